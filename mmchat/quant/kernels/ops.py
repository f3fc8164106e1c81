"""Products and attention by the best kernel for this machine, format and number of tokens.

The choice follows from what the machine has and never from a timing, so that the same machine
gives the same tokens every time. The kernels are also operators of torch (`torch.ops.mmchat`), so
that torch.compile keeps them whole.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mmchat.quant.kernels import native, reference

# Tokens up to which a kernel that reads 16-bit weights once beats a matrix product.
FEW_TOKENS, FEW_TOKENS_WITH_FAST_BF16 = 64, 4
PACKED_ROWS = 64  # that are packed together, for torch to take
PACKED_MULTIPLE = 16  # of rows, that torch asks for
CHUNK_BYTES = 16 * 1024**2  # of widened weights at a time, so that they stay in the cache


@functools.cache
def has_fast_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 matrices faster than float32 ones."""
    cpu = torch.cpu
    return bool(cpu._is_avx512_bf16_supported() or cpu._is_amx_tile_supported())


@dataclass(frozen=True)
class Choice:
    """Which kernel is used. serves: a format of weights, or "attention"; reason: one clause."""

    serves: str
    kernel: str
    reason: str


def probe() -> list[Choice]:
    """What is used on this CPU for each format of weights and for attention, and why."""
    many = "bfloat16 products" if has_fast_bf16() else "float32 products"
    if native.library() is None:
        why = native.reason()
        return [
            Choice("bfloat16", f"torch; {many} for many tokens", why),
            Choice("int8", f"torch int8pack; {many} for many tokens", why),
            Choice("int4", "torch int4pack", why),
            Choice("attention", "torch", why),
        ]
    why = native.reason()
    few = FEW_TOKENS_WITH_FAST_BF16 if has_fast_bf16() else FEW_TOKENS
    wide = f"C up to {few} tokens, then {many}"
    return [
        Choice("bfloat16", wide, why),
        Choice("int8", wide if has_fast_bf16() else "C, int8 activations", why),
        Choice("int4", wide if has_fast_bf16() else "C, int8 activations", why),
        Choice("attention", "C for the next token in bfloat16, else torch", why),
    ]


# ---- the three formats --------------------------------------------------------------------------


def linear_bf16(x: Tensor, weight: Tensor) -> Tensor:
    """x: [..., K], weight: bfloat16 [N, K] -> [..., N] in x's dtype."""
    if torch.compiler.is_compiling():
        return torch.ops.mmchat.linear_bf16(x, weight)
    return _linear_bf16(x, weight)


