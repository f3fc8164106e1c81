"""Every kernel against the plain product, in each format, shape and way of being called."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from mmchat.quant import operators  # noqa: F401  the test of compiled graphs calls them
from mmchat.quant.formats.base import Format
from mmchat.quant.formats.int4 import Int4, PackedInt4
from mmchat.quant.formats.int8 import INT8
from mmchat.quant.formats.plain import PLAIN
from mmchat.quant.kernels import native, ops, reference
from tests.quant.kernels.available import needs_kernels, needs_packing, reason_for_none

TOKENS = (1, 2, 3, 4, 5, 7, 8, 70, 300)
GROUPS = (32, 64, 128)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(3)


@pytest.fixture
def restored_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["native", "fallback", "native, fast bfloat16", "fallback, fast bfloat16"])
def machine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each way of computing that a machine may lead to."""
    if "native" not in request.param:
        monkeypatch.setattr(native, "library", lambda: None)
    elif reason := reason_for_none():
        pytest.skip(reason)
    for name in ("has_fast_bf16", "has_tiles"):
        monkeypatch.setattr(ops, name, lambda: "fast" in request.param)
    return request.param


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


def product(format: Format, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x · Wᵀ with the weight rounded to a format."""
    return format.product(x, *format.quantize(weight))


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("rows", [1, 6, 131])
def test_a_bfloat16_product_is_as_exact_as_its_inputs(machine: str, tokens: int, rows: int) -> None:
    x, weight = torch.randn(tokens, 192), torch.randn(rows, 192).bfloat16()
    expected = x.double() @ weight.double().T
    exact = machine == "native"  # the others round x or y to bfloat16 for some token counts
    assert relative(PLAIN.product(x, weight), expected) < (1e-6 if exact else 0.02)


@pytest.mark.parametrize("tokens", TOKENS)
def test_an_int8_product_is_that_of_the_rounded_weights(machine: str, tokens: int) -> None:
    x = torch.randn(tokens, 192)
    weight, scale = INT8.quantize(torch.randn(70, 192))
    expected = x.double() @ reference.widen_int8(weight, scale, torch.float64).T
    assert relative(INT8.product(x, weight, scale), expected) < 0.012


@needs_kernels
@pytest.mark.parametrize(
    ("instructions", "tokens", "by_kernel"),
    [
        ("AVX-512 VNNI", 5, True),
        ("AVX-512 VNNI", 64, True),
        ("AVX-512 VNNI", 65, False),
        ("AMX", 65, True),
    ],
)
def test_matrix_units_take_over_where_the_kernel_has_none(
    instructions: str, tokens: int, by_kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = native.library()
    assert library
    monkeypatch.setattr(ops, "has_tiles", lambda: True)
    monkeypatch.setattr(library, "instructions", instructions)
    x, held = torch.randn(tokens, 192), INT8.quantize(torch.randn(70, 192))
    of_kernel = library.linear_int8(x, *held)
    assert torch.equal(INT8.product(x, *held), of_kernel) == by_kernel


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("group", GROUPS)
def test_an_int4_product_is_that_of_the_rounded_weights(
    machine: str, tokens: int, group: int
) -> None:
    x = torch.randn(tokens, 384) + 0.3
    weight = Int4(group).quantize(torch.randn(70, 384) + 0.1)
    expected = x.double() @ reference.widen_int4(*weight, torch.float64).T
    assert relative(Int4(group).product(x, *weight), expected) < 0.012


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("group", GROUPS)
def test_a_packed_int4_product_is_that_of_the_rounded_weights(
    machine: str, tokens: int, group: int
) -> None:
    x = torch.randn(tokens, 384) + 0.3
    weight = Int4(group).quantize(torch.randn(72, 384) + 0.1)
    expected = x.double() @ reference.widen_int4(*weight, torch.float64).T
    packed = PackedInt4(group), reference.pack_int4(*weight)  # without kernels it is widened
    assert relative(packed[0].product(x, packed[1]), expected) < 0.012


@needs_packing
@pytest.mark.parametrize("group", GROUPS)
def test_packed_rows_give_the_same_bits_whatever_else_is_computed(group: int) -> None:
    """Tokens that are checked together come to what each alone would."""
    library = native.library()
    assert library
    x = torch.randn(70, 384)
    packed = library.pack_int4(*Int4(group).quantize(torch.randn(72, 384)))
    found = library.linear_packed_int4(x, packed)
    for tokens in range(1, 10):
        assert torch.equal(library.linear_packed_int4(x[:tokens], packed), found[:tokens])
    assert torch.equal(library.linear_packed_int4(x, packed[16:32]), found[:, 16:32])


@needs_kernels
@pytest.mark.parametrize("tokens", [1, 7, 70])
def test_the_number_of_threads_changes_no_bit(tokens: int, restored_threads: None) -> None:
    x, weight = torch.randn(tokens, 384), torch.randn(131, 384)
    int8, int4 = INT8.quantize(weight), Int4(64).quantize(weight)
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        products = (
            PLAIN.product(x, weight.bfloat16()),
            INT8.product(x, *int8),
            Int4(64).product(x, *int4),
        )
        packed = PackedInt4(64).product(x, reference.pack_int4(*(part[:128] for part in int4)))
        found.append(torch.cat([*products, packed], dim=1))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_widths_that_no_block_divides_are_computed_too(machine: str) -> None:
    x, weight = torch.randn(2, 160), torch.randn(9, 160)
    expected = x.double() @ weight.double().T
    assert relative(PLAIN.product(x, weight.bfloat16()), expected) < 0.02
    assert relative(product(INT8, x, weight), expected) < 0.02
    assert relative(product(Int4(32), x, weight), expected) < 0.12


def test_the_axes_and_the_dtype_of_the_input_stay(machine: str) -> None:
    x, weight = torch.randn(2, 3, 128).bfloat16(), torch.randn(5, 128)
    for y in (
        PLAIN.product(x, weight.bfloat16()),
        product(INT8, x, weight),
        product(Int4(64), x, weight),
    ):
        assert y.shape == (2, 3, 5)
        assert y.dtype == torch.bfloat16


@needs_kernels
@pytest.mark.parametrize("tokens", [6, 15])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_broken_activation_breaks_its_token_and_no_other(value: float, tokens: int) -> None:
    x = torch.randn(tokens, 128)
    x[1, 70] = value
    weight = torch.randn(24, 128)
    for y in (
        PLAIN.product(x, weight.bfloat16()),
        product(INT8, x, weight),
        product(Int4(64), x, weight),
    ):
        assert not y[1].isfinite().any()
        assert y[[0, *range(2, tokens)]].isfinite().all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_broken_weight_breaks_its_row_and_no_other(
    machine: str, value: float, dtype: torch.dtype
) -> None:
    weight = torch.randn(24, 128, dtype=dtype)
    weight[1, 70] = value
    for tokens in (1, 5, 70):
        x = torch.randn(tokens, 128)
        for y in (
            PLAIN.product(x, weight.bfloat16()),
            product(INT8, x, weight),
            *(product(Int4(group), x, weight) for group in GROUPS),
        ):
            assert not y[:, 1].isfinite().any()
            assert y[:, [0, *range(2, 24)]].isfinite().all()


@needs_kernels
def test_every_nan_stays_one_in_bfloat16() -> None:
    """Those with all bits set too, which rounding would carry over into the sign."""
    library = native.library()
    assert library
    scale = torch.tensor([-1, 0x7FFFFFFF, 0x7F800001], dtype=torch.int32).view(torch.float32)
    assert library.widen_int8(torch.ones(3, 64, dtype=torch.int8), scale).isnan().all()


def test_zeros_stay_zeros(machine: str) -> None:
    nothing = torch.zeros(3, 128)
    assert not product(INT8, nothing, torch.randn(4, 128)).any()
    assert not product(INT8, torch.randn(3, 128), torch.zeros(4, 128)).any()
    assert not product(Int4(64), torch.randn(3, 128), torch.zeros(4, 128)).any()


@pytest.mark.parametrize("tiny", [1e-36, 1e-37, 1e-38, 1e-39, 1e-44])
def test_the_smallest_numbers_are_rounded_to_finite_ones(machine: str, tiny: float) -> None:
    weight = torch.zeros(4, 128)
    weight[:, 3] = tiny  # the rest of its group is zero
    x = torch.full((2, 128), tiny)
    for group in GROUPS:
        scale, zero = Int4(group).quantize(weight)[1:]
        assert scale.isfinite().all()
        assert zero.isfinite().all()
        assert (product(Int4(group), x, weight).abs() <= 1e-30).all()
    assert (product(INT8, x, weight).abs() <= 1e-30).all()


@needs_kernels
@pytest.mark.parametrize("group", GROUPS)
def test_the_compiled_rounding_is_that_of_the_reference(group: int) -> None:
    weight = torch.randn(40, 256) * torch.rand(40, 1)
    library = native.library()
    assert library
    for ours, plain in (
        (library.quantize_int8(weight), reference.quantize_int8(weight)),
        (library.quantize_int4(weight, group), reference.quantize_int4(weight, group)),
    ):
        for a, b in zip(ours, plain, strict=True):
            assert float((a != b).float().mean()) < 0.01  # sums differ in their last bit


def plainly_rounded(weight: torch.Tensor, group: int) -> torch.Tensor:
    """To 16 levels from the smallest to the largest of each group."""
    groups = weight.unflatten(1, (-1, group))
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    scale = ((high - low) / 15).bfloat16().float()
    zero = (low + 8 * scale).bfloat16().float()
    levels = ((groups - zero) / scale + 8).round().clamp(0, 15)
    return ((levels - 8) * scale + zero).flatten(1)


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("outliers", [0, 20])
def test_the_search_beats_plain_rounding(group: int, outliers: int) -> None:
    weight = torch.randn(64, 512)
    weight.view(-1)[torch.randperm(weight.numel())[:outliers]] *= 8
    searched = reference.widen_int4(*Int4(group).quantize(weight), torch.float64)
    rounded = plainly_rounded(weight, group)
    assert (searched - weight).norm() < 0.95 * (rounded - weight).norm()


@needs_kernels
def test_compiled_graphs_keep_the_kernels_whole() -> None:
    weight = torch.randn(6, 128)
    formats = {
        PLAIN: (weight.bfloat16(),),
        INT8: INT8.quantize(weight),
        Int4(32): Int4(32).quantize(weight),
        PackedInt4(32): (reference.pack_int4(*Int4(32).quantize(torch.randn(16, 128))),),
    }
    x = torch.randn(2, 128)
    for format, tensors in formats.items():
        graph = torch.compile(
            lambda x, *w, run=format.product: run(x, *w) + 1, fullgraph=True, backend="eager"
        )
        assert torch.equal(graph(x, *tensors), format.product(x, *tensors) + 1)
        operator = getattr(torch.ops.mmchat, format.operator)
        torch.library.opcheck(
            operator, (x, *tensors), test_utils=("test_schema", "test_faketensor")
        )


def test_the_probe_names_a_kernel_and_a_reason_for_each_use(machine: str) -> None:
    choices = ops.probe()
    assert [choice.serves for choice in choices] == ["bfloat16", "int8", "int4", "attention"]
    assert all(choice.kernel and choice.reason for choice in choices)
    fallback = "fallback" in machine
    assert {choice.kernel.startswith("torch") for choice in choices} == {fallback}


@pytest.mark.process
def test_the_operators_need_nothing_of_torchs_compiler():
    """Programs that were compiled ahead of time call them, where its import would cost seconds."""
    program = """
import sys, torch
from mmchat.quant import operators
from mmchat.quant.schemes import INT8, Int4
x, weight = torch.ones(1, 64), torch.ones(16, 64)
torch.ops.mmchat.linear_bf16(x, weight.bfloat16())
torch.ops.mmchat.linear_int8(x, *INT8.quantize(weight))
torch.ops.mmchat.linear_int4(x, *Int4(32).quantize(weight))
torch.ops.mmchat.attend(*torch.ones(3, 1, 1, 1, 64).bfloat16(), None)
assert not {"torch._dynamo", "torch._inductor", "sympy"} & set(sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_weights_that_do_not_lie_row_by_row_are_rounded_as_their_copy_is(machine: str) -> None:
    weight = torch.randn(128, 6).T  # as a .pth file may hold it
    for rounded in (INT8.quantize, Int4(64).quantize):
        for found, expected in zip(rounded(weight), rounded(weight.contiguous()), strict=True):
            assert torch.equal(found, expected)
