"""The comparison with the original's logits can fail: each of these mistakes is seen, by ten times
the tolerance. Every one is a mistake that some implementation has shipped, or one slip from it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from mmchat.models.embedding_model import EmbeddingCache
from mmchat.models.qwen_vl import text, vision
from mmchat.models.qwen_vl.config import TextConfig
from mmchat.nn.norm import RMSNorm
from tests.models.qwen_vl import oracle
from tests.models.qwen_vl.oracle import TOLERANCE

pytestmark = pytest.mark.slow

MUTATIONS: dict[str, Callable] = {}
OF_EPS: dict[str, Callable] = {}  # they show where the norms are fed small numbers
COMPARED = ("one", "two", "long text", "crossing")


def mutation(function: Callable) -> Callable:
    MUTATIONS[function.__name__] = function
    return function


def of_eps(function: Callable) -> Callable:
    OF_EPS[function.__name__] = function
    return function


def use_text(model, **changed) -> None:
    config = replace(model.config.text_config, **changed)
    model.config = replace(model.config, text_config=config)
    model.transformer.config = config


@mutation
def no_dynamic_ntk(model, patch):
    use_text(model, use_dynamic_ntk=False)


@mutation
def ntk_from_one_position_too_late(model, patch):
    alpha = TextConfig.alpha
    patch.setattr(TextConfig, "alpha", lambda self, length: alpha(self, length * 3 // 5))


@mutation
def no_logn(model, patch):
    use_text(model, use_logn_attn=False)


@mutation
def logn_by_the_positions_counted_from_zero_to_a_limit_too_small(model, patch):
    sharpness = text.TextModel.sharpness
    patch.setattr(text.TextModel, "sharpness", lambda self, p: sharpness(self, p + 8))


@mutation
def gate_and_up_exchanged(model, patch):
    for layer in model.transformer.h:
        layer.mlp.w1, layer.mlp.w2 = layer.mlp.w2, layer.mlp.w1


@mutation
def no_biases_of_queries_keys_and_values(model, patch):
    for layer in model.transformer.h:
        layer.attn.c_attn.bias.data.zero_()


@mutation
def vision_projections_read_as_queries_then_keys_then_values(model, patch):
    def plainly(self, x):
        projected = self.in_proj(x).chunk(3, dim=-1)
        heads = (vision.split_heads(y, self.head_dim) for y in projected)
        return self.out_proj(vision.merge_heads(vision.attend(*heads)))

    patch.setattr(vision.VisionAttention, "forward", plainly)


@mutation
def quick_gelu_in_the_vision_encoder(model, patch):
    patch.setattr(F, "gelu", lambda x: x * torch.sigmoid(1.702 * x))


@mutation
def tables_of_positions_resized_by_corners(model, patch):
    resize = F.interpolate
    patch.setattr(
        F, "interpolate", lambda x, size, **how: resize(x, size, **{**how, "align_corners": True})
    )


@mutation
def tables_of_positions_resized_with_antialias(model, patch):
    resize = F.interpolate
    patch.setattr(F, "interpolate", lambda x, size, **how: resize(x, size, antialias=True, **how))


@mutation
def no_norm_in_front_of_the_vision_encoder(model, patch):
    model.transformer.visual.ln_pre = torch.nn.Identity()


@mutation
def no_norm_behind_the_resampler(model, patch):
    model.transformer.visual.ln_post = torch.nn.Identity()


@mutation
def no_norm_of_the_resamplers_keys(model, patch):
    model.transformer.visual.attn_pool.ln_kv = torch.nn.Identity()


@mutation
def positions_in_the_resamplers_values_too(model, patch):
    def forward(self, x):
        x = self.ln_kv(self.kv_proj(x))
        query = self.ln_q(self.query) + self.pos_embed
        x = x + vision.for_grid(self.pos_embed, x.shape[1])
        return self.attn(query, x, x)

    patch.setattr(vision.Resampler, "forward", forward)


@mutation
def the_last_projection_transposed(model, patch):
    model.transformer.visual.proj.data = model.transformer.visual.proj.data.T.contiguous()


@mutation
def pictures_one_position_too_late(model, patch):
    pictures = EmbeddingCache.pictures

    def late(self, batch):
        found = pictures(self, batch)
        return None if found is None else (found[0], found[1].roll(1, dims=0))

    patch.setattr(EmbeddingCache, "pictures", late)


@mutation
def patches_column_by_column(model, patch):
    patches = vision.VisionModel.patches
    patch.setattr(vision.VisionModel, "patches", lambda self, x: patches(self, x.transpose(2, 3)))


@mutation
def no_final_norm(model, patch):
    model.transformer.ln_f.register_forward_hook(lambda _, given, __: given[0])


@of_eps
def text_norm_eps_1e_5(model, patch):
    for module in model.modules():
        if isinstance(module, RMSNorm):
            module.eps = 1e-5


@of_eps
def vision_norm_eps_1e_5(model, patch):
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = 1e-5


def largest_difference(model, small: bool = False) -> float:
    if small:
        return oracle.difference(model, "small", 84, "one")
    return max(oracle.difference(model, "84", 84, case) for case in COMPARED)


@pytest.mark.parametrize("small", [False, True])
def test_without_a_mutation_the_comparison_agrees(small):
    assert largest_difference(oracle.build(small=small), small) < TOLERANCE


@pytest.mark.parametrize("name", MUTATIONS)
def test_the_comparison_sees(name, monkeypatch):
    model = oracle.build()
    MUTATIONS[name](model, monkeypatch)
    assert largest_difference(model) > 10 * TOLERANCE


@pytest.mark.parametrize("name", OF_EPS)
def test_the_comparison_of_small_numbers_sees(name, monkeypatch):
    model = oracle.build(small=True)
    OF_EPS[name](model, monkeypatch)
    assert largest_difference(model, small=True) > 10 * TOLERANCE
