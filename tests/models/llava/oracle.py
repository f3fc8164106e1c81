"""A tiny LLaVA whose parameters are all random, and cases in which pictures stand in its text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from mmchat.models.base import Batch
from mmchat.models.hub_config import CLIP_MEAN, CLIP_STD
from mmchat.models.llava.config import (
    FeaturesConfig,
    ImageProcessorConfig,
    LlavaConfig,
    TextConfig,
    VisionConfig,
)
from mmchat.models.llava.model import LlavaForConditionalGeneration
from mmchat.models.llava.tensor_names import hub_shapes
from mmchat.models.prompt import MediaFacts, PlacedMedia, Prompt
from mmchat.nn.shapes_only import shapes_only
from tests.models.reading import read

TOLERANCE = 1e-4  # of logits whose standard deviation is about 1.3; 1e-5 is usual
GRID, PATCH = 5, 14  # 25 positions a picture

CONFIG = LlavaConfig(
    vision_config=VisionConfig(
        hidden_size=48,
        intermediate_size=112,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_channels=3,
        image_size=GRID * PATCH,
        patch_size=PATCH,
        layer_norm_eps=1e-5,
    ),
    text_config=TextConfig(
        vocab_size=44,
        hidden_size=64,
        intermediate_size=144,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        rms_norm_eps=1e-5,
        rope_theta=10_000.0,
        max_position_embeddings=512,
    ),
    features=FeaturesConfig(layer=-2, strategy="default", tower=None),
    image_processor=ImageProcessorConfig(CLIP_MEAN, CLIP_STD, square="pad", alpha="drop"),
)


def with_features(layer: int, strategy: str = "default") -> LlavaConfig:
    features = replace(CONFIG.features, layer=layer, strategy=strategy)
    return replace(CONFIG, features=features)


_NO_FACTS = MediaFacts((0, 0), (0, 0), (1, 1), 0, 0)


@dataclass(frozen=True, eq=False)
class Pixels:
    """models.prompt.Media of normalised pixels [C, S, S]."""

    content_hash: str
    tensors: tuple[Tensor, ...]
    facts: MediaFacts = _NO_FACTS


@cache
def picture(seed: int) -> Pixels:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(3, GRID * PATCH, GRID * PATCH, generator=generator)
    return Pixels(f"picture {seed}", (pixels,))


Part = int | Pixels
A, B = picture(1), picture(2)
CASES: dict[str, tuple[Part, ...]] = {
    "one": (1, 5, 17, A, 13, 33, 9, 4),
    "first": (1, A, 17, 33),
    "two": (1, 5, A, 17, 33, B, 4, 7, 8),
    "adjacent": (1, B, A, 33, 9),
    "last": (1, 5, 8, A),
    "text": (1, 5, 17, 33, 9),
}
FEATURES = {"default -2": (-2, "default"), "full -2": (-2, "full"), "default -1": (-1, "default"),
            "default -4": (-4, "default"), "default 3": (3, "default")}  # fmt: skip


def prompt(parts: Sequence[Part], config: LlavaConfig = CONFIG) -> Prompt:
    ids: list[int] = []
    media = []
    for part in parts:
        if isinstance(part, Pixels):
            media.append(PlacedMedia(len(ids), config.positions_per_image, part))
            ids += [config.image_token_id] * config.positions_per_image
        else:
            ids.append(part)
    return Prompt(tuple(ids), tuple(media))


@cache
def random_weights(config: LlavaConfig = CONFIG, *, small: bool = False) -> dict[str, Tensor]:
    """Every parameter, by the Hub's names. small: so that the eps of the norms counts."""
    generator = torch.Generator().manual_seed(1)
    weights = {}
    for name, shape in sorted(hub_shapes(config).items()):
        value = torch.randn(shape, generator=generator)
        if "norm" in name or "layrnorm" in name:
            value = 1 + 0.2 * value if name.endswith("weight") else 0.1 * value
        elif name.endswith("bias"):
            value = 0.3 * value
        elif "embed" in name and "patch" not in name:
            value = value * 0.7
        else:
            value = value * 1.3 * value[0].numel() ** -0.5
        weights[name] = value * 1e-2 if small and "embed" in name else value
    return weights


def build(
    weights: dict[str, Tensor] | None = None, config: LlavaConfig = CONFIG
) -> LlavaForConditionalGeneration:
    with shapes_only():
        model = LlavaForConditionalGeneration(config)
    weights = random_weights(config) if weights is None else weights
    copies = {name: value.clone() for name, value in weights.items()}
    model.load_state_dict(copies, strict=True, assign=True)
    model.finish_loading(torch.device("cpu"))
    return model.eval()


@torch.inference_mode()
def logits(
    model: LlavaForConditionalGeneration, parts: Sequence[Part], said: Sequence[int] = ()
) -> Tensor:
    """Logits [N, V] of the prompt, and of what was `said` after it, token by token."""
    cache = model.new_cache(1, 0)
    rows = [read(model, cache, prompt(parts, model.config))]
    for token in said:
        rows.append(model.forward(Batch.last_of(torch.tensor([token]), cache.lengths[0]), cache))
    return torch.cat(rows)


def distance(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return float((found - expected).abs().max())
