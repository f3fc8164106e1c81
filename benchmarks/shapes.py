"""A model of a released model's widths with random weights, made in memory from a seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from benchmarks import random_mllama
from benchmarks.in_memory import InMemoryCheckpoint
from mmchat.catalog.known import find_spec
from mmchat.errors import UsageError
from mmchat.models.family import parameter_count
from mmchat.tokenizers.byte_pair import BytePairTokenizer
from mmchat.tokenizers.tiktoken_file import SPECIAL_TOKEN_COUNT, llama3_special_tokens

if TYPE_CHECKING:
    from mmchat.catalog.spec import ModelSpec

SHAPES = {"11B": "Llama-3.2-11B-Vision-Instruct", "90B": "Llama-3.2-90B-Vision-Instruct"}
CPU_DEPTH = (5, 3)  # text and vision layers: as 4 self-attention layers to 1 of cross-attention


@dataclass(frozen=True)
class Shapes:
    """What random model to make. layers, vision_layers: None takes all on a GPU, few on a CPU."""

    name: str
    layers: int | None = None
    vision_layers: int | None = None
    seed: int = 0


def shaped_spec(shapes: Shapes, device: torch.device) -> ModelSpec:
    """The spec of the named model, with fewer layers. Raises UsageError."""
    spec = find_spec(SHAPES.get(shapes.name.upper(), shapes.name))
    if spec is None:
        raise UsageError(f"no shapes {shapes.name!r}; use {', '.join(SHAPES)} or a known model")
    whole = random_mllama.config_of(spec)
    full = random_mllama.depth(whole)
    fallback = full if device.type == "cuda" else tuple(map(min, CPU_DEPTH, full))
    try:
        config = random_mllama.with_depth(
            whole,
            fallback[0] if shapes.layers is None else shapes.layers,
            fallback[1] if shapes.vision_layers is None else shapes.vision_layers,
        )
    except ValueError as problem:
        raise UsageError(str(problem)) from None
    count = parameter_count(spec.family.shapes(config))
    return replace(spec, config=config, parameters=count)


class RandomTensors:
    """Tensors by Hub name, made when they are asked for; `keep` remembers those made."""

    def __init__(
        self,
        spec: ModelSpec,
        seed: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        keep: bool,
    ) -> None:
        self.shapes = spec.family.shapes(spec.config)
        self.device = device
        self.dtype = dtype
        self._config = random_mllama.config_of(spec)
        self._seed = seed
        self._kept: dict[str, Tensor] | None = {} if keep else None

    def read(self, name: str) -> Tensor:
        if self._kept is not None and name in self._kept:
            return self._kept[name]
        tensor = random_mllama.random_tensor(
            self._config, name, self.shapes[name], self._seed, self.dtype, self.device
        )
        if self._kept is not None:
            self._kept[name] = tensor
        return tensor

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def checkpoint(self) -> InMemoryCheckpoint:
        """The same tensors as the loader takes them."""
        return InMemoryCheckpoint(self.shapes, self.dtype_name, self.read)


def byte_tokenizer(vocab_size: int, words: Sequence[str] = ()) -> BytePairTokenizer:
    """A tokenizer of the model's size that knows bytes, `words` and Llama's special tokens."""
    first = vocab_size - SPECIAL_TOKEN_COUNT
    names = llama3_special_tokens()
    tokens = [bytes([i]) for i in range(256)] + [word.encode() for word in words]
    return BytePairTokenizer(tokens, {name: first + i for i, name in enumerate(names)})
