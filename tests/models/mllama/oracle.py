"""A tiny Mllama with random weights, and how the tests run and compare it.

Sizes are chosen so that no two axes are equal, tiles are not square in number both ways, and the
tokens of a tile (10) are no multiple of 8. Every parameter is random, so nothing hides behind a
gate of 0, a norm of 1 or a bias of 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mmchat.models.base import Batch, cache_lacks
from mmchat.models.mllama.config import (
    ImageProcessorConfig,
    MllamaConfig,
    RopeScaling,
    TextConfig,
    VisionConfig,
)
from mmchat.models.mllama.model import MllamaForConditionalGeneration
from mmchat.models.mllama.tiling import TileLayout, layout_facts
from mmchat.models.prepared import PreparedImage
from mmchat.models.prompt import PlacedMedia, Prompt

TOLERANCE = 1e-4  # on logits and features with a standard deviation around 1
CANVASES = ((1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (2, 2), (3, 1), (4, 1))
CONFIG = MllamaConfig(
    vision_config=VisionConfig(
        hidden_size=36,
        intermediate_size=100,
        num_hidden_layers=6,
        num_global_layers=2,
        attention_heads=3,
        num_channels=3,
        image_size=42,
        patch_size=14,
        max_num_tiles=4,
        intermediate_layers_indices=(1, 2, 5),
        norm_eps=1e-5,
    ),
    text_config=TextConfig(
        vocab_size=256,
        hidden_size=80,
        intermediate_size=176,
        num_hidden_layers=8,
        num_attention_heads=10,
        num_key_value_heads=2,
        cross_attention_layers=(2, 6),
        rms_norm_eps=1e-5,
        rope_theta=500000.0,
        rope_scaling=RopeScaling(8.0, 1.0, 4.0, 8192),
        max_position_embeddings=131072,
    ),
    image_processor=ImageProcessorConfig((0.5,) * 3, (0.5,) * 3, "checkpoint"),
)
IMAGE = CONFIG.image_token_id
# For texts of more than a thousand positions: few numbers a position, and rotary frequencies of
# which some stay, some are divided and one is in between.
THIN = replace(
    CONFIG,
    text_config=replace(
        CONFIG.text_config,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        cross_attention_layers=(1,),
        rope_scaling=RopeScaling(4.0, 2.0, 5.0, 512),
    ),
)

Row = tuple[list[int], list[PreparedImage]]  # token ids, and one picture for each image token


def random_weights(
    config: MllamaConfig = CONFIG, seed: int = 1, *, fill_unused_tiles: bool = False
) -> dict[str, Tensor]:
    """Random float32 weights under the Hub's names.

    What enters a norm directly is small, so that the norm's epsilon shows in the output. As in
    every released checkpoint, the tile tables are 0 where a canvas has no tile, unless
    `fill_unused_tiles`, as training in transformers does.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        shapes = MllamaForConditionalGeneration(config).state_dict()
    weights = {}
    for name, like in shapes.items():
        weights[name] = _random_values(name, like.shape, generator)
    for name, table in weights.items() if not fill_unused_tiles else ():
        if table.shape[0] == len(CANVASES) + 1 and name.startswith("vision_model"):
            slots = table.view(len(CANVASES) + 1, config.vision_config.max_num_tiles, -1)
            slots[0] = 0
            for index, (rows, columns) in enumerate(CANVASES):
                slots[index + 1, rows * columns :] = 0
    return weights


