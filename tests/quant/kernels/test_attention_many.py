"""The attention of many queries against the plain formula, for all that it reads."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mmchat.nn.attention import attend
from mmchat.quant.kernels import native, ops, reference
from mmchat.quant.kernels.library import Library
from tests.quant.kernels.available import needs_kernels

LEAST = ops.MANY_QUERIES


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(5)


def projected(batch: int, length: int, heads: int, width: int) -> torch.Tensor:
    """Heads side by side, as a projection gives them: [B, H, S, D]."""
    return torch.randn(batch, length, heads * width).unflatten(-1, (heads, width)).transpose(1, 2)


def exact(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None = None,
    causal: bool = False,
) -> torch.Tensor:
    wide = query.double(), key.double(), value.double()
    mask = mask.double() if mask is not None and mask.is_floating_point() else mask
    return reference.attend_many(*wide, mask, causal=causal)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.fixture
def library() -> Library:
    library = native.library()
    assert library
    return library


@needs_kernels
@pytest.mark.parametrize("width", [8, 80, 256])
@pytest.mark.parametrize("queries", [1, 32, 130])
@pytest.mark.parametrize("keys", [1, 95, 96, 97, 700])
def test_it_is_as_exact_as_torchs_own(
    library: Library, width: int, queries: int, keys: int
) -> None:
    query = projected(2, queries, 4, width) * 3
    key, value = projected(2, keys, 2, width), projected(2, keys, 2, width)
    bias = torch.randn(2, 1, 1, keys)
    for mask in (None, bias, bias[:1], bias > 0):
        if mask is not None and mask.dtype == torch.bool:
            mask[..., -1] = True
        expected = exact(query, key, value, mask)
        plain = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)
        found = library.attend_many(query, key, value, mask, causal=False)
        assert relative(found, expected) < max(4 * relative(plain, expected), 1e-6)
        short = [x.bfloat16() for x in (query, key, value)]
        found = library.attend_many(*short, mask, causal=False)
        assert found.dtype == torch.bfloat16
        assert relative(found, exact(*short, mask)) < 0.003


@needs_kernels
@pytest.mark.parametrize("queries", [1, 31, 32, 33, 129, 300])
@pytest.mark.parametrize("before", [0, 1, 64, 95, 300])
def test_a_causal_query_sees_the_keys_up_to_its_own(
    library: Library, queries: int, before: int
) -> None:
    query = projected(1, queries, 4, 64)
    key, value = torch.randn(2, 1, 2, before + queries, 64)
    found = library.attend_many(query, key, value, None, causal=True)
    assert relative(found, exact(query, key, value, causal=True)) < 1e-6
    key[:, :, -1] = value[:, :, -1] = 1e6  # which the last query alone sees
    again = library.attend_many(query, key, value, None, causal=True)
    assert torch.equal(again[:, :, :-1], found[:, :, :-1])
    assert not torch.equal(again[:, :, -1], found[:, :, -1])


@needs_kernels
def test_a_row_gives_the_same_bits_whatever_is_beside_it(library: Library) -> None:
    query = projected(3, 140, 4, 80)
    key, value = projected(3, 500, 2, 80), projected(3, 500, 2, 80)
    together = library.attend_many(query, key, value, None, causal=False)
    for row in range(3):
        of = slice(row, row + 1)
        alone = library.attend_many(query[of], key[of], value[of], None, causal=False)
        assert torch.equal(together[of], alone)
    first = library.attend_many(query[:, :, :33], key, value, None, causal=False)
    assert torch.equal(together[:, :, :33], first)


@needs_kernels
def test_the_number_of_threads_changes_no_bit(library: Library) -> None:
    query, key, value = (projected(2, 300, 3, 40) for _ in range(3))
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(library.attend_many(query, key, value, None, causal=True))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@needs_kernels
def test_scores_far_apart_neither_overflow_nor_vanish(library: Library) -> None:
    query = torch.full((1, 1, 40, 64), 40.0)
    key, value = torch.randn(2, 1, 1, 700, 64)
    key[0, 0, 600] = 40.0  # a score of 12,800
    key[0, 0, 10] = -40.0
    found = library.attend_many(query, key, value, None, causal=False)
    assert torch.equal(found[0, 0], value[0, 0, 600].expand(40, -1))
    found = library.attend_many(-query * 1e18, key, value, None, causal=False)
    assert torch.equal(found[0, 0], value[0, 0, 10].expand(40, -1))


@needs_kernels
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_what_is_no_number_is_none(library: Library, number: float) -> None:
    query, key, value = (projected(1, 130, 2, 16) for _ in range(3))
    query[0, 0, 60, 3] = number
    found = library.attend_many(query, key, value, None, causal=False)
    assert found[0, 0, 60].isnan().all()
    assert found[0, 0, :60].isfinite().all()
    assert found[0, 0, 61:].isfinite().all()
    query[0, 0, 60, 3] = 0
    for broken in (key, value):
        broken[0, 1, 129, 3] = number
        found = library.attend_many(query, key, value, None, causal=False)
        assert not found[0, 1, :, 3].isfinite().any() or broken is key
        assert not found[0, 1].isfinite().all()
        assert found[0, 0].isfinite().all()
        broken[0, 1, 129, 3] = 0


@needs_kernels
def test_what_is_masked_has_no_part(library: Library) -> None:
    query, key, value = (projected(2, 130, 2, 16) for _ in range(3))
    mask = torch.arange(130)[None, None, None] < 70
    expected = library.attend_many(query, key[:, :, :70], value[:, :, :70], None, causal=False)
    assert torch.equal(library.attend_many(query, key, value, mask, causal=False), expected)
    nothing = library.attend_many(query, key, value, torch.zeros_like(mask), causal=False)
    assert not nothing.any()


@needs_kernels
def test_what_it_does_not_read_is_refused_and_left_to_torch(library: Library) -> None:
    query, key, value = (projected(1, 40, 2, 16) for _ in range(3))
    others = {
        "width": [x[..., :12] for x in (query, key, value)],
        "spread": [torch.stack((x, x), -1)[..., 0] for x in (query, key, value)],
        "kinds": [query, key.bfloat16(), value],
        "double": [x.double() for x in (query, key, value)],
        "lengths": [query, key, value[:, :, 1:]],
        "heads": [projected(1, 40, 3, 16), key, value],
        "no keys": [query, key[:, :, :0], value[:, :, :0]],
    }
    for given in others.values():
        with pytest.raises(ValueError, match="another dtype"):
            library.attend_many(*given, None, causal=False)
        assert ops.attend_many(*given, None, causal=False) is None
    of_each = torch.ones(1, 1, 40, 40, dtype=torch.bool).tril()
    assert ops.attend_many(query, key, value, of_each, causal=False) is None
    few = query[:, :, : LEAST - 1]
    assert ops.attend_many(few, key, value, None, causal=False) is None
    assert ops.attend_many(query.requires_grad_(), key, value, None, causal=False) is None


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("causal", [True, False])
def test_many_queries_attend_by_it_where_there_are_kernels(
    kernels: bool, causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not kernels:
        monkeypatch.setattr(native, "library", lambda: None)
    elif native.library() is None:
        pytest.skip("no kernels")
    query = projected(1, 2 * LEAST, 4, 16)
    key, value = torch.randn(2, 1, 2, 2 * LEAST + 9, 16)
    found = attend(query, key, value, causal=causal)
    assert relative(found, exact(query, key, value, causal=causal)) < 1e-6
    by_kernel = ops.attend_many(query, key, value, None, causal=causal)
    library = native.library()
    slow = ("portable C",) if causal else ("portable C", "AVX2", "AVX VNNI")
    assert (by_kernel is None) == (library is None or library.instructions in slow)
    if by_kernel is not None:
        assert torch.equal(found, by_kernel)


@needs_kernels
def test_it_is_an_operator_of_torch() -> None:
    query, key = projected(1, 40, 4, 16), projected(1, 50, 2, 16)
    given = query, key, key * 2, None, True
    torch.library.opcheck(
        torch.ops.mmchat.attend_many, given, test_utils=("test_schema", "test_faketensor")
    )
