"""Mllama in its plain form: dense masks, all tile slots and pad tokens computed, no cache.

It exists to check the shortcuts of the model. It computes in the dtype of the weights (the tests
use float64), takes the Hub's weight names and shares no code with the package.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = dict[str, Tensor]
OUTER_EPS = 1e-5  # of the norms before and after the local layers, whatever the config says


def linear(w: Weights, name: str, x: Tensor) -> Tensor:
    return F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))


def layer_norm(w: Weights, name: str, x: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], eps)


def rms_norm(w: Weights, name: str, x: Tensor, eps: float) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * w[f"{name}.weight"]


def masked_attention(query: Tensor, key: Tensor, value: Tensor, allowed: Tensor) -> Tensor:
    """query [H, S, D], key and value [G, N, D], allowed [S, N] -> [S, H·D]; blocked rows give 0."""
    copies = query.shape[0] // key.shape[0]
    key, value = key.repeat_interleave(copies, 0), value.repeat_interleave(copies, 0)
    scores = query @ key.mT / math.sqrt(query.shape[-1])
    weights = scores.masked_fill(~allowed, -math.inf).softmax(-1).nan_to_num(0.0)
    return (weights @ value).transpose(0, 1).flatten(1)


def heads(x: Tensor, count: int) -> Tensor:
    """[S, H·D] -> [H, S, D]."""
    return x.unflatten(-1, (count, -1)).transpose(0, 1)


# The vision tower


def vision_features(w: Weights, config, tiles: Tensor, canvas: tuple[int, int]) -> Tensor:
    """tiles [t, C, S, S] of one picture -> features [t, P, output_dim] of its valid tiles."""
    vision, valid = config.vision_config, canvas[0] * canvas[1]
    slots, size, tokens = vision.max_num_tiles, vision.hidden_size, vision.tokens_per_tile
    ratio = vision.aspect_ratios.index(canvas) + 1
    name = "vision_model."

    def table(key: str) -> Tensor:
        return w[f"{name}{key}.weight"][ratio].view(slots, -1, size)

    def gate(key: str) -> Tensor:
        return w[f"{name}{key}.gate"].tanh()

    pixels = torch.zeros(slots, *tiles.shape[1:], dtype=w[f"{name}class_embedding"].dtype)
    pixels[:valid] = tiles
    x = F.conv2d(pixels, w[f"{name}patch_embedding.weight"], stride=vision.patch_size)
    x = x.flatten(2).mT
    key = "pre_tile_positional_embedding"
    x = x + gate(key) * table(f"{key}.embedding")
    x = torch.cat((w[f"{name}class_embedding"].expand(slots, 1, -1), x), dim=1)
    key = "gated_positional_embedding"
    x = x + (1 - gate(key)) * w[f"{name}{key}.embedding"]
    x = x + gate(key) * table(f"{key}.tile_embedding")
    x = layer_norm(w, f"{name}layernorm_pre", x, OUTER_EPS)
    x = F.pad(x, (0, 0, 0, -tokens % 8))
    padding = torch.ones(x.shape[:2], dtype=torch.bool)
    padding[:valid, :tokens] = False
    allowed = ~(padding.flatten()[:, None] & padding.flatten())
    x = x.flatten(0, 1)
    saved = []
    for index in range(vision.num_hidden_layers):
        if index in vision.intermediate_layers_indices:
            saved.append(x)
        x = vision_layer(w, f"{name}transformer.layers.{index}.", vision, x, allowed)
    x = layer_norm(w, f"{name}layernorm_post", x, OUTER_EPS).unflatten(0, (slots, -1))
    key = "post_tile_positional_embedding"
    x = x + gate(key) * table(f"{key}.embedding")
    x = x.flatten(0, 1)
    for index in range(vision.num_global_layers):
        prefix = f"{name}global_transformer.layers.{index}."
        x = vision_layer(w, prefix, vision, x, allowed)
    features = [x] + [torch.stack([s[:, c] for s in saved], dim=-1) for c in range(size)]
    return torch.cat(features, dim=-1).unflatten(0, (slots, -1))[:valid, :tokens]


def vision_layer(w: Weights, name: str, vision, x: Tensor, allowed: Tensor) -> Tensor:
    one = torch.ones(1, dtype=x.dtype)
    attention_gate = w[f"{name}gate_attn"].tanh() if f"{name}gate_attn" in w else one
    mlp_gate = w[f"{name}gate_ffn"].tanh() if f"{name}gate_ffn" in w else one
    y = layer_norm(w, f"{name}input_layernorm", x, vision.norm_eps)
    parts = [
        heads(linear(w, f"{name}self_attn.{p}_proj", y), vision.attention_heads) for p in "qkv"
    ]
    attended = masked_attention(*parts, allowed)
    x = x + attention_gate * linear(w, f"{name}self_attn.o_proj", attended)
    y = layer_norm(w, f"{name}post_attention_layernorm", x, vision.norm_eps)
    return x + mlp_gate * linear(w, f"{name}mlp.fc2", F.gelu(linear(w, f"{name}mlp.fc1", y)))


# The text decoder


def cross_mask(ids: Sequence[int], image: int) -> Tensor:
    """[S, N]: which of the N pictures each position sees.

    A picture is seen from its token to just before the next one's; a run of adjacent pictures ends
    where the last of them ends; the last one has no end.
    """
    starts = [at for at, token in enumerate(ids) if token == image]
    ends = [*starts[1:], len(ids)][: len(starts)]
    for i in reversed(range(len(starts) - 1)):
        if starts[i + 1] == starts[i] + 1:
            ends[i] = ends[i + 1]
    seen = torch.zeros(len(ids), len(starts), dtype=torch.bool)
    for i, (start, end) in enumerate(zip(starts, ends, strict=True)):
        seen[start:end, i] = True
    return seen


def text_logits(w: Weights, config, ids: Sequence[int], states: Sequence[Tensor]) -> Tensor:
    """Logits [S, V] of one row. states: projected features [t, P, E] of each picture, in order."""
    text = config.text_config
    slots, tokens = config.vision_config.max_num_tiles, config.vision_config.tokens_per_tile
    seen = cross_mask(ids, config.image_token_id)
    used = torch.zeros(len(states), slots, dtype=torch.bool)
    padded = []
    for i, state in enumerate(states):
        used[i, : len(state)] = True
        padded.append(F.pad(state, (0, 0, 0, 0, 0, slots - len(state)), value=1e3))
    dense = (seen[:, :, None] & used).flatten(1).repeat_interleave(tokens, 1)
    vision = torch.stack(padded).flatten(0, 2) if states else None
    x = w["language_model.model.embed_tokens.weight"][torch.tensor(ids)]
    for index in range(text.num_hidden_layers):
        name = f"language_model.model.layers.{index}."
        if index not in text.cross_attention_layers:
            x = self_layer(w, name, text, x)
        elif vision is not None:
            x = cross_layer(w, name, text, x, vision, dense)
    x = rms_norm(w, "language_model.model.norm", x, text.rms_norm_eps)
    return linear(w, "language_model.lm_head", x)


def self_layer(w: Weights, name: str, text, x: Tensor) -> Tensor:
    y = rms_norm(w, f"{name}input_layernorm", x, text.rms_norm_eps)
    query = heads(linear(w, f"{name}self_attn.q_proj", y), text.num_attention_heads)
    key = heads(linear(w, f"{name}self_attn.k_proj", y), text.num_key_value_heads)
    value = heads(linear(w, f"{name}self_attn.v_proj", y), text.num_key_value_heads)
    causal = torch.ones(len(x), len(x), dtype=torch.bool).tril()
    attended = masked_attention(rotated(query, text), rotated(key, text), value, causal)
    x = x + linear(w, f"{name}self_attn.o_proj", attended)
    return x + swiglu(w, name, rms_norm(w, f"{name}post_attention_layernorm", x, text.rms_norm_eps))


def cross_layer(w: Weights, name: str, text, x: Tensor, vision: Tensor, allowed: Tensor) -> Tensor:
    eps, some = text.rms_norm_eps, allowed.any(1, keepdim=True)
    y = rms_norm(w, f"{name}input_layernorm", x, eps)
    query = heads(linear(w, f"{name}cross_attn.q_proj", y), text.num_attention_heads)
    key = heads(linear(w, f"{name}cross_attn.k_proj", vision), text.num_key_value_heads)
    value = heads(linear(w, f"{name}cross_attn.v_proj", vision), text.num_key_value_heads)
    query = rms_norm(w, f"{name}cross_attn.q_norm", query, eps)
    key = rms_norm(w, f"{name}cross_attn.k_norm", key, eps)
    attended = masked_attention(query, key, value, allowed) * some
    out = linear(w, f"{name}cross_attn.o_proj", attended)
    x = x + w[f"{name}cross_attn_attn_gate"].tanh() * out
    y = swiglu(w, name, rms_norm(w, f"{name}post_attention_layernorm", x, eps)) * some
    return x + w[f"{name}cross_attn_mlp_gate"].tanh() * y


def swiglu(w: Weights, name: str, x: Tensor) -> Tensor:
    gate = F.silu(linear(w, f"{name}mlp.gate_proj", x))
    return linear(w, f"{name}mlp.down_proj", gate * linear(w, f"{name}mlp.up_proj", x))


def rotated(x: Tensor, text) -> Tensor:
    """Turn the pairs (i, i + D/2) of x [H, S, D] as complex numbers."""
    half = x.shape[-1] // 2
    turns = [frequency(i, 2 * half, text) for i in range(half)]
    angles = torch.arange(x.shape[1])[:, None] * torch.tensor(turns, dtype=torch.float64)
    numbers = torch.complex(x[..., :half], x[..., half:])
    numbers = numbers * torch.polar(torch.ones_like(angles), angles).to(numbers.dtype)
    return torch.cat((numbers.real, numbers.imag), dim=-1)


def frequency(pair: int, head_dim: int, text) -> float:
    scaling, value = text.rope_scaling, text.rope_theta ** (-2 * pair / head_dim)
    context, wavelength = scaling.original_max_position_embeddings, 2 * math.pi / value
    if wavelength < context / scaling.high_freq_factor:
        return value
    if wavelength > context / scaling.low_freq_factor:
        return value / scaling.factor
    span = scaling.high_freq_factor - scaling.low_freq_factor
    share = (context / wavelength - scaling.low_freq_factor) / span
    return (1 - share) * value / scaling.factor + share * value


# Both together


def logits(w: Weights, config, ids: Sequence[int], pictures: Sequence) -> Tensor:
    """Logits [S, V] of one row in one pass; pictures: PreparedImage, one for each image token."""
    states = []
    for image in pictures:
        pixels = image.tensors[0].to(w["vision_model.class_embedding"].dtype)
        features = vision_features(w, config, pixels, image.facts.grid)
        states.append(linear(w, "multi_modal_projector", features))
    return text_logits(w, config, ids, states)
