"""What the engine knows of a model: batches of rows, a cache, and two calls.

A family's own state travels in the media of a prompt and in the cache; nobody else looks inside.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from torch import Tensor, nn

    from mmchat.models.prompt import Media, Prompt


# ---- one forward --------------------------------------------------------------------------------


class Watch:
    """What positions of a prompt read of its pictures, filled while the prompt is read.

    first: the first of these positions. read: position -> the places of the pictures that it sees,
    and the share of each of their tokens, one picture behind the other: float32 [M], sums to 1.
    Models whose text does not read pictures by cross-attention, and programs, fill nothing.
    """

    def __init__(self, first: int) -> None:
        self.first = first
        self.read: dict[int, tuple[tuple[int, ...], Tensor]] = {}


@dataclass(frozen=True)
class Reading:
    """One row of a batch: positions start .. start + count of `slot`, from `offset` of the N."""

    slot: int
    start: int
    count: int
    offset: int

    @property
    def end(self) -> int:
        return self.start + self.count


@dataclass(frozen=True, eq=False)
class Batch:
    """New positions of several rows, which lie one behind the other: N tokens in all.

    token_ids: [N]. slots: where each row lives in the cache, each in its own. starts: positions
    that it has read. counts: tokens that it reads now: 1 decodes, a few check a draft, many are a
    prompt or a piece of one. wanted: which of the N give logits, rising. scores: they are many
    of a prompt; slots without a row must not be computed beside it. watch: of the only row.
    """

    token_ids: Tensor
    slots: tuple[int, ...]
    starts: tuple[int, ...]
    counts: tuple[int, ...]
    wanted: tuple[int, ...]
    scores: bool = False
    watch: Watch | None = None

    @property
    def wants_all(self) -> bool:
        return len(self.wanted) == sum(self.counts)

    def rows(self) -> Iterator[Reading]:
        rows = zip(self.slots, self.starts, self.counts, strict=True)
        offset = 0
        for slot, start, count in rows:
            yield Reading(slot, start, count, offset)
            offset += count

    def check(self, lengths: Sequence[int]) -> None:
        """Raises ValueError unless each row goes on where its slot ends, and reads something."""
        held = tuple(lengths[slot] for slot in self.slots if 0 <= slot < len(lengths))
        total = len(self.token_ids)
        fits = (
            self.slots
            and self.starts == held
            and len(set(self.slots)) == len(self.slots) == len(held) == len(self.counts)
            and min(self.counts) >= 1
            and sum(self.counts) == total
            and all(a < b for a, b in pairwise((-1, *self.wanted, total)))
        )
        if not fits:
            raise ValueError(
                f"slots {self.slots} read {self.counts} of {total} tokens from {self.starts}; they"
                f" hold {held}; wanted are {self.wanted[:9]}"
            )

    @classmethod
    def last_of(cls, token_ids: Tensor, start: int, slot: int = 0) -> Batch:
        """One row, of which the last position gives logits. token_ids: [N]"""
        count = len(token_ids)
        return cls(token_ids, (slot,), (start,), (count,), (count - 1,))

    @classmethod
    def all_of(cls, token_ids: Tensor, start: int, slot: int = 0) -> Batch:
        """One row, of which all positions give logits. token_ids: [N]"""
        count = len(token_ids)
        return cls(token_ids, (slot,), (start,), (count,), tuple(range(count)))


class Cache(Protocol):
    """What a model keeps of the rows that it reads, each in its slot, and of their pictures.

    A slot's life: `copy` or `truncate` what it shares with a new prompt, `begin` it with the whole
    prompt, encode `prompt.unread(lengths[slot])`, then read batch by batch, and `free` it.
    """

    @property
    def lengths(self) -> Sequence[int]:
        """Positions stored of each slot; `forward` changes them at its end."""
        ...

    @property
    def fixed(self) -> bool:
        """Whether all slots have the room of the longest, so that one step computes them all."""
        ...

    def begin(self, slot: int, prompt: Prompt) -> None:
        """Say what the slot will read, of which it may hold the first positions already.

        Only the ids, the places of the pictures and their hashes are read. It stands until the next
        `begin`, `copy` or `free`.
        """
        ...

    def reserve(self, slot: int, length: int) -> None:
        """Make room for `length` positions; `forward` does so for what it reads."""
        ...

    def truncate(self, slot: int, length: int) -> None:
        """Forget everything from position `length` on; encoded pictures may stay."""
        ...

    def copy(self, source: int, target: int, length: int) -> None:
        """Let `target` hold the first `length` positions of `source`, and nothing else."""
        ...

    def shrink(self, slot: int) -> None:
        """Give back the room that the slot's positions do not need, unless all are `fixed`."""
        ...

    def free(self, slot: int) -> None:
        """Forget a row, give its memory back, and leave nothing of it behind.

        A NaN past the end of a row would spoil those who come after it: a masked position counts 0
        times its value.
        """
        ...

    def has_media(self, content_hash: str) -> bool:
        """Whether the picture need not be encoded.

        One that an open prompt still needs stays, whatever is released.
        """
        ...

    def drop_media(self, content_hash: str) -> None:
        """Forget an encoded picture, unless an open prompt needs it."""
        ...

    def release(self) -> None:
        """Give back all memory that the stored positions do not need."""
        ...


