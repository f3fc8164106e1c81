"""The engine against a model whose next token follows from all that a row has read."""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any

import pytest
import torch

import mmchat
from mmchat.conversation import Message, Text
from mmchat.engine import reading as reading_module
from mmchat.engine.driver import hold, run
from mmchat.engine.engine import Engine
from mmchat.engine.events import Finished, Progress, TextDelta
from mmchat.engine.request import Request
from mmchat.engine.sampling import SamplingParams
from mmchat.errors import (
    ContextLengthExceeded,
    ImageError,
    MemoryError_,
    MmchatError,
    NumericalError,
    UsageError,
)
from mmchat.evals.run import judge_scenes
from mmchat.evals.scenes import heldout_scenes
from mmchat.models.base import Watch
from mmchat.models.prompt import PlacedMedia, Prompt
from tests.fake_model import EOT, VOCAB_SIZE, ByteTokenizer, FakeCache
from tests.kinds import some

ENGINE = Path(reading_module.__file__).parent
GUILTY = 251  # a token that breaks every step that reads it
CURSED = 252  # breaks every step that goes on more than two tokens after a prompt with it
GREEDY = SamplingParams(temperature=0.0, max_new_tokens=12)


def after(ids: list[int]) -> int:
    """The token that a row with these ids goes on with; an answer ends now and then.

    It follows from the last three, so that the last two often came before, and went on otherwise.
    """
    mixed = sum((at + 3) * token for at, token in enumerate(ids[-3:])) + len(ids) // 30
    return EOT if mixed % 19 == 0 else mixed % 5


class Cache(FakeCache):
    """Encoded pictures too; `needed`: what must be encoded before a row is read on."""

    def __init__(self, slots: int) -> None:
        super().__init__(slots)
        self.encoded: set[str] = set()
        self.prompts: dict[int, Prompt] = {}

    def begin(self, slot: int, prompt: Prompt) -> None:
        self.prompts[slot] = prompt

    def has_media(self, content_hash: str) -> bool:
        return content_hash in self.encoded

    def drop_media(self, content_hash: str) -> None:
        self.encoded.discard(content_hash)


