"""Memory of rows and pictures: never more than there is, and nobody waits for ever."""

from __future__ import annotations

import random
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

import mmchat
from mmchat.engine import reading as reading_module
from mmchat.engine.driver import run
from mmchat.engine.engine import Engine
from mmchat.engine.prefix import Place, Prefixes, Slot
from mmchat.engine.request import Answer, Request
from mmchat.engine.room import STEP, Queue, Room
from mmchat.engine.sampling import SamplingParams
from mmchat.errors import MemoryError_, NumericalError
from mmchat.evals.run import judge_scenes
from mmchat.evals.scenes import heldout_scenes
from mmchat.models.prompt import PlacedMedia, Prompt
from tests.engine.test_engine import GREEDY, Cache, Runtime, expected, fake_model

POSITION_BYTES, TOKEN_BYTES = 10, 400
ROW = STEP * POSITION_BYTES  # of a short request


class CountedCache(Cache):
    """Counts bytes as they are allocated."""

    def __init__(self, slots: int, *, fixed: bool = False) -> None:
        super().__init__(slots)
        self.fixed = fixed
        self.rooms = [0] * slots
        self.sizes: dict[str, int] = {}

    @property
    def bytes(self) -> int:
        positions = max(self.rooms) * len(self.rooms) if self.fixed else sum(self.rooms)
        own = positions * POSITION_BYTES + sum(self.sizes[name] for name in self.encoded)
        return own + (len(self.rooms) * self.longest if self.fixed and len(self.rooms) > 1 else 0)

    @property
    def longest(self) -> int:
        """Bytes of the pictures of a row, which it sees together; a step pads all rows to that."""
        rows = [[p.media.content_hash for p in prompt.media] for prompt in self.prompts.values()]
        return max((sum(self.sizes.get(name, 0) for name in names) for names in rows), default=0)

    def needed(self) -> set[str]:
        return {p.media.content_hash for prompt in self.prompts.values() for p in prompt.media}

    def drop_media(self, content_hash):
        if content_hash not in self.needed():
            self.encoded.discard(content_hash)

    def reserve(self, slot, length):
        self.rooms[slot] = max(self.rooms[slot], round_up(length))

    def copy(self, source, target, length):
        super().copy(source, target, length)
        self.reserve(target, length)

    def shrink(self, slot):
        if not self.fixed:
            self.rooms[slot] = round_up(self.lengths[slot])

    def free(self, slot):
        super().free(slot)
        self.prompts.pop(slot, None)
        self.rooms[slot] = 0

    def release(self):
        self.encoded &= self.needed()
        self.rooms = list(map(round_up, self.lengths))


class CountedRuntime(Runtime):
    def __init__(self, *, fixed: bool = False) -> None:
        super().__init__()
        self.fixed = fixed

    def new_cache(self, slots, positions):
        return CountedCache(slots, fixed=self.fixed)

    def encode(self, media, cache):
        for _ in range(3):
            yield media[:2]
        for one in media[:2]:
            cache.sizes[one.content_hash] = one.facts.tokens * TOKEN_BYTES
            cache.encoded.add(one.content_hash)


def counted_model(*, fixed: bool = False) -> Any:
    model = fake_model()
    model.runtime = CountedRuntime(fixed=fixed)
    model.position_bytes = POSITION_BYTES
    model.media_bytes = lambda facts: facts.tokens * TOKEN_BYTES
    return model


def picture(name: str) -> Any:
    return SimpleNamespace(content_hash=name, facts=SimpleNamespace(tokens=1 + ord(name) % 5))


