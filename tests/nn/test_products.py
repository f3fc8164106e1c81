"""Products of float32 by the library of torch's that this processor is fast with."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mmchat.nn import mlp
from mmchat.nn.linear import Linear
from mmchat.quant.kernels import ops

needs_onednn = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="torch without oneDNN"
)


@pytest.fixture(params=[True, False])
def slow_mkl(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(ops, "has_slow_mkl", lambda: request.param)
    return request.param


@needs_onednn
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("shape", [(16, 48), (2, 33, 48), (3, 48), (0, 48)])
def test_many_rows_are_multiplied_right(
    shape: tuple[int, ...], has_bias: bool, slow_mkl: bool
) -> None:
    layer = Linear(48, 40, bias=has_bias).requires_grad_(False)
    x = torch.randn(*shape)
    wide = layer.bias.double() if has_bias else None
    expected = F.linear(x.double(), layer.weight.double(), wide)
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-5)
    spread = x.transpose(0, -2).contiguous().transpose(0, -2)  # not row by row
    assert torch.equal(layer(spread), layer(x))


@needs_onednn
@pytest.mark.parametrize("needed", ["weight", "bias", "input"])
def test_a_gradient_flows_through_many_rows(needed: str, slow_mkl: bool) -> None:
    layer, x = Linear(48, 40).requires_grad_(False), torch.randn(20, 48)
    leaf = x if needed == "input" else getattr(layer, needed)
    leaf.requires_grad_(True)
    [found] = torch.autograd.grad(layer(x).square().sum(), leaf)
    expected = F.linear(x, layer.weight, layer.bias).square().sum()
    torch.testing.assert_close(found, torch.autograd.grad(expected, leaf)[0])


@needs_onednn
def test_a_compiler_sees_torchs_own_product(slow_mkl: bool) -> None:
    layer, x = Linear(48, 40).requires_grad_(False), torch.randn(20, 48)
    graph = torch.compile(layer, fullgraph=True, backend="eager")
    torch.testing.assert_close(graph(x), layer(x))


def test_an_mlp_in_pieces_gives_what_it_gives_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = mlp.MLP(32, 64), torch.randn(2, 2 * mlp.PIECE + 5, 32)
    found, seen = layer(x), []
    layer.fc1.register_forward_hook(lambda _, given, __: seen.append(given[0].shape[1]))
    torch.testing.assert_close(layer(x[:, : mlp.PIECE]), found[:, : mlp.PIECE])
    torch.testing.assert_close(layer(x), found)
    assert seen == [mlp.PIECE, mlp.PIECE, mlp.PIECE, 5]
    monkeypatch.setattr(mlp, "PIECE", 10**6)
    torch.testing.assert_close(layer(x), found)
    assert seen[-1] == x.shape[1]