class Runtime:
    """sizes: how many rows and tokens each step read. slices: of pictures, in order."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.sizes: list[tuple[int, int]] = []
        self.slices: list[str] = []
        self.error: Exception = RuntimeError("the step fails")

    def new_cache(self, slots: int, positions: int) -> Cache:
        return Cache(slots)

    def encode(self, media, cache):
        group = media[:2]
        for _ in range(3):
            self.slices.append("".join(one.content_hash for one in group))
            yield group
        cache.encoded.update(one.content_hash for one in group)

    def forward(self, batch, cache):
        ids = batch.token_ids.tolist()
        self.sizes.append((len(batch.slots), len(ids)))
        batch.check(cache.lengths)
        late = [row for row in batch.rows() if self._is_late(row, cache)]
        if GUILTY in ids or late:
            raise self.error
        logits = torch.zeros(len(ids), VOCAB_SIZE)
        for row in batch.rows():
            held = cache.rows[row.slot]
            prompt = cache.prompts[row.slot]
            for media in prompt.media:
                if row.start <= media.position < row.end:
                    assert media.media.content_hash in cache.encoded
            for at in range(row.offset, row.offset + row.count):
                held.append(ids[at])
                logits[at, after(held)] = 9.0
            assert held[: len(prompt.token_ids)] == list(prompt.token_ids[: len(held)])
        return logits[list(batch.wanted)]

    def _is_late(self, row, cache) -> bool:
        ids = cache.prompts[row.slot].token_ids
        return CURSED in ids and row.end > len(ids) + 3


def fake_model() -> Any:
    return SimpleNamespace(
        runtime=Runtime(),
        processor=SimpleNamespace(stop_ids=frozenset({EOT})),
        tokenizer=ByteTokenizer(),
        vocab_size=VOCAB_SIZE,
        peak_memory=lambda: 1,
    )


def expected(prompt: Prompt, most: int) -> tuple[int, ...]:
    ids, said = list(prompt.token_ids), []
    while len(said) < most and (not said or said[-1] != EOT):
        said.append(after(ids + said))
    return tuple(said)


def endless(ids: list[int], count: int) -> tuple[int, ...]:
    """What a row says that does not stop."""
    said: list[int] = []
    for _ in range(count):
        said.append(after(ids + said))
    return tuple(said)


def picture(name: str) -> Any:
    facts = SimpleNamespace(tokens=5)
    return SimpleNamespace(content_hash=name, facts=facts)


def prompt_of(draw: random.Random, shared: list[int]) -> Prompt:
    """Begins as others do, now and then with pictures."""
    begin = shared[: draw.choice([0, 0, 20, 40])]
    most = draw.choice([5, 250])
    ids = [*begin, *(draw.randrange(most) for _ in range(draw.randint(1, 40)))]
    places = sorted(draw.sample(range(len(begin), len(ids)), k=draw.choice([0, 0, 0, 1])))
    media = [PlacedMedia(at, 1, picture(draw.choice("abcd"))) for at in places]
    return Prompt(tuple(ids), tuple(media))


@pytest.mark.parametrize(
    "sequences",
    [range(40), pytest.param(range(40, 1_000), marks=[pytest.mark.slow, pytest.mark.timeout(900)])],
)
def test_each_row_says_what_it_says_alone_whatever_goes_on_beside_it(sequences, monkeypatch):
    """Ten random requests a sequence: queued, cancelled, failing, sharing beginnings, drafting."""
    monkeypatch.setattr(reading_module, "PIECE", 7)
    shared_positions = 0
    for seed in sequences:
        draw = random.Random(seed)
        common = [draw.randrange(250) for _ in range(40)]
        engine = Engine(fake_model(), rows=draw.choice([1, 2, 5]))
        left, going, ended = 10, [], []
        steps = 0
        while left or any(not answer.is_over for answer in going):
            if left and draw.random() < 0.4:
                left -= 1
                params = replace(GREEDY, speculate=draw.choice(["off", 3, "auto"]))
                prompt = prompt_of(draw, common)
                if draw.random() < 0.2:
                    prompt = Prompt((*prompt.token_ids, draw.choice([GUILTY, CURSED])))
                owner = draw.choice(["", "", "other"])
                going.append(engine.submit(Request(prompt, params, owner=owner)))
            if going and draw.random() < 0.03:
                draw.choice(going).cancel()
            engine.step()
            steps += 1
            assert steps < 3_000, "somebody waits for ever"
            taken = [slot for slot in engine.prefixes.slots if slot.is_taken]
            assert len(taken) <= engine.rows
        assert not engine.step()
        assert not any(slot.is_taken for slot in engine.prefixes.slots)
        ended = going
        for answer in ended:
            prompt, most = answer.request.prompt, answer.request.sampling.max_new_tokens
            whole = expected(prompt, most)
            is_cursed = CURSED in prompt.token_ids
            if answer.error is not None:
                assert str(answer.error) == "the step fails"
                assert GUILTY in prompt.token_ids or is_cursed
                continue
            assert answer.is_cancelled or not (is_cursed and len(whole) > 4)
            assert answer.is_cancelled or GUILTY not in prompt.token_ids
            if answer.finished is None:
                assert answer.is_cancelled
                continue
            said = answer.finished.output_ids
            assert said == whole[: len(said)]
            if not answer.is_cancelled:
                assert said == whole
                deltas = [e for e in answer.take() if isinstance(e, TextDelta)]
                assert [e.token_id for e in deltas if e.token_id is not None] == list(said)
            shared_positions += answer.finished.usage.cached_tokens
        for slot in engine.prefixes.slots:
            assert engine.cache.lengths[slot.number] == len(slot.marks)
    assert shared_positions > 100


def test_owners_share_nothing():
    model = fake_model()
    engine = Engine(model, rows=3)
    prompt = Prompt(tuple(range(60)))
    cached = []
    for owner in ("one", "one", "two"):
        [*_, (_, end)] = run(engine, [engine.submit(Request(prompt, GREEDY, owner=owner))])
        assert isinstance(end, Finished)
        cached.append(end.usage.cached_tokens)
    assert cached == [0, 59, 0]


def test_a_long_prompt_is_read_in_pieces_while_others_write():
    engine = Engine(fake_model(), rows=2)
    first = engine.submit(Request(Prompt((1, 2, 3)), replace(GREEDY, max_new_tokens=40)))
    while not any(isinstance(event, TextDelta) for event in first.take()):
        engine.step()
    engine.submit(Request(Prompt(tuple(range(200)) * 8), GREEDY))
    sizes = engine._model.runtime.sizes
    before = len(sizes)
    for _ in range(4):
        engine.step()
    both = (2, 1 + reading_module.PIECE)  # with each piece everybody writes on, in one forward
    assert sizes[before:] == [both] * 4


@pytest.mark.parametrize("apart", ["fixed slots", "a watched row"])
def test_what_is_computed_in_another_way_is_read_beside_those_who_write(apart, monkeypatch):
    monkeypatch.setattr(FakeCache, "fixed", apart == "fixed slots")
    engine = Engine(fake_model(), rows=2)
    engine.submit(Request(Prompt((1, 2, 3)), replace(GREEDY, max_new_tokens=9), ignore_stop=True))
    for _ in range(2):
        engine.step()
    sizes = engine._model.runtime.sizes
    before = len(sizes)
    watch = Watch(0) if apart == "a watched row" else None
    engine.submit(Request(Prompt((4, 5, 6)), GREEDY, watch=watch))
    engine.step()
    assert sizes[before:] == [(1, 1), (1, 3)]


def test_two_long_prompts_are_read_in_turns_while_another_writes():
    engine = Engine(fake_model(), rows=3)
    engine.submit(Request(Prompt((1, 2, 3)), replace(GREEDY, max_new_tokens=400), ignore_stop=True))
    for _ in range(3):
        engine.step()
    for first in (10, 20):
        engine.submit(Request(Prompt((first, *range(200)) * 8), GREEDY))
    read = []
    for _ in range(6):
        engine.step()
        read.append(engine.cache.lengths[1:])
    piece = reading_module.PIECE
    assert read[:4] == [[piece, 0], [piece, piece], [2 * piece, piece], [2 * piece, 2 * piece]]


def test_a_long_prompt_lets_others_begin_where_there_are_several_rows():
    engine = Engine(fake_model(), rows=2)
    engine.submit(Request(Prompt(tuple(range(200)) * 8), GREEDY))
    engine.step()
    sizes = engine._model.runtime.sizes
    assert sizes == [(1, reading_module.PIECE)]
    short = engine.submit(Request(Prompt((1, 2, 3)), GREEDY))
    engine.step()
    assert any(isinstance(event, TextDelta) for event in short.take())
    engine.step()
    assert sizes[1:] == [(1, 3), (2, 1 + reading_module.PIECE)]


def test_short_prompts_without_end_do_not_keep_a_long_one_from_being_read():
    engine = Engine(fake_model(), rows=4)
    long = engine.submit(Request(Prompt(tuple(range(200)) * 8), GREEDY))
    short: list[Any] = []
    for steps in range(1, 99):
        if sum(not answer.is_over for answer in short) < 3:
            prompt = Prompt((steps, 2, 3))
            short.append(engine.submit(Request(prompt, replace(GREEDY, max_new_tokens=1))))
        engine.step()
        if any(isinstance(event, TextDelta) for event in long.take()):
            break
    assert steps <= 2 * -(-1_600 // reading_module.PIECE)
    assert sum(answer.is_over for answer in short) >= steps - 3


@pytest.mark.parametrize("fixed", [False, True])
def test_who_comes_while_others_write_is_read_at_once(fixed, monkeypatch):
    """In the next forward: where one reads tokens and prompts, that is in the next step."""
    monkeypatch.setattr(FakeCache, "fixed", fixed)
    engine = Engine(fake_model(), rows=2)
    endless_one = replace(GREEDY, max_new_tokens=40)
    came: list[Any] = []

    def tell():
        answer.take()  # or nothing more is told
        if engine.steps[1] == 3 and not came:
            came.append(engine.submit(Request(Prompt((4, 5)), GREEDY, owner="b")))

    request = Request(Prompt((1, 2)), endless_one, owner="a", ignore_stop=True)
    answer = engine.submit(request, tell)
    while not came:
        engine.step()
    if not fixed:
        engine.step()
    assert any(isinstance(event, TextDelta) for event in came[0].take())


def test_one_alone_reads_its_prompt_at_once():
    engine = Engine(fake_model())
    engine.submit(Request(Prompt(tuple(range(200)) * 8), GREEDY))
    engine.step()
    assert engine._model.runtime.sizes == [(1, 1_600)]


def with_pictures(names: str, *ids: int) -> Prompt:
    return Prompt(ids, tuple(PlacedMedia(at, 1, picture(name)) for at, name in enumerate(names)))


def test_pictures_of_several_rows_are_encoded_together_and_their_prompts_read_so():
    engine = Engine(fake_model(), rows=4)
    prompts = [with_pictures(name, 9, number, 7) for number, name in enumerate("abab")]
    answers = [engine.submit(Request(prompt, GREEDY)) for prompt in prompts]
    while not engine._model.runtime.sizes:
        engine.step()
    assert engine._model.runtime.slices == ["ab"] * 3  # the model takes two
    assert engine._model.runtime.sizes == [(4, 12)]
    while engine.step():
        pass
    for answer, prompt in zip(answers, prompts, strict=True):
        assert answer.finished is not None
        assert answer.finished.output_ids == expected(prompt, 12)


def test_prompts_that_are_read_together_share_the_positions_of_a_piece():
    engine = Engine(fake_model(), rows=5)
    engine.submit(Request(Prompt((1, 2, 3)), replace(GREEDY, max_new_tokens=99), ignore_stop=True))
    engine.step()
    piece = reading_module.PIECE
    for length in (piece // 2, piece, reading_module.SHORT + 1):
        ids = (length % 250, *range(200), *range(200), *range(200))
        engine.submit(Request(Prompt(ids[:length]), GREEDY))
    read = []
    for _ in range(2):
        engine.step()
        read.append(engine.cache.lengths[1:4])
    half = piece // 2
    assert read[0] == [half, half, 0]
    assert read[1][1:] == [piece, reading_module.SHORT + 1]


@pytest.mark.parametrize(
    ("failure", "kind"),
    [(RuntimeError("no"), RuntimeError), (RuntimeError("can't allocate memory"), MemoryError_)],
)
def test_a_picture_that_fails_ends_the_row_that_needs_it(failure, kind, monkeypatch):
    engine = Engine(fake_model(), rows=3)
    encode, tried = engine._runtime.encode, []

    def failing(media, cache):
        for taken in encode(media, cache):
            names = "".join(one.content_hash for one in media)
            if "b" in names[:2]:
                tried.append(names)
                raise failure
            yield taken

    monkeypatch.setattr(engine._runtime, "encode", failing)
    prompts = [with_pictures(name, 9, number, 7) for number, name in enumerate("abc")]
    answers = [engine.submit(Request(prompt, GREEDY)) for prompt in prompts]
    while engine.step():
        pass
    assert isinstance(answers[1].error, kind)
    assert tried[0] == "abc"
    assert tried[-1] == "b"
    assert len(tried) < 5
    for number in (0, 2):
        end = answers[number].finished
        assert end is not None
        assert end.output_ids == expected(prompts[number], 12)
    assert not any(slot.is_taken for slot in engine.prefixes.slots)


def test_memory_that_runs_out_for_a_picture_is_looked_for_once(monkeypatch):
    engine = Engine(fake_model(), rows=3)
    encode, tried = engine._runtime.encode, []

    def narrow(media, cache):
        tried.append(len(media))
        if len(tried) == 1:
            raise MemoryError
        yield from encode(media, cache)

    monkeypatch.setattr(engine._runtime, "encode", narrow)
    prompt = with_pictures("a", 9, 1, 7)
    [*_, (_, end)] = run(engine, [engine.submit(Request(prompt, GREEDY))])
    assert isinstance(end, Finished)
    assert end.output_ids == expected(prompt, 12)
    assert tried == [1, 1]


@pytest.mark.parametrize("gone", [0, 1])
def test_a_row_that_is_cancelled_among_pictures_leaves_those_of_others(gone):
    engine = Engine(fake_model(), rows=2)
    prompts = [with_pictures(name, 9, number, 7) for number, name in enumerate("ab")]
    answers = [engine.submit(Request(prompt, GREEDY)) for prompt in prompts]
    for _ in range(2):
        engine.step()
    engine.cancel(answers[gone])
    assert sum(slot.is_taken for slot in engine.prefixes.slots) == 1
    while engine.step():
        pass
    assert engine._model.runtime.slices == ["ab"] * 3
    left = answers[1 - gone].finished
    assert left is not None
    assert left.output_ids == expected(prompts[1 - gone], 12)


def test_a_picture_that_is_tried_alone_though_its_row_is_gone_is_dropped(monkeypatch):
    """Two are encoded together, the row of the first is cancelled, then memory runs out."""
    engine = Engine(fake_model(), rows=2)
    encode, tried = engine._runtime.encode, []

    def narrow(media, cache):
        tried.append("".join(one.content_hash for one in media))
        for at, taken in enumerate(encode(media, cache)):
            if at and len(media) > 1:
                raise MemoryError
            yield taken

    monkeypatch.setattr(engine._runtime, "encode", narrow)
    prompts = [with_pictures(name, 9, number, 7) for number, name in enumerate("ab")]
    answers = [engine.submit(Request(prompt, GREEDY)) for prompt in prompts]
    engine.step()
    engine.cancel(answers[0])
    while engine.step():
        pass
    assert tried == ["ab", "b"]
    assert answers[1].finished is not None
    assert answers[1].finished.output_ids == expected(prompts[1], 12)


def test_what_the_model_did_not_take_keeps_no_picture_of_a_row_that_is_gone():
    """Of three pictures it takes the first two; the rows of these are cancelled."""
    engine = Engine(fake_model(), rows=3)
    prompts = [with_pictures(name, 9, number, 7) for number, name in enumerate("abc")]
    answers = [engine.submit(Request(prompt, GREEDY)) for prompt in prompts]
    engine.step()
    for answer in answers[:2]:
        engine.cancel(answer)
    while engine.step():
        pass
    assert engine._model.runtime.slices == ["ab"] + ["c"] * 3
    assert answers[2].finished is not None
    assert answers[2].finished.output_ids == expected(prompts[2], 12)


def test_a_picture_that_was_encoded_beside_another_for_a_row_that_is_gone_is_not_kept():
    engine = Engine(fake_model(), rows=2)
    answers = [engine.submit(Request(with_pictures(name, 9, 7), GREEDY)) for name in "ab"]
    engine.step()
    engine.cancel(answers[0])
    while engine.step():
        pass
    assert engine.cache.encoded == {"b"}
    assert (engine.encoded, engine.known) == (1, 0)


def test_when_nobody_waits_for_the_pictures_any_more_they_are_dropped():
    engine = Engine(fake_model(), rows=2)
    answers = [engine.submit(Request(with_pictures(name, 9, 7), GREEDY)) for name in "ab"]
    for _ in range(2):
        engine.step()
    for answer in answers:
        engine.cancel(answer)
    assert engine._encoding is None
    assert not engine.step()


def test_a_picture_is_encoded_slice_by_slice_and_once_for_all():
    engine = Engine(fake_model(), rows=2)
    prompts = [Prompt((9, token, 7), (PlacedMedia(0, 1, picture("p")),)) for token in (1, 2)]
    first = engine.submit(Request(prompts[0], GREEDY))
    for _ in range(3):
        engine.step()
    assert engine._model.runtime.slices == ["p"] * 3
    assert [type(event) for event in first.take()] == [Progress]
    list(run(engine, [first]))
    list(run(engine, [engine.submit(Request(prompts[1], GREEDY))]))
    assert engine._model.runtime.slices == ["p"] * 3


def test_only_those_who_wait_for_a_picture_have_time_of_pictures():
    """Neither a text beside a picture has, nor who asks about one that is known."""
    engine = Engine(fake_model(), rows=3)
    prompts = [with_pictures("a", 9, 7), Prompt((1, 2, 3)), with_pictures("a", 9, 8)]
    seen = [engine.submit(Request(prompt, GREEDY)) for prompt in prompts[:2]]
    while engine.step():
        pass
    seen.append(engine.submit(Request(prompts[2], GREEDY)))
    while engine.step():
        pass
    spent = [answer.request.timings for answer in seen]
    assert [one.vision_seconds > 0 for one in spent] == [True, False, False]
    for one in spent:
        assert 0 < one.vision_seconds + one.prefill_seconds <= one.time_to_first_token


@pytest.mark.parametrize("after_steps", [0, 1, 2, 3, 4, 6])
def test_cancelling_frees_the_row_at_once(after_steps):
    engine = Engine(fake_model(), rows=1)
    media = tuple(PlacedMedia(at, 1, picture(name)) for at, name in enumerate("pqr", start=1))
    answer = engine.submit(Request(Prompt((1, 2, 3, 4), media), GREEDY))
    for _ in range(after_steps):
        engine.step()
    engine.cancel(answer)
    assert not any(slot.is_taken for slot in engine.prefixes.slots)
    assert answer.finished is not None
    assert answer.finished.reason == "interrupted"
    assert not engine.step()
    [*_, (_, end)] = run(engine, [engine.submit(Request(Prompt((5, 6)), GREEDY))])
    assert end.output_ids == expected(Prompt((5, 6)), 12)


def test_an_answer_that_cancels_another_as_it_ends_is_heard_once():
    engine = Engine(fake_model(), rows=2)
    params = replace(GREEDY, max_new_tokens=100)
    others = []
    first = engine.submit(
        Request(Prompt((1, 2)), params, ignore_stop=True),
        lambda: [engine.cancel(other) for other in others if first.is_over],
    )
    others.append(engine.submit(Request(Prompt((3, 4)), params, ignore_stop=True)))
    for _ in range(5):
        engine.step()
    engine.cancel(first)
    while engine.step():
        pass
    for answer in (first, *others):
        assert [type(event) for event in answer.take()].count(Finished) == 1


PLACES = {
    "in the queue": lambda engine, answer: answer in engine._waiting,
    "in a picture": lambda engine, answer: engine._encoding is not None,
    "in the prompt": lambda engine, answer: 0 < engine.cache.lengths[1] < 1_500,
    "while it writes": lambda engine, answer: engine.cache.lengths[1] > 1_503,
    "in a draft": lambda engine, answer: engine._runtime.sizes[-1][1] > 2,
}


@pytest.mark.parametrize("place", PLACES)
def test_cancelling_anywhere_frees_the_row_before_the_next_step(place):
    """Beside another that writes on and says what it says alone."""
    engine = Engine(fake_model(), rows=1 if place == "in the queue" else 2)
    params = replace(GREEDY, max_new_tokens=200, speculate="off")
    other = engine.submit(Request(Prompt((1, 2, 3)), params, ignore_stop=True))
    while not other.take():
        engine.step()
    ids = (9, *range(30)) if place == "in a draft" else tuple(range(250)) * 6
    media = (PlacedMedia(1, 1, picture("p")),) if place == "in a picture" else ()
    params = replace(params, speculate=4 if place == "in a draft" else "off")
    answer = engine.submit(Request(Prompt(ids, media), params, ignore_stop=True))
    while not PLACES[place](engine, answer):
        engine.step()
        assert engine.has_work, "the place was never reached"
    engine.cancel(answer)
    assert answer.finished is not None
    assert answer.finished.reason == "interrupted"
    assert sum(slot.is_taken for slot in engine.prefixes.slots) == 1
    assert not any(row.answer is answer for row in engine._active)
    while engine.step():
        pass
    assert other.finished is not None
    assert other.finished.output_ids == endless([1, 2, 3], 200)


def test_two_hundred_poisons_leave_a_good_answer_and_the_engine_whole(monkeypatch):
    """Rows that break their step, and rows that are not numbers, beside one that is good."""
    model = fake_model()
    engine = Engine(model, rows=3)
    forward = model.runtime.forward

    def poisoned(batch, cache):
        logits = forward(batch, cache)
        for row in batch.rows():
            if 253 in cache.prompts[row.slot].token_ids:
                read = range(row.offset, row.offset + row.count)
                logits[[at for at, one in enumerate(batch.wanted) if one in read]] = float("nan")
        return logits

    monkeypatch.setattr(model.runtime, "forward", poisoned)
    params = replace(GREEDY, max_new_tokens=1_500)
    good = engine.submit(Request(Prompt((1, 2, 3)), params, ignore_stop=True))
    kinds = {GUILTY: RuntimeError, CURSED: RuntimeError, 253: NumericalError}
    answers = []
    for number in range(200):
        poison = list(kinds)[number % 3]
        params = replace(GREEDY, max_new_tokens=9)
        prompt = Prompt((number, 7, poison))
        answers.append((poison, engine.submit(Request(prompt, params, ignore_stop=True))))
    while engine.step():
        pass
    for poison, answer in answers:
        assert isinstance(answer.error, kinds[poison])
    assert good.finished is not None
    assert good.finished.output_ids == endless([1, 2, 3], 1_500)


def test_memory_that_runs_out_ends_one_row():
    model = fake_model()
    model.runtime.error = RuntimeError("can't allocate memory")
    engine = Engine(model, rows=4)
    prompts = [Prompt((1, 2)), Prompt((3, 4)), Prompt((5, 6))]
    answers = [engine.submit(Request(prompt, GREEDY)) for prompt in prompts]
    cursed = next(p for p in (Prompt((n, CURSED)) for n in range(99)) if len(expected(p, 12)) > 4)
    bad = engine.submit(Request(cursed, GREEDY))
    while engine.step():
        pass
    assert isinstance(bad.error, MemoryError_)
    assert bad.error.__context__ is None
    for answer, prompt in zip(answers, prompts, strict=True):
        assert answer.finished is not None
        assert answer.finished.output_ids == expected(prompt, 12)


def test_memory_that_runs_out_for_who_writes_ends_nobody_who_is_read():
    """Here it is the writer's fault, though the other is the younger."""
    model = fake_model()
    model.runtime.error = RuntimeError("can't allocate memory")
    engine = Engine(model, rows=2)
    params = replace(GREEDY, speculate="off")
    bad = engine.submit(Request(Prompt((1, CURSED)), params, ignore_stop=True))
    for _ in range(2):
        engine.step()
    long = Prompt(tuple(range(200)) * 8)
    answer = engine.submit(Request(long, GREEDY))
    while engine.step():
        pass
    assert isinstance(bad.error, MemoryError_)
    assert answer.finished is not None
    assert answer.finished.output_ids == expected(long, 12)


