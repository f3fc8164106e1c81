"""The parity test of LLaVA can fail: each of these mistakes is seen, by ten times the tolerance.

Every one is a mistake that some implementation has shipped, or one slip away from it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest
import torch
import torch.nn.functional as F

from mmchat.models.embedding_model import EmbeddingCache
from mmchat.models.llava import vision
from mmchat.nn import decoder
from mmchat.nn.kv_cache import LayerCache
from mmchat.nn.norm import RMSNorm
from mmchat.nn.rope import inverse_frequencies
from tests.models.llava import oracle
from tests.models.llava import transformers_llava as theirs
from tests.models.llava.oracle import CASES, CONFIG, TOLERANCE

pytestmark = pytest.mark.slow

STEPS = 5
COMPARED = ("one", "two", "adjacent")
MUTATIONS: dict[str, Callable] = {}
OF_EPS: dict[str, Callable] = {}  # they show where the norms are fed small numbers


def mutation(function: Callable) -> Callable:
    MUTATIONS[function.__name__] = function
    return function


def of_eps(function: Callable) -> Callable:
    OF_EPS[function.__name__] = function
    return function


def use_features(model, **changed) -> None:
    config = replace(CONFIG, features=replace(CONFIG.features, **changed))
    model.config = model.vision_tower.config = config


@mutation
def last_vision_layer_for_the_one_before(model, patch):
    use_features(model, layer=-1)


@mutation
def one_vision_layer_too_few(model, patch):
    use_features(model, layer=-3)


@mutation
def norm_behind_the_vision_encoder(model, patch):
    norm = model.vision_tower.vision_model.post_layernorm
    model.multi_modal_projector.register_forward_pre_hook(lambda _, given: (norm(given[0]),))


@mutation
def no_norm_in_front_of_the_vision_encoder(model, patch):
    model.vision_tower.vision_model.pre_layrnorm = torch.nn.Identity()


@mutation
def exact_gelu_in_the_vision_encoder(model, patch):
    patch.setattr(vision, "quick_gelu", F.gelu)


@mutation
def quick_gelu_in_the_projector(model, patch):
    projector = model.multi_modal_projector
    patch.setattr(
        projector, "forward", lambda x: projector.linear_2(vision.quick_gelu(projector.linear_1(x)))
    )


@mutation
def patches_column_by_column(model, patch):
    embed = model.vision_tower.vision_model.embeddings
    embed.register_forward_pre_hook(lambda _, given: (given[0].transpose(2, 3),))


@mutation
def channels_as_blue_green_red(model, patch):
    embed = model.vision_tower.vision_model.embeddings
    embed.register_forward_pre_hook(lambda _, given: (given[0].flip(1),))


@mutation
def no_positions_of_patches(model, patch):
    model.vision_tower.vision_model.embeddings.position_embedding.weight.data.zero_()


@mutation
def class_token_kept_and_the_last_patch_dropped(model, patch):
    model.multi_modal_projector.register_forward_pre_hook(
        lambda _, given: (given[0].roll(1, dims=1),)
    )


@mutation
def biases_of_vision_keys_dropped_with_those_of_values(model, patch):
    for layer in model.vision_tower.vision_model.encoder.layers:
        layer.self_attn.v_proj.bias.data.zero_()


@mutation
def embeddings_of_pictures_scaled(model, patch):
    model.multi_modal_projector.register_forward_hook(lambda _, __, found: found * 0.9)


@mutation
def embeddings_of_pictures_begin_one_too_late(model, patch):
    pictures = EmbeddingCache.pictures

    def late(self, batch):
        found = pictures(self, batch)
        return None if found is None else (found[0], found[1].roll(1, dims=0))

    patch.setattr(EmbeddingCache, "pictures", late)


@mutation
def a_picture_as_one_position_of_rotation(model, patch):
    rotary = model.language_model.model.rotary

    def squeezed(_, given):
        positions = given[0]
        return (torch.where(positions > 3, (positions - 24).clamp(min=3), positions),)

    rotary.register_forward_pre_hook(squeezed)


@mutation
def another_rotary_base(model, patch):
    rotary = model.language_model.model.rotary
    rotary.inv_freq = inverse_frequencies(rotary.head_dim, 500_000.0)


@mutation
def rotation_of_adjacent_pairs(model, patch):
    def rotate_pairs(x, cos, sin):
        half = x.shape[-1] // 2
        cos, sin = cos[..., :half], sin[..., :half]
        even, odd = x[..., ::2], x[..., 1::2]
        return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)

    patch.setattr(decoder, "rotate", rotate_pairs)


@mutation
def a_step_reads_one_position_too_few(model, patch):
    row = LayerCache.row

    def stale(self, slot):
        key, value = row(self, slot)
        return key, value.roll(1, dims=2)

    patch.setattr(LayerCache, "row", stale)


@mutation
def gate_and_up_exchanged(model, patch):
    for layer in model.language_model.model.layers:
        layer.mlp.gate_proj, layer.mlp.up_proj = layer.mlp.up_proj, layer.mlp.gate_proj


@mutation
def no_final_norm(model, patch):
    model.language_model.model.norm.register_forward_hook(lambda _, given, __: given[0])


@of_eps
def text_norm_eps_1e_6(model, patch):
    for module in model.modules():
        if isinstance(module, RMSNorm):
            module.eps = 1e-6


@of_eps
def vision_norm_eps_1e_6(model, patch):
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = 1e-6


@cache
def expected(case: str, small: bool):
    their = theirs.build(oracle.random_weights(small=small))
    return theirs.run(their, CASES[case], STEPS, CONFIG.positions_per_image)


def largest_difference(model, small: bool = False) -> float:
    found = []
    for case in COMPARED:
        their, said = expected(case, small)
        found.append(oracle.distance(oracle.logits(model, CASES[case], said), their))
    return max(found)


@pytest.mark.parametrize("small", [False, True])
def test_without_a_mutation_the_comparison_agrees(small):
    assert largest_difference(oracle.build(oracle.random_weights(small=small)), small) < TOLERANCE


@pytest.mark.parametrize("name", MUTATIONS)
def test_the_comparison_sees(name, monkeypatch):
    model = oracle.build(oracle.random_weights())
    MUTATIONS[name](model, monkeypatch)
    assert largest_difference(model) > 10 * TOLERANCE


@pytest.mark.parametrize("name", OF_EPS)
def test_the_comparison_of_small_numbers_sees(name, monkeypatch):
    model = oracle.build(oracle.random_weights(small=True))
    OF_EPS[name](model, monkeypatch)
    assert largest_difference(model, small=True) > 10 * TOLERANCE
