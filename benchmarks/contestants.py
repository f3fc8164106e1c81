"""What is compared: mmchat in several schemes, and the interface that a reference fulfils."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from benchmarks.clock import Elapsed, Stopwatch
from benchmarks.random_mllama import RandomContext, fill_cache
from mmchat.conversation import Image, Message
from mmchat.engine.reading import encode, rest_of
from mmchat.models.base import Batch
from mmchat.models.prompt import PlacedMedia, Prompt

if TYPE_CHECKING:
    from mmchat.loading.loader import LoadedModel

DECODE_ROOM = 256  # positions beyond the context that a decode measurement may fill

# What decoding goes on from: made up, or token ids, which are read.
Context = RandomContext | tuple[int, ...]


@dataclass(frozen=True)
class PicturePrompt:
    """A prompt that begins with a picture. image: the family's tiled picture."""

    token_ids: tuple[int, ...]
    image: Any


class Contestant(Protocol):
    """Reads prompts and decodes; every method returns float logits [rows, V] of last positions."""

    @property
    def name(self) -> str: ...

    @property
    def reads_context(self) -> bool:
        """Whether `begin` takes token ids alone."""
        ...

    def prefill(self, input_ids: tuple[int, ...]) -> Tensor: ...

    def prefill_picture(self, prompt: PicturePrompt) -> tuple[Tensor, Mapping[str, Elapsed]]:
        """Also the time of the stages "vision", "prefill" and "total"."""
        ...

    def begin(self, context: Context, rows: int) -> Any:
        """A cache whose rows all hold the context."""
        ...

    def decode(self, token_ids: tuple[int, ...], cache: Any) -> Tensor:
        """A step of all rows, each with its own token."""
        ...


class Mmchat:
    """A loaded model, asked through its runtime as a session does."""

    reads_context = False

    def __init__(self, name: str, loaded: LoadedModel) -> None:
        self.name = name
        self.loaded = loaded
        self._clock = Stopwatch(loaded.device)

    def prefill(self, input_ids: tuple[int, ...]) -> Tensor:
        runtime = self.loaded.runtime
        cache = runtime.new_cache(1, len(input_ids) + DECODE_ROOM)
        return runtime.forward(rest_of(Prompt(input_ids), cache, runtime.device), cache)

    def prefill_picture(self, prompt: PicturePrompt) -> tuple[Tensor, Mapping[str, Elapsed]]:
        runtime = self.loaded.runtime
        cache = runtime.new_cache(1, len(prompt.token_ids) + DECODE_ROOM)
        whole = Prompt(prompt.token_ids, (PlacedMedia(0, 1, prompt.image),))
        begin = self._clock.now()
        encode(runtime, whole, cache)
        middle = self._clock.now()
        logits = runtime.forward(rest_of(whole, cache, runtime.device), cache)
        end = self._clock.now()
        return logits, {"vision": middle - begin, "prefill": end - middle, "total": end - begin}

    def project_pictures(self, states: Tensor) -> Elapsed | None:
        """Time of the cross-attention keys and values of vision states [1, N, E].

        None where they cannot be asked for alone, as of an exported program.
        """
        model: Any = getattr(self.loaded.runtime, "model", None)
        if not hasattr(model, "cross_key_values"):
            return None
        with torch.inference_mode():
            return self._clock.time(lambda: model.cross_key_values(states))[1]

    def begin(self, context: Context, rows: int) -> Any:
        runtime = self.loaded.runtime
        if isinstance(context, RandomContext):
            cache: Any = runtime.new_cache(rows, context.length + DECODE_ROOM)
            fill_cache(cache, context)
            return cache
        cache = runtime.new_cache(rows, len(context) + DECODE_ROOM)
        runtime.forward(rest_of(Prompt(context), cache, runtime.device), cache)
        for slot in range(1, rows):
            cache.copy(0, slot, len(context))
        return cache

    def decode(self, token_ids: tuple[int, ...], cache: Any) -> Tensor:
        rows = tuple(range(len(token_ids)))
        ids = torch.tensor(token_ids, device=self.loaded.device)
        batch = Batch(ids, rows, tuple(cache.lengths), (1,) * len(rows), rows)
        return self.loaded.runtime.forward(batch, cache)


def tiled(processor: Any, image: Image) -> Any:
    """The picture as the family's model takes it."""
    return processor.raw(Message("user", (image,))).media[0].media