def test_what_memory_does_not_allow_in_one_forward_is_read_in_two(monkeypatch):
    engine = Engine(fake_model(), rows=2)
    forward = engine._runtime.forward

    def narrow(batch, cache):
        if len(batch.token_ids) > reading_module.PIECE:
            raise MemoryError
        return forward(batch, cache)

    monkeypatch.setattr(engine._runtime, "forward", narrow)
    first = engine.submit(Request(Prompt((1, 2, 3)), GREEDY, ignore_stop=True))
    for _ in range(2):
        engine.step()
    long = Prompt(tuple(range(200)) * 8)
    second = engine.submit(Request(long, GREEDY))
    while engine.step():
        pass
    assert first.finished is not None
    assert first.finished.output_ids == endless([1, 2, 3], 12)
    assert second.finished is not None
    assert second.finished.output_ids == expected(long, 12)


def test_a_copy_that_fails_leaves_nothing_that_is_taken_for_read(monkeypatch):
    model = fake_model()
    engine = Engine(model, rows=2)
    long, other = Prompt(tuple(range(60))), Prompt((*range(50), 1, 2))
    for prompt in (long, Prompt((9, 9, 9))):
        list(run(engine, [engine.submit(Request(prompt, GREEDY))]))

    def fail(*_):
        raise MemoryError

    first = engine.submit(Request(long, replace(GREEDY, max_new_tokens=50), ignore_stop=True))
    engine.step()
    with monkeypatch.context() as patch:
        patch.setattr(engine.cache, "copy", fail)
        with pytest.raises(MemoryError_):
            list(run(engine, [engine.submit(Request(other, GREEDY))]))
    [*_, (_, end)] = run(engine, [engine.submit(Request(other, GREEDY))])
    assert end.output_ids == expected(other, 12)
    list(run(engine, [first]))


