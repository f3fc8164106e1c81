"""Which layers are rounded to what, how large that is, and that a quantised model runs on them."""

from __future__ import annotations

import pytest
import torch

import mmchat
from mmchat.catalog.find import find_model
from mmchat.errors import DeviceError, UsageError
from mmchat.models.mllama.model import MllamaForConditionalGeneration
from mmchat.nn.linear import Linear, set_formats
from mmchat.quant import schemes
from mmchat.quant.formats.base import Format
from mmchat.quant.formats.int4 import Int4
from mmchat.quant.formats.int8 import INT8
from mmchat.quant.formats.plain import PLAIN
from tests.models.mllama import oracle

GB = 1e9


def planned(name: str, scheme: str, keep: tuple[str, ...] = ()) -> MllamaForConditionalGeneration:
    """A known model on the meta device, its linear layers replaced."""
    spec = find_model(name, checkpoint_required=False).spec
    with torch.device("meta"):
        model = MllamaForConditionalGeneration(spec.config)
    model.to(torch.bfloat16)
    set_formats(model, schemes.make_plan(scheme, keep))
    return model


def format_of(model: torch.nn.Module, name: str) -> Format:
    layer = model.get_submodule(name)
    assert isinstance(layer, Linear)
    return layer.format


def plain_layers(model: torch.nn.Module) -> set[str]:
    layers = ((name, layer) for name, layer in model.named_modules() if isinstance(layer, Linear))
    return {name for name, layer in layers if layer.format == PLAIN}


def weight_bytes(model: torch.nn.Module) -> int:
    return sum(t.nbytes for t in (*model.parameters(), *model.buffers()))


@pytest.mark.parametrize("name", ["Llama-3.2-11B-Vision-Instruct", "Llama-3.2-90B-Vision-Instruct"])
def test_int4_rounds_text_to_int4_and_the_rest_to_int8(name: str) -> None:
    model = planned(name, "int4")
    text = "language_model.model.layers."
    assert format_of(model, f"{text}0.self_attn.q_proj") == Int4(64)
    assert format_of(model, f"{text}3.cross_attn.k_proj") == Int4(64)
    assert format_of(model, f"{text}3.mlp.down_proj") == Int4(64)
    assert format_of(model, "language_model.lm_head") == INT8
    assert format_of(model, "multi_modal_projector") == INT8
    assert format_of(model, "vision_model.transformer.layers.0.mlp.fc1") == INT8
    assert not plain_layers(model)


def test_parts_can_be_kept() -> None:
    model = planned("Llama-3.2-11B-Vision-Instruct", "int8", keep=("vision", "head"))
    kept = {name for name, part in model.linear_parts().items() if part != "text"}
    assert kept
    assert plain_layers(model) == kept


def test_11b_in_int4_fits_in_8_gb() -> None:
    """With room for a conversation: caches of 2048 positions and a picture of four tiles."""
    model = planned("Llama-3.2-11B-Vision-Instruct", "int4")
    weights = weight_bytes(model)
    assert 7.4 * GB < weights < 7.55 * GB
    cache = 2048 * 131_072 + 4 * 1601 * 32_768
    assert weights + cache < 8.05 * GB  # of 8.59 GB, which is 8 GiB


@pytest.mark.parametrize(
    ("name", "scheme", "size"),
    [
        ("Llama-3.2-11B-Vision-Instruct", "none", 21.340),
        ("Llama-3.2-11B-Vision-Instruct", "int8", 11.283),
        ("Llama-3.2-11B-Vision-Instruct", "int4-g128", 7.187),
        ("Llama-3.2-11B-Vision-Instruct", "int4-g32", 8.004),
        ("Llama-3.2-11B-Vision-Instruct", "int4-b32", 7.595),
        ("Llama-3.2-11B-Vision-Instruct", "int6", 9.709),
        ("Llama-3.2-11B-Vision-Instruct", "int8-b32", 11.900),
        ("Llama-3.2-90B-Vision-Instruct", "int8", 89.759),
        ("Llama-3.2-90B-Vision-Instruct", "int4", 52.292),
    ],
)
def test_sizes_of_the_schemes(name: str, scheme: str, size: float) -> None:
    assert weight_bytes(planned(name, scheme)) / GB == pytest.approx(size, rel=1e-3)


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    return oracle.random_weights()


def loaded(weights: dict[str, torch.Tensor], scheme: str) -> MllamaForConditionalGeneration:
    """The oracle's model with its layers quantised."""
    with torch.device("meta"):
        model = MllamaForConditionalGeneration(oracle.CONFIG)
    model.requires_grad_(False).eval()
    set_formats(model, schemes.make_plan(scheme))
    for name, tensor in weights.items():
        owner, _, last = name.rpartition(".")
        module = model.get_submodule(owner)
        if last == "weight" and isinstance(module, Linear) and module.format != PLAIN:
            module.quantize(tensor)
        else:
            setattr(module, last, torch.nn.Parameter(tensor, requires_grad=False))
    model.finish_loading(torch.device("cpu"))
    return model


def widened(
    model: MllamaForConditionalGeneration, weights: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The weights that the quantised layers of `model` stand for."""
    out = dict(weights)
    for name, layer in model.named_modules():
        if isinstance(layer, Linear):
            out[f"{name}.weight"] = layer.format.widen(*layer.held())
    return out


def logits_of(model: MllamaForConditionalGeneration) -> torch.Tensor:
    """Of a prompt with a picture and of two tokens after it."""
    reader = oracle.Reader(model)
    logits = [reader.prefill(*oracle.CASES["A_start_picture_text"])]
    logits += [reader.decode(torch.tensor([[token]])) for token in (9, 40)]
    return torch.stack(logits)


@pytest.mark.parametrize("scheme", ["int8", "int4-g32"])
def test_a_quantised_model_computes_with_its_rounded_weights(
    weights: dict[str, torch.Tensor], scheme: str
) -> None:
    model = loaded(weights, scheme)
    exact = logits_of(oracle.build(widened(model, weights)))
    off = (logits_of(model) - exact).norm() / exact.norm()
    assert 0 < off < 0.03  # activations are rounded as well


@pytest.mark.parametrize("scheme", ["none", "int8", "int4-g32"])
def test_joined_projections_change_nothing(weights: dict[str, torch.Tensor], scheme: str) -> None:
    model = loaded(weights, scheme)
    apart = logits_of(model)
    model.fuse_projections()
    assert model.language_model.model.layers[0].self_attn.qkv_proj is not None
    torch.testing.assert_close(logits_of(model), apart)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"quantize": "int5"}, UsageError, "unknown quantisation scheme 'int5'; use one of"),
        ({"quantize": "gguf"}, UsageError, "use one of auto, none, int8, int4"),
        ({"quantize": "fp8"}, DeviceError, "fp8 needs a CUDA device, not cpu; use int8 or int4"),
        (
            {"quantize": "int8", "quantize_keep": ["eyes"]},
            UsageError,
            "unknown part 'eyes' to keep; use text, head, vision",
        ),
    ],
)
def test_what_cannot_be_quantised_is_refused(options, error, message) -> None:
    with pytest.raises(error, match=message):
        mmchat.load("tiny", device="cpu", **options)
