"""What the formats make their products of, and attention by the best kernel for this machine.

The choice of a kernel follows from what the machine has and never from a timing, so that the same
machine gives the same tokens every time. What is chosen is an operator of torch as well
(`torch.ops.mmchat`), so that torch.compile keeps it whole.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from mmchat.hardware.cpu import is_amd, processor_flags
from mmchat.quant.kernels import blocks_reference, native, reference
from mmchat.quant.kernels.compiler import IS_MAC
from mmchat.quant.kernels.library import BLOCK, PANEL, Library

# Tokens up to which a kernel that reads the weights once beats a matrix product; the second for
# bfloat16 weights where their products are not fast.
FEW_TOKENS, FEW_TOKENS_OF_BF16 = 4, 64
# Beside matrix units that the kernels may not use: with AVX-512 VNNI widening takes far longer.
FEW_TOKENS_OF_ROUNDED = 64
MANY_QUERIES = 32  # from which on they fill the kernel's tiles
MANY_TOKENS = 16  # from which on a product by oneDNN makes up for what its call takes
CHUNK_BYTES = 16 * 1024**2  # of widened weights at a time, so that they stay in the cache
Parts = TypeVar("Parts", bound=tuple[Tensor, ...])


@functools.cache
def has_fast_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 matrices faster than float32 ones."""
    cpu = torch.cpu
    return bool(cpu._is_avx512_bf16_supported() or cpu._is_amx_tile_supported())


@functools.cache
def has_tiles() -> bool:
    """Whether this CPU has matrix units (AMX). Other bfloat16 instructions do half of what those of
    int8 do."""
    return bool(torch.cpu._is_amx_tile_supported())


def widens_many() -> bool:
    """Whether the kernels of int8 and int4 are slow for many tokens, beside matrix units that only
    torch uses: the compiler did not know them, or Linux did not give them."""
    library = native.library()
    return has_tiles() and library is not None and library.instructions != "AMX"


@dataclass(frozen=True)
class Choice:
    """Which kernel is used. serves: a format of weights, or "attention"; reason: one clause."""

    serves: str
    kernel: str
    reason: str


_ATTENTION = (
    f"C for the next token in bfloat16 or int8, for {MANY_QUERIES} or more if faster, else torch"
)


def probe() -> list[Choice]:
    """What is used on this CPU for each format of weights and for attention, and why."""
    fast = has_fast_bf16()
    many = "bfloat16 products" if fast else "float32 products"
    wide = f"C up to {FEW_TOKENS if fast else FEW_TOKENS_OF_BF16} tokens, then {many}"
    rounded = "C, int8 activations"
    if widens_many():
        rounded += f", up to {FEW_TOKENS_OF_ROUNDED} tokens, then {many}"
    found = [wide, rounded, rounded, _ATTENTION]
    if native.library() is None:
        whole = f"{many} for many tokens"
        found = [f"torch; {whole}", f"torch int8pack; {whole}", "torch int4pack", "torch"]
    uses = ("bfloat16", "int8", "int4", "attention")
    return [Choice(use, kernel, native.reason()) for use, kernel in zip(uses, found, strict=True)]


@functools.cache
def has_slow_mkl() -> bool:
    """Whether MKL, which makes torch's products of float32, leaves half of the processor unused:
    it takes AVX-512 on Intel's alone. oneDNN, which torch has too, takes it on all."""
    has_other = torch.backends.mkldnn.is_available() and hasattr(
        torch.ops.mkldnn, "_linear_pointwise"
    )
    return has_other and is_amd() and "avx512f" in processor_flags()


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Whether a gradient is asked for through any of them: compiled kernels give none."""
    return torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in tensors
    )


# ---- products -----------------------------------------------------------------------------------


def library_for(x: Tensor) -> Library | None:
    """The compiled kernels, if there are any and they take the width of x: [..., K]."""
    return None if x.shape[-1] % BLOCK else native.library()


def tokens(x: Tensor) -> int:
    """Rows of x: [..., K]."""
    return x.numel() // x.shape[-1]


def by_kernel(kernel: Callable[..., Tensor], x: Tensor, *weight: Tensor) -> Tensor:
    """The product of a compiled kernel, which takes and gives float32 rows."""
    return shaped(kernel(x.reshape(-1, x.shape[-1]).float().contiguous(), *weight), x)


def rounded(
    kernel: Callable[..., Tensor], widen: Callable[..., Tensor], x: Tensor, *weight: Tensor
) -> Tensor:
    """By a kernel that rounds x to int8, but many tokens where widening is faster."""
    if tokens(x) <= FEW_TOKENS_OF_ROUNDED or not widens_many():
        return by_kernel(kernel, x, *weight)
    return in_chunks(widen, x, *weight)


def in_chunks(widen: Callable[..., Tensor], x: Tensor, *weight: Any) -> Tensor:
    """A matrix product with a weight that is widened some rows at a time.

    The product is made in bfloat16 where that is fast, else in float32.
    """
    wide = torch.bfloat16 if has_fast_bf16() else torch.float32
    flat = x.reshape(-1, x.shape[-1]).to(wide)
    rows = weight[0].shape[0]
    out = torch.empty(flat.shape[0], rows, dtype=wide)
    for begin, end in spans(rows, flat.shape[1] * wide.itemsize, PANEL):
        chunk = widen(*(tensor[begin:end] for tensor in weight))
        torch.mm(flat, chunk.to(wide).T, out=out[:, begin:end])
    return shaped(out, x)


def spans(rows: int, row_bytes: int, multiple: int = 1) -> Iterator[tuple[int, int]]:
    """Begin and end of the rows that are taken together, `multiple` of them or more."""
    size = max(1, CHUNK_BYTES // (row_bytes * multiple)) * multiple
    return ((begin, min(begin + size, rows)) for begin in range(0, rows, size))


def shaped(out: Tensor, x: Tensor) -> Tensor:
    """out: [M, N] with the dtype and the leading axes of x: [..., K]."""
    return out.to(x.dtype).reshape(*x.shape[:-1], -1)


# ---- rounding weights ---------------------------------------------------------------------------


def rounding(weight: Tensor) -> Library | ModuleType:
    """What rounds `weight`: the compiled kernels, or the reference."""
    return (native.library() if weight.device.type == "cpu" else None) or reference


def rounding_blocks(weight: Tensor) -> Callable[[int, Tensor], Tensor]:
    """What rounds `weight` [N, K] to blocks of so many bits, uint8 [N, bytes of a row]."""
    library = native.library() if weight.device.type == "cpu" else None
    if library:
        return library.quantize_blocks
    return lambda bits, rows: blocks_reference.pack(bits, blocks_reference.quantize(bits, rows))


def by_rows(quantize: Callable[[Tensor], Parts], weight: Tensor, multiple: int = 1) -> Parts:
    """Round some rows at a time, so that neither a float32 copy nor two results are held."""
    rows = weight.shape[0]
    whole: Any = ()
    for begin, end in spans(rows, 4 * weight.shape[1], multiple):
        parts = quantize(weight[begin:end].float().contiguous())
        whole = whole or tuple(part.new_empty(rows, *part.shape[1:]) for part in parts)
        for out, part in zip(whole, parts, strict=True):
            out[begin:end] = part
    return whole


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear, of many rows in float32 by the better of torch's libraries."""
    if (
        not torch.compiler.is_compiling()
        and x.dtype == weight.dtype == torch.float32
        and x.is_cpu
        and tokens(x) >= MANY_TOKENS
        and has_slow_mkl()
        and not needs_gradient(x, weight, bias)
    ):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


