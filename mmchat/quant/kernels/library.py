"""The compiled C kernels as functions of tensors."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from mmchat.quant.kernels import layout

BLOCK = 64  # K must be a multiple of it
GROUPS = (32, 64, 128)  # of int4 weights
PANEL = 8  # rows of packed int4 that lie together
LARGEST_HEAD = 256  # as in attention.c
NONE = torch.zeros(16, dtype=torch.uint8)  # in place of a table


class UnavailableError(Exception):
    """Why there are no native kernels; its text completes "because"."""


Read = tuple[Tensor, torch.dtype, tuple[int, ...]]  # what C reads, and as what
# C functions that cannot fail, and return nothing.
_SURE = ("mmchat_widen", "mmchat_pack", "mmchat_quantize_int")


class Weight(NamedTuple):
    """What holds a weight [N, width], and the sizes that C asks for beside these two."""

    reads: list[Read]
    width: int
    sizes: tuple[int, ...] = ()


class Library:
    """The C functions with tensors as arguments.

    What a function would read otherwise than it lies in memory is refused with ValueError: another
    dtype, shape, stride, alignment or device.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._c = ctypes.CDLL(str(path))
            self._c.mmchat_instructions.restype = ctypes.c_char_p
            self.instructions = self._c.mmchat_instructions().decode()
            self.packs_int4 = hasattr(self._c, "mmchat_pack_int4")  # with AVX2
        except (OSError, AttributeError) as error:
            raise UnavailableError(f"the compiled kernels do not load: {error}") from None

    def linear_bf16(self, x: Tensor, weight: Tensor) -> Tensor:
        """x: float32 [M, K], weight: bfloat16 [N, K] -> float32 [M, N]."""
        return self._linear("bf16", x, _of(weight, torch.bfloat16))

    def linear_int8(self, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        """x: float32 [M, K], weight: int8 [N, K], scale: float32 [N] -> float32 [M, N]."""
        return self._linear("int8", x, _int8(weight, scale))

    def linear_int4(self, x: Tensor, weight: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """x: float32 [M, K], weight: uint8 [N, K/2], scale, zero: [N, K/group] -> [M, N]."""
        return self._linear("int4", x, _int4(weight, scale, zero))

    def linear_packed_int4(self, x: Tensor, packed: Tensor) -> Tensor:
        """x: float32 [M, K], packed: as pack_int4 gives it, of N rows -> [M, N]."""
        return self._linear("packed_int4", x, _packed(packed, x.shape[-1]))

    def linear_blocks(
        self, bits: int, x: Tensor, weight: Tensor, table: Tensor | None = None
    ) -> Tensor:
        """x: float32 [M, K], weight: blocks of `bits` bits, of N rows -> float32 [M, N].

        table: uint8 [16] of layout.TABLE.
        """
        return self._linear("blocks", x, _blocks(bits, weight, table))

    def _linear(self, kind: str, x: Tensor, weight: Weight) -> Tensor:
        if weight.width % BLOCK:
            raise ValueError(f"mmchat_linear_{kind}: weights of a width of {weight.width}")
        tokens, rows = x.shape[0], weight.reads[0][0].shape[0]
        out = torch.empty(tokens, rows)
        reads = [*weight.reads, (x, torch.float32, (tokens, weight.width))]
        sizes = (tokens, rows, weight.width, *weight.sizes)
        self._run(f"mmchat_linear_{kind}", reads, [out], *sizes)
        return out

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """As reference.attend; key and value as `attends` accepts them."""
        if not self.attends(key, value):
            raise ValueError("mmchat_attend: keys and values of another dtype or layout")
        batch, groups, length, _ = key.shape
        width, is_int8 = _width(key), key.dtype == torch.int8
        scaled = query.float().reshape(batch, groups, -1, width).contiguous() * width**-0.5
        out = torch.empty_like(scaled)
        queries = scaled.shape[2]
        seen, mask_stride = None, 0
        if mask is not None:
            rows = mask.numel() // length
            seen = mask.reshape(rows, length).contiguous()
            mask_stride = length if rows > 1 else 0
            _check("mmchat_attend", [(seen, torch.bool, (batch if rows > 1 else 1, length))])
        sizes = (batch, groups, queries, length, width)
        strides = [key.stride(axis) * key.itemsize for axis in (0, 1)]
        reads = [(scaled, torch.float32, (batch, groups, queries, width))]
        given = (*sizes, *strides, mask_stride, int(is_int8))
        self._run("mmchat_attend", reads, [key, value, seen, out], *given)
        return out.reshape(query.shape).to(query.dtype)

    def attend_rows(
        self, query: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor]
    ) -> Tensor:
        """As ops.attend_rows; each row's key and value as `attends` accepts them."""
        rows = list(zip(keys, values, strict=True))
        groups, width, dtype = keys[0].shape[1], _width(keys[0]), keys[0].dtype
        if not all(
            k.shape[:2] == (1, groups) and k.dtype == dtype and self.attends(k, v) for k, v in rows
        ):
            raise ValueError("mmchat_attend_rows: keys and values of another dtype or layout")
        scaled = query.float().reshape(len(rows), groups, -1, width).contiguous() * width**-0.5
        out = torch.empty_like(scaled)
        queries = scaled.shape[2]
        places = [
            (k.data_ptr(), v.data_ptr(), k.shape[2], k.stride(1) * k.itemsize) for k, v in rows
        ]
        reads = [(scaled, torch.float32, (len(rows), groups, queries, width))]
        sizes = (len(rows), groups, queries, width, int(dtype == torch.int8))
        self._run("mmchat_attend_rows", reads, [torch.tensor(places), out], *sizes)
        return out.reshape(query.shape).to(query.dtype)

    def attend_many(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, causal: bool
    ) -> Tensor:
        """As reference.attend_many, of what `attends_many` accepts."""
        batch, heads, queries, width = query.shape
        groups, length = key.shape[1:3]
        is_aligned = not any(x.data_ptr() % x.itemsize for x in (query, key, value))
        if not (is_aligned and self.attends_many(query, key, value, mask)):
            raise ValueError("mmchat_attend_many: another dtype, shape or layout")
        bias, bias_stride = None, 0
        if mask is not None:
            bias = torch.zeros(mask.shape[0], length)
            flat = mask.reshape(bias.shape)
            bias = bias.masked_fill_(~flat, -torch.inf) if flat.dtype == torch.bool else bias + flat
            bias_stride = length if len(bias) > 1 else 0
        out = torch.empty(batch, queries, heads, width, dtype=query.dtype)
        strides = [stride for x in (query, key, value) for stride in x.stride()[:3]]
        first = length - queries if causal else length
        is_bf16 = int(query.dtype == torch.bfloat16)
        sizes = (batch, heads, groups, queries, length, width, *strides, bias_stride, first)
        self._run("mmchat_attend_many", [], [query, key, value, bias, out], *sizes, is_bf16)
        return out.transpose(1, 2)

    @staticmethod
    def attends_many(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
        """Whether `attend_many` reads tensors of this dtype, shape and layout."""
        batch, heads, queries, width = query.shape
        groups, length = key.shape[1:3]
        return (
            query.dtype in (torch.float32, torch.bfloat16)
            and all(x.dtype == query.dtype and x.is_cpu for x in (query, key, value))
            and query.stride(3) == key.stride(3) == value.stride(3) == 1
            and key.shape == value.shape == (batch, groups, length, width)
            and min(queries, length, groups) > 0
            and heads % groups == width % 8 == 0
            and (mask is None or mask.shape in ((1, 1, 1, length), (batch, 1, 1, length)))
        )

    @staticmethod
    def attends(key: Tensor, value: Tensor) -> bool:
        """Whether `attend` reads keys and values of this dtype, width and layout."""
        width = _width(key)
        return (
            key.dtype in (torch.bfloat16, torch.int8)
            and key.dtype == value.dtype
            and key.device.type == value.device.type == "cpu"
            and key.dim() == 4
            and width % 16 == 0
            and 0 < width <= LARGEST_HEAD
            and key.stride()[2:] == (key.shape[-1], 1)
            and key.stride() == value.stride()
            and key.shape == value.shape
        )

    def quantize_int8(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """As reference.quantize_int8, of float32 weights."""
        rows, width = weight.shape
        q, scale = torch.empty(rows, width, dtype=torch.int8), torch.empty(rows)
        self._run("mmchat_quantize_int8", _of(weight).reads, [q, scale], rows, width)
        return q, scale

    def quantize_int4(self, weight: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor]:
        """As reference.quantize_int4, of float32 weights."""
        rows, width = weight.shape
        if group not in GROUPS or width % group:
            raise ValueError(f"groups of {group} in a width of {width}")
        q = torch.empty(rows, width // 2, dtype=torch.uint8)
        scale = torch.empty(rows, width // group, dtype=torch.bfloat16)
        zero = torch.empty_like(scale)
        reads = _of(weight).reads
        self._run("mmchat_quantize_int4", reads, [q, scale, zero], rows, width, group)
        return q, scale, zero

    def quantize_blocks(self, bits: int, weight: Tensor) -> Tensor:
        """As blocks_reference.quantize and pack, of float32 weights."""
        rows, width = weight.shape
        if bits not in layout.BITS or rows % layout.ROWS or width % layout.PART:
            raise ValueError(f"weights [{rows}, {width}] have no blocks of {bits} bits")
        out = torch.empty(rows, layout.row_bytes(bits, width), dtype=torch.uint8)
        self._run("mmchat_quantize_blocks", _of(weight).reads, [out], rows, width, bits)
        return out

    def widen_blocks(self, bits: int, weight: Tensor, table: Tensor | None = None) -> Tensor:
        """As blocks_reference.widen of what is unpacked, to bfloat16."""
        return self._widen("blocks", _blocks(bits, weight, table))

    def widen_int8(self, weight: Tensor, scale: Tensor) -> Tensor:
        """As reference.widen_int8, to bfloat16."""
        return self._widen("int8", _int8(weight, scale))

    def widen_int4(self, weight: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """As reference.widen_int4, to bfloat16."""
        return self._widen("int4", _int4(weight, scale, zero))

    def widen_packed_int4(self, packed: Tensor, width: int) -> Tensor:
        """The weights that were packed, bfloat16 [N, K] of K = width."""
        return self._widen("packed_int4", _packed(packed, width))

    def _widen(self, kind: str, weight: Weight) -> Tensor:
        out = torch.empty(len(weight.reads[0][0]), weight.width, dtype=torch.bfloat16)
        self._run(f"mmchat_widen_{kind}", weight.reads, [out], *out.shape, *weight.sizes)
        return out

    def pack_int4(self, weight: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """As reference.pack_int4."""
        rows, (reads, width, sizes) = len(weight), _int4(weight, scale, zero)
        if rows % PANEL or width % BLOCK:
            raise ValueError(f"int4 weights [{rows}, {width}] cannot be packed")
        out = torch.empty(rows, width // 2 + 4 * scale.shape[1], dtype=torch.uint8)
        self._run("mmchat_pack_int4", reads, [out], rows, width, *sizes)
        return out

    def _run(
        self, name: str, reads: Sequence[Read], others: Sequence[Tensor | None], *sizes: int
    ) -> None:
        """C functions take what they read, which is checked here, then what was checked or made
        for them, and sizes. Raises ValueError, MemoryError."""
        _check(name, reads)
        tensors = [*(read[0] for read in reads), *others]
        function = getattr(self._c, name)
        if function.argtypes is None:  # once: it took 9 of the 29 us of a product of 64 x 64
            numbers = [ctypes.c_int64] * len(sizes)
            function.argtypes = [ctypes.c_void_p] * len(tensors) + numbers + [ctypes.c_int]
            function.restype = None if name.startswith(_SURE) else ctypes.c_int
        pointers = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
        if function(*pointers, *sizes, torch.get_num_threads()):
            raise MemoryError(f"{name}: no memory for {sizes}")


def _width(key: Tensor) -> int:
    """Numbers of a key or value, behind which int8 has a scale."""
    return key.shape[-1] - (layout.SCALE_BYTES if key.dtype == torch.int8 else 0)


def _of(weight: Tensor, dtype: torch.dtype = torch.float32) -> Weight:
    rows, width = weight.shape
    return Weight([(weight, dtype, (rows, width))], width)


def _int8(weight: Tensor, scale: Tensor) -> Weight:
    rows, width = weight.shape
    return Weight([(weight, torch.int8, (rows, width)), (scale, torch.float32, (rows,))], width)


def _int4(weight: Tensor, scale: Tensor, zero: Tensor) -> Weight:
    """Its size is that of the groups."""
    rows, half = weight.shape
    groups = scale.shape[-1]
    group = 2 * half // groups if groups else 0
    if group not in GROUPS or group * groups != 2 * half:
        raise ValueError(f"int4 weights {tuple(weight.shape)} with scales {tuple(scale.shape)}")
    shared = torch.bfloat16, (rows, groups)
    reads = [(weight, torch.uint8, (rows, half)), (scale, *shared), (zero, *shared)]
    return Weight(reads, 2 * half, (group,))


def _packed(packed: Tensor, width: int) -> Weight:
    """int4 weights of this width; their size is that of the groups."""
    rows, row_bytes = packed.shape
    for group in GROUPS:
        if 2 * group * row_bytes == (group + 8) * width and not (width % group or rows % PANEL):
            return Weight([(packed, torch.uint8, (rows, row_bytes))], width, (group,))
    raise ValueError(f"packed int4 weights {tuple(packed.shape)} of a width of {width}")


def _blocks(bits: int, weight: Tensor, table: Tensor | None) -> Weight:
    rows, row = weight.shape
    if bits not in layout.GROUPS or rows % layout.ROWS:
        raise ValueError(f"{tuple(weight.shape)} are no blocks of {bits} bits")
    table = NONE if table is None else table
    reads = [(weight, torch.uint8, (rows, row)), (table, torch.uint8, (16,))]
    return Weight(reads, layout.columns_of(bits, row), (bits,))


def _check(name: str, reads: Sequence[Read]) -> None:
    """Raises ValueError unless each tensor lies in memory as C reads it."""
    for tensor, dtype, shape in reads:
        if (
            tensor.dtype != dtype
            or tensor.shape != shape
            or not tensor.is_contiguous()
            or not tensor.is_cpu
            or tensor.data_ptr() % dtype.itemsize
        ):
            raise ValueError(
                f"{name}: expected {dtype} {list(shape)}, contiguous and aligned, on the CPU;"
                f" found {tensor.dtype} {list(tensor.shape)} with strides {tensor.stride()} on"
                f" {tensor.device}"
            )
