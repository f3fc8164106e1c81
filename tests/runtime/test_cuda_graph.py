"""Decoding by replay, with a recorder that stands in for a GPU's, and what a capture asks for."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from mmchat.models import row_cache
from mmchat.models.mllama.cache import MllamaCache
from mmchat.runtime.compiled import StepGraph
from mmchat.runtime.eager import EagerRuntime
from tests.kinds import some
from tests.models.mllama import oracle
from tests.models.mllama.oracle import CASES, CONFIG

CPU = torch.device("cpu")
GROWING = CASES["A_start_picture_text"]


class Recorder:
    """Replays by running again and writing the result where the first run left it."""

    def __init__(self) -> None:
        self.captures = 0

    def __call__(self, step: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        self.captures += 1
        for _ in range(3):  # as a capture is preceded by runs
            result = step().clone()

        def replay() -> None:
            result.copy_(step())

        return replay, result


@pytest.fixture(scope="module")
def weights():
    return oracle.random_weights()


@pytest.fixture
def recorder():
    return Recorder()


@pytest.fixture
def replayed(weights, recorder):
    model = oracle.build(weights)
    model.step = StepGraph(model.step, recorder)
    return EagerRuntime(model, CPU)


@pytest.fixture
def plain(weights):
    return EagerRuntime(oracle.build(weights), CPU)


def start(runtime, rows: list[oracle.Row]):
    reader = oracle.Reader(runtime, len(rows))
    return reader, [reader.prefill(*rows)]


def go_on(reader, logits: list[Tensor], steps: int) -> None:
    for _ in range(steps):
        logits.append(reader.decode(logits[-1].argmax(-1, keepdim=True)))


def test_one_capture_serves_all_tokens_until_the_cache_grows(
    plain, replayed, recorder, monkeypatch
):
    monkeypatch.setattr(row_cache, "CAPACITY_STEP", 16)
    written = []
    for runtime in (plain, replayed):
        reader, logits = start(runtime, GROWING)
        go_on(reader, logits, 16 - reader.length)
        before = recorder.captures
        go_on(reader, logits, 16)
        written.append(logits)
    assert before == 1
    assert recorder.captures == 2
    assert all(torch.equal(a, b) for a, b in zip(*written, strict=True))


def test_each_number_of_tokens_has_a_capture_of_its_own(plain, replayed, recorder):
    written = []
    for runtime in (plain, replayed):
        reader, logits = start(runtime, GROWING)
        for _ in range(2):
            go_on(reader, logits, 2)
            logits.append(reader.verify(torch.tensor([[4, 5, 6]]))[:, -1])
        written.append(logits)
    assert recorder.captures == 2
    assert all(torch.equal(a, b) for a, b in zip(*written, strict=True))


@pytest.mark.parametrize("case", ["B_text_between_pictures", "C_adjacent"])
def test_another_turn_with_the_same_picture_and_another_conversation(
    case, plain, replayed, recorder
):
    written = []
    for runtime in (plain, replayed):
        reader, logits = start(runtime, CASES["D_text_only"])
        go_on(reader, logits, 2)
        length = reader.length
        turn = [5, 7, 9] * 22  # more than a step takes
        logits.append(reader.prefill((turn, [])))
        go_on(reader, logits, 2)
        reader.truncate(length)
        go_on(reader, logits, 2)
        assert recorder.captures in (0, 1)
        other, more = start(runtime, CASES[case])
        go_on(other, more, 2)
        go_on(reader, logits, 1)
        written.append(logits + more)
    assert recorder.captures == 3
    assert all(torch.equal(a, b) for a, b in zip(*written, strict=True))


def test_what_a_step_returned_survives_the_next_step(replayed):
    reader, logits = start(replayed, GROWING)
    go_on(reader, logits, 1)
    kept = logits[1].clone()
    go_on(reader, logits, 3)
    assert torch.equal(logits[1], kept)


@pytest.mark.parametrize("case", [*CASES, "NO_PICTURE_IN_ONE_ROW"])
@pytest.mark.parametrize("count", some([1, 3], [3]))
def test_a_step_never_waits_for_the_device_and_mixes_none_in(case, count, weights):
    """A capture fails on both; meta tensors have no value to tell and meet no others."""
    rows = CASES.get(case, oracle.NO_PICTURE_IN_ONE_ROW)
    real = oracle.build(weights)
    text, slots = real.config.text_config, len(rows)
    cache = MllamaCache(text, slots, 32, torch.zeros(()), fixed=True)
    oracle.Reader(real, slots, cache=cache).prefill(*rows)

    def on_device(value):
        return pytree.tree_map(lambda leaf: None if leaf is None else leaf.to("meta"), value)

    seen = cache.seen_steps(range(slots), cache.lengths)
    cached = [layer.whole[0] for layer in cache.layers]
    ids = torch.zeros(len(rows), count, dtype=torch.long, device="meta")
    with torch.inference_mode():
        logits = real.to("meta").step(ids, *map(on_device, (cache.positions, cached, seen)))
    assert logits.device.type == "meta"
    assert logits.shape == (len(rows) * count, CONFIG.text_config.vocab_size)


# With a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("case", ["D_text_only", "B_text_between_pictures"])
def test_a_captured_step_equals_the_plain_one_and_never_synchronises(case, weights, monkeypatch):
    from mmchat.runtime.compiled import CompiledRuntime

    monkeypatch.setattr(row_cache, "CAPACITY_STEP", 16)
    device = torch.device("cuda")
    written = []
    for make in (EagerRuntime, CompiledRuntime):
        runtime = make(oracle.build(weights).to(device), device)
        reader, logits = start(runtime, CASES[case])
        go_on(reader, logits, 20)
        reader.cache.reserve(0, reader.length + 6)
        go_on(reader, logits, 1)
        torch.cuda.set_sync_debug_mode("error")
        try:
            go_on(reader, logits, 4)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        written.append(logits)
    for plain, captured in zip(*written, strict=True):
        assert torch.equal(plain.argmax(-1), captured.argmax(-1))
        torch.testing.assert_close(captured, plain, atol=1e-4, rtol=0)
