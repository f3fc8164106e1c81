"""Replay a whole decode step as one CUDA graph: one launch instead of a thousand.

A graph is bound to the addresses of the tensors that it was captured with, so it is captured anew
when the cache has grown or another picture or conversation is read. Not measured: it has been
written without a GPU at hand, and all but `record_cuda` is tested with a recorder for the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

WARM_UPS = 3  # runs before a capture, for libraries that set themselves up on first use
Recorder = Callable[[Callable[[], Tensor]], tuple[Callable[[], None], Tensor]]


def record_cuda(step: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """Capture `step`; what replays it, and the tensor that each replay overwrites.

    Running `step` again must change nothing that one run did not.
    """
    side = torch.cuda.Stream()  # torch asks that what is captured has run on another stream before
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UPS):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()
    return graph.replay, result


class StepGraph:
    """`step(token_ids, *tensors)` by replay, one recording for each shape of token_ids.

    tensors: nested sequences of tensors that stay where they are, of which `step` writes some in
    place, and the same values if it runs twice. -> a new tensor each time.
    """

    def __init__(self, step: Callable[..., Tensor], record: Recorder = record_cuda) -> None:
        self.step = step
        self.record = record
        self._tensors: Sequence[Any] = ()  # held, so that no other tensor gets their addresses
        self._places: list[object] = []
        # a captured step: its input of token ids, what replays it, its logits
        self._recordings: dict[torch.Size, tuple[Tensor, Callable[[], None], Tensor]] = {}

    def __call__(self, token_ids: Tensor, *tensors: Any) -> Tensor:
        places = [_place(tensor) for tensor in _flat(tensors)]
        if places != self._places:
            self._recordings.clear()
            self._tensors, self._places = tensors, places
        if token_ids.shape not in self._recordings:
            static_ids = token_ids.clone()
            recorded = self.record(lambda: self.step(static_ids, *tensors))
            self._recordings[token_ids.shape] = static_ids, *recorded
        static_ids, replay, logits = self._recordings[token_ids.shape]
        static_ids.copy_(token_ids)
        replay()
        return logits.clone()  # the next replay overwrites them


def _flat(value: Any) -> Iterator[Tensor | None]:
    if value is None or isinstance(value, Tensor):
        yield value
    else:
        for item in value:
            yield from _flat(item)


def _place(tensor: Tensor | None) -> object:
    """What must be equal for a recording to read the same memory."""
    return None if tensor is None else (tensor.data_ptr(), tensor.shape, tensor.stride())
