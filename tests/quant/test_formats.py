"""Each format of weights says what it holds, and a linear layer multiplies by that."""

from __future__ import annotations

import pytest
import torch

from mmchat.checkpoints.codes import Codes
from mmchat.nn.linear import Linear
from mmchat.quant import operators
from mmchat.quant.formats import int4
from mmchat.quant.formats.base import Format, Stored
from mmchat.quant.formats.blocks import BLOCKS4, BLOCKS6, BLOCKS8, Blocks
from mmchat.quant.formats.fp8 import FP8
from mmchat.quant.formats.int4 import Int4, PackedInt4
from mmchat.quant.formats.int8 import INT8
from mmchat.quant.formats.table import FP4, NF4, Table
from mmchat.quant.kernels import native, ops
from tests.packed_writers import NF4 as NF4_TABLE
from tests.quant.kernels.available import needs_packing

FORMATS = (INT8, Int4(32), Int4(64), Int4(128), FP8, BLOCKS4, BLOCKS6, BLOCKS8, NF4, FP4)


def rounded_layer(format: Format, weight: torch.Tensor) -> Linear:
    layer = Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.set_format(format)
    layer.quantize(weight)
    return layer


@pytest.mark.parametrize("rows", [1, 8, 70])
def test_rows_that_torchs_kernel_does_not_take_are_computed_too(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = rounded_layer(Int4(64), torch.randn(rows, 128))
    wide = layer.format.widen(*layer.held())
    monkeypatch.setattr(native, "library", lambda: None)
    x = torch.randn(3, 128)  # rounded to bfloat16, of which sums may cancel
    assert (layer(x) - x @ wide.T).norm() < 0.003 * (x.abs() @ wide.abs().T).norm()


@needs_packing
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("tokens", [1, 5, 70])
def test_int4_is_held_once_in_the_order_of_the_compiled_kernel(group: int, tokens: int) -> None:
    layer = rounded_layer(Int4(group), torch.randn(168, 384))
    wide, size = layer.format.widen(*layer.held()), sum(t.nbytes for t in layer.buffers())
    stored = layer.state_dict()
    assert layer.repack()
    assert not layer.repack()
    assert layer.format == PackedInt4(group)
    assert sum(tensor.nbytes for tensor in layer.buffers()) == size
    assert layer.format.nbytes(168, 384, item_bytes=2) == size
    assert torch.equal(layer.format.widen(*layer.held()), wide)
    x = torch.randn(2, tokens, 384)
    expected = x @ wide.T
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    for run in (layer, compiled):
        assert (run(x) - expected).norm() < 0.012 * expected.norm()
    saved = layer.state_dict()  # as they came
    assert saved.keys() == stored.keys()
    assert all(torch.equal(saved[name], stored[name]) for name in stored)


@needs_packing
@pytest.mark.parametrize(("rows", "width"), [(1, 128), (12, 128), (8, 96)])
def test_int4_of_other_shapes_stays_as_it_lies(rows: int, width: int) -> None:
    layer = rounded_layer(Int4(32), torch.randn(rows, width))
    assert not layer.repack()
    assert layer.format == Int4(32)
    x = torch.randn(3, width)
    wide = layer.format.widen(*layer.held())
    assert (layer(x) - x @ wide.T).norm() < 0.012 * (x.abs() @ wide.abs().T).norm()


@needs_packing
def test_packed_int4_is_widened_on_other_devices_and_for_gradients() -> None:
    layer = rounded_layer(Int4(64), torch.randn(16, 128))
    wide = layer.format.widen(*layer.held())
    x = torch.randn(3, 128, requires_grad=True)
    layer.repack()
    out = torch.randn(3, 16)
    [gradient] = torch.autograd.grad(layer(x), x, out)
    assert torch.equal(gradient, out @ wide)
    assert layer.to("meta")(x.to("meta")).shape == (3, 16)


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("tokens", [1, 5, 70])
def test_without_a_compiler_int4_runs_in_torchs_own_kernel(
    group: int, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ops, "CHUNK_BYTES", 1)  # so that the rows are packed in several pieces
    layer = rounded_layer(Int4(group), torch.randn(160, 384))
    x = torch.randn(2, tokens, 384)
    expected = x @ layer.format.widen(*layer.held()).T
    size = layer.weight.nbytes
    monkeypatch.setattr(native, "library", lambda: None)
    for _ in range(2):
        assert (layer(x) - expected).norm() < 0.01 * expected.norm()
    held = sum(tensor.nbytes for tensor in layer.buffers())
    assert held <= size * 1.3  # the scales; the weights are there once
    with pytest.raises(RuntimeError, match="load them anew to save"):
        layer.state_dict()


def metal(x: torch.Tensor, weight: torch.Tensor, group: int, groups: torch.Tensor) -> torch.Tensor:
    """torch's kernel on Apple GPUs as Quantized.metal and Quantized.mm have it, in float32."""
    assert (weight.dtype, weight.dim(), weight.is_contiguous()) == (torch.int32, 4, True)
    rows = weight.shape[0] * 8
    assert x.dim() == 2
    assert x.is_contiguous()
    assert groups.dtype == x.dtype
    assert groups.shape == (x.shape[1] // group, rows, 2)
    levels = weight.view(torch.uint8).reshape(rows, -1)
    levels = torch.stack((levels & 15, levels >> 4), -1).flatten(1).float()
    scale, zero = (part.T.float().repeat_interleave(group, 1) for part in groups.unbind(-1))
    return (x.float() @ (levels * scale + (zero - scale * 8)).T).to(x.dtype)


@pytest.fixture
def apple_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's kernel for it is there, on the CPU."""
    monkeypatch.setattr(torch.ops.aten, "_weight_int4pack_mm", metal)
    monkeypatch.setattr(int4, "_metal_is_right", int4._metal_is_right.__wrapped__)


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("tokens", [1, 32, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int4_on_apple_gpus_is_the_product_of_the_weights(
    apple_gpu: None, group: int, tokens: int, dtype: torch.dtype
) -> None:
    held = Int4(group).quantize(torch.randn(24, 384))
    found = int4._for_metal(*held)
    assert found
    format, tensors = found
    assert tensors["weight"] is held[0]  # nothing is held twice
    x = torch.randn(tokens, 1, 384).to(dtype)
    expected = x.float() @ Int4(group).widen(*held).T
    y = format.product(x, *tensors.values())
    assert (y.dtype, y.shape) == (dtype, (tokens, 1, 24))
    assert (y.float() - expected).norm() < 0.01 * expected.norm()


def test_int4_on_apple_gpus_is_widened_where_torchs_kernel_does_not_serve(
    apple_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert int4._for_metal(*Int4(64).quantize(torch.randn(20, 128))) is None
    held = Int4(64).quantize(torch.randn(24, 128))
    assert int4._for_metal(*held)
    turned = lambda x, weight, *more: metal(x, weight.flip(0), *more)  # noqa: E731
    monkeypatch.setattr(torch.ops.aten, "_weight_int4pack_mm", turned)
    assert int4._for_metal(*held) is None
    monkeypatch.undo()  # torch has it for GPUs alone
    assert int4._for_metal(*held) is None


def test_float8_layers_multiply_what_they_hold() -> None:
    torch.manual_seed(0)
    weight, bias, x = torch.randn(48, 64), torch.randn(48), torch.randn(2, 5, 64)
    layer = rounded_layer(FP8, weight)
    layer.bias = torch.nn.Parameter(bias, requires_grad=False)
    held = layer.format.widen(*layer.held())
    assert (held - weight).norm() < 0.04 * weight.norm()
    expected = x @ weight.T + bias
    assert (layer(x) - expected).norm() < 0.06 * expected.norm()


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_a_format_says_the_tensors_and_bytes_that_it_makes(format: Format) -> None:
    weight = torch.randn(48, 256)
    said, made = format.tensors(48, 256), format.quantize(weight)
    found = [(str(t.dtype).removeprefix("torch."), tuple(t.shape)) for t in made]
    assert found == list(said.values())
    assert next(iter(said)) == "weight"
    assert format.nbytes(48, 256, item_bytes=2) == sum(tensor.nbytes for tensor in made)
    off = format.widen(*made) - weight
    is_coarse = format.name in ("int4", "nf4", "fp4")
    assert off.norm() < (0.13 if is_coarse else 0.04) * weight.norm()


class AnyTable(Format):
    """A format that comes from files: 16 numbers, of which each weight is one, by half a byte."""

    name = operator = "table"

    def tensors(self, rows: int, columns: int) -> dict[str, Stored]:
        return {"weight": ("uint8", (rows, columns // 2)), "weight_table": ("float32", (rows, 16))}

    def widen(self, weight: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        codes = torch.stack((weight & 15, weight >> 4), dim=-1).flatten(1)
        return table.gather(1, codes.long())


def test_a_format_needs_to_say_its_tensors_and_how_to_widen_them() -> None:
    operators.register_product(AnyTable())
    layer = Linear(96, 20)
    layer.set_format(AnyTable())
    layer.weight = torch.randint(0, 256, (20, 48), dtype=torch.uint8)
    layer.weight_table = torch.randn(20, 16)
    assert set(layer.state_dict()) == {"weight", "weight_table", "bias"}
    x = torch.randn(2, 7, 96)
    wide = AnyTable().widen(*layer.held())
    with torch.no_grad():
        expected = x @ wide.T + layer.bias
        for run in (layer, torch.compile(layer, fullgraph=True, backend="eager")):
            off = run(x) - expected
            assert off.norm() < 0.01 * expected.norm()  # bfloat16 where that is fast


@pytest.mark.parametrize("format", [f for f in FORMATS if f != FP8], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_passes_rounded_weights_to_what_they_multiply(
    format: Format, dtype: torch.dtype
) -> None:
    layer = rounded_layer(format, torch.randn(8, 128))
    x = torch.randn(3, 128, dtype=dtype, requires_grad=True)
    out = torch.randn(3, 8, dtype=dtype)
    [gradient] = torch.autograd.grad(layer(x), x, out)
    expected = out.float() @ layer.format.widen(*layer.held()).float()
    torch.testing.assert_close(gradient.float(), expected, atol=0.1, rtol=0.02)


@pytest.mark.parametrize("format", [BLOCKS4, BLOCKS6, BLOCKS8, NF4, FP4], ids=str)
@pytest.mark.parametrize("native_kernels", [True, False])
@pytest.mark.parametrize("tokens", [1, 5, 70])
def test_products_of_blocks_are_those_of_what_they_hold(
    format: Blocks, native_kernels: bool, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not native_kernels:
        monkeypatch.setattr(native, "library", lambda: None)
    layer, x = rounded_layer(format, torch.randn(24, 320)), torch.randn(2, tokens, 320)
    expected = x @ format.widen(*layer.held()).T
    torch.compiler.reset()  # which counts the formats of all tests
    for run in (layer, torch.compile(layer, fullgraph=True, backend="eager")):
        assert (run(x) - expected).norm() < 0.012 * expected.norm()


@pytest.mark.parametrize(("format", "error"), [(NF4, 0.0055), (FP4, 0.004)])
def test_tables_are_nearly_those_of_bitsandbytes(format: Table, error: float) -> None:
    """Their scales are taken as they are, so that the difference is that of the tables."""
    quarter = torch.tensor([0, 1 / 192, 2 / 3, 1, 1 / 3, 1 / 2, 1 / 6, 1 / 4])
    theirs = NF4_TABLE if format == NF4 else torch.cat((quarter, -quarter))
    groups = torch.randn(16, 4, 64, generator=torch.Generator().manual_seed(0))
    scale = groups.abs().amax(-1)
    codes = (groups / scale[..., None])[..., None].sub(theirs).abs().argmin(-1).flatten(1)
    levels = (codes[:, ::2] | codes[:, 1::2] << 4).to(torch.uint8)
    exact = (theirs[codes].unflatten(1, (4, 64)) * scale[..., None]).flatten(1)
    held = format.adopt(Codes(levels, scale, table=theirs))
    assert held
    assert (format.widen(*held) - exact).norm() < error * exact.norm()
    assert format.adopt(Codes(levels, scale, table=theirs + 0.01)) is None
    assert format.adopt(Codes(levels, scale, torch.zeros_like(scale))) is None
    assert format.adopt(Codes(levels, scale[:, :2], table=theirs)) is None


def test_blocks_are_nearer_than_what_has_as_many_bits() -> None:
    """The errors of GGUF's Q4_K, Q6_K and Q8_0 on these weights are 7.15, 1.78 and 0.54 %, of
    int4 and int8 8.34 and 0.87 %."""
    weight = torch.randn(64, 1024, generator=torch.Generator().manual_seed(0))
    for format, most in ((BLOCKS4, 0.0692), (BLOCKS6, 0.0175), (BLOCKS8, 0.00545)):
        off = format.widen(*format.quantize(weight)) - weight
        assert off.norm() < most * weight.norm()


@pytest.mark.parametrize("format", [BLOCKS4, BLOCKS6, BLOCKS8], ids=str)
@pytest.mark.parametrize("native_kernels", [True, False])
def test_blocks_of_extreme_weights(
    format: Blocks, native_kernels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not native_kernels:
        monkeypatch.setattr(native, "library", lambda: None)
    weight = torch.randn(16, 256)
    weight[0] *= 1e-6  # float16 has few numbers of this size
    weight[1], weight[2] = 0.0, 0.25
    weight[3, 9], weight[4, 200] = float("nan"), float("inf")
    found = format.widen(*format.quantize(weight))
    assert not found[3, 9].isfinite()
    assert not found[4, 200].isfinite()
    assert not found[1].any()
    assert (found[2] - 0.25).abs().max() < 0.005
    assert found[5:].isfinite().all()
    assert (found[0] - weight[0]).norm() < 0.12 * weight[0].norm()
