"""Rows that lie one behind the other: each is read as if it were alone, whatever lies beside it."""

from __future__ import annotations

import random

import pytest
import torch

from mmchat.models.base import Batch, cache_lacks
from mmchat.models.mllama import model as model_module
from mmchat.models.mllama.cache import MllamaCache
from mmchat.models.prompt import PlacedMedia, Prompt
from mmchat.models.row_cache import Place
from tests.kinds import some
from tests.models.mllama import oracle, plain_mllama
from tests.models.mllama.oracle import CASES, CONFIG, IMAGE, TOLERANCE, distance, picture

ROWS = [row for rows in CASES.values() for row in rows] + oracle.NO_PICTURE_IN_ONE_ROW


@pytest.fixture(scope="module")
def weights():
    return oracle.random_weights()


@pytest.fixture(scope="module")
def model(weights):
    return oracle.build(weights)


@pytest.fixture(scope="module")
def alone(model):
    """Logits [S, V] of each of ROWS, read alone."""
    return [oracle.Reader(model).read(row)[0] for row in ROWS]


class Talk:
    """One of ROWS in a slot, read in pieces."""

    def __init__(self, number: int, slot: int) -> None:
        self.number, self.slot = number, slot
        self.ids, pictures = ROWS[number]
        places = oracle.image_positions(self.ids)
        placed = [PlacedMedia(at, 1, p) for at, p in zip(places, pictures, strict=True)]
        self.prompt = Prompt(tuple(self.ids), tuple(placed))


def opened(cache, model, talk: Talk) -> Talk:
    cache.begin(talk.slot, talk.prompt)
    unread = talk.prompt.unread(cache.lengths[talk.slot])
    while lacking := cache_lacks(cache, unread):
        for _ in model.encode(lacking, cache):
            pass
    return talk


def batch_of(cache, pieces: list[tuple[Talk, int]]) -> Batch:
    """The next `count` positions of each talk, all wanted."""
    starts = [cache.lengths[talk.slot] for talk, _ in pieces]
    read = [t.ids[s : s + n] for (t, n), s in zip(pieces, starts, strict=True)]
    return Batch(
        torch.tensor([token for ids in read for token in ids]),
        tuple(talk.slot for talk, _ in pieces),
        tuple(starts),
        tuple(map(len, read)),
        tuple(range(sum(map(len, read)))),
    )


@torch.inference_mode()
def read_at_random(model, cache, seed: int) -> dict[int, torch.Tensor]:
    """Logits of each of ROWS, read in pieces of any length in slots that come and go."""
    draw = random.Random(seed)
    waiting = draw.sample(range(len(ROWS)), len(ROWS))
    talks: list[Talk] = []
    found: dict[int, list[torch.Tensor]] = {number: [] for number in waiting}
    while waiting or talks:
        free = set(range(len(cache.lengths))) - {talk.slot for talk in talks}
        if free and waiting and (not talks or draw.random() < 0.6):
            slot = draw.choice(sorted(free))
            cache.free(slot)
            talks.append(opened(cache, model, Talk(waiting.pop(), slot)))
        going = draw.sample(talks, draw.randint(1, len(talks)))
        left = [len(talk.ids) - cache.lengths[talk.slot] for talk in going]
        most = draw.choice([1, 3, 100])
        batch = batch_of(
            cache, [(t, draw.randint(1, min(n, most))) for t, n in zip(going, left, strict=True)]
        )
        logits = model.forward(batch, cache).split(batch.counts)
        for talk, rows in zip(going, logits, strict=True):
            found[talk.number].append(rows)
            if cache.lengths[talk.slot] == len(talk.ids):
                talks.remove(talk)
    return {number: torch.cat(rows) for number, rows in found.items()}


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_each_row_is_read_as_if_it_were_alone(seed, fixed, model, alone):
    cache = MllamaCache(CONFIG.text_config, 4, 1, model.like, fixed=fixed)
    for number, logits in read_at_random(model, cache, seed).items():
        assert distance(logits, alone[number]) < TOLERANCE, number


@torch.inference_mode()
def test_rows_in_fixed_slots_decode_beside_slots_that_wait(model):
    rows = [ROWS[0], ROWS[1]]
    expected = [oracle.run(model, [row], 4) for row in rows]
    cache = MllamaCache(CONFIG.text_config, 5, 1, model.like, fixed=True)
    slots = (3, 1)
    for slot, (ids, pictures) in zip(slots, rows, strict=True):
        talk = Talk(0, slot)
        placed = zip(oracle.image_positions(ids), pictures, strict=True)
        talk.ids = ids
        talk.prompt = Prompt(tuple(ids), tuple(PlacedMedia(at, 1, p) for at, p in placed))
        opened(cache, model, talk)
        model.forward(batch_of(cache, [(talk, len(ids))]), cache)
    for step in range(3):
        tokens = torch.cat([run.tokens[:, step] for run in expected])
        lengths = tuple(cache.lengths[slot] for slot in slots)
        batch = Batch(tokens, slots, lengths, (1, 1), (0, 1))
        assert cache.is_step(batch)
        logits = model.forward(batch, cache)
        wanted = torch.cat([run.steps[:, step + 1] for run in expected])
        assert distance(logits, wanted) < TOLERANCE


