"""Rounding by what a layer reads: beside a plain implementation, and where nothing is to be won."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mmchat.errors import NumericalError
from mmchat.quant import gptq
from mmchat.quant.formats.base import Format
from mmchat.quant.formats.blocks import BLOCKS4
from mmchat.quant.formats.int4 import Int4
from mmchat.quant.schemes import SCHEMES

FORMATS = (Int4(32), Int4(64), BLOCKS4)
ROWS, COLUMNS = 16, 192  # more columns than are taken together, and no multiple of them


def drawn(seed: int) -> tuple[Tensor, Tensor]:
    """A weight, and inputs that hang together, some columns ten times as large as others."""
    draw = torch.Generator().manual_seed(seed)
    mixed = torch.randn(COLUMNS, COLUMNS, generator=draw) / COLUMNS**0.5 + torch.eye(COLUMNS)
    sizes = torch.rand(COLUMNS, generator=draw) * 10
    x = torch.randn(600, 24, generator=draw) @ torch.randn(24, COLUMNS, generator=draw)
    x = (x + torch.randn(600, COLUMNS, generator=draw)) @ mixed * sizes
    return torch.randn(ROWS, COLUMNS, generator=draw), x


def gram_of(x: Tensor) -> gptq.Gram:
    gram = gptq.Gram(x.shape[-1], x.device)
    gram.add(x)
    return gram


def nearest(weight: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """The numbers that the levels of one column stand for."""
    inverse = torch.where(scale == 0, 0, 1 / scale)
    return ((weight - zero) * inverse).clamp(-8, 7).round() * scale + zero


def plainly(format: Format, weight: Tensor, x: Tensor) -> Tensor:
    """The rounded weight, by an inverse that is made anew for each column, in float64."""
    scale, zero = (part.double() for part in format.grid(*format.quantize(weight)))
    group, x, rest = COLUMNS // scale.shape[1], x.double(), weight.double().clone()
    products = x.T @ x
    strength = products.diagonal().clone()
    products += gptq.DAMPING[0] * strength.mean() * torch.eye(COLUMNS, dtype=torch.float64)
    left = strength.argsort(stable=True).tolist()
    while left:
        inverse = products[left][:, left].inverse()
        column = left.pop()
        of = column // group
        value = nearest(rest[:, column], scale[:, of], zero[:, of])
        error = (rest[:, column] - value) / inverse[-1, -1]
        rest[:, left] -= error[:, None] * inverse[-1, :-1]
        rest[:, column] = value
    return rest


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_it_is_what_a_plain_implementation_gives(format: Format) -> None:
    weight, x = drawn(0)
    found = format.widen(*gptq.quantize(format, weight, gram_of(x)))
    torch.testing.assert_close(found.double(), plainly(format, weight, x), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_products_are_closer_than_by_rounding(format: Format) -> None:
    for seed in range(3):
        weight, x = drawn(seed)
        held = format.quantize(weight), gptq.quantize(format, weight, gram_of(x))
        errors = [((format.widen(*one) - weight) @ x.T).norm() for one in held]
        assert errors[1] < 0.5 * errors[0]
        assert [one.shape for one in held[1]] == [one.shape for one in held[0]]


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_inputs_without_relation_leave_the_nearest_levels(format: Format) -> None:
    weight, _ = drawn(0)
    weight[0] = weight[1, :] = 0.5  # of which a scale is 0
    held = gptq.quantize(format, weight, gram_of(3 * torch.eye(COLUMNS)))
    scale, zero = format.grid(*held)
    columns = weight.unflatten(1, (scale.shape[1], -1))
    expected = nearest(columns, scale[..., None], zero[..., None]).flatten(1)
    assert torch.equal(format.widen(*held), expected)


def test_blocks_without_relation_are_those_of_rounding() -> None:
    weight, _ = drawn(0)
    [held] = gptq.quantize(BLOCKS4, weight, gram_of(torch.eye(COLUMNS)))
    assert torch.equal(held, BLOCKS4.quantize(weight)[0])


def test_columns_that_are_never_read_are_rounded() -> None:
    weight, x = drawn(0)
    x[:, 5] = x[:, 100:120] = 0
    held = gptq.quantize(BLOCKS4, weight, gram_of(x))
    scale, zero = BLOCKS4.grid(*held)
    expected = nearest(weight[:, 5], scale[:, 0], zero[:, 0])
    assert torch.equal(BLOCKS4.widen(*held)[:, 5], expected)
    none = gptq.quantize(BLOCKS4, weight, gram_of(0 * x))
    assert torch.equal(none[0], BLOCKS4.quantize(weight)[0])


def test_sums_do_not_depend_on_how_inputs_come(monkeypatch: pytest.MonkeyPatch) -> None:
    _, x = drawn(0)
    monkeypatch.setattr(gptq, "CHUNK", 70)
    gram = gptq.Gram(COLUMNS, x.device)
    for part in x.reshape(2, 3, 100, COLUMNS):
        gram.add(part)
    assert (gram.sums - x.T @ x).norm() < 1e-6 * gram.sums.norm()


def test_fewer_inputs_than_columns_have_a_factor() -> None:
    weight, x = drawn(0)
    held = gptq.quantize(Int4(64), weight, gram_of(x[:3]))
    plain = Int4(64).quantize(weight)
    errors = [((Int4(64).widen(*one) - weight) @ x[:3].T).norm() for one in (held, plain)]
    assert errors[0] < 0.2 * errors[1]


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_inputs_that_are_no_numbers_are_refused(wrong: float) -> None:
    weight, x = drawn(0)
    x[7, 7] = wrong
    with pytest.raises(NumericalError, match="infinite or no number; try --dtype float32"):
        gptq.quantize(Int4(64), weight, gram_of(x))


def test_the_schemes_of_4_bits_are_calibrated() -> None:
    found = [name for name, format in SCHEMES.items() if format.calibrates]
    assert found == ["int4", "int4-g32", "int4-g64", "int4-g128", "int4-b32"]
