"""A tiny Qwen-VL whose parameters are all random, and cases in which pictures stand in its text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image as PILImage
from torch import Tensor

from mmchat.conversation import Image
from mmchat.models.base import Batch
from mmchat.models.hub_config import CLIP_MEAN, CLIP_STD
from mmchat.models.prompt import MediaFacts, PlacedMedia, Prompt
from mmchat.models.qwen_vl.config import (
    ImageProcessorConfig,
    QwenVLConfig,
    TextConfig,
    VisionConfig,
)
from mmchat.models.qwen_vl.model import QwenVLForConditionalGeneration
from mmchat.models.qwen_vl.processor import preprocess
from mmchat.models.qwen_vl.tensor_names import hub_shapes
from mmchat.nn.shapes_only import shapes_only
from tests.models.reading import read

TOLERANCE = 1e-4  # of logits whose standard deviation is about 1.3; 1e-5 is usual
GOLDEN = Path(__file__).parents[2] / "golden" / "qwen_vl.npz"
START = 256  # <img>, behind the bytes that the original writes a path with; </img>, <imgpad>
SPAN = 256  # ids between the tags
# One picture stays below the trained length, two go beyond it, three beyond twice as much.
SEQ_LENGTH = 300


def config(side: int = 84) -> QwenVLConfig:
    """side: 448 pixels are more patches than the tables have, 84 fewer."""
    return QwenVLConfig(
        vision_config=VisionConfig(
            width=48,
            layers=3,
            heads=4,
            mlp_ratio=4.9231,
            image_size=side,
            patch_size=14,
            n_queries=256,
        ),
        text_config=TextConfig(
            vocab_size=START + 4,
            hidden_size=256,
            intermediate_size=208,
            num_hidden_layers=3,
            num_attention_heads=4,
            layer_norm_epsilon=1e-6,
            rotary_emb_base=10_000.0,
            seq_length=SEQ_LENGTH,
            max_position_embeddings=4 * SEQ_LENGTH,
            use_dynamic_ntk=True,
            use_logn_attn=True,
        ),
        image_processor=ImageProcessorConfig(CLIP_MEAN, CLIP_STD, alpha="drop"),
    )


CONFIG = config()
MODELS = (("84", 84, False), ("448", 448, False), ("small", 84, True))
SMALL_CASES = ("one",)


@cache
def pictures() -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(3)
    sizes = [(61, 90), (90, 61), (470, 500)]
    return tuple(rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes)


def image(number: int) -> Image:
    return Image(PILImage.fromarray(pictures()[number]), f"{number}.png", f"picture {number}")


@dataclass(frozen=True)
class Picture:
    number: int


def _random(count: int, seed: int) -> tuple[int, ...]:
    return tuple(np.random.default_rng(seed).integers(0, START, count).tolist())


Part = int | Picture
A, B, C = map(Picture, range(3))
CASES: dict[str, tuple[Part, ...]] = {
    "text": (5, 17, 33, 190, 9),
    "one": (201, 5, A, 198, 33, 9, 202),
    "first": (B, 33, 9),
    "two": (201, A, 10, C, 33, 9, 202, 210),
    "three": (201, A, B, 7, C, 33, 9, 202, 210),
    "long text": _random(SEQ_LENGTH + 35, 4),
    "at the limit": _random(SEQ_LENGTH, 5),
    "crossing": _random(SEQ_LENGTH - 2, 6),
}


def token_ids(parts: Sequence[Part], addresses: Sequence[bytes] = (b"", b"", b"")) -> list[int]:
    """With the addresses of pictures between their tags, as the original has them."""
    ids: list[int] = []
    for part in parts:
        if isinstance(part, Picture):
            address = list(addresses[part.number])
            ids += [START, *address, *[START + 2] * (SPAN - len(address)), START + 1]
        else:
            ids.append(part)
    return ids


def compared(length: int) -> list[int]:
    """Positions of a prompt whose logits are kept: 12 of them, the last included."""
    return sorted({length - 1 - at * (length - 1) // 11 for at in range(12)})


@cache
def random_weights(side: int = 84, *, small: bool = False) -> dict[str, Tensor]:
    """Every parameter. small: so that the eps of the norms counts."""
    return weights_of(config(side), small=small)


def weights_of(config: QwenVLConfig, *, small: bool = False) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    weights = {}
    for name, shape in sorted(hub_shapes(config).items()):
        value = torch.randn(shape, generator=generator)
        if ".ln_" in name:
            value = 1 + 0.2 * value if name.endswith("weight") else 0.1 * value
        elif name.endswith("bias"):
            value = 0.3 * value
        elif name.endswith(("positional_embedding", "query", "pos_embed", "wte.weight")):
            value = 0.7 * value
        elif name.endswith("visual.proj"):
            value = value * shape[0] ** -0.5
        else:
            value = value * 1.3 * value[0].numel() ** -0.5
        is_small = small and any(part in name for part in ("embed", "query", "wte", "conv1"))
        weights[name] = value * 1e-2 if is_small else value
    return weights


_NO_FACTS = MediaFacts((0, 0), (0, 0), (1, 1), 0, 0)


@dataclass(frozen=True, eq=False)
class Pixels:
    """models.prompt.Media of normalised pixels [C, S, S]."""

    content_hash: str
    tensors: tuple[Tensor, ...]
    facts: MediaFacts = _NO_FACTS


@cache
def media(number: int, side: int) -> Pixels:
    return Pixels(f"picture {number}", preprocess(image(number), config(side)).tensors)


def prompt(parts: Sequence[Part], side: int = 84) -> Prompt:
    ids: list[int] = []
    placed = []
    for part in parts:
        if isinstance(part, Picture):
            placed.append(PlacedMedia(len(ids) + 1, SPAN, media(part.number, side)))
        ids += token_ids([part])
    alpha = CONFIG.text_config.alpha(len(ids))
    return Prompt(tuple(ids), tuple(placed), f"alpha {alpha}" if alpha > 1 else "")


def build(side: int = 84, *, small: bool = False) -> QwenVLForConditionalGeneration:
    with shapes_only():
        model = QwenVLForConditionalGeneration(config(side))
    copies = {name: value.clone() for name, value in random_weights(side, small=small).items()}
    model.load_state_dict(copies, strict=True, assign=True)
    model.finish_loading(torch.device("cpu"))
    return model.eval()


@torch.inference_mode()
def logits(
    model: QwenVLForConditionalGeneration, parts: Sequence[Part], said: Sequence[int], side: int
) -> Tensor:
    """Logits of the compared positions, and of what was `said` after the prompt, one by one."""
    cache, begun = model.new_cache(1, 0), prompt(parts, side)
    rows = [read(model, cache, begun)[compared(len(begun.token_ids))]]
    for token in said:
        rows.append(model.forward(Batch.last_of(torch.tensor([token]), cache.lengths[0]), cache))
    return torch.cat(rows)


@cache
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN) as found:
        return dict(found)


def difference(model: QwenVLForConditionalGeneration, name: str, side: int, case: str) -> float:
    """Largest difference of a case's logits from those of the original code."""
    said = golden()[f"{name}/{case}/said"].tolist()
    expected = torch.from_numpy(golden()[f"{name}/{case}/logits"])
    found = logits(model, CASES[case], said, side)
    assert found.shape == expected.shape
    return float((found - expected).abs().max())
