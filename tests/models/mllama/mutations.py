"""Mistakes to make in the model, each of which a comparison must see.

Every one is a mistake that some implementation has shipped, or one slip away from it. A mutation
takes the model and pytest's monkeypatch, and changes one thing. MUTATIONS: by the comparison that
sees it, "cases" being those of the parity tests.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

from mmchat.models.mllama import cache, text, vision
from mmchat.nn import decoder, kv_cache, norm
from mmchat.nn.kv_cache import LayerCache
from mmchat.nn.rope import inverse_frequencies, rotate, scale_llama3
from tests.models.mllama import oracle
from tests.models.mllama.oracle import CONFIG

MUTATIONS: dict[str, dict[str, Callable]] = {}


def mutation(function: Callable, comparison: str = "cases") -> Callable:
    MUTATIONS.setdefault(comparison, {})[function.__name__] = function
    return function


long_text = partial(mutation, comparison="long texts")
scaling = partial(mutation, comparison="scaling")
filled_tables = partial(mutation, comparison="filled tables")
outer_norms = partial(mutation, comparison="norm_eps")


def cross_layers(model) -> list[text.CrossAttentionLayer]:
    return [layer for layer in model.language_model.model.layers if hasattr(layer, "cross_attn")]


# Text


@mutation
def gate_of_one_attention_branch_off(model, patch):
    cross_layers(model)[1].cross_attn_attn_gate.data.zero_()


@mutation
def gate_of_one_feed_forward_branch_off(model, patch):
    cross_layers(model)[0].cross_attn_mlp_gate.data.zero_()


@mutation
def gate_without_tanh(model, patch):
    gate = cross_layers(model)[0].cross_attn_attn_gate
    gate.data = gate.data.clamp(-0.99, 0.99).atanh()  # so that tanh gives the raw value


@mutation
def text_norm_eps_1e_6(model, patch):
    for module in model.modules():
        if isinstance(module, norm.RMSNorm):
            module.eps = 1e-6


@mutation
def key_norm_eps_1e_6(model, patch):
    for layer in cross_layers(model):
        layer.cross_attn.k_norm.eps = 1e-6


@mutation
def key_norm_dropped(model, patch):
    for layer in cross_layers(model):
        layer.cross_attn.k_norm = torch.nn.Identity()


@mutation
def query_norm_dropped(model, patch):
    for layer in cross_layers(model):
        layer.cross_attn.q_norm = torch.nn.Identity()


@mutation
def rope_on_adjacent_pairs(model, patch):
    def rotate_pairs(x, cos, sin):
        half = x.shape[-1] // 2
        cos, sin = cos[..., :half], sin[..., :half]
        even, odd = x[..., ::2], x[..., 1::2]
        return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)

    patch.setattr(decoder, "rotate", rotate_pairs)


@mutation
def rope_on_the_query_of_cross_attention(model, patch):
    rotary = model.language_model.model.rotary

    def turned(module, arguments, query):
        return rotate(query, *rotary(torch.arange(query.shape[0])))

    for layer in cross_layers(model):
        layer.cross_attn.q_norm.register_forward_hook(turned)


@mutation
def rope_frequencies_not_scaled(model, patch):
    rotary = model.language_model.model.rotary
    rotary.inv_freq = inverse_frequencies(rotary.head_dim, rotary.theta)


@mutation
def decode_position_one_too_late(model, patch):
    rotary = model.language_model.model.rotary
    rotary.register_forward_pre_hook(
        lambda module, arguments: (arguments[0] + (arguments[0].numel() == 1),)
    )


def rescale(model, **changes) -> None:
    rotary = model.language_model.model.rotary
    values = {**rotary.scaling, **changes}
    frequencies = inverse_frequencies(rotary.head_dim, rotary.theta)
    rotary.inv_freq = scale_llama3(frequencies, **values)


@scaling
def scaling_by_the_released_factor(model, patch):
    rescale(model, factor=8.0)


@scaling
def scaling_by_the_released_low_factor(model, patch):
    rescale(model, low_freq_factor=1.0)


@scaling
def scaling_by_the_released_high_factor(model, patch):
    rescale(model, high_freq_factor=4.0)


@scaling
def scaling_by_the_released_context(model, patch):
    rescale(model, original_max_position_embeddings=8192)


@long_text
def rotary_positions_in_bfloat16(model, patch):
    """Which has every whole number up to 256."""
    model.language_model.model.rotary.register_forward_pre_hook(
        lambda module, arguments: (arguments[0].bfloat16().long(),)
    )


def change_step_mask(patch, change: Callable) -> None:
    original = kv_cache.causal_mask

    def changed(positions, length):
        return original(positions, length) & change(torch.arange(length), positions)

    patch.setattr(kv_cache, "causal_mask", changed)


@long_text
def decoding_does_not_see_itself_beyond_256(model, patch):
    change_step_mask(
        patch, lambda columns, at: (columns != at[..., None])[:, None] | (at < 256)[..., None]
    )


@long_text
def decoding_sees_the_last_1024_positions(model, patch):
    change_step_mask(patch, lambda columns, at: (columns > at[..., None] - 1024)[:, None])


@long_text
def a_grown_cache_loses_its_last_position(model, patch):
    original = LayerCache._move

    def lossy(self, slot, capacity):
        original(self, slot, capacity)
        if capacity > 512:
            self.row(slot)[0][:, :, 511] = 0

    patch.setattr(LayerCache, "_move", lossy)


@mutation
def no_token_for_the_image_but_the_last_one_of_the_vocabulary(model, patch):
    model.language_model.model.embed_tokens.register_forward_pre_hook(
        lambda module, arguments: (arguments[0].clamp(max=CONFIG.text_config.vocab_size - 1),)
    )


# Which pictures a position sees


def change_intervals(patch, change: Callable) -> None:
    original = cache.visible_images
    patch.setattr(cache, "visible_images", lambda images, end: change(original(images, end)))


@mutation
def interval_starts_one_late(model, patch):
    change_intervals(patch, lambda found: [(first + 1, end, seen) for first, end, seen in found])


@mutation
def text_before_the_first_picture_sees_it(model, patch):
    change_intervals(patch, lambda found: [(0, *found[0][1:]), *found[1:]])


@mutation
def all_earlier_pictures_stay_visible(model, patch):
    def widen(found):
        last = found[-1][2][-1:]
        pictures = [seen[-1] for _, _, seen in found[:-1]] + last
        return [(first, end, pictures[: i + 1]) for i, (first, end, _) in enumerate(found)]

    change_intervals(patch, widen)


@mutation
def adjacent_pictures_are_not_seen_together(model, patch):
    change_intervals(patch, lambda found: [(first, end, seen[-1:]) for first, end, seen in found])


@mutation
def at_most_two_pictures_are_seen_together(model, patch):
    change_intervals(patch, lambda found: [(first, end, seen[-2:]) for first, end, seen in found])


@mutation
def generated_tokens_see_no_picture(model, patch):
    patch.setattr(cache.MllamaCache, "seen_steps", lambda self, *rows: [])


# Vision


def on_tiles(model, change: Callable) -> None:
    slices = model.vision_model.slices
    model.vision_model.slices = lambda tiles, ratios, found: slices(*change(tiles, ratios), found)


@mutation
def tiles_column_by_column(model, patch):
    def swap(tiles, ratios):
        return (tiles[:, [0, 2, 1, 3]] if tiles.shape[1] == 4 else tiles), ratios

    on_tiles(model, swap)


@mutation
def canvas_width_before_height(model, patch):
    swapped = [oracle.CANVASES.index((w, h)) + 1 for h, w in oracle.CANVASES]
    on_tiles(model, lambda tiles, ratios: (tiles, torch.tensor([0, *swapped])[ratios]))


@mutation
def pixels_column_by_column(model, patch):
    on_tiles(model, lambda tiles, ratios: (tiles.mT, ratios))


@mutation
def intermediate_layers_one_off(model, patch):
    model.vision_model.config = dataclasses.replace(
        CONFIG.vision_config, intermediate_layers_indices=(2, 3, 4)
    )


@mutation
def intermediate_layers_concatenated(model, patch):
    vision_config = CONFIG.vision_config
    count, size = len(vision_config.intermediate_layers_indices), vision_config.hidden_size

    def regrouped(tiles, ratios, found):
        yield from slices(tiles, ratios, found)
        last, rest = found.pop().split((size, count * size), dim=-1)
        found.append(torch.cat((last, rest.unflatten(-1, (size, count)).mT.flatten(-2)), dim=-1))

    slices = model.vision_model.slices
    model.vision_model.slices = regrouped


@mutation
def vision_gate_without_tanh(model, patch):
    patch.setattr(vision.GatedVisionLayer, "attention_scale", lambda self: self.gate_attn)


@mutation
def layernorm_pre_eps_1e_6(model, patch):
    model.vision_model.layernorm_pre.eps = 1e-6


@mutation
def global_layers_norm_eps_1e_6(model, patch):
    for layer in model.vision_model.global_transformer.layers:
        layer.input_layernorm.eps = 1e-6


@outer_norms
def outer_norms_with_the_eps_of_the_layers(model, patch):
    for layer in (model.vision_model.layernorm_pre, model.vision_model.layernorm_post):
        layer.eps = model.vision_model.config.norm_eps


@filled_tables
def padding_tiles_taken_for_equal(model, patch):
    model.vision_model.padding_is_equal = True


@filled_tables
def padding_tiles_without_post_tile_embedding(model, patch):
    original = vision.VisionModel._add_post_tile

    def spare(self, x, ratios, slots):
        added = original(self, x, ratios, slots)
        tokens = self.config.tokens_per_tile
        return torch.cat((added[:, :tokens], x[:, tokens:]), dim=1)  # one tile is valid

    patch.setattr(vision.VisionModel, "_add_post_tile", spare)


@mutation
def gelu_by_tanh(model, patch):
    patch.setattr("mmchat.nn.mlp.F.gelu", lambda x, gelu=F.gelu: gelu(x, approximate="tanh"))


def change_counts(patch, change: Callable) -> None:
    original = vision.VisionModel._log_counts

    def changed(self, num_tiles, x):
        return change(original(self, num_tiles, x), num_tiles * self.config.tokens_per_tile)

    patch.setattr(vision.VisionModel, "_log_counts", changed)


@mutation
def padding_counted_once(model, patch):
    change_counts(patch, lambda counts, valid: torch.zeros_like(counts))


@mutation
def pad_tokens_of_valid_tiles_dropped(model, patch):
    def drop(counts, valid):
        tiles = valid // CONFIG.vision_config.tokens_per_tile
        counts[valid : valid + tiles] = -torch.inf
        return counts

    change_counts(patch, drop)


@mutation
def padding_tiles_dropped(model, patch):
    def drop(counts, valid):
        tiles = valid // CONFIG.vision_config.tokens_per_tile
        counts[valid + tiles :] = -torch.inf
        return counts

    change_counts(patch, drop)


@mutation
def post_tile_embedding_skipped(model, patch):
    patch.setattr(vision.VisionModel, "_add_post_tile", lambda self, x, *arguments: x)


@mutation
def post_tile_embedding_not_on_pad_tokens(model, patch):
    original = vision.VisionModel._add_post_tile

    def spare(self, x, ratios, num_tiles):
        valid = num_tiles * self.config.tokens_per_tile
        added = original(self, x, ratios, num_tiles)
        return torch.cat((added[:, :valid], x[:, valid:]), dim=1)

    patch.setattr(vision.VisionModel, "_add_post_tile", spare)


@mutation
def pre_tile_embedding_skipped(model, patch):
    model.vision_model.pre_tile_positional_embedding.gate.data.zero_()


@mutation
def tile_positions_without_their_share_of_the_gate(model, patch):
    def whole(self):
        return self.embedding

    patch.setattr(vision.PositionEmbedding, "inside_tile", whole)


@mutation
def projector_bias_dropped(model, patch):
    model.multi_modal_projector.bias.data.zero_()