def test_a_row_that_cannot_be_made_frees_its_slot(monkeypatch):
    engine = Engine(fake_model())

    def fail(*_):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr("mmchat.engine.row.Sampler", fail)
        with pytest.raises(MemoryError_):
            list(run(engine, [engine.submit(Request(Prompt((1, 2)), GREEDY))]))
    [*_, (_, end)] = run(engine, [engine.submit(Request(Prompt((1, 2)), GREEDY))])
    assert end.output_ids == expected(Prompt((1, 2)), 12)


@pytest.mark.parametrize("place", ["mmchat.engine.row.Sampler", "forward", "encode", "begin"])
def test_ctrl_c_in_the_middle_of_the_work_frees_the_slot(place, monkeypatch):
    engine = Engine(fake_model())
    prompt = Prompt((1, 2), (PlacedMedia(0, 1, picture("p")),))

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if place == "begin":
            patch.setattr(engine.cache, place, interrupted)
        elif "." in place:
            patch.setattr(place, interrupted)
        else:
            patch.setattr(engine._runtime, place, interrupted)
        answer = engine.submit(Request(prompt, GREEDY))
        with pytest.raises(KeyboardInterrupt):
            list(run(engine, [answer]))
    assert answer.is_over
    assert not any(slot.is_taken for slot in engine.prefixes.slots)
    [*_, (_, end)] = run(engine, [engine.submit(Request(prompt, GREEDY))])
    assert end.output_ids == expected(prompt, 12)


