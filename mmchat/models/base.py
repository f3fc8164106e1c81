"""What the engine knows of a model: inputs and a cache that it passes on without looking inside."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from torch import Tensor, nn

# run(name of a program, its arguments in one flat list) -> its results
RunProgram = Callable[[str, "Sequence[Tensor]"], "Sequence[Tensor]"]


@dataclass(frozen=True)
class ExportLimits:
    """What exported programs are made for. max_seq_len: positions of prompt and answer.

    max_images: pictures that one prefill may see.
    """

    max_seq_len: int
    max_images: int


@dataclass(frozen=True)
class ExportProgram:
    """A function of tensors to be compiled ahead of time.

    module: holds the model as its attribute `model`, so that every weight is found by the model's
    own name for it. args: examples. dynamic_shapes: as in torch.export.export.
    """

    name: str
    module: nn.Module
    args: tuple[Any, ...]
    dynamic_shapes: tuple[Any, ...] | None


class ModelInputs(Protocol):
    """New positions of a batch. Everything but `input_ids` belongs to the family."""

    @property
    def input_ids(self) -> Tensor:
        """[B, S], rows padded on the right."""
        ...


class Cache(Protocol):
    """What a model keeps of the positions it has seen."""

    @property
    def length(self) -> int:
        """Positions stored, of the longest row."""
        ...

    def truncate(self, length: int) -> None:
        """Forget everything from position `length` on."""
        ...

    def reserve(self, length: int) -> None:
        """Make room for `length` positions."""
        ...

    def reset(self) -> None:
        """Forget all positions; encoded pictures may stay."""
        ...

    def release(self) -> None:
        """Give back all memory that the stored positions do not need."""
        ...


Use = Literal["decode", "verify", "vision"]


@dataclass(frozen=True)
class Example:
    """Arguments as they come. Axes of their tensors: dynamic ones change from call to call."""

    args: tuple[Any, ...]
    dynamic: tuple[tuple[Tensor, int], ...] = ()
    static: tuple[tuple[Tensor, int], ...] = ()


@dataclass(frozen=True)
class Block:
    """A kind of layer in one use, for runtimes that compile: `method` of any of `layers`.

    example: called in inference mode.
    """

    layers: Sequence[nn.Module]
    method: str
    use: Use
    example: Callable[[], Example]


class VisionLanguageModel(Protocol):
    """Prefill and decode; both return float32 logits [B, V] of the last position of each row."""

    def new_cache(self, batch: int, capacity: int) -> Cache: ...

    def blocks(self) -> list[Block]:
        """The kinds of layer that are worth compiling, of those that are loaded."""
        ...

    def encode_images(self, inputs: ModelInputs, cache: Cache) -> int:
        """Encode the pictures that the cache does not hold; how many there were."""
        ...

    def prefill(self, inputs: ModelInputs, cache: Cache) -> Tensor: ...

    def decode(self, token_ids: Tensor, cache: Cache) -> Tensor:
        """token_ids: [B, 1], the next position of each row."""
        ...

    def verify(self, token_ids: Tensor, cache: Cache) -> Tensor:
        """token_ids: [B, S], the next positions of each row; float32 logits [B, S, V] of all."""
        ...

    def verify_step(self, token_ids: Tensor, /, *tensors: Any) -> Tensor:
        """`verify` on static tensors, of which only those of the cache are written, in place."""
        ...


def common_prefix(first: Sequence[object], second: Sequence[object]) -> int:
    """How many leading items two sequences share."""
    shared = 0
    for a, b in zip(first, second, strict=False):
        if a != b:
            break
        shared += 1
    return shared
