"""Attention by kernels that know no gradient where one is asked for, and to keys in int8."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmchat.nn.attention import Row, attend, attend_rows, attention_weights, held
from mmchat.quant.kernels import reference

HEADS, GROUPS, DIM = 4, 2, 16


def numbers(*shape: int, seed: int) -> Tensor:
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return values.to(torch.bfloat16).requires_grad_()


def keys_and_values(lengths: tuple[int, ...]) -> list[tuple[Tensor, Tensor]]:
    """bfloat16, in the layout that the compiled kernel takes."""
    return [
        (numbers(1, GROUPS, n, DIM, seed=n), numbers(1, GROUPS, n, DIM, seed=n + 100))
        for n in lengths
    ]


@pytest.mark.parametrize("needed", ["query", "key", "value"])
@pytest.mark.parametrize("lengths", [(5,), (5, 3)])
def test_one_bfloat16_query_has_the_gradient_of_torchs_attention(
    lengths: tuple[int, ...], needed: str
) -> None:
    query = numbers(len(lengths), HEADS, DIM, seed=1)
    pairs = keys_and_values(lengths)
    leaves = {"query": [query], "key": [k for k, _ in pairs], "value": [v for _, v in pairs]}
    for name, tensors in leaves.items():
        for tensor in tensors:
            tensor.requires_grad_(name == needed)
    if len(lengths) == 1:
        found = attend(query[:, :, None], *pairs[0])[:, :, 0]
    else:
        found = attend_rows(query, [Row(1, key, value) for key, value in pairs])
    wide = [
        F.scaled_dot_product_attention(
            query[row, None, :, None].float(), key.float(), value.float(), enable_gqa=True
        )[:, :, 0]
        for row, (key, value) in enumerate(pairs)
    ]
    expected = torch.autograd.grad(torch.cat(wide).square().sum(), leaves[needed])
    gradients = torch.autograd.grad(found.float().square().sum(), leaves[needed])
    for mine, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(mine, other, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "read", [[(1, 9), (1, 5), (1, 7), (4, 4), (4, 4)], [(1, 9), (6, 8), (1, 3)], [(1, 9), (6, 6)]]
)
def test_rows_that_write_and_rows_that_read_attend_as_each_alone(
    read: list[tuple[int, int]], dtype: torch.dtype
) -> None:
    query = numbers(sum(count for count, _ in read), HEADS, DIM, seed=1).detach().to(dtype)
    pairs = keys_and_values(tuple(length for _, length in read))
    rows = [
        Row(count, key.detach().to(dtype), value.detach().to(dtype), is_causal=count > 1)
        for (count, _), (key, value) in zip(read, pairs, strict=True)
    ]
    parts = query.split([row.queries for row in rows])
    alone = [attend_rows(part, [row]) for part, row in zip(parts, rows, strict=True)]
    torch.testing.assert_close(attend_rows(query, rows), torch.cat(alone))


@pytest.mark.parametrize("wide_bytes", [1, 2**24])
@pytest.mark.parametrize("form", ["causal", "mask of each", "mask of all", "none"])
def test_keys_and_values_in_int8_are_read_as_what_they_stand_for(
    form: str, wide_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Head by head or all at once."""
    monkeypatch.setattr(reference, "WIDE_BYTES", wide_bytes)
    query = numbers(2, HEADS, 7, DIM, seed=1).detach().float()
    rows = [held(numbers(2, GROUPS, 7, DIM, seed=n).detach(), torch.int8) for n in (2, 3)]
    key, value = (reference.widen_rows(x) for x in rows)
    mask = {
        "mask of each": torch.rand(2, 1, 7, 7) < 0.7,
        "mask of all": torch.rand(1, 1, 1, 7) < 0.7,
    }.get(form)
    if mask is not None:
        mask[..., 0] = True
    found = attend(query, *rows, mask=mask, causal=form == "causal")
    expected = attend(query, key, value, mask=mask, causal=form == "causal")
    torch.testing.assert_close(found, expected)
    weights = attention_weights(query[0].transpose(0, 1), rows[0][0])
    torch.testing.assert_close(weights, attention_weights(query[0].transpose(0, 1), key[0]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_key_in_int8_is_off_by_half_a_step_of_its_largest_number(dtype: torch.dtype) -> None:
    rows = torch.randn(3, 5, DIM).to(dtype)
    rows[0, 0] = 0
    found = held(rows, torch.int8)
    assert (found.dtype, found.shape) == (torch.int8, (3, 5, DIM + 4))
    step = rows.float().abs().amax(-1, keepdim=True) / 127
    error = (reference.widen_rows(found) - rows.float()).abs()
    assert (error <= step * 0.5001).all()
    assert held(rows, dtype) is rows
