"""How large an Mllama is and how much memory it works in. Pure arithmetic, in bytes and numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from mmchat.models.mllama.config import MllamaConfig
from mmchat.models.mllama.weights import hf_shapes

# When a weight is read: for each token, for each token after a picture, or seldom (once a picture,
# or of a table some rows).
Reading = Literal["token", "token after a picture", "seldom"]
# linear_bytes(part, rows, columns): bytes of a linear layer's weight [rows, columns]; part is
# "text", "head" or "vision".
LinearBytes = Callable[[str, int, int], int]


@dataclass(frozen=True)
class Part:
    """One part of a model. kind: "text", "head", "vision" or "embedding".

    linears: [rows, columns] of the weights of its linear layers; other: all its other parameters.
    """

    name: str
    kind: str
    reading: Reading
    linears: tuple[tuple[int, int], ...]
    other: int

    @property
    def parameters(self) -> int:
        return sum(map(math.prod, self.linears)) + self.other

    def bytes(self, item_bytes: int, linear_bytes: LinearBytes | None = None) -> int:
        """Bytes in a dtype of `item_bytes`, but for linear layers that `linear_bytes` counts."""
        if linear_bytes is None:
            return self.parameters * item_bytes
        linears = sum(linear_bytes(self.kind, *shape) for shape in self.linears)
        return linears + self.other * item_bytes


@dataclass(frozen=True)
class Footprint:
    """Sizes of one model. Cache sizes are numbers stored: keys and values of all layers together.

    cache_per_token: for one text position in self-attention. cache_per_tile: for one tile of a
    picture in cross-attention. once_a_picture: linear layers of the cross-attention layers that
    only make those.
    """

    config: MllamaConfig
    parts: tuple[Part, ...]
    cache_per_token: int
    cache_per_tile: int
    once_a_picture: tuple[tuple[int, int], ...]

    @property
    def parameters(self) -> int:
        return sum(part.parameters for part in self.parts)

    @property
    def most_tiles(self) -> int:
        """Tiles of the largest picture."""
        return self.config.vision_config.max_num_tiles

    def loaded_parts(self, *, text_only: bool) -> tuple[Part, ...]:
        """text_only leaves out vision and cross-attention."""
        return tuple(
            part
            for part in self.parts
            if not text_only or (part.kind != "vision" and part.reading != "token after a picture")
        )

    def token_linears(self, *, pictures: bool) -> list[tuple[str, int, int]]:
        """(kind, rows, columns) of the linear layers that decoding one token reads.

        pictures: there is one in the conversation.
        """
        read = [(part.kind, *shape) for part in self._read(pictures) for shape in part.linears]
        for shape in self.once_a_picture if pictures else ():
            read.remove(("text", *shape))
        return read

    def token_others(self, *, pictures: bool) -> int:
        """Parameters outside of linear layers that decoding one token reads."""
        return sum(part.other for part in self._read(pictures))

    def _read(self, pictures: bool) -> list[Part]:
        readings = ("token", "token after a picture")[: 1 + pictures]
        return [part for part in self.parts if part.reading in readings]

    def encode_bytes(self, tiles: int, item_bytes: int, *, wide_products: bool = False) -> int:
        """Most memory at a time, beyond weights and caches, while a picture is encoded.

        wide_products: linear layers make float32 copies of what they read and write.
        """
        vision, text = self.config.vision_config, self.config.text_config
        tiles = min(tiles, vision.max_num_tiles)
        if not tiles:
            return 0
        width, inner = vision.hidden_size, vision.intermediate_size
        seen = tiles * vision.tokens_per_tile
        computed = seen + tiles
        if tiles < vision.max_num_tiles:  # one padding tile and its pad token
            computed += vision.tokens_per_tile + 1
        kept = len(vision.intermediate_layers_indices)  # states, each as long as `computed`
        in_layer = computed * ((kept + 4) * width + 2 * inner)
        at_the_end = computed * kept * width + seen * (2 * kept + 2) * width
        projected = seen * (vision.output_dim + text.hidden_size)
        # states, and a key in float32 while it is normalised
        keys = seen * (text.hidden_size + 5 * text.num_key_value_heads * text.head_dim)
        numbers = max(in_layer, at_the_end, projected, keys)
        return numbers * item_bytes + (4 * computed * (width + inner) if wide_products else 0)

    def prefill_bytes(
        self, prompt: int, item_bytes: int, *, pictures: bool, wide_products: bool = False
    ) -> int:
        """Most memory at a time, beyond weights and caches, while a prompt is read in one pass."""
        text = self.config.text_config
        inner, width = text.intermediate_size, text.hidden_size
        # gate, up and their product; the input, its norm, the sum so far, and that of the block
        numbers = prompt * (3 * inner + (3 + pictures) * width)
        rotation = 2 * 4 * prompt * text.head_dim
        logits = 2 * 4 * text.vocab_size
        wide = 4 * prompt * (width + 2 * inner) if wide_products else 0
        return numbers * item_bytes + rotation + logits + wide


def footprint(config: MllamaConfig) -> Footprint:
    """Sizes that follow from the configuration alone."""
    linears: dict[str, list[tuple[int, int]]] = {}
    others: dict[str, int] = {}
    once = []
    for name, shape in hf_shapes(config).items():
        part = _part_of(name, config)
        shapes = linears.setdefault(part, [])
        if len(shape) == 2 and name.endswith(".weight") and "embed" not in name:
            shapes.append((shape[0], shape[1]))
            if name.endswith(("cross_attn.k_proj.weight", "cross_attn.v_proj.weight")):
                once.append((shape[0], shape[1]))
        else:
            others[part] = others.get(part, 0) + math.prod(shape)
    text = config.text_config
    keys_and_values = 2 * text.num_key_value_heads * text.head_dim
    return Footprint(
        config=config,
        parts=tuple(
            Part(name, *_KINDS[name], tuple(shapes), others.get(name, 0))
            for name, shapes in linears.items()
        ),
        cache_per_token=keys_and_values * len(text.self_attention_layers),
        cache_per_tile=keys_and_values
        * len(text.cross_attention_layers)
        * config.vision_config.tokens_per_tile,
        once_a_picture=tuple(once),
    )


_KINDS: dict[str, tuple[str, Reading]] = {
    "vision encoder": ("vision", "seldom"),
    "projector": ("vision", "seldom"),
    "cross-attention layers": ("text", "token after a picture"),
    "self-attention layers": ("text", "token"),
    "token embedding": ("embedding", "seldom"),
    "head": ("head", "token"),
}


def _part_of(name: str, config: MllamaConfig) -> str:
    if name.startswith("vision_model."):
        return "vision encoder"
    if name.startswith("multi_modal_projector."):
        return "projector"
    if name.startswith("language_model.model.layers."):
        index = int(name.split(".")[3])
        is_cross = index in config.text_config.cross_attention_layers
        return "cross-attention layers" if is_cross else "self-attention layers"
    return "token embedding" if "embed_tokens" in name else "head"