def interrupted_at(line: int, work: Callable[[], object]) -> int:
    """Ctrl-C before so many lines of the engine have run; returns how many did."""
    count = 0

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal count
        if Path(frame.f_code.co_filename).parent != ENGINE:
            return None
        if event == "line":
            count += 1
            if count == line:
                sys.settrace(None)
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        with suppress(KeyboardInterrupt):
            work()
    finally:
        sys.settrace(before)
    return count


@pytest.mark.parametrize("every", some([17, 199], [199]))
def test_ctrl_c_at_any_line_leaves_the_engine_whole(every):
    """No slot is lost, and none keeps positions that it does not hold: answers would be wrong."""
    with_picture = Prompt((1, 2, 7), (PlacedMedia(0, 1, picture("p")),))
    prompts = [Prompt((1, 2, 3, 4)), with_picture, Prompt((1, 2, 3, 9))]

    def answers(engine: Engine, *asked: Prompt) -> list[Any]:
        submitted = [engine.submit(Request(prompt, GREEDY)) for prompt in asked]
        ends = dict(run(engine, submitted))
        return [ends[answer].output_ids for answer in submitted]

    def attempt(line: int) -> int:
        engine = Engine(fake_model(), rows=2)
        answers(engine, prompts[0])
        count = interrupted_at(line, lambda: answers(engine, *prompts[1:]))
        for prompt in (*prompts, prompts[0]):
            assert answers(engine, prompt) == [expected(prompt, 12)], line
        assert engine.running == 0
        assert not any(slot.is_taken for slot in engine.prefixes.slots), line
        return count

    lines = attempt(0)  # at none
    assert lines > 1_000
    for line in range(1, lines, every):
        assert attempt(line) == line