# ---- attention ----------------------------------------------------------------------------------


def is_fast_for(key: Tensor) -> bool:
    """Whether `attend` is the way to read these keys: it streams them from memory once."""
    return key.dtype in (torch.bfloat16, torch.int8) and key.device.type == "cpu"


def attend_rows(query: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor]) -> Tensor:
    """`attend` of the next token of several rows, each with its own keys [1, G, n, D].

    query: [R, H, D] -> [R, H, D]
    """
    library = native.library()
    if library and all(map(library.attends, keys, values)):
        return library.attend_rows(query, keys, values)
    rows = zip(query[:, None, :, None], keys, values, strict=True)
    return torch.cat([reference.attend(*row, None)[:, :, 0] for row in rows])


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Attention of the next token to keys and values in bfloat16 or int8, as reference.attend."""
    return run("attend", _attend, query, key, value, mask)


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    library = native.library()
    if library and library.attends(key, value):
        return library.attend(query, key, value, mask)
    return reference.attend(query, key, value, mask)


def attend_many(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, causal: bool
) -> Tensor | None:
    """reference.attend_many by the kernel; None where torch's attention is to be taken."""
    if (
        torch.compiler.is_compiling()
        or not query.is_cpu
        or query.shape[2] < MANY_QUERIES
        or IS_MAC  # whose matrix units torch's attention has
        or (query.dtype == torch.bfloat16 and has_tiles())
        or needs_gradient(query, key, value)
    ):
        return None
    library = native.library()
    if library is None or library.instructions == "portable C":
        return None
    # With vectors of 32 bytes torch takes 0.7 of the time for 65 queries in float32, and 0.95 for
    # 1,601; up to 1.4 where queries see only what comes before them.
    few = not causal or query.shape[2] < 2 * MANY_QUERIES
    if few and query.dtype == torch.float32 and library.instructions in ("AVX2", "AVX VNNI"):
        return None
    if not library.attends_many(query, key, value, mask):
        return None
    return torch.ops.mmchat.attend_many(query, key, value, mask, causal)  # also of fake tensors


def _attend_many(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool
) -> Tensor:
    library = native.library()
    of = library.attend_many if library else reference.attend_many
    return of(query, key, value, mask, causal=causal)


# ---- as operators of torch ----------------------------------------------------------------------

# Not by torch.library.custom_op, whose first call imports torch's compiler.
_LIBRARY = torch.library.Library("mmchat", "DEF")


def register(
    name: str, schema: str, compute: Callable[..., Tensor], empty: Callable[..., Tensor]
) -> None:
    """Let `run` find an operator. empty: gives a tensor like the one that `compute` returns."""
    _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, compute, "CPU")
    torch.library.register_fake(f"mmchat::{name}", empty, lib=_LIBRARY)


def run(name: str, compute: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """compute(*arguments), which torch.compile takes as the operator `name`."""
    if torch.compiler.is_compiling():
        return getattr(torch.ops.mmchat, name)(*arguments)
    return compute(*arguments)


def _attended(query: Tensor, *_: Tensor | None) -> Tensor:
    return torch.empty_like(query, memory_format=torch.contiguous_format)


def _attended_many(query: Tensor, *_: Any) -> Tensor:
    return _attended(query.transpose(1, 2)).transpose(1, 2)


register("attend", torch.library.infer_schema(_attend, mutates_args=()), _attend, _attended)
register(
    "attend_many",
    torch.library.infer_schema(_attend_many, mutates_args=()),
    _attend_many,
    _attended_many,
)