class Model(Protocol):
    """A model's math. Eager runtimes call it as it is, others replace parts of it.

    The caller chooses the mode: under inference mode nothing is differentiable, else what is
    encoded, and rows that start at 0, are.
    """

    def new_cache(self, slots: int, positions: int) -> Cache:
        """Room for so many rows, each of `positions` to begin with."""
        ...

    def encode(self, media: Sequence[Media], cache: Cache) -> Iterator[Sequence[Media]]:
        """Put the first of these pictures into the cache; each next() does one slice of the work.

        Others go with it where that costs less than one by one and makes no slice long. Each slice
        but the last gives those that are being encoded. The cache has them at the end, and nothing
        of them before.
        """
        ...

    def forward(self, batch: Batch, cache: Cache) -> Tensor:
        """Read new positions into the cache; float32 logits [W, V] of the wanted ones.

        Pictures at those positions are encoded already.
        """
        ...


# ---- compiling and exporting --------------------------------------------------------------------

# run(name of a program, its arguments in one flat list) -> its results
RunProgram = Callable[[str, "Sequence[Tensor]"], "Sequence[Tensor]"]


@dataclass(frozen=True)
class ExportLimits:
    """What exported programs are made for. max_seq_len: positions of prompt and answer.

    max_images: pictures that one position may see.
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


Use = Literal["decode", "verify", "vision"]


@dataclass(frozen=True)
class Example:
    """Arguments as they come. Axes of their tensors: dynamic ones change from call to call."""

    args: tuple[Any, ...]
    dynamic: tuple[tuple[Tensor, int], ...] = ()
    static: tuple[tuple[Tensor, int], ...] = ()


@dataclass(frozen=True)
class Block:
    """A kind of layer in one use, for runtimes that compile: `forward` of any of `layers`.

    It is compiled for arguments that are tensors and tuples of them, and runs as it is with others.
    example: called in inference mode.
    """

    layers: Sequence[nn.Module]
    use: Use
    example: Callable[[], Example]


class CompilableModel(Model, Protocol):
    """A model whose parts runtimes replace by what they compile."""

    @property
    def step(self) -> Callable[..., Tensor]:
        """step(token_ids, *tensors): the next tokens of some rows, for graphs of a GPU.

        `forward` calls it with static tensors, of which only those of the cache are written, in
        place.
        """
        ...

    def blocks(self) -> list[Block]:
        """The kinds of layer that are worth compiling, of those that are loaded."""
        ...


def common_prefix(first: Sequence[object], second: Sequence[object]) -> int:
    """How many leading items two sequences share."""
    shared = 0
    for a, b in zip(first, second, strict=False):
        if a != b:
            break
        shared += 1
    return shared


def cache_lacks(cache: Cache, media: Sequence[Media]) -> list[Media]:
    """Those pictures that are still to be encoded."""
    return [one for one in media if not cache.has_media(one.content_hash)]
