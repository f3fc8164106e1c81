"""How large a model is and what it works in: numbers and bytes that follow from its config."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, Literal

from mmchat.models.prompt import MediaFacts
from mmchat.parallel.slices import Shares, share_shape
from mmchat.quant.kernels.layout import SCALE_BYTES

# When a weight is read: for each token, for each token after a picture, seldom (once a picture, or
# of a table some rows), or never, so that it is not loaded.
Reading = Literal["token", "token after a picture", "seldom", "never"]
# linear_bytes(kind of part, rows, columns): bytes of a linear layer's weight [rows, columns].
LinearBytes = Callable[[str, int, int], int]


@dataclass(frozen=True)
class Part:
    """One part of a model. kind: "text", "head", "vision" or "embedding".

    matrices: weights of its linear layers, [rows, columns] by name; others: all its other tensors.
    """

    name: str
    kind: str
    reading: Reading
    matrices: Mapping[str, tuple[int, ...]]
    others: Mapping[str, tuple[int, ...]]

    @cached_property
    def linears(self) -> tuple[tuple[int, int], ...]:
        """[rows, columns] of the weights of its linear layers."""
        return tuple((shape[0], shape[1]) for shape in self.matrices.values())

    @cached_property
    def other(self) -> int:
        """Parameters that are not in linear layers."""
        return sum(map(math.prod, self.others.values()))

    def share(self, shares: Shares) -> Part:
        """What one of several ranks holds of it."""

        def own(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
            return {name: share_shape(shares, name, shape) for name, shape in shapes.items()}

        return replace(self, matrices=own(self.matrices), others=own(self.others))

    @property
    def parameters(self) -> int:
        return sum(map(math.prod, self.linears)) + self.other

    def bytes(self, item_bytes: int, linear_bytes: LinearBytes | None = None) -> int:
        """Bytes in a dtype of `item_bytes`, but for linear layers that `linear_bytes` counts."""
        if linear_bytes is None:
            return self.parameters * item_bytes
        linears = sum(linear_bytes(self.kind, *shape) for shape in self.linears)
        return linears + self.other * item_bytes


PartName = tuple[str, str, Reading]  # name, kind and reading of a Part
ENCODER: PartName = ("vision encoder", "vision", "seldom")
PROJECTOR: PartName = ("projector", "vision", "seldom")
DECODER: PartName = ("decoder", "text", "token")
EMBEDDING: PartName = ("token embedding", "embedding", "seldom")
HEAD: PartName = ("head", "head", "token")


def parts_of(
    shapes: Mapping[str, tuple[int, ...]],
    names: Mapping[str, PartName],
    is_table: Callable[[str], bool] = lambda name: "embed" in name,
) -> tuple[Part, ...]:
    """The parts of a model whose tensors have these shapes, in the order of their first tensors.

    names: how those of a part's tensors begin; the first that fits counts, and the head has what is
    left. Weights with two axes are those of linear layers, but for tables of embeddings.
    """
    found: dict[PartName, tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]] = {}
    for name, shape in shapes.items():
        part = next((part for start, part in names.items() if name.startswith(start)), HEAD)
        matrices, others = found.setdefault(part, ({}, {}))
        is_matrix = len(shape) == 2 and name.endswith(".weight") and not is_table(name)
        (matrices if is_matrix else others)[name] = shape
    return tuple(Part(*part, *tensors) for part, tensors in found.items())


@dataclass(frozen=True)
class Sizes(ABC):
    """Sizes of one model; a family adds the formulas for what its passes work in.

    cache_per_token: numbers stored for one position, keys and values of all layers together, each
    of head_dim.
    largest_picture: the one that takes most memory and time. once_a_picture: weights of linear
    layers that decoding reads only to take in a picture.
    """

    parts: tuple[Part, ...]
    cache_per_token: int
    head_dim: int
    largest_picture: MediaFacts
    once_a_picture: tuple[tuple[int, int], ...]

    # whether what is kept of a picture is keys and values, whose heads ranks share as the text's
    shares_pictures: ClassVar[bool] = False

    @abstractmethod
    def picture_numbers(self, picture: MediaFacts) -> int:
        """Numbers that are kept of a picture, beside the cache of the positions that it takes."""

    @abstractmethod
    def encode_bytes(
        self, picture: MediaFacts, item_bytes: int, *, wide_products: bool = False
    ) -> int:
        """Most memory at a time, beyond weights and caches, while a picture is encoded.

        wide_products: linear layers make float32 copies of what they read and write.
        """

    @abstractmethod
    def prefill_bytes(
        self, prompt: int, item_bytes: int, *, pictures: bool, wide_products: bool = False
    ) -> int:
        """Most memory at a time, beyond weights and caches, while a prompt is read in one pass."""

    def cache_bytes(self, numbers: int, item_bytes: int, kv: str) -> int:
        """Of so many numbers of keys and values. kv: as in LoadOptions."""
        if kv == "int8":
            return numbers + numbers // self.head_dim * SCALE_BYTES
        return numbers * item_bytes

    def picture_bytes(self, picture: MediaFacts, item_bytes: int, kv: str) -> int:
        """Of what is kept of a picture."""
        numbers = self.picture_numbers(picture)
        is_cached = self.shares_pictures
        return self.cache_bytes(numbers, item_bytes, kv) if is_cached else numbers * item_bytes

    @property
    def parameters(self) -> int:
        return sum(part.parameters for part in self.parts)

    def loaded_parts(self, *, text_only: bool) -> tuple[Part, ...]:
        """text_only leaves out what only pictures need."""
        return tuple(
            part
            for part in self.parts
            if part.reading != "never"
            and (
                not text_only or (part.kind != "vision" and part.reading != "token after a picture")
            )
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


@dataclass(frozen=True)
class DecoderSizes(Sizes):
    """Sizes of a model whose text goes through layers like Llama's.

    text: their config, with the names of the Hub's.
    """

    text: Any

    def prefill_bytes(
        self, prompt: int, item_bytes: int, *, pictures: bool, wide_products: bool = False
    ) -> int:
        inner, width = self.text.intermediate_size, self.text.hidden_size
        # gate, up and their product; the input, its norm, the sum so far, and what pictures add
        numbers = prompt * (3 * inner + (3 + pictures) * width)
        rotation = 2 * 4 * prompt * self.text.head_dim
        logits = 2 * 4 * self.text.vocab_size
        wide = 4 * prompt * (width + 2 * inner) if wide_products else 0
        return numbers * item_bytes + rotation + logits + wide


@dataclass(frozen=True)
class EmbeddingSizes(DecoderSizes):
    """Sizes of a decoder among whose tokens pictures stand, which a ViT encodes.

    A picture takes embeddings until they are read. patches, width, intermediate_size: of the ViT;
    behind: numbers a patch that are held at once where its states become embeddings.
    """

    patches: int
    width: int
    intermediate_size: int
    behind: int

    def picture_numbers(self, picture: MediaFacts) -> int:
        return picture.tokens * self.text.hidden_size

    def encode_bytes(
        self, picture: MediaFacts, item_bytes: int, *, wide_products: bool = False
    ) -> int:
        width, inner = self.width, self.intermediate_size
        # the sum so far, its norm, query, key, value and what they give; or the widths of the MLP
        numbers = self.patches * max(6 * width, 2 * width + 3 * inner, self.behind)
        wide = 4 * self.patches * (max(width, self.text.hidden_size) + inner)
        return numbers * item_bytes + (wide if wide_products else 0)


Shape = tuple[int, ...]


def biased(name: str, *shape: int) -> dict[str, Shape]:
    """A weight of this shape and its bias; of one axis, those of a norm."""
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def numbered(prefix: str, numbers: Iterable[int], layer: Mapping[str, Shape]) -> dict[str, Shape]:
    """Of several equal layers."""
    return {f"{prefix}{i}.{name}": shape for i in numbers for name, shape in layer.items()}


def decoder_layer(text: Any, attention: str = "self_attn") -> dict[str, Shape]:
    """Of a layer of nn.decoder, or one that differs from it in the name of its attention."""
    width, inner = text.hidden_size, text.intermediate_size
    queries, keys = (
        n * text.head_dim for n in (text.num_attention_heads, text.num_key_value_heads)
    )
    return {
        f"{attention}.q_proj.weight": (queries, width),
        f"{attention}.k_proj.weight": (keys, width),
        f"{attention}.v_proj.weight": (keys, width),
        f"{attention}.o_proj.weight": (width, queries),
        "mlp.gate_proj.weight": (inner, width),
        "mlp.up_proj.weight": (inner, width),
        "mlp.down_proj.weight": (width, inner),
        "input_layernorm.weight": (width,),
        "post_attention_layernorm.weight": (width,),
    }
