"""Attention by kernels that know no gradient, where one is asked for."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmchat.nn.attention import Row, attend, attend_rows

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
