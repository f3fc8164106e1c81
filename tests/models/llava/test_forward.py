"""The protocol of models.base, kept by LLaVA: pieces, rows together, copies, drafts, truncation."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mmchat.models.base import Batch, common_prefix
from mmchat.models.embedding_model import EmbeddingCache
from mmchat.models.llava.model import LlavaForConditionalGeneration
from mmchat.models.prompt import Prompt
from tests.models.llava.oracle import CASES, CONFIG, A, B, build, picture, prompt, random_weights
from tests.models.reading import encode, read

TWO = prompt((1, 5, 7, A, 17, 33, B, 4, 7, 8))
PLAIN = prompt((1, 9, 9, 3))


@pytest.fixture(scope="module")
def model() -> LlavaForConditionalGeneration:
    return build(random_weights())


def fresh(model: LlavaForConditionalGeneration, wanted: Prompt) -> Tensor:
    return read(model, model.new_cache(1, 0), wanted)


def after(start: Prompt, *tokens: int) -> Prompt:
    return Prompt((*start.token_ids, *tokens), start.media)


def together(prompts: Sequence[Prompt], ends: Sequence[int], cache: EmbeddingCache) -> Batch:
    """The next positions of each slot's prompt, up to its end, where there are any; all wanted."""
    spans = [(slot, cache.lengths[slot], end) for slot, end in enumerate(ends)]
    slots, starts, stops = zip(*(span for span in spans if span[1] < span[2]), strict=True)
    counts = tuple(stop - start for start, stop in zip(starts, stops, strict=True))
    pieces = [prompts[slot].token_ids[a:b] for slot, a, b in zip(slots, starts, stops, strict=True)]
    ids = [token_id for piece in pieces for token_id in piece]
    return Batch(torch.tensor(ids), slots, starts, counts, tuple(range(len(ids))))


def assert_equal(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)


@torch.inference_mode()
@pytest.mark.parametrize("piece", [1, 4, 7, 30])
def test_pieces_that_are_cut_inside_a_picture_equal_the_whole(model, piece):
    assert_equal(read(model, model.new_cache(1, 0), TWO, piece=piece), fresh(model, TWO))


@torch.inference_mode()
def test_a_picture_is_encoded_a_layer_at_a_time_as_far_as_its_features_need(model):
    cache = model.new_cache(1, 0)
    taken = [(one, cache.has_media(A.content_hash)) for [one] in model.encode([A, B], cache)]
    assert taken == [(A, False)] * (CONFIG.vision_config.num_hidden_layers - 1)
    assert list(cache.encoded) == [A.content_hash]
    assert cache.encoded[A.content_hash].shape == (25, CONFIG.text_config.hidden_size)


@torch.inference_mode()
@pytest.mark.parametrize("fixed", [False, True])
def test_rows_with_and_without_pictures_are_read_together_as_each_alone(model, fixed):
    prompts = [TWO, PLAIN, prompt((1, *range(3, 40), B, 8)), prompt(CASES["last"])]
    cache = model.new_cache(4, 8)
    if fixed:
        cache = fixed_cache(model, 4)
    for slot, one in enumerate(prompts):
        cache.begin(slot, one)
        encode(model, one, cache, slot)
    lengths = [len(one.token_ids) for one in prompts]
    assert len(set(lengths)) == 4
    found: list[list[Tensor]] = [[], [], [], []]
    for ends in [(13, lengths[1] - 1, 0, 2), (40, lengths[1], 44, 10), lengths]:
        batch = together(prompts, ends, cache)
        parts = model.forward(batch, cache).split(batch.counts)
        for slot, part in zip(batch.slots, parts, strict=True):
            found[slot].append(part)
    for one, parts in zip(prompts, found, strict=True):
        assert_equal(torch.cat(parts), fresh(model, one))
    longer = [after(one, 11, 12) for one in prompts]  # now all write
    for _ in range(2):
        batch = together(longer, [length + 1 for length in cache.lengths], cache)
        steps = model.forward(batch, cache)
        for slot, one in enumerate(longer):
            end = cache.lengths[slot]
            assert_equal(steps[slot : slot + 1], fresh(model, one)[end - 1 : end])


@torch.inference_mode()
def test_scoring_a_prompt_computes_no_other_slot(model):
    cache = fixed_cache(model, 2)
    for slot in (0, 1):
        cache.begin(slot, PLAIN)
    ids = torch.tensor(PLAIN.token_ids)
    first = Batch(ids[:2], (0,), (0,), (2,), (0, 1), scores=True)
    step = Batch(ids[2:4], (0,), (2,), (2,), (0, 1))
    model.forward(first, cache)
    assert cache.is_step(step)
    scored = replace(step, scores=True)
    assert not cache.is_step(scored)
    assert_equal(model.forward(scored, cache), fresh(model, PLAIN)[2:4])


def fixed_cache(model: LlavaForConditionalGeneration, slots: int) -> EmbeddingCache:
    """As on a GPU, where a step computes all slots."""
    return EmbeddingCache(CONFIG.text_config, slots, 8, model.like, fixed=True)


@torch.inference_mode()
def test_a_cached_turn_equals_a_fresh_one(model):
    first = prompt((1, 5, A, 17, 33))
    for second in [
        prompt((1, 5, A, 17, 33, 9, 2, 4, 8)),
        prompt((1, 5, A, 17, 33, 9, 2, B, 4, 8)),
        prompt((1, 5, A, 17, 33, 9, 2, A, 4, 8)),
    ]:
        cache = model.new_cache(1, 0)
        read(model, cache, first)
        shared = common_prefix(first.fingerprint, second.fingerprint)
        assert shared == len(first.token_ids) == cache.lengths[0]
        assert_equal(read(model, cache, second), fresh(model, second)[shared:])