def round_up(length: int) -> int:
    return -(-length // STEP) * STEP


def request(*ids: int, pictures: str = "", owner: str = "", most: int = 12) -> Request:
    """Pictures come before the text."""
    media = [PlacedMedia(at, 1, picture(name)) for at, name in enumerate(pictures)]
    prompt = Prompt((*[250] * len(pictures), *ids), tuple(media))
    return Request(prompt, replace(GREEDY, max_new_tokens=most), owner=owner)


def finish(engine: Engine) -> None:
    while engine.step():
        pass


def said(answer: Answer) -> tuple[int, ...]:
    assert answer.error is None
    assert answer.finished is not None
    return answer.finished.output_ids


def test_the_engine_tells_what_it_does():
    engine = Engine(counted_model(), rows=2, memory=8 * ROW)
    for number in (1, 2, 3):
        engine.submit(request(number, pictures="a"))
    assert (engine.waiting, engine.running, engine.bytes_used) == (3, 0, 0)
    engine.step()
    assert (engine.waiting, engine.running) == (1, 2)
    assert engine.bytes_used >= 2 * 256 * POSITION_BYTES
    finish(engine)
    assert (engine.waiting, engine.running) == (0, 0)
    assert (engine.encoded, engine.known) == (1, 2)
    assert set(engine.steps) <= {1, 2}
    assert engine.steps[2] > 0
    assert not engine.is_stalled(0)


def test_a_step_that_takes_too_long_is_seen_by_those_who_wait(monkeypatch):
    engine = Engine(counted_model(), rows=1)
    seen = []

    def looks(batch, cache):
        seen.append((engine.is_stalled(-1), engine.is_stalled(60)))
        return forward(batch, cache)

    runtime = engine._runtime
    forward = runtime.forward
    monkeypatch.setattr(runtime, "forward", looks)
    engine.submit(request(1))
    engine.step()
    engine.submit(request(2))
    engine.step()
    assert seen == [(False, False), (True, False)]


def test_rows_wait_until_there_is_memory():
    """Forty requests, memory for three."""
    engine = Engine(counted_model(), rows=8, memory=3 * ROW)
    answers = [engine.submit(request(number, 2)) for number in range(40)]
    most = 0
    while engine.step():
        most = max(most, sum(slot.is_taken for slot in engine.prefixes.slots))
        assert engine.cache.bytes <= 3 * ROW
    assert most == 3
    for number, answer in enumerate(answers):
        assert said(answer) == expected(Prompt((number, 2)), 12)


def test_a_request_that_can_never_fit_is_refused_with_the_numbers():
    engine = Engine(counted_model(), rows=2, memory=3 * ROW)
    with pytest.raises(MemoryError_, match=r"3 tokens and an answer of up to 900 need 10.0 KiB"):
        engine.submit(request(1, 2, 3, most=900))
    with pytest.raises(MemoryError_, match=r"there is room for 7.5 KiB"):
        engine.submit(request(1, pictures="abdgi"))
    assert not engine.has_work
    fewer = r"with fewer pictures; the first 4 of its 5 pictures would fit \(.*paper.pdf#1-4\)"
    with pytest.raises(MemoryError_, match=fewer):
        engine.submit(request(1, pictures="abdgi"))


@pytest.mark.parametrize(("places", "together"), [((0, 1, 2), 3 + 4 + 5), ((0, 3, 4), 4 + 5)])
def test_fixed_slots_need_room_for_the_most_pictures_that_one_of_them_sees_together(
    places, together
):
    media = tuple(PlacedMedia(at, 1, picture(n)) for at, n in zip(places, "abc", strict=True))
    asked = Request(Prompt((1,) * 8, media), GREEDY)
    need = 3 * ROW + (3 + 4 + 5) * TOKEN_BYTES + 3 * together * TOKEN_BYTES
    engine = Engine(counted_model(fixed=True), rows=3, memory=need)
    answer = engine.submit(asked)
    finish(engine)
    assert said(answer) == expected(asked.prompt, 12)
    assert engine.bytes_used == need
    with pytest.raises(MemoryError_, match="with fewer rows at once"):
        Engine(counted_model(fixed=True), rows=3, memory=need - 1).submit(asked)


def test_what_is_idle_goes_before_anybody_waits():
    engine = Engine(counted_model(), rows=4, memory=4 * ROW)
    list(run(engine, [engine.submit(request(*range(30)))]))
    list(run(engine, [engine.submit(request(*range(100, 130), pictures="d"))]))
    together = [engine.submit(request(number, 1)) for number in range(4)]
    engine.step()
    assert sum(slot.is_taken for slot in engine.prefixes.slots) == 4
    assert engine.cache.bytes <= 4 * ROW
    assert not engine.cache.encoded
    finish(engine)
    assert all(said(answer) for answer in together)


def test_the_least_recently_used_goes_and_the_prefix_that_is_asked_for_stays():
    engine = Engine(counted_model(), rows=3, memory=3 * ROW)
    old, young = tuple(range(40)), tuple(range(100, 140))
    for ids in (old, young):
        list(run(engine, [engine.submit(request(*ids, most=1))]))
    again = request(*old, 7, 8, most=600)  # takes three times the room
    [*_, (_, end)] = run(engine, [engine.submit(again)])
    assert end.usage.cached_tokens == 40
    assert end.output_ids == expected(again.prompt, 600)
    [*_, (_, end)] = run(engine, [engine.submit(request(*young))])
    assert end.usage.cached_tokens == 0


@pytest.mark.parametrize("limit", [None, ROW + 14 * TOKEN_BYTES])
def test_known_pictures_stay_while_they_fit_or_a_few_where_no_limit_is_known(limit):
    """Those of `d` to `g` take 1, 2, 3 and 4 tokens, `b` 4 and `c` 5."""
    engine = Engine(counted_model(), rows=1, memory=limit)
    for number, name in enumerate("abcdbefg"):
        list(run(engine, [engine.submit(request(number, 7, pictures=name))]))
    assert engine.cache.encoded == set("bdefg")  # `b` was used again before `c` had to go
    assert (engine.encoded, engine.known) == (7, 1)
    list(run(engine, [engine.submit(request(9, 9, 9))]))  # which needs none
    assert engine.cache.encoded == set("befg" if limit is None else "bdefg")


def test_a_prefix_is_cut_rather_than_lost_where_a_copy_does_not_fit():
    engine = Engine(counted_model(), rows=2, memory=ROW * 3 // 2)
    ids = tuple(range(200))
    list(run(engine, [engine.submit(request(*ids))]))
    [*_, (_, end)] = run(engine, [engine.submit(request(*ids[:150], 7, 8))])
    assert end.usage.cached_tokens == 150
    assert end.output_ids == expected(Prompt((*ids[:150], 7, 8)), 12)


def test_memory_that_runs_out_while_a_slot_is_shrunk_costs_what_it_holds(monkeypatch):
    engine = Engine(counted_model(), rows=2, memory=4 * ROW)

    def fail(slot):
        if engine.cache.lengths[slot]:
            raise RuntimeError("can't allocate memory")

    monkeypatch.setattr(engine.cache, "shrink", fail)
    first = engine.submit(request(1, 2))
    finish(engine)
    assert said(first) == expected(Prompt((1, 2)), 12)
    assert engine.cache.bytes == 0


@pytest.mark.parametrize(
    "sequences",
    [range(20), pytest.param(range(20, 200), marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("fixed", [False, True])
def test_the_engine_keeps_within_its_memory_and_answers_everybody(sequences, fixed, monkeypatch):
    """Ten random requests a sequence, of four owners, cancelled now and then."""
    monkeypatch.setattr(reading_module, "PIECE", 7)
    waited = 0
    for seed in sequences:
        draw = random.Random(seed)
        rows = draw.choice([1, 2, 3, 8])
        memory = ROW * draw.choice([2, 3, 5]) * (rows if fixed else 1)
        engine = Engine(counted_model(fixed=fixed), rows=rows, memory=memory)
        begin = [draw.randrange(250) for _ in range(40)]
        going: list[Answer] = []
        left, steps = 10, 0
        while left or engine.has_work:
            if left and draw.random() < 0.5:
                left -= 1
                with suppress(MemoryError_):
                    going.append(engine.submit(random_request(draw, begin)))
            if going and draw.random() < 0.05:
                draw.choice(going).cancel()
            engine.step()
            steps += 1
            waited += any(True for _ in engine._waiting)
            assert engine.cache.bytes <= memory
            assert steps < 9_000, "somebody waits for ever"
        for answer in going:
            whole = expected(answer.request.prompt, answer.request.sampling.max_new_tokens)
            assert said(answer) == whole[: len(said(answer))]
            assert answer.is_cancelled or said(answer) == whole
        for slot in engine.prefixes.slots:
            engine._room.free(slot)
        engine.cache.release()
        assert engine.cache.bytes == 0, "what was promised is not given back"
    assert waited


@pytest.mark.parametrize(
    "sequences", [range(500), pytest.param(range(500, 10_000), marks=pytest.mark.slow)]
)
def test_never_over_budget_and_nobody_waits_for_ever(sequences):
    """Twenty requests a sequence, against the scheduler alone: rows end when chance says so."""
    for seed in sequences:
        draw = random.Random(seed)
        rows, fixed = draw.choice([1, 2, 3, 8]), draw.random() < 0.3
        memory = ROW * draw.choice([2, 3, 5]) * (rows if fixed else 1)
        cache, prefixes, queue = CountedCache(rows, fixed=fixed), Prefixes(rows), Queue(rows)
        room = Room(cache, prefixes, counted_model(), memory)
        begin = [draw.randrange(250) for _ in range(40)]
        running: list[tuple[Slot, Request]] = []
        coming = [random_request(draw, begin) for _ in range(20)]
        admitted = 0
        while coming or queue or running:
            if coming and draw.random() < 0.5:
                with suppress(MemoryError_):
                    asked = coming.pop()
                    room.check(asked)
                    queue.add(Answer(asked))
            while prefixes.has_room:
                answer = queue.next(Counter(asked.owner for _, asked in running))
                place = room.place(answer.request) if answer else None
                if answer is None or place is None:
                    break
                queue.remove(answer)
                begin_row(room, cache, place, answer.request)
                running.append((place.slot, answer.request))
                admitted += 1
            assert cache.bytes <= memory
            assert running or not queue, "somebody waits for ever"
            if running and draw.random() < 0.4:
                slot, asked = running.pop(draw.randrange(len(running)))
                marks = asked.prompt.fingerprint[: draw.choice([0, 5, 1_000])]
                cache.rows[slot.number] = list(asked.prompt.token_ids)
                room.leave(slot, marks)
                assert cache.bytes <= memory
        for slot in prefixes.slots:
            room.free(slot)
        cache.release()
        assert cache.bytes == 0, "what was promised is not given back"


def random_request(draw: random.Random, begin: list[int]) -> Request:
    ids = [*begin[: draw.choice([0, 20, 40])], *draw.choices(range(5), k=9)]
    pictures = "".join(draw.sample("abcdefgh", k=draw.choice([0, 0, 1, 2])))
    owner, most = draw.choice(["", "a", "b", "c"]), draw.choice([3, 12, 250, 400])
    return request(*ids, pictures=pictures, owner=owner, most=most)


def begin_row(room: Room, cache: CountedCache, place: Place, asked: Request) -> None:
    """What the engine does first."""
    room.take(place, asked)
    for media in asked.prompt.unread(place.shared):
        if not cache.has_media(media.content_hash):
            cache.sizes[media.content_hash] = media.facts.tokens * TOKEN_BYTES
            cache.encoded.add(media.content_hash)
            room.encoded(media)


# Where memory runs out all the same


def test_memory_that_runs_out_for_all_ends_the_youngest_first(monkeypatch):
    """The step of three rows fails, also after idle slots were freed; that of two does not."""
    model = fake_model()
    engine = Engine(model, rows=4)
    list(run(engine, [engine.submit(request(*range(30)))]))
    prompts = [Prompt((1, 2)), Prompt((3, 4)), Prompt((5, 6))]
    answers = [engine.submit(Request(prompt, GREEDY, ignore_stop=True)) for prompt in prompts]
    forward, tried = model.runtime.forward, []

    def narrow(batch, cache):
        if len(batch.slots) > 2:
            tried.append(sum(bool(slot.marks) for slot in engine.prefixes.slots))
            raise RuntimeError("can't allocate memory")
        return forward(batch, cache)

    monkeypatch.setattr(model.runtime, "forward", narrow)
    finish(engine)
    assert isinstance(answers[2].error, MemoryError_)
    assert len(said(answers[0])) == len(said(answers[1])) == 12
    assert len(tried) == 2
    assert not engine.prefixes.slots[0].marks or engine.prefixes.slots[0].used > 1


def test_one_row_goes_on_with_what_idle_ones_give_back(monkeypatch):
    model = fake_model()
    engine = Engine(model, rows=2)
    list(run(engine, [engine.submit(request(*range(30)))]))
    answer = engine.submit(request(7, 8))
    forward = model.runtime.forward

    def fails_once(batch, cache):
        is_idle = any(slot.marks and not slot.is_taken for slot in engine.prefixes.slots)
        if is_idle and batch.counts == (1,):
            raise MemoryError
        return forward(batch, cache)

    monkeypatch.setattr(model.runtime, "forward", fails_once)
    finish(engine)
    assert said(answer) == expected(Prompt((7, 8)), 12)


def test_what_was_not_a_number_leaves_nothing_behind(monkeypatch):
    model = fake_model()
    engine = Engine(model)
    first = request(*range(30))
    list(run(engine, [engine.submit(first)]))
    forward = model.runtime.forward
    with monkeypatch.context() as patch:
        patch.setattr(model.runtime, "forward", lambda *given: forward(*given) * float("nan"))
        with pytest.raises(NumericalError):
            list(run(engine, [engine.submit(request(*range(30), 1))]))
    assert engine.cache.lengths == [0]
    [*_, (_, end)] = run(engine, [engine.submit(first)])
    assert end.usage.cached_tokens == 0
    assert end.output_ids == expected(first.prompt, 12)


# With the built-in model


@pytest.mark.slow
def test_scenes_in_little_memory_get_the_answers_of_one_at_a_time():
    """Room for two rows of eight."""
    model = mmchat.load("tiny", dtype="float32")
    scenes = list(heldout_scenes(10))
    alone = [verdict.answer for verdict in judge_scenes(model, scenes)]
    [facts] = [model.processor.facts(mmchat.load_image("assets/dog.jpg"))]
    memory = 2 * (STEP * model.position_bytes + 2 * model.media_bytes(facts))
    together = judge_scenes(replace(model, memory=memory), scenes, rows=8)
    assert [verdict.answer for verdict in together] == alone


def test_many_questions_share_the_memory_that_is_known(monkeypatch):
    model = mmchat.load("tiny")
    assert model.memory is not None
    assert model.memory > 0
    tight = replace(model, memory=model.position_bytes * STEP)
    with pytest.raises(MemoryError_, match=r"ask for a shorter answer \(--max-new-tokens\)"):
        list(tight.generate_many(["Hello?"], SamplingParams(max_new_tokens=500)))
    [end] = tight.generate_many(["Hello?"], SamplingParams(max_new_tokens=5))
    assert end.text