def linear_int8(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """x: [..., K], weight: int8 [N, K], scale: float32 [N] -> [..., N] in x's dtype."""
    if torch.compiler.is_compiling():
        return torch.ops.mmchat.linear_int8(x, weight, scale)
    return _linear_int8(x, weight, scale)


def linear_int4(x: Tensor, weight: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """x: [..., K], weight: uint8 [N, K/2], scale, zero: [N, K/group] -> [..., N] in x's dtype."""
    if torch.compiler.is_compiling():
        return torch.ops.mmchat.linear_int4(x, weight, scale, zero)
    return _linear_int4(x, weight, scale, zero)


def _linear_bf16(x: Tensor, weight: Tensor) -> Tensor:
    tokens, width = _tokens(x), x.shape[-1]
    library = native.library()
    few = FEW_TOKENS_WITH_FAST_BF16 if has_fast_bf16() else FEW_TOKENS
    if library and tokens <= few and width % native.BLOCK == 0 and weight.is_contiguous():
        return _shaped(library.linear_bf16(_rows(x), weight), x)
    if has_fast_bf16() or tokens == 1:
        return F.linear(x.to(weight.dtype), weight).to(x.dtype)
    return _in_chunks(x, weight.shape[0], lambda begin, end: weight[begin:end])


def _linear_int8(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    tokens, width = _tokens(x), x.shape[-1]
    library = native.library()
    if library and width % native.BLOCK == 0:
        if tokens <= FEW_TOKENS_WITH_FAST_BF16 or not has_fast_bf16():
            return _shaped(library.linear_int8(_rows(x), weight, scale), x)
        return _in_chunks(
            x, weight.shape[0], lambda a, b: library.widen_int8(weight[a:b], scale[a:b])
        )
    if tokens <= FEW_TOKENS_WITH_FAST_BF16:
        rows = x.reshape(-1, width).bfloat16()
        return _shaped(torch.ops.aten._weight_int8pack_mm(rows, weight, scale.bfloat16()), x)
    wide = torch.bfloat16 if has_fast_bf16() else torch.float32
    return _in_chunks(
        x, weight.shape[0], lambda a, b: reference.widen_int8(weight[a:b], scale[a:b], wide)
    )


def _linear_int4(x: Tensor, weight: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    tokens, width = _tokens(x), x.shape[-1]
    library = native.library()
    if library and width % native.BLOCK == 0:
        if tokens <= FEW_TOKENS_WITH_FAST_BF16 or not has_fast_bf16():
            return _shaped(library.linear_int4(_rows(x), weight, scale, zero), x)
        return _in_chunks(
            x, weight.shape[0], lambda a, b: library.widen_int4(weight[a:b], scale[a:b], zero[a:b])
        )
    wide = torch.bfloat16 if has_fast_bf16() else torch.float32
    return _in_chunks(
        x,
        weight.shape[0],
        lambda a, b: reference.widen_int4(weight[a:b], scale[a:b], zero[a:b], wide),
    )


def pack_int4(weight: Tensor, scale: Tensor, zero: Tensor) -> tuple[Tensor, Tensor] | None:
    """int4 weights in the order of torch's own kernel, where no compiled one serves them.

    weight: uint8 [N, K/2], scale, zero: [N, K/group] -> uint8 [N, K/2] for this processor alone,
    and bfloat16 [K/group, N, 2]; None where the weights are used as they are.
    """
    if native.library() is not None or weight.device.type != "cpu":
        return None
    if weight.shape[0] % PACKED_MULTIPLE:
        return None
    packed = torch.empty_like(weight)
    size = max(1, CHUNK_BYTES // (weight.shape[1] * 8 * PACKED_ROWS)) * PACKED_ROWS
    for begin, end in _spans(weight.shape[0], size):
        rows = weight[begin:end]
        levels = torch.stack((rows & 15, rows >> 4), dim=-1).flatten(1).to(torch.int32)
        packed[begin:end] = torch.ops.aten._convert_weight_to_int4pack_for_cpu(levels, 1)
    return packed, torch.stack((scale, zero), dim=-1).transpose(0, 1).contiguous()


def linear_packed_int4(x: Tensor, packed: Tensor, scales: Tensor) -> Tensor:
    """x: [..., K], weights of `pack_int4` -> [..., N] in x's dtype."""
    rows = x.reshape(-1, x.shape[-1]).bfloat16()
    group = x.shape[-1] // scales.shape[0]
    return _shaped(torch.ops.aten._weight_int4pack_mm_for_cpu(rows, packed, group, scales), x)


def _in_chunks(x: Tensor, rows: int, chunk: Callable[[int, int], Tensor]) -> Tensor:
    """A matrix product with weights that are widened piece by piece; chunk(begin, end) gives rows.

    The product is made in bfloat16 where that is fast, else in float32.
    """
    wide = torch.bfloat16 if has_fast_bf16() else torch.float32
    flat = x.reshape(-1, x.shape[-1]).to(wide)
    out = torch.empty(flat.shape[0], rows, dtype=wide)
    for begin, end in _spans(rows, max(1, CHUNK_BYTES // (flat.shape[1] * wide.itemsize))):
        torch.mm(flat, chunk(begin, end).to(wide).T, out=out[:, begin:end])
    return _shaped(out, x)


def _spans(total: int, size: int) -> Iterator[tuple[int, int]]:
    return ((begin, min(begin + size, total)) for begin in range(0, total, size))


def _tokens(x: Tensor) -> int:
    return x.numel() // x.shape[-1]


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]).float().contiguous()


def _shaped(out: Tensor, x: Tensor) -> Tensor:
    return out.to(x.dtype).reshape(*x.shape[:-1], -1)


# ---- attention ----------------------------------------------------------------------------------


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Attention of the next token to bfloat16 keys and values, as reference.attend."""
    if torch.compiler.is_compiling():
        return torch.ops.mmchat.attend(query, key, value, mask)
    return _attend(query, key, value, mask)


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    library = native.library()
    if library and library.attends(key, value):
        return library.attend(query, key, value, mask)
    return reference.attend(query, key, value, mask)


# ---- rounding weights ---------------------------------------------------------------------------


def quantize_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Weights [N, K] -> int8 [N, K] and float32 scale [N]."""
    library = native.library() if weight.device.type == "cpu" else None
    return _by_rows(library.quantize_int8 if library else reference.quantize_int8, weight)


def quantize_int4(weight: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Weights [N, K] -> uint8 [N, K/2], bfloat16 scale and zero [N, K/group]."""
    library = native.library() if weight.device.type == "cpu" else None
    quantize = library.quantize_int4 if library else reference.quantize_int4
    return _by_rows(lambda rows: quantize(rows, group), weight)


def _by_rows(quantize: Callable[[Tensor], tuple[Tensor, ...]], weight: Tensor) -> tuple:
    """Quantise some rows at a time, so that neither a float32 copy nor two results are held."""
    rows = weight.shape[0]
    size = max(1, CHUNK_BYTES // (4 * weight.shape[1]))
    whole: tuple[Tensor, ...] = ()
    for begin, end in _spans(rows, size):
        parts = quantize(weight[begin:end].float().contiguous())
        whole = whole or tuple(part.new_empty(rows, *part.shape[1:]) for part in parts)
        for out, part in zip(whole, parts, strict=True):
            out[begin:end] = part
    return whole


# ---- as operators of torch ----------------------------------------------------------------------

# Not by torch.library.custom_op, whose first call imports torch's compiler.
_LIBRARY = torch.library.Library("mmchat", "DEF")


def _register(name: str, compute: Callable[..., Tensor], shaped: Callable[..., Tensor]) -> None:
    """shaped: an empty tensor like the one that `compute` returns."""
    schema = torch.library.infer_schema(compute, mutates_args=())
    _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, compute, "CPU")
    torch.library.register_fake(f"mmchat::{name}", shaped, lib=_LIBRARY)


def _product(x: Tensor, weight: Tensor, *_: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _attended(query: Tensor, *_: Tensor | None) -> Tensor:
    return torch.empty_like(query, memory_format=torch.contiguous_format)


_register("linear_bf16", _linear_bf16, _product)
_register("linear_int8", _linear_int8, _product)
_register("linear_int4", _linear_int4, _product)
_register("attend", _attend, _attended)
