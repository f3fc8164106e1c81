"""The protocol of models.base, kept by Qwen-VL: pieces, rows together, copies, drafts, truncation,
with prompts on both sides of the limits of rotation."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from mmchat.models.base import Batch
from mmchat.models.prompt import Prompt
from mmchat.models.qwen_vl.model import QwenVLForConditionalGeneration
from tests.models.qwen_vl import oracle
from tests.models.qwen_vl.oracle import CASES, CONFIG, SEQ_LENGTH, prompt
from tests.models.reading import encode, read

ONE, TWO, PLAIN = (prompt(CASES[name]) for name in ("one", "two", "text"))
LONG = prompt(CASES["long text"])


@pytest.fixture(scope="module")
def model() -> QwenVLForConditionalGeneration:
    return oracle.build()


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.inference_mode():
        yield


def fresh(model: QwenVLForConditionalGeneration, wanted: Prompt) -> Tensor:
    return read(model, model.new_cache(1, 0), wanted)


def near(found: Tensor, expected: Tensor) -> bool:
    return found.shape == expected.shape and float((found - expected).abs().max()) < 2e-5


@pytest.mark.parametrize(("wanted", "piece"), [(ONE, 1), (ONE, 100), (TWO, 7), (TWO, 300)])
def test_reading_in_pieces_equals_reading_at_once(model, wanted, piece):
    assert near(read(model, model.new_cache(1, 0), wanted, piece=piece), fresh(model, wanted))


def test_rows_of_other_rotations_are_read_together(model):
    """One prompt below the first limit, two behind it with and without pictures, in one forward."""
    prompts = [ONE, TWO, PLAIN, LONG]
    cache = model.new_cache(4, 0)
    for slot, one in enumerate(prompts):
        cache.begin(slot, one)
        encode(model, one, cache, slot)
    assert cache.alphas == [1, 3, 1, 3]
    counts = tuple(len(one.token_ids) for one in prompts)
    ids = torch.tensor([i for one in prompts for i in one.token_ids])
    batch = Batch(ids, (0, 1, 2, 3), (0, 0, 0, 0), counts, tuple(range(len(ids))))
    rows = model.forward(batch, cache).split(counts)
    for found, one in zip(rows, prompts, strict=True):
        assert near(found, fresh(model, one))
    # and what is written after them
    ends = torch.tensor([5, 6, 7, 8])
    after = Batch(ends, (0, 1, 2, 3), counts, (1, 1, 1, 1), (0, 1, 2, 3))
    steps = model.forward(after, cache)
    for slot, one in enumerate(prompts):
        alone = model.new_cache(1, 0)
        read(model, alone, one)
        step = model.forward(Batch.last_of(ends[slot : slot + 1], counts[slot]), alone)
        assert near(steps[slot : slot + 1], step)


def test_steps_of_all_slots_at_once_turn_each_as_its_prompt(model):
    """As on a GPU, where slots are fixed and one step computes them all."""
    cache = model.cache_type(CONFIG.text_config, 3, 600, model.like, fixed=True)
    for slot, one in ((0, TWO), (2, ONE)):
        read(model, cache, one, slot)
    places = tuple(len(one.token_ids) for one in (TWO, ONE))
    ids = torch.tensor([5, 9, 7, 3])
    batch = Batch(ids, (0, 2), places, (2, 2), (0, 1, 2, 3))
    assert cache.is_step(batch)
    rows = model.forward(batch, cache).split(2)
    for found, one, said in zip(rows, (TWO, ONE), ids.split(2), strict=True):
        alone = model.new_cache(1, 0)
        read(model, alone, one)
        assert near(found, model.forward(Batch.all_of(said, len(one.token_ids)), alone))


def longer(start: Prompt, tokens: Sequence[int]) -> Prompt:
    return Prompt((*start.token_ids, *tokens), start.media, start.context)


def test_a_cached_turn_equals_a_fresh_one(model):
    cache = model.new_cache(1, 0)
    read(model, cache, ONE)
    more = longer(ONE, (7, 8, 9))
    assert near(read(model, cache, more), fresh(model, more)[len(ONE.token_ids) :])


def test_a_turn_beyond_the_limit_shares_nothing_and_the_cache_refuses_it(model):
    more = prompt((*CASES["one"], *range(60)))
    assert (ONE.context, more.context) == ("", "alpha 3")
    assert ONE.fingerprint[0] != more.fingerprint[0]
    cache = model.new_cache(1, 0)
    read(model, cache, ONE)
    with pytest.raises(ValueError, match="slot 0 was read with alpha 1, not 3"):
        cache.begin(0, more)
    cache.truncate(0, 0)
    assert near(read(model, cache, more), fresh(model, more))


def test_what_is_written_beyond_the_limit_is_turned_as_the_prompt(model):
    """Until the next turn; the original does so too, as its golden logits show."""
    start = prompt(CASES["crossing"])
    cache = model.new_cache(1, 0)
    read(model, cache, start)
    for token in range(8):
        model.forward(Batch.last_of(torch.tensor([token]), cache.lengths[0]), cache)
    assert cache.lengths[0] > SEQ_LENGTH
    assert cache.alphas == [1]


def test_a_draft_of_which_some_is_rejected_leaves_no_trace(model):
    cache = model.new_cache(1, 0)
    read(model, cache, TWO)
    at = len(TWO.token_ids)
    draft = model.forward(Batch.all_of(torch.tensor([5, 9, 7]), at), cache)
    cache.truncate(0, at + 1)
    again = model.forward(Batch.all_of(torch.tensor([9, 7]), at + 1), cache)
    assert near(again, draft[1:])


def test_a_copy_goes_on_by_itself(model):
    cache = model.new_cache(2, 0)
    read(model, cache, TWO)
    at = len(TWO.token_ids)
    cache.copy(0, 1, at)
    model.forward(Batch.last_of(torch.tensor([3]), at, slot=1), cache)
    found = model.forward(Batch.last_of(torch.tensor([5]), at), cache)
    alone = model.new_cache(1, 0)
    read(model, alone, TWO)
    assert near(found, model.forward(Batch.last_of(torch.tensor([5]), at), alone))
    assert cache.alphas == [3, 3]


def test_a_prompt_that_begins_inside_a_picture_is_read_to_its_end(model):
    cache = model.new_cache(1, 0)
    read(model, cache, ONE)
    cache.truncate(0, 100)
    assert near(read(model, cache, ONE), fresh(model, ONE)[100:])


def test_pictures_that_were_read_are_forgotten_when_memory_is_short(model):
    cache = model.new_cache(1, 0)
    read(model, cache, TWO)
    assert len(cache.encoded) == 2
    cache.release()
    assert not cache.encoded


def test_gradients_flow_to_pictures(model):
    with torch.inference_mode(False), torch.enable_grad():
        trained = oracle.build()
        cache = trained.new_cache(1, 0)
        read(trained, cache, ONE).sum().backward()
        for name in ("transformer.visual.conv1.weight", "transformer.wte.weight"):
            assert trained.get_parameter(name).grad is not None


def test_fused_projections_answer_alike(model):
    fused = oracle.build()
    fused.fuse_projections()
    assert near(fresh(fused, TWO), fresh(model, TWO))
