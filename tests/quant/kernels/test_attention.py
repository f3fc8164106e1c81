"""The attention of the next token against the plain formula, for every layout that it reads."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mmchat.nn.attention import attend
from mmchat.quant.kernels import native, ops, reference
from mmchat.quant.kernels.library import Library
from tests.quant.kernels.available import needs_kernels


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(5)


def heads(batch: int, groups: int, length: int, width: int, spare: int = 0) -> torch.Tensor:
    """As a cache gives them: the first positions of a longer tensor."""
    return torch.randn(batch, groups, length + spare, width).bfloat16()[:, :, :length]


def in_int8(rows: torch.Tensor) -> torch.Tensor:
    """Heads in int8, as a cache gives them."""
    return reference.round_rows(torch.nn.functional.pad(rows, (0, 0, 0, 5)))[:, :, : rows.shape[2]]


def exact(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    if key.dtype == torch.int8:
        key, value = reference.widen_rows(key), reference.widen_rows(value)
    wide = (query.double(), key.double(), value.double())
    return F.scaled_dot_product_attention(*wide, attn_mask=mask, enable_gqa=True)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@needs_kernels
@pytest.mark.parametrize("width", [16, 80, 128, 256])
@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 511, 513, 1300])
@pytest.mark.parametrize("query_heads", [2, 6, 8])
@pytest.mark.parametrize("is_int8", [False, True])
def test_it_is_exact_up_to_the_rounding_of_the_result(
    width: int, length: int, query_heads: int, is_int8: bool
) -> None:
    query = torch.randn(2, query_heads, 1, width).bfloat16() * 3
    key, value = heads(2, 2, length, width, spare=5), heads(2, 2, length, width, spare=5)
    if is_int8:
        key, value = in_int8(key), in_int8(value)
    assert Library.attends(key, value)
    for rows in (0, 1, 2):
        mask = torch.rand(rows, 1, 1, length) < 0.6 if rows else None
        if mask is not None:
            mask[..., -1] = True
        found = ops.attend(query, key, value, mask)
        assert found.dtype == torch.bfloat16
        assert relative(found, exact(query, key, value, mask)) < 0.003


@needs_kernels
def test_scores_far_apart_neither_overflow_nor_vanish() -> None:
    query, key = torch.full((1, 1, 1, 64), 40.0).bfloat16(), heads(1, 1, 700, 64)
    key[0, 0, 600] = 40.0  # a score of 12,800
    key[0, 0, 10] = -40.0
    value = heads(1, 1, 700, 64)
    assert torch.equal(ops.attend(query, key, value, None)[0, 0, 0], value[0, 0, 600])


@needs_kernels
@pytest.mark.parametrize("length", [40, 41, 1300])
def test_one_large_number_among_many_small_ones_costs_int8_little(length: int) -> None:
    """Each query, and each 64 weights, are rounded to 16 bits for themselves."""
    query, key, value = torch.randn(1, 4, 1, 64), *torch.randn(2, 1, 1, length, 64)
    query[..., 3] *= 50
    value[0, 0, 7] *= 1000
    key, value = in_int8(key), in_int8(value)
    found = ops.attend(query, key, value, None)
    assert relative(found, exact(query, key, value, None)) < 1e-3


@needs_kernels
@pytest.mark.parametrize("length", [40, 41, 700])
@pytest.mark.parametrize("broken", ["query", "key", "value"])
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_what_is_no_number_is_none_in_int8(length: int, broken: str, number: float) -> None:
    given = {"query": torch.randn(1, 4, 1, 64), "key": torch.randn(1, 1, length, 64)}
    given["value"] = torch.randn(1, 1, length, 64)
    given[broken][0, 0, -1, 3] = number
    query, key, value = given["query"], in_int8(given["key"]), in_int8(given["value"])
    found = ops.attend(query, key, value, None)
    assert not found[0, 0].isfinite().any()
    assert (found[0, 1:].isfinite().all()) == (broken == "query")


@needs_kernels
@pytest.mark.parametrize("length", [40, 41, 700])
def test_what_is_not_a_number_stays_so(length: int) -> None:
    query, key, value = (heads(1, 1, n, 64) for n in (1, length, length))
    for broken in (key, value):
        broken[0, 0, length - 1, 3] = float("nan")
        assert ops.attend(query, key, value, None)[0, 0, 0, 3].isnan()
        broken[0, 0, length - 1, 3] = 0
    assert not ops.attend(query, key, value, None).isnan().any()


@needs_kernels
@pytest.mark.parametrize("is_int8", [False, True])
def test_what_is_masked_has_no_part(is_int8: bool) -> None:
    query = torch.randn(1, 4, 1, 64).bfloat16()
    key, value = heads(1, 1, 90, 64), heads(1, 1, 90, 64)
    if is_int8:
        key, value = in_int8(key), in_int8(value)
    mask = torch.arange(90)[None, None, None] < 70
    expected = ops.attend(query, key[:, :, :70], value[:, :, :70], None)
    assert torch.equal(ops.attend(query, key, value, mask), expected)
    assert not ops.attend(query, key, value, torch.zeros_like(mask)).any()


@needs_kernels
def test_the_number_of_threads_changes_no_bit() -> None:
    query, key = torch.randn(1, 8, 1, 128).bfloat16(), heads(1, 2, 3000, 128)
    value, before, found = heads(1, 2, 3000, 128), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(ops.attend(query, key, value, None))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize(
    "layout", ["width", "transposed", "dtype", "strides", "no kernels", "no kernels, int8"]
)
def test_other_layouts_are_computed_by_torch(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    width = 40 if layout == "width" else 64
    key, value = heads(1, 2, 30, width), heads(1, 2, 30, width)
    if layout == "transposed":
        key, value = (x.transpose(-1, -2).contiguous().transpose(-1, -2) for x in (key, value))
    if layout == "dtype":
        key, value = key.float(), value.float()
    if layout == "strides":
        value = heads(1, 2, 30, width, spare=3)
    if layout == "no kernels, int8":
        key, value = in_int8(key), in_int8(value)
    if layout.startswith("no kernels"):
        monkeypatch.setattr(native, "library", lambda: None)
    else:
        assert not Library.attends(key, value)
    query = torch.randn(1, 4, 1, width)
    query = query if key.dtype == torch.int8 else query.to(key.dtype)
    assert relative(ops.attend(query, key, value, None), exact(query, key, value, None)) < 0.02


@pytest.mark.parametrize("is_int8", [False, True])
def test_the_next_token_attends_by_it_and_torch_compile_keeps_it_whole(is_int8: bool) -> None:
    query = torch.randn(1, 4, 1, 64).bfloat16()
    key, value = heads(1, 2, 50, 64), heads(1, 2, 50, 64)
    if is_int8:
        key, value = in_int8(key), in_int8(value)
    mask = torch.arange(50)[None, None, None] < 40
    expected = ops.attend(query, key, value, mask)
    assert torch.equal(attend(query, key, value, mask=mask), expected)
    whole = torch.compile(attend, fullgraph=True, backend="eager")
    assert torch.equal(whole(query, key, value, mask=mask), expected)
    assert torch.library.opcheck(torch.ops.mmchat.attend, (query, key, value, mask))
