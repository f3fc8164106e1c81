"""bitsandbytes: 4 bits by a table of 16 values (NF4, FP4) with a scale for each block, scales
quantised again or not; and int8 by rows (LLM.int8)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from mmchat.checkpoints.checkpoint import Checkpoint
from mmchat.checkpoints.codes import Codes
from mmchat.checkpoints.computed import PackedWeight
from mmchat.checkpoints.packed.base import (
    FLOATS,
    Packing,
    Source,
    ending,
    one_of,
    packed_weight,
    source,
)
from mmchat.strict_json import parse_object

if TYPE_CHECKING:
    from torch import Tensor

_STATE = ".quant_state.bitsandbytes__"  # and the name of the table
_STATE_BYTES = 4096
_BLOCKS = tuple(2**n for n in range(5, 13))
_HELD = 64  # columns that share a scale in our formats
_INT8_SCALE = 7.874015748031496e-3  # 1/127, as the library has it


class Bitsandbytes(Packing):
    """Each module says for itself how it is packed; the config only says what most of them are."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        is_int8 = config.get("load_in_8bit") is True
        table = str(config.get("bnb_4bit_quant_type", "fp4")).upper()
        self.label = "bitsandbytes int8" if is_int8 else f"bitsandbytes {table[:8]}"
        self.scheme = "int8" if is_int8 else "nf4" if table == "NF4" else "fp4"

    def weights(self, stored: Checkpoint) -> Iterator[PackedWeight]:
        for name in stored.entries:
            weight, found, _ = name.partition(_STATE)
            if found and (said := source(stored, name)):
                yield _four_bits(said.beside(weight), said)
        for module, scale in ending(stored, ".SCB"):
            yield _eight_bits(module, scale)


def _four_bits(entry: Source, said: Source) -> PackedWeight:
    state = _State(said)
    rows, columns = state.shape
    count = rows * columns
    blocks = math.ceil(count / state.blocksize)
    if entry.num_bytes != math.ceil(count / 2):  # the dtype says nothing of what the bytes are
        raise entry.error(f"{entry.num_bytes:,} bytes for [{rows}, {columns}] weights of 4 bits")
    table, size = entry.beside(f"{entry.name}.quant_map"), state.blocksize
    table.check("float32", (16,))
    scales, of_scales = _scales(entry, state, blocks)

    def values(begin: int, end: int) -> Tensor:
        import torch

        first, last = begin * columns, end * columns  # `first` begins a byte and a block
        packed = entry.read().reshape(-1).view(torch.uint8)[first // 2 : (last + 1) // 2].int()
        codes = table.read()
        pairs = torch.stack((codes.repeat_interleave(16), codes.repeat(16)), dim=-1)
        # both values of a byte at once
        found = torch.index_select(pairs.view(torch.int64).flatten(), 0, packed)
        wide = found.view(torch.float32)
        blocks = scales(first // size, -(-last // size))
        if (last - first) % size:  # the last one is not whole
            wide = torch.nn.functional.pad(wide, (0, len(blocks) * size - len(wide)))
        wide = (wide.reshape(-1, size) * blocks[:, None]).flatten()[: last - first]
        return wide.reshape(-1, columns)

    def codes(begin: int, end: int) -> Codes:
        import torch

        packed = (
            entry.read().reshape(-1).view(torch.uint8)[begin * columns // 2 : end * columns // 2]
        )
        levels = (packed >> 4 | packed << 4).reshape(end - begin, -1)  # the first in the low half
        blocks = scales(begin * columns // size, -(-end * columns // size))
        each = blocks.repeat_interleave(size // _HELD)[: levels.numel() * 2 // _HELD]
        return Codes(levels, each.reshape(end - begin, -1), table=table.read())

    fits = columns % _HELD == size % _HELD == 0
    others, own = [table, said, *of_scales], codes if fits else None
    return packed_weight(entry, (rows, columns), state.dtype, others, values, own)


def _scales(
    entry: Source, state: _State, blocks: int
) -> tuple[Callable[[int, int], Tensor], list[Source]]:
    """What reads float32 scales of blocks `begin` to `end`, and the tensors they are made of."""
    absmax = entry.beside(f"{entry.name}.absmax")
    if not state.nested_blocksize:
        absmax.check("float32", (blocks,))
        return lambda begin, end: absmax.read()[begin:end], [absmax]
    absmax.check("uint8", (blocks,))
    outer = entry.beside(f"{entry.name}.nested_absmax")
    table = entry.beside(f"{entry.name}.nested_quant_map")
    outer.check("float32", (math.ceil(blocks / state.nested_blocksize),))
    table.check("float32", (256,))

    def nested(begin: int, end: int) -> Tensor:
        import torch

        values = table.read()[absmax.read()[begin:end].int()]
        of_each = torch.arange(begin, end) // state.nested_blocksize
        return values * outer.read()[of_each] + state.nested_offset

    return nested, [absmax, outer, table]


class _State:
    """The JSON that says how one weight is packed. shape: [N, K]; nested_blocksize 0: not."""

    def __init__(self, entry: Source) -> None:
        if entry.dtype != "uint8" or entry.numel > _STATE_BYTES:
            raise entry.error(f"expected up to {_STATE_BYTES:,} bytes of JSON; download it again")
        try:
            found = parse_object(bytes(entry.read().flatten().tolist()))
            self.blocksize: int = one_of(found, "blocksize", _BLOCKS, None)
            self.nested_blocksize: int = one_of(found, "nested_blocksize", (0, *_BLOCKS), 0)
            self.dtype: str = one_of(found, "dtype", FLOATS, None)
            shape, offset = found.get("shape"), found.get("nested_offset", 0.0)
            sizes = shape if isinstance(shape, list) else []
            if len(sizes) != 2 or not all(type(n) is int and 0 < n < 2**31 for n in sizes):
                raise ValueError("shape is not that of a matrix, in whole numbers")
            if type(offset) not in (int, float):
                raise ValueError("nested_offset is no number")
        except ValueError as error:
            raise entry.error(f"its JSON is damaged: {error}; download it again") from None
        self.shape, self.nested_offset = (sizes[0], sizes[1]), float(offset)


def _eight_bits(module: str, scale: Source) -> PackedWeight:
    entry = scale.beside(f"{module}.weight")
    entry.check("int8")
    shape = entry.matrix()
    scale.check("float32", (shape[0],))
    if form := source(scale.checkpoint, f"{module}.weight_format"):
        form.check("uint8", (), (1,))
        if form.read().item() != 0:
            raise form.error(
                "the weight is in the order of a GPU, which is not read; save it by rows"
            )

    def codes(begin: int, end: int) -> Codes:
        scales = scale.read()[begin:end, None] * _INT8_SCALE
        return Codes(entry.read()[begin:end], scales)

    def values(begin: int, end: int) -> Tensor:
        # in the order of the library's products
        wide = entry.read()[begin:end].float() * scale.read()[begin:end, None]
        return wide * _INT8_SCALE

    return packed_weight(entry, shape, "bfloat16", [scale, form], values, codes)