def test_a_reader_that_is_collected_within_a_step_is_dropped_after_it(monkeypatch):
    engine = Engine(fake_model(), rows=2)
    other = engine.submit(Request(Prompt((4, 5)), replace(GREEDY, max_new_tokens=30)))
    for _ in range(3):
        engine.step()
    forward = engine._runtime.forward

    def collecting(batch, cache):
        engine.cancel(other)
        return forward(batch, cache)

    with monkeypatch.context() as patch:
        patch.setattr(engine._runtime, "forward", collecting)
        engine.step()
    prompt = Prompt((1, 2, 3))
    [*_, (_, end)] = run(engine, [engine.submit(Request(prompt, GREEDY))])
    assert end.output_ids == expected(prompt, 12)
    assert other.is_over
    assert not any(slot.is_taken for slot in engine.prefixes.slots)


def test_a_picture_that_another_row_encodes_is_waited_for():
    engine = Engine(fake_model(), rows=2)
    prompts = [Prompt((9, token, 7), (PlacedMedia(0, 1, picture("p")),)) for token in (1, 2)]
    answers = [engine.submit(Request(prompt, GREEDY)) for prompt in prompts]
    list(run(engine, answers))
    assert engine._model.runtime.slices == ["p"] * 3
    for answer, prompt in zip(answers, prompts, strict=True):
        assert answer.finished is not None
        assert answer.finished.output_ids == expected(prompt, 12)


