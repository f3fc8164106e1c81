"""A second process that holds the same model, and does what it is told through a pipe.

Told are the calls of models.base.Cache and Model, with plain data: nothing of the toy's own.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import mmchat
from mmchat.models.base import Batch, Cache
from mmchat.models.prompt import Media, MediaFacts, Prompt
from mmchat.models.registry import register
from mmchat.runtime.base import Runtime
from tests.toy.family import ToyFamily

_NO_FACTS = MediaFacts((0, 0), (0, 0), (0, 0), 0, 0)


@dataclass(frozen=True)
class Sent:
    """A picture as it goes through the pipe; `begin` sends none of its tensors."""

    content_hash: str
    tensors: tuple[Tensor, ...] = ()
    facts: MediaFacts = _NO_FACTS


def follow(pipe: Connection, folder: Path) -> None:
    """The second process: run what comes, and send back the logits."""
    torch.set_num_threads(1)
    register("toy", ToyFamily)
    runtime = mmchat.load(folder).runtime
    cache = runtime.new_cache(2, 0)
    while (told := pickle.loads(pipe.recv_bytes())) is not None:
        name, *given = told
        if name == "forward":
            pipe.send_bytes(pickle.dumps(runtime.forward(given[0], cache)))
        elif name == "encode":
            for _ in runtime.encode(given[0], cache):
                pass
        else:
            getattr(cache, name)(*given)


class MirroredCache:
    """models.base.Cache: what is done to `own` is done to the other as well."""

    def __init__(self, own: Cache, tell: Any) -> None:
        self.own, self._tell = own, tell

    @property
    def lengths(self) -> Sequence[int]:
        return self.own.lengths

    @property
    def fixed(self) -> bool:
        return self.own.fixed

    def begin(self, slot: int, prompt: Prompt) -> None:
        media = tuple(replace(p, media=Sent(p.media.content_hash)) for p in prompt.media)
        self._tell("begin", slot, Prompt(prompt.token_ids, media))
        self.own.begin(slot, prompt)

    def has_media(self, content_hash: str) -> bool:
        return self.own.has_media(content_hash)

    def reserve(self, slot: int, length: int) -> None:
        self._both("reserve", slot, length)

    def truncate(self, slot: int, length: int) -> None:
        self._both("truncate", slot, length)

    def copy(self, source: int, target: int, length: int) -> None:
        self._both("copy", source, target, length)

    def shrink(self, slot: int) -> None:
        self._both("shrink", slot)

    def free(self, slot: int) -> None:
        self._both("free", slot)

    def drop_media(self, content_hash: str) -> None:
        self._both("drop_media", content_hash)

    def release(self) -> None:
        self._both("release")

    def _both(self, name: str, *given: object) -> None:
        self._tell(name, *given)
        getattr(self.own, name)(*given)


class MirroredRuntime:
    """runtime.base.Runtime with a follower. differences: of the logits of each forward."""

    def __init__(self, runtime: Runtime, folder: Path) -> None:
        self._runtime = runtime
        self.device, self.notices, self.compile_seconds = runtime.device, (), None
        self.differences: list[float] = []
        context = get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=follow, args=(theirs, folder))
        self._process.start()

    def new_cache(self, slots: int, positions: int) -> MirroredCache:
        return MirroredCache(self._runtime.new_cache(slots, positions), self._tell)

    def encode(self, media: Sequence[Media], cache: Cache) -> Iterator[Sequence[Media]]:
        assert isinstance(cache, MirroredCache)
        self._tell("encode", [Sent(one.content_hash, one.tensors) for one in media])
        return self._runtime.encode(media, cache.own)

    def forward(self, batch: Batch, cache: Cache) -> Tensor:
        assert isinstance(cache, MirroredCache)
        self._tell("forward", batch)
        logits = self._runtime.forward(batch, cache.own)
        if not self._pipe.poll(30):
            raise TimeoutError("the other process does not answer")
        other = pickle.loads(self._pipe.recv_bytes())
        self.differences.append(float((logits - other).abs().max()))
        return logits

    def close(self) -> int | None:
        """End the other process; its exit code."""
        self._pipe.send_bytes(pickle.dumps(None))
        self._process.join(30)
        return self._process.exitcode

    def _tell(self, *message: object) -> None:
        self._pipe.send_bytes(pickle.dumps(message))