@torch.inference_mode()
def test_another_picture_is_read_anew_from_its_first_position(model):
    other = prompt((1, 5, 7, A, 17, 33, picture(3), 4))
    shared = common_prefix(TWO.fingerprint, other.fingerprint)
    assert shared == TWO.media[1].position
    for length in (0, 3, TWO.media[0].position + 5, shared):
        cache = model.new_cache(1, 4)
        read(model, cache, TWO)
        cache.truncate(0, length)
        assert_equal(read(model, cache, other), fresh(model, other)[length:])


@torch.inference_mode()
def test_a_draft_is_read_at_once_and_a_rejected_one_leaves_nothing_behind(model):
    cache = model.new_cache(1, 4)
    read(model, cache, TWO)
    length = len(TWO.token_ids)
    drafted = model.forward(Batch.all_of(torch.tensor([6, 7, 8]), length), cache)
    assert_equal(drafted, fresh(model, after(TWO, 6, 7, 8))[length:])
    cache.truncate(0, length + 1)
    again = model.forward(Batch.last_of(torch.tensor([9]), length + 1), cache)
    assert_equal(again, fresh(model, after(TWO, 6, 9))[-1:])


@torch.inference_mode()
@pytest.mark.parametrize("cut", [2, 12, 30])
def test_a_prefix_copied_to_another_slot_equals_a_fresh_start(model, cut):
    other = prompt((1, 5, 7, A, 17, 33, B, 9))
    cache = model.new_cache(2, 4)
    read(model, cache, TWO, slot=0)
    read(model, cache, PLAIN, slot=1)
    cache.release()  # no picture is left: the copy holds what was made of them
    assert not cache.encoded
    cache.copy(0, 1, cut)
    assert list(cache.lengths) == [len(TWO.token_ids), cut]
    assert_equal(read(model, cache, other, slot=1), fresh(model, other)[cut:])
    assert_equal(read(model, cache, after(TWO, 6), slot=0), fresh(model, after(TWO, 6))[-1:])


@torch.inference_mode()
def test_a_freed_slot_is_used_again(model):
    cache = model.new_cache(2, 4)
    read(model, cache, TWO, slot=0)
    read(model, cache, PLAIN, slot=1)
    cache.free(0)
    assert list(cache.lengths) == [0, len(PLAIN.token_ids)]
    longer = prompt((1, *[8] * 300, picture(3)))
    assert_equal(read(model, cache, longer, slot=0), fresh(model, longer))
    assert_equal(read(model, cache, after(PLAIN, 6), slot=1), fresh(model, after(PLAIN, 6))[-1:])


@torch.inference_mode()
def test_release_keeps_what_is_still_to_be_read(model):
    cache = model.new_cache(1, 100)
    cache.begin(0, TWO)
    encode(model, TWO, cache)
    ids = torch.tensor(TWO.token_ids)
    end = TWO.media[1].position + 2
    begun = model.forward(Batch.all_of(ids[:end], 0), cache)
    cache.release()
    assert not cache.has_media(A.content_hash)
    cache.drop_media(B.content_hash)  # needed
    assert cache.has_media(B.content_hash)
    rest = model.forward(Batch.all_of(ids[end:], end), cache)
    assert_equal(torch.cat((begun, rest)), fresh(model, TWO))
    cache.drop_media(B.content_hash)
    assert not cache.has_media(B.content_hash)


@torch.inference_mode()
def test_a_slot_keeps_no_pixels(model):
    """Slots that wait for a prompt like theirs would hold them for as long as the server runs."""
    cache = model.new_cache(2, 0)
    asked = prompt((1, 5, picture.__wrapped__(11), 6))  # that nobody else keeps
    read(model, cache, asked)
    cache.copy(0, 1, 3)
    pixels = weakref.ref(asked.media[0].media.tensors[0])
    del asked
    gc.collect()
    assert pixels() is None


@torch.inference_mode()
def test_a_piece_may_want_no_logits_or_a_few(model):
    scores = fresh(model, TWO)
    cache = model.new_cache(1, 0)
    cache.begin(0, TWO)
    encode(model, TWO, cache)
    ids = torch.tensor(TWO.token_ids)
    silent = model.forward(Batch(ids[:13], (0,), (0,), (13,), ()), cache)
    assert silent.shape == (0, CONFIG.vocab_size)
    few = model.forward(Batch(ids[13:], (0,), (13,), (len(ids) - 13,), (0, 4)), cache)
    assert few.dtype == torch.float32
    assert_equal(few, scores[[13, 17]])


def test_gradient_flows_to_every_parameter_that_is_used(model):
    model.zero_grad()
    model.requires_grad_(True)
    fresh(model, TWO).square().mean().backward()
    model.requires_grad_(False)
    used = model.weight_names(text_only=False)
    missing = {
        name
        for name, parameter in model.named_parameters()
        if name in used and (parameter.grad is None or not parameter.grad.abs().max() > 0)
    }
    # the bias of keys shifts all scores of a query alike, so it changes nothing
    assert {name for name in missing if not name.endswith("k_proj.bias")} == set()
    unused = {n for n, p in model.named_parameters() if n not in used and p.grad is not None}
    assert unused == set()