def test_answers_read_in_several_threads_are_right():
    engine, found = Engine(fake_model(), rows=2), {}

    def read(number: int) -> None:
        for turn in range(20):
            prompt = Prompt((number, turn, 3))
            [*_, (_, end)] = run(engine, [engine.submit(Request(prompt, GREEDY))])
            found[number, turn] = end.output_ids == expected(prompt, 12)

    threads = [threading.Thread(target=read, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 80
    assert all(found.values())


def test_a_reader_that_stops_cancels_what_it_reads():
    engine = Engine(fake_model(), rows=2)
    answer = engine.submit(Request(Prompt((1, 2, 3)), GREEDY))
    reading = run(engine, [answer])
    next(reading)
    reading.close()
    assert answer.finished is not None
    assert not any(slot.is_taken for slot in engine.prefixes.slots)


def test_talks_end_in_their_order_and_the_first_failure_is_raised():
    engine = Engine(fake_model(), rows=3)

    def talk(ids: tuple[int, ...], turns: int):
        said: list[tuple[int, ...]] = []
        for _ in range(turns):
            end = yield Request(Prompt(ids), GREEDY)
            said.append(end.output_ids)
            ids = (*ids, *end.output_ids, 8)
        return said

    found = list(hold(engine, [talk((number, 5), 1 + number % 3) for number in range(9)]))
    assert [len(said) for said in found] == [1 + number % 3 for number in range(9)]
    assert found[4][0] == expected(Prompt((4, 5)), 12)
    with pytest.raises(RuntimeError, match="the step fails"):
        list(hold(engine, [talk((1, 2), 1), talk((GUILTY,), 1)]))
    assert not any(slot.is_taken for slot in engine.prefixes.slots)


# With the built-in model


@dataclass(frozen=True)
class Compared:
    same: int
    ties: int


def test_scenes_asked_eight_at_once_get_the_answers_of_one_at_a_time():
    check_scenes(12)


@pytest.mark.slow
def test_two_hundred_scenes_get_the_same_answers_alone_and_among_seven_others():
    check_scenes(200)


def check_scenes(count: int) -> None:
    model = mmchat.load("tiny", dtype="float32")
    scenes = list(heldout_scenes(count))
    alone, together = (list(judge_scenes(model, scenes, rows)) for rows in (1, 8))
    assert [v.question for v in alone] == [v.question for v in together]
    assert [v.answer for v in alone] == [v.answer for v in together]


def test_many_questions_are_answered_in_their_order(monkeypatch):
    model = mmchat.load("tiny", dtype="float32")
    image = mmchat.load_image("assets/dog.jpg")
    questions = [
        Message("user", (image, Text("What's in this image?"))),
        "Say something.",
        ("What colour is the dog?", [image]),
    ]
    found = list(model.generate_many(questions, GREEDY, rows=2))
    for question, end in zip(questions, found, strict=True):
        session = model.chat()
        if isinstance(question, Message):
            *_, alone = session.ask(question, GREEDY)
        else:
            given = question if isinstance(question, tuple) else (question,)
            *_, alone = session.send(*given, sampling=GREEDY)
        assert end.text == alone.text
    with pytest.raises(UsageError, match="rows must be between 1 and 64, not 0"):
        model.generate_many([], rows=0)
    for wrong in ("Hello", None, 5):
        with pytest.raises(UsageError, match="questions must be a list, or something else to go"):
            model.generate_many(wrong)
    with pytest.raises(UsageError, match="urls must be a list, or something else to go through"):
        model.generate_many(["Hello"], urls="dog.jpg")
    with pytest.raises(UsageError, match="return_exceptions must be True or False, not int"):
        model.generate_many([], return_exceptions=1)  # type: ignore[call-overload]
    with pytest.raises(UsageError, match="text must be a string, not int"):
        list(model.generate_many([5]))  # type: ignore[list-item]
    assert issubclass(UsageError, MmchatError)


def test_one_question_that_fails_can_leave_the_others():
    model = mmchat.load("tiny", dtype="float32", max_seq_len=64)
    good = ("What's in this image?", "assets/dog.jpg")
    three = ("What is it?", "assets/dog.jpg", "assets/fish.jpg")
    questions = [("What is it?", "nope.jpg"), good, "many words " * 99, 5, good, three]
    with pytest.raises(ImageError, match="does not exist"):
        list(model.generate_many(questions, GREEDY))  # type: ignore[arg-type]
    found = list(model.generate_many(questions, GREEDY, rows=2, return_exceptions=True))  # type: ignore[arg-type]
    texts = [end.text if isinstance(end, Finished) else end.__class__ for end in found]
    answer = "A brown dog."
    assert texts == [ImageError, answer, ContextLengthExceeded, UsageError, answer, UsageError]
    assert "a question of 3 parts; give a text and its pictures" in str(found[-1])
    assert isinstance(found[0], ImageError)
    assert found[0].__traceback__ is None