@pytest.mark.parametrize("size", some([1, 2, 3, 5, 7, 16, 64], {1, 3, 64}))
@torch.inference_mode()
def test_a_prompt_in_pieces_equals_the_whole_for_every_layout_and_cut(size, model, alone):
    """Pieces of one size, the first shorter by 0 to size - 1: so cuts come before, between and
    behind pictures, and all eight canvases are among ROWS."""
    for number in range(len(ROWS)):
        length = len(ROWS[number][0])
        cache = model.new_cache(1, 1)  # one for all cuts, whose pictures are encoded once
        for first in range(1, min(size, length) + 1):
            cache.truncate(0, 0)
            talk, read = opened(cache, model, Talk(number, 0)), []
            while cache.lengths[0] < length:
                piece = min(size if cache.lengths[0] else first, length - cache.lengths[0])
                read.append(model.forward(batch_of(cache, [(talk, piece)]), cache))
            assert distance(torch.cat(read), alone[number]) < 5e-5, (number, first)


@pytest.mark.parametrize("fixed", [False, True])
@torch.inference_mode()
def test_a_copied_prefix_goes_on_as_its_source(fixed, model, alone):
    number = ROWS.index(CASES["B_three_pictures"][0])
    cache = MllamaCache(CONFIG.text_config, 3, 1, model.like, fixed=fixed)
    whole = opened(cache, model, Talk(number, 2))
    model.forward(batch_of(cache, [(whole, len(whole.ids))]), cache)
    for cut in range(1, len(whole.ids)):
        cache.copy(2, 0, cut)
        other = opened(cache, model, Talk(number, 0))
        logits = model.forward(batch_of(cache, [(other, len(other.ids))]), cache)
        assert distance(logits, alone[number][cut:]) < TOLERANCE, cut


@torch.inference_mode()
def test_only_what_is_wanted_gives_logits(model, alone):
    cache = model.new_cache(2, 1)
    talks = [opened(cache, model, Talk(number, slot)) for slot, number in enumerate((1, 3))]
    every = batch_of(cache, [(talk, len(talk.ids)) for talk in talks])
    first, second = (len(talk.ids) for talk in talks)
    wanted = (0, first - 1, first + 2, first + second - 1)
    batch = Batch(every.token_ids, every.slots, every.starts, every.counts, wanted)
    expected = torch.cat([alone[1], alone[3]])[list(wanted)]
    assert distance(model.forward(batch, cache), expected) < TOLERANCE


@pytest.mark.parametrize(
    "change",
    [{"starts": (1, 0)}, {"slots": (0, 0)}, {"counts": (3, 0)}],
    ids=["another start", "a slot twice", "nothing to read"],
)
def test_a_batch_that_does_not_fit_the_cache_is_refused(change, model):
    given = {"slots": (0, 1), "starts": (0, 0), "counts": (2, 1), **change}
    with pytest.raises(ValueError, match="they hold"):
        model.forward(Batch(torch.tensor([1, 2, 3]), wanted=(2,), **given), model.new_cache(2, 1))


def test_a_released_cache_goes_on_and_a_needed_picture_stays(model, alone):
    number = ROWS.index(CASES["E_picture_first"][0])
    cache = model.new_cache(2, 1000)
    with torch.inference_mode():
        talk = opened(cache, model, Talk(number, 1))
        first = model.forward(batch_of(cache, [(talk, 2)]), cache)
        cache.release()
        cache.drop_media(talk.prompt.media[0].media.content_hash)
        assert cache.layers[0].capacity(1) == 256
        rest = model.forward(batch_of(cache, [(talk, len(talk.ids))]), cache)
    assert distance(torch.cat((first, rest)), alone[number]) < TOLERANCE


# Pictures together