def _random_values(name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    noise = torch.randn(shape, generator=generator)
    if name.rsplit(".", 1)[-1].startswith("gate") or name.endswith("_gate"):
        return noise.sign() * (0.4 + 0.3 * noise.abs())
    if "norm" in name:
        return _norm_scale(name) * (0.1 * noise if name.endswith("bias") else 1 + 0.2 * noise)
    if name.endswith("bias"):
        return 0.3 * noise
    if "post_tile" in name:
        return 0.03 * noise
    if "embed" in name:
        return 0.015 * noise * (shape[1:].numel() ** -0.5 if "patch" in name else 1)
    gain = 0.02 if "cross_attn.k_proj" in name else 1.2
    return gain * noise * shape[-1] ** -0.5


def _norm_scale(name: str) -> float:
    """Around 1, but attention to pictures is peaked, and the global layers start small."""
    if "layernorm_post." in name:
        return 0.02
    return 2.5 if name.endswith(("q_norm.weight", "k_norm.weight")) else 1.0


def build(
    weights: dict[str, Tensor], config: MllamaConfig = CONFIG, dtype: torch.dtype = torch.float32
) -> MllamaForConditionalGeneration:
    """Our model with these weights; every name and shape must match."""
    model = MllamaForConditionalGeneration(config).to(dtype)
    model.load_state_dict(weights, strict=True)
    model.finish_loading(torch.device("cpu"))
    return model.eval()


def picture(canvas: tuple[int, int], seed: int = 0) -> PreparedImage:
    """Random tiles on a canvas (rows, columns), on the scale of normalised pixels."""
    side = CONFIG.vision_config.image_size
    rows, columns = canvas
    generator = torch.Generator().manual_seed(1000 * seed + 10 * rows + columns)
    pixels = torch.randn(rows * columns, 3, side, side, generator=generator)
    layout = TileLayout(
        image_size=(rows * side, columns * side),
        resized=(rows * side, columns * side),
        aspect_ratio=canvas,
        aspect_ratio_id=CANVASES.index(canvas) + 1,
        tile_size=side,
    )
    facts = layout_facts(layout, CONFIG.vision_config)
    ratio = torch.tensor([layout.aspect_ratio_id])
    return PreparedImage(f"{rows}x{columns}-{seed}", facts, (pixels, ratio))


# The arrangements of pictures and text that have gone wrong in some implementation.
CASES: dict[str, list[Row]] = {
    "A_start_picture_text": [([1, IMAGE, 17, 33, 9, 4, 77], [picture((1, 2))])],
    "B_text_between_pictures": [
        ([1, 5, IMAGE, 17, 33, IMAGE, 4, 77, 8], [picture((2, 1)), picture((1, 1))])
    ],
    "B_three_pictures": [
        (
            [1, IMAGE, 5, IMAGE, 17, 33, IMAGE, 4],
            [picture((1, 1)), picture((1, 3)), picture((2, 1))],
        )
    ],
    "C_adjacent": [([1, IMAGE, IMAGE, 33, 9, 4], [picture((1, 1)), picture((3, 1))])],
    "C_adjacent_then_apart": [
        (
            [1, 7, IMAGE, IMAGE, 33, 9, IMAGE, 4, 77],
            [picture((1, 2)), picture((1, 1)), picture((2, 1))],
        )
    ],
    "C_three_adjacent": [
        (
            [1, 7, IMAGE, IMAGE, IMAGE, 33, 9],
            [picture((1, 2)), picture((2, 1)), picture((1, 1))],
        )
    ],
    "C_same_picture_twice": [([1, IMAGE, IMAGE, 33, 9], [picture((1, 2)), picture((1, 2))])],
    "D_text_only": [([1, 5, 17, 33, 9], [])],
    "E_picture_first": [([IMAGE, 17, 33, 9, 4, 77], [picture((2, 2))])],
    **{
        f"F_canvas_{rows}x{columns}": [([1, 40, IMAGE, 60, 9], [picture((rows, columns))])]
        for rows, columns in CANVASES
    },
    "G_one_and_two_pictures": [
        ([1, 8, IMAGE, 17, 33], [picture((1, 3))]),
        ([1, IMAGE, 21, 5, IMAGE, 44, 90, 3], [picture((1, 1)), picture((2, 2))]),
    ],
}


def long_row(length: int) -> Row:
    """A picture, then random text, so many tokens in all."""
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(5, IMAGE, (length - 3,), generator=generator).tolist()
    return [1, 8, IMAGE, *ids], [picture((1, 2))]


NO_PICTURE_IN_ONE_ROW: list[Row] = [
    ([1, 8, IMAGE, 17, 33], [picture((4, 1))]),
    ([1, 90, 12, 43, 7, 2, 6], []),
]


@dataclass(frozen=True)
class Outputs:
    """prefill: for each row the logits [S, V] of all positions.

    steps: [B, n, V], the first from the last prompt position. tokens: [B, n], what was read.
    """

    prefill: list[Tensor]
    steps: Tensor
    tokens: Tensor


class Reader:
    """A model, or what runs one, with a cache of which row i has slot i."""

    def __init__(self, model: Any, rows: int = 1, positions: int = 1, cache: Any = None) -> None:
        self.model = model
        self.cache = cache or model.new_cache(rows, positions)
        self._placed: list[list[PlacedMedia]] = [[] for _ in range(rows)]

    @property
    def length(self) -> int:
        return max(self.cache.lengths)

    @torch.inference_mode()
    def read(self, *rows: Row) -> list[Tensor]:
        """Logits [S, V] of all positions of each row, which goes on where it ended."""
        logits = self._forward(rows, range(sum(len(ids) for ids, _ in rows)))
        return list(logits.split([len(ids) for ids, _ in rows]))

    @torch.inference_mode()
    def prefill(self, *rows: Row) -> Tensor:
        """Logits [B, V] of the last position of each row."""
        ends = torch.tensor([len(ids) for ids, _ in rows]).cumsum(0)
        return self._forward(rows, (ends - 1).tolist())

    def _forward(self, rows: Sequence[Row], wanted: Sequence[int]) -> Tensor:
        starts = tuple(self.cache.lengths[: len(rows)])
        for slot, (ids, pictures) in enumerate(rows):
            kept = [p for p in self._placed[slot] if p.position < starts[slot]]
            places = [starts[slot] + at for at in image_positions(ids)]
            kept += [PlacedMedia(at, 1, p) for at, p in zip(places, pictures, strict=True)]
            self._placed[slot] = kept
            self.cache.begin(slot, Prompt((), tuple(kept)))
            while lacking := cache_lacks(self.cache, pictures):
                for _ in self.model.encode(lacking, self.cache):
                    pass
        counts = tuple(len(ids) for ids, _ in rows)
        ids = torch.tensor([token for ids, _ in rows for token in ids])
        batch = Batch(ids, tuple(range(len(rows))), starts, counts, tuple(wanted))
        return self.model.forward(batch, self.cache)

    def decode(self, tokens: Tensor) -> Tensor:
        """Read one more token a row, [B, 1]; logits [B, V]."""
        return self.verify(tokens)[:, -1]

    @torch.inference_mode()
    def verify(self, tokens: Tensor) -> Tensor:
        """Read a few more tokens a row, [B, S]; logits [B, S, V]."""
        rows, count = tokens.shape
        starts = tuple(self.cache.lengths[:rows])
        wanted = tuple(range(rows * count))
        batch = Batch(tokens.flatten(), tuple(range(rows)), starts, (count,) * rows, wanted)
        return self.model.forward(batch, self.cache).unflatten(0, (rows, count))

    def truncate(self, length: int) -> None:
        for slot in range(len(self.cache.lengths)):
            self.cache.truncate(slot, length)


def image_positions(ids: Sequence[int]) -> list[int]:
    return [at for at, token in enumerate(ids) if token == IMAGE]


def run(model: Any, rows: Sequence[Row], tokens: Tensor | int) -> Outputs:
    """Prefill, then decode greedily for `tokens` steps, or along the given tokens [B, n]."""
    forced = None if isinstance(tokens, int) else tokens
    count = tokens if isinstance(tokens, int) else tokens.shape[1]
    reader = Reader(model, len(rows), max(len(ids) for ids, _ in rows) + count)
    prefill = reader.read(*rows)
    steps = [torch.stack([row[-1] for row in prefill])]
    read = []
    for index in range(count):
        chosen = steps[-1].argmax(-1) if forced is None else forced[:, index]
        read.append(chosen)
        if index + 1 < count:
            steps.append(reader.decode(chosen[:, None]))
    return Outputs(prefill, torch.stack(steps, dim=1), torch.stack(read, dim=1))


def difference(left: Outputs, right: Outputs) -> float:
    """Largest difference of any logit of two runs over the same tokens; inf if shapes differ."""
    pairs = [*zip(left.prefill, right.prefill, strict=True), (left.steps, right.steps)]
    return max(distance(a, b) for a, b in pairs)


def distance(left: Tensor, right: Tensor) -> float:
    """Largest difference of any element; inf if shapes differ or a value is not finite."""
    if left.shape != right.shape:
        return float("inf")
    largest = float((left.double() - right.double()).abs().max())
    return largest if largest == largest else float("inf")


def write(runtime: Any, rows: list[Row], steps: int) -> list[Tensor]:
    """Logits of a prefill, of `steps` greedy tokens, and of three tokens read at once."""
    reader = Reader(runtime, len(rows))
    logits = [reader.prefill(*rows)]
    for _ in range(steps):
        logits.append(reader.decode(logits[-1].argmax(-1, keepdim=True)))
    drafted = torch.stack([logits[i].argmax(-1) for i in range(3)], dim=1)
    return [*logits, reader.verify(drafted)]
