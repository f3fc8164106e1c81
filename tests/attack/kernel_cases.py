"""Calls of the C kernels with random shapes and values; run with the sanitizers' build of them.

python -m tests.attack.kernel_cases LIBRARY FIRST LAST: prints how many cases ran. A sanitizer ends
the process at the first access outside of a tensor and at the first undefined operation.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

import torch
from torch import Tensor

from mmchat.quant.formats.table import NF4
from mmchat.quant.kernels import blocks_reference, layout, reference
from mmchat.quant.kernels.library import BLOCK, PANEL, Library

EXTREMES = (0.0, -0.0, 1e-45, 1e-38, 1.0, -1.0, 127.5, 3e38, -3e38)


def values(draw: random.Random, *shape: int) -> Tensor:
    """Random numbers; in some tensors the extremes of float32 too, in some one number alone."""
    found = torch.randn(*shape)
    kind = draw.random()
    if kind < 0.3:
        for _ in range(draw.randint(1, 9)):
            found.view(-1)[draw.randrange(found.numel())] = draw.choice(EXTREMES)
    elif kind < 0.4:
        found.fill_(draw.choice(EXTREMES))
    return found


def products(library: Library, draw: random.Random) -> None:
    rows, tokens = draw.randint(1, 70), draw.choice((1, 1, 2, 3, 4, 5, 8, 17, 33, 67))
    width = BLOCK * draw.randint(1, 9)
    weight, x = values(draw, rows, width), values(draw, tokens, width)
    library.linear_bf16(x, weight.bfloat16())
    rounded = library.quantize_int8(weight)
    library.linear_int8(x, *rounded)
    library.widen_int8(*rounded)
    group = draw.choice([g for g in (32, 64, 128) if width % g == 0])
    packed = library.quantize_int4(weight, group)
    library.linear_int4(x, *packed)
    library.widen_int4(*packed)
    if rows >= layout.ROWS:
        panels = weight[: rows // layout.ROWS * layout.ROWS]
        for bits in layout.BITS:
            held = library.quantize_blocks(bits, panels)
            library.linear_blocks(bits, x, held)
            library.widen_blocks(bits, held)
        table = NF4.table
        held = blocks_reference.pack(layout.TABLE, blocks_reference.quantize_table(panels, table))
        library.linear_blocks(layout.TABLE, x, held, table)
        library.widen_blocks(layout.TABLE, held, table)
    if library.packs_int4 and rows >= PANEL:
        stream = library.pack_int4(*(part[: rows // PANEL * PANEL] for part in packed))
        library.linear_packed_int4(x, stream)
        library.widen_packed_int4(stream, width)


def attention(library: Library, draw: random.Random) -> None:
    batch, groups, length = draw.randint(1, 3), draw.randint(1, 4), draw.randint(1, 300)
    width, heads = 16 * draw.randint(1, 16), draw.randint(1, 5)
    room = length + draw.randint(0, 9)  # of a cache, of which a part is filled
    caches = [values(draw, batch, groups, room, width).bfloat16() for _ in range(2)]
    if draw.random() < 0.5:
        caches = [reference.round_rows(cache) for cache in caches]
    key, value = (cache[:, :, :length] for cache in caches)
    if not library.attends(key, value):
        return
    query = values(draw, batch, groups * heads, 1, width).bfloat16()
    masks = draw.choice((0, 1, batch))
    mask = (torch.rand(masks, 1, 1, length) < 0.7) if masks else None
    library.attend(query, key, value, mask)


def attention_of_many(library: Library, draw: random.Random) -> None:
    batch, groups, width = draw.randint(1, 3), draw.randint(1, 3), 8 * draw.randint(1, 32)
    heads, queries, keys = groups * draw.randint(1, 3), draw.randint(1, 150), draw.randint(1, 230)
    dtype = draw.choice((torch.float32, torch.bfloat16))
    query = values(draw, batch, queries, heads, width).to(dtype).transpose(1, 2)
    key, value = (values(draw, batch, groups, keys, width).to(dtype) for _ in range(2))
    masks = draw.choice((0, 1, batch))
    mask = values(draw, masks, 1, 1, keys) if masks else None
    causal = not masks and draw.random() < 0.5 and keys >= queries
    library.attend_many(query, key, value, mask, causal=causal)


def main() -> None:
    library = Library(Path(sys.argv[1]))
    first, last = map(int, sys.argv[2:])
    for seed in range(first, last):
        draw = random.Random(seed)
        torch.manual_seed(seed)
        torch.set_num_threads(draw.choice((1, 2)))
        draw.choice((products, products, attention, attention_of_many))(library, draw)
    sys.stdout.write(f"{last - first}\n")


if __name__ == "__main__":
    main()
