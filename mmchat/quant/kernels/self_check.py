"""Compare every function of the compiled kernels with its reference, on every branch that it has.

Products are of whole numbers and powers of two with 127 or 254 in each block of activations, so
that rounding leaves them as they are: they must come out exactly. Widths leave every remainder of
the blocks and groups that are taken together, and 1 to 9 rows and tokens every remainder of those.
Shapes of many tokens leave every remainder of the tokens and rows that are in order together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from mmchat.quant.kernels import blocks_reference, layout, reference
from mmchat.quant.kernels.library import BLOCK, GROUPS, PANEL, Library

# Tokens and rows of products. From 5, 9 or 18 tokens on weights are unpacked first, 16 or 32 rows
# at a time, and 2 to 6 tokens meet them together.
FEW = tuple((count, count * 4 % 9 + 1) for count in range(1, 10))
MANY = ((5, 17), (7, 34), (8, 16), (13, 16), (14, 35), (15, 50), (22, 31), (67, 33))
# Of packed int4: one, two or three panels, of which two are read together, and tokens that are
# shared out in every way; of 65 one is in a window of its own where none are unpacked.
PACKED = tuple((count, PANEL * (1 + count % 3)) for count in (*range(1, 10), 13, 17, 65, 67))
WIDTHS = (64, 128, 192, 256, 320, 576, 1152)
WIDE = 32_832  # so many activations that a few tokens are taken at a time
WINDOW = (267, 40)  # tokens of which some are in a window of their own, and rows
# (positions, width, queries that share a key) of attention; spans have 512 positions
ATTENTION = ((1, 16, 1), (2, 128, 4), (65, 64, 3), (130, 256, 5), (513, 128, 9), (578, 32, 2))
# (queries, keys, width, heads, heads of keys): groups, blocks and tasks that are whole, and what
# is left of each; queries that see nothing of the first blocks' ends where they are causal
MANY_QUERIES = (
    (32, 96, 64, 2, 2),
    (1, 1, 8, 1, 1),
    (33, 123, 80, 4, 2),
    (17, 12, 16, 3, 1),
    (161, 193, 24, 2, 1),
    (300, 300, 40, 2, 2),
    (5, 400, 256, 4, 4),
)
NUMBERS = torch.arange(16, dtype=torch.uint8) * 17  # of a table: all sizes, and 0 and 255


def first_fault(library: Library, *, briefly: bool = False) -> str | None:
    """What the first function that is wrong computes; None if all are right.

    briefly: a few shapes of products, one of each attention, in 4 ms; all shapes of all take 0.3 s.
    """
    draw = torch.Generator().manual_seed(0)
    if briefly:
        some = (PACKED[4], PACKED[10])
        products = _products(library, draw, (384,), (FEW[6], MANY[6]), some)
        blocks = _blocks(library, draw, (384,), some)
        checks = [
            products,
            blocks,
            _attention(library, draw, ATTENTION[2:3]),
            _attention_many(library, draw, MANY_QUERIES[2:3]),
        ]
    else:
        checks = [
            _products(library, draw, (*WIDTHS, WIDE), FEW, PACKED[:9]),
            _products(library, draw, WIDTHS, MANY, PACKED[9:]),
            _products(library, draw, (576,), (WINDOW,), (WINDOW,)),
            _blocks(library, draw, (64, 192, 448, 1088), PACKED),
            _blocks(library, draw, (576,), (WINDOW,)),
            _attention(library, draw, ATTENTION),
            _attention_many(library, draw, MANY_QUERIES),
            _rounding(library, draw),
            _rounding_blocks(library, draw),
        ]
    return next((name for check in checks for name, is_right in check if not is_right), None)


def _products(
    library: Library,
    draw: torch.Generator,
    widths: Sequence[int],
    shapes: Sequence[tuple[int, int]],
    packed_shapes: Sequence[tuple[int, int]],
) -> Iterator[tuple[str, bool]]:
    """packed_shapes: of packed int4, whose rows are a multiple of 8."""
    tokens, rows = map(max, zip(*shapes, *packed_shapes, strict=True))
    for width in widths:
        x = torch.randint(-127, 128, (tokens, width), generator=draw).float()
        x[:, 5::BLOCK] = 127
        blocks = torch.arange(width // BLOCK) + torch.arange(tokens)[:, None]
        x *= (1 + blocks % 2).repeat_interleave(BLOCK, 1)  # their scales are 1 and 2 in turn
        q = torch.randint(-128, 128, (rows, width), generator=draw).to(torch.int8)
        q[8:16] //= 2  # which need no second part, where others do
        if width != WIDE:  # the largest products, as long as float32 holds their sum
            x[0], q[0] = 127, -128
        scale = 2.0 ** (torch.arange(rows) % 5 - 2)
        yield "bf16", _exact(library.linear_bf16, shapes, x, q.float(), q.bfloat16())
        wide = reference.widen_int8(q, scale, torch.float32)
        yield "int8", _exact(library.linear_int8, shapes, x, wide, q, scale)
        yield "wide int8", torch.equal(library.widen_int8(q, scale).float(), wide)
        packed = q[:, : width // 2].contiguous().view(torch.uint8)
        for group in GROUPS:
            if width % group:
                continue
            at = torch.arange(rows * width // group).reshape(rows, -1)
            int4 = packed, (2.0 ** (at % 3 - 1)).bfloat16(), (at % 7 - 3.0).bfloat16()
            wide = reference.widen_int4(*int4, torch.float32)
            yield f"int4-g{group}", _exact(library.linear_int4, shapes, x, wide, *int4)
            yield f"wide int4-g{group}", torch.equal(library.widen_int4(*int4).float(), wide)
            if not library.packs_int4:
                continue
            whole = rows // PANEL * PANEL
            int4, wide = tuple(tensor[:whole] for tensor in int4), wide[:whole]
            stream, name = library.pack_int4(*int4), f"packed int4-g{group}"
            yield name, torch.equal(stream, reference.pack_int4(*int4))
            yield name, _exact(library.linear_packed_int4, packed_shapes, x, wide, stream)
            widened = library.widen_packed_int4(stream, width)
            yield f"wide {name}", torch.equal(widened.float(), wide)


def _blocks(
    library: Library,
    draw: torch.Generator,
    widths: Sequence[int],
    shapes: Sequence[tuple[int, int]],
) -> Iterator[tuple[str, bool]]:
    tokens, rows = map(max, zip(*shapes, strict=True))
    for width in widths:
        x = torch.randint(-127, 128, (tokens, width), generator=draw).float()
        x[:, 5::BLOCK] = 254  # their scale is 2, which all of them but one are halves of
        x = (x / 2).round() * 2
        for bits in layout.GROUPS:
            name = "blocks with a table" if bits == layout.TABLE else f"blocks of {bits} bits"
            codes = exact_codes(bits, rows, width, draw)
            packed = blocks_reference.pack(bits, codes)
            wide = blocks_reference.widen(bits, codes, NUMBERS)
            linear = partial(library.linear_blocks, bits, table=NUMBERS)
            yield name, _exact(linear, shapes, x, wide, packed)
            widened = library.widen_blocks(bits, packed, NUMBERS)
            yield f"wide {name}", torch.equal(widened, wide.bfloat16())


def exact_codes(bits: int, rows: int, width: int, draw: torch.Generator) -> blocks_reference.Codes:
    """Random levels whose scales are small whole numbers, or powers of two where they are float."""

    def whole(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=draw)

    most = 16 if bits == layout.TABLE else 2**bits
    levels = whole(0, most, rows, width).to(torch.uint8)
    groups = width // layout.GROUPS[bits]
    if not layout.LARGES[bits]:
        small = 2.0 ** whole(-2, 3, rows, groups, 1)
        small = small.half() if bits == 8 else small
        return blocks_reference.Codes(levels, small, small[:, :1, :0].half())
    blocks = rows, -(-width // layout.LARGE)
    if bits == 6:
        large = (2.0 ** whole(-2, 3, *blocks, 1)).half()
        return blocks_reference.Codes(levels, whole(-4, 4, rows, groups, 1).to(torch.int8), large)
    large = (2.0 ** whole(0, 2, *blocks, 2)).half()
    small = torch.stack((whole(0, 4, rows, groups), whole(-9, 9, rows, groups)), -1)
    return blocks_reference.Codes(levels, small.to(torch.int8).view(torch.uint8), large)


def _exact(
    linear: Callable[..., Tensor],
    shapes: Sequence[tuple[int, int]],
    x: Tensor,
    wide: Tensor,
    *weights: Tensor,
) -> bool:
    """Whether so many of the tokens with so many of the rows give the products."""
    expected = x @ wide.T
    for tokens, rows in shapes:
        found = linear(x[:tokens], *(weight[:rows] for weight in weights))
        if not torch.equal(found, expected[:tokens, :rows]):
            return False
    return True


def _attention(
    library: Library, draw: torch.Generator, shapes: Sequence[tuple[int, int, int]]
) -> Iterator[tuple[str, bool]]:
    for length, width, queries in shapes:
        query = torch.randn(2, 2 * queries, 1, width, generator=draw)
        given = torch.randn(2, 2, 2, length, width, generator=draw)
        mask = torch.rand(2, 1, 1, length, generator=draw) < 0.7
        mask[..., -1] = True
        of_int8 = reference.round_rows(given)
        # beside int8, queries and weights are rounded to 16 bits
        for kind, held, wide, atol in (
            ("", given.bfloat16(), given.bfloat16().float(), 1e-5),
            (" in int8", of_int8, reference.widen_rows(of_int8), 2e-4),
        ):
            for name, seen in (("attention", None), ("attention with a mask", mask)):
                found = library.attend(query, held[0], held[1], seen)
                expected = reference.attend(query, wide[0], wide[1], seen)
                yield name + kind, torch.allclose(found, expected, rtol=1e-4, atol=atol)
            ends = (length, length // 2 + 1)  # rows of two lengths
            rows = [[x[row, None, :, :end] for row, end in enumerate(ends)] for x in held]
            found = library.attend_rows(query[:, :, 0], *rows)
            for row, end in enumerate(ends):
                k, v = wide[:, row, None, :, :end]
                expected = reference.attend(query[row, None], k, v, None)[0, :, 0]
                is_right = torch.allclose(found[row], expected, rtol=1e-4, atol=atol)
                yield f"attention of rows{kind}", is_right


def _attention_many(
    library: Library, draw: torch.Generator, shapes: Sequence[tuple[int, int, int, int, int]]
) -> Iterator[tuple[str, bool]]:
    for queries, keys, width, heads, groups in shapes:
        # heads side by side, as a projection gives them, and a key and value more than are read
        query = torch.randn(2, queries, heads, width, generator=draw).transpose(1, 2) * 3
        key, value = (
            torch.randn(2, keys + 1, groups, width, generator=draw)[:, :-1].transpose(1, 2)
            for _ in range(2)
        )
        bias = torch.randn(2, 1, 1, keys, generator=draw)
        seen = bias[:1] < 0.5
        seen[..., -1] = True
        cases = {"": (None, False), " with a bias": (bias, False), " with a mask": (seen, False)}
        if keys >= queries:
            cases[" of a causal kind"] = None, True
        for dtype, rtol, atol in ((torch.float32, 1e-4, 2e-5), (torch.bfloat16, 1e-2, 1e-4)):
            q, k, v = (x.to(dtype) for x in (query, key, value))
            for kind, (mask, causal) in cases.items():
                found = library.attend_many(q, k, v, mask, causal=causal)
                wide = q.float(), k.float(), v.float()
                expected = reference.attend_many(*wide, mask, causal=causal)
                is_right = torch.allclose(found.float(), expected, rtol=rtol, atol=atol)
                yield f"attention of many queries{kind}", is_right


def _rounding(library: Library, draw: torch.Generator) -> Iterator[tuple[str, bool]]:
    weight = torch.randn(3, 384 + 13, generator=draw)  # no vector length divides the rows
    q, scale = library.quantize_int8(weight)
    plain_q, plain_scale = reference.quantize_int8(weight)
    is_near = int((q.int() - plain_q.int()).abs().max()) <= 1
    yield "rounding to int8", is_near and torch.allclose(scale, plain_scale, rtol=1e-6, atol=0)
    weight = weight[:, :384].contiguous()
    for group in GROUPS:
        found, plain = (
            reference.widen_int4(*quantize(weight, group), torch.float32) - weight
            for quantize in (library.quantize_int4, reference.quantize_int4)
        )
        errors = [d.unflatten(1, (-1, group)).square().sum(-1) for d in (found, plain)]
        yield f"rounding to int4-g{group}", bool((errors[0] <= 1.05 * errors[1]).all())


def _rounding_blocks(library: Library, draw: torch.Generator) -> Iterator[tuple[str, bool]]:
    weight = torch.randn(16, 448, generator=draw)
    for bits in layout.BITS:
        reference = blocks_reference
        packed = reference.unpack(bits, library.quantize_blocks(bits, weight))
        found, plain = (
            (reference.widen(bits, codes) - weight).square().sum()
            for codes in (packed, reference.quantize(bits, weight))
        )
        yield f"rounding to blocks of {bits} bits", bool(found <= 1.02 * plain)