@pytest.mark.parametrize("padding_is_equal", [True, False])
def test_pictures_together_are_what_each_is_alone(weights, padding_is_equal, monkeypatch):
    model = oracle.build(weights)
    model.vision_model.padding_is_equal = padding_is_equal
    pictures = [picture(grid, seed) for seed, grid in enumerate([(1, 2), (1, 1), (2, 1), (1, 2)])]
    alone = model.new_cache(1, 0)
    for each in pictures:
        for _ in model.encode([each], alone):
            pass
    together = model.new_cache(1, 0)
    calls = 0
    while lacking := cache_lacks(together, pictures):
        for _ in model.encode(lacking, together):
            pass
        calls += 1
    assert calls == 2  # of two tiles, and of one
    for content_hash, layers in alone.encoded.items():
        for expected, found in zip(layers, together.encoded[content_hash], strict=True):
            for one, other in zip(expected, found, strict=True):
                torch.testing.assert_close(other, one, atol=1e-5, rtol=1e-4)
                assert other.untyped_storage().nbytes() == other.nbytes  # keeps no other picture
    monkeypatch.setattr(model_module, "SHORT_WORK", 1)  # as for a large model
    slow = model.new_cache(1, 0)
    config = CONFIG.vision_config
    layers = config.num_hidden_layers + config.num_global_layers
    assert list(model.encode(pictures, slow)) == [pictures[:1]] * layers
    assert list(slow.encoded) == [pictures[0].content_hash]


# Differentiable


def test_gradients_of_rows_together_are_those_of_the_plain_model(weights):
    rows = [*CASES["C_adjacent_then_apart"], *CASES["D_text_only"], *CASES["F_canvas_2x1"]]
    wide = {name: value.double().requires_grad_() for name, value in weights.items()}
    plain = [plain_mllama.logits(wide, CONFIG, ids, pictures) for ids, pictures in rows]
    scale = torch.randn(
        sum(map(len, plain)), plain[0].shape[1], generator=torch.Generator().manual_seed(1)
    ).double()
    (torch.cat(plain) * scale).sum().backward()

    model = oracle.build({name: value.double() for name, value in weights.items()}).double()
    model.requires_grad_(True)
    cache = model.new_cache(len(rows), 64)
    for slot, (ids, pictures) in enumerate(rows):
        places = zip(oracle.image_positions(ids), pictures, strict=True)
        cache.places[slot] = tuple(Place(at, at + 1, p.content_hash) for at, p in places)
        for image in pictures:
            for _ in model.encode([image], cache):
                pass
    counts = tuple(len(ids) for ids, _ in rows)
    ids = torch.tensor([token for ids, _ in rows for token in ids])
    slots, wanted = tuple(range(len(rows))), tuple(range(len(ids)))
    (model(Batch(ids, slots, (0,) * len(rows), counts, wanted), cache) * scale).sum().backward()
    unused = 0
    for name, parameter in model.named_parameters():
        if "tile_" in name and name.endswith("embedding.weight"):
            continue  # slots without a tile are zero and read by padding tiles, which are shared
        expected = wide[name].grad
        if expected is None or parameter.grad is None:
            assert expected is None or not expected.any(), name
            unused += 1
            continue
        largest = max(float(expected.abs().max()), 1e-6)
        assert distance(parameter.grad, expected) < 1e-4 * largest, name
    assert unused < 5
    assert IMAGE in ids


def test_steps_leave_no_graph_in_the_cache(weights):
    model = oracle.build(weights)
    model.requires_grad_(True)
    cache = model.new_cache(1, 8)
    model(Batch.last_of(torch.tensor([1, 5, 9]), 0), cache)
    for step in range(2):
        model(Batch.last_of(torch.tensor([7]), 3 + step), cache)
    assert not cache.layers[0].row(0)[0].requires_grad


def test_rows_of_one_length_have_the_gradients_of_each_alone(weights):
    """Which is how the built-in model is trained."""
    model = oracle.build(weights)
    model.requires_grad_(True)
    image = picture((1, 2))
    rows = [([1, IMAGE, 5, 9], [image]), ([1, 7, 8, 3], []), ([2, 6, IMAGE, 4], [image])]

    def gradients(groups) -> list[torch.Tensor]:
        model.zero_grad()
        for group in groups:
            cache = model.new_cache(len(group), 8)
            for slot, (ids, pictures) in enumerate(group):
                places = zip(oracle.image_positions(ids), pictures, strict=True)
                cache.places[slot] = tuple(Place(at, at + 1, p.content_hash) for at, p in places)
            for _ in model.encode([image], cache):
                pass
            ids = torch.tensor([token for ids, _ in group for token in ids])
            slots, counts = tuple(range(len(group))), (4,) * len(group)
            every = Batch(ids, slots, (0,) * len(group), counts, tuple(range(len(ids))))
            model(every, cache).logsumexp(-1).sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    together, apart = gradients([rows]), gradients([[row] for row in rows])
    for one, other in zip(together, apart, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
