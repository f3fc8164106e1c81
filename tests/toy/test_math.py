"""The protocol of models.base, kept by a family that is not Mllama."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from PIL import Image as PILImage
from torch import Tensor

from mmchat.conversation import Image
from mmchat.models.base import Batch, Cache, Model, cache_lacks, common_prefix
from mmchat.models.prompt import Prompt
from tests.toy.config import CONFIG
from tests.toy.model import ToyModel
from tests.toy.pictures import ask, picture
from tests.toy.processor import ToyProcessor

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def two_pictures(processor: ToyProcessor) -> Prompt:
    return ask(processor, "is it ", picture(1), picture(2), " alike?")


def encode(model: Model, prompt: Prompt, cache: Cache, slot: int = 0) -> None:
    """Encode the pictures that the slot has not read to their ends."""
    unread = prompt.unread(cache.lengths[slot])
    while lacking := cache_lacks(cache, unread):
        for _ in model.encode(lacking, cache):
            pass


def read(model: Model, cache: Cache, prompt: Prompt, slot: int = 0, piece: int = 1000) -> Tensor:
    """Logits [N, V] of all positions that the slot does not hold, read piece by piece."""
    cache.begin(slot, prompt)
    encode(model, prompt, cache, slot)
    ids = torch.tensor(prompt.token_ids)
    starts = range(cache.lengths[slot], len(ids), piece)
    return torch.cat(
        [model.forward(Batch.all_of(ids[s : s + piece], s, slot), cache) for s in starts]
    )


def fresh(model: Model, prompt: Prompt) -> Tensor:
    return read(model, model.new_cache(1, 0), prompt)


def together(prompts: Sequence[Prompt], ends: Sequence[int], cache: Cache) -> Batch:
    """The next positions of each slot's prompt, up to its end, where there are any; all wanted."""
    spans = [(slot, cache.lengths[slot], end) for slot, end in enumerate(ends)]
    slots, starts, stops = zip(*(span for span in spans if span[1] < span[2]), strict=True)
    counts = tuple(stop - start for start, stop in zip(starts, stops, strict=True))
    pieces = [prompts[slot].token_ids[a:b] for slot, a, b in zip(slots, starts, stops, strict=True)]
    ids = [token_id for piece in pieces for token_id in piece]
    return Batch(torch.tensor(ids), slots, starts, counts, tuple(range(len(ids))))


def assert_equal(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_a_picture_takes_nine_positions_whose_order_matters(
    model: ToyModel, processor: ToyProcessor
) -> None:
    prompt = ask(processor, picture(1), "what?")
    assert [(p.count, p.media.facts.positions) for p in prompt.media] == [(9, 9)]
    assert prompt.token_ids.count(CONFIG.image_token_id) == 9
    turned = picture(1).pixels.transpose(PILImage.Transpose.ROTATE_180)
    other = ask(processor, Image(turned, "", "turned"), "what?")
    assert not torch.allclose(fresh(model, prompt)[-1], fresh(model, other)[-1], atol=1e-2)


@torch.inference_mode()
def test_a_picture_is_encoded_in_slices(model: ToyModel, two_pictures: Prompt) -> None:
    media = two_pictures.media[0].media
    cache = model.new_cache(1, 0)
    held = [cache.has_media(media.content_hash) for _ in model.encode([media], cache)]
    assert held == [False, False]
    assert cache.has_media(media.content_hash)


@torch.inference_mode()
def test_pieces_that_are_cut_inside_a_picture_equal_the_whole(
    model: ToyModel, two_pictures: Prompt
) -> None:
    first, second = two_pictures.media
    assert [first.position % 4, second.position % 4] == [2, 3]  # where pieces of 4 are cut
    whole = fresh(model, two_pictures)
    for piece in (1, 4, 7):
        assert_equal(read(model, model.new_cache(1, 0), two_pictures, piece=piece), whole)


@torch.inference_mode()
def test_rows_of_different_lengths_are_read_together_as_each_alone(
    model: ToyModel, processor: ToyProcessor, two_pictures: Prompt
) -> None:
    long = ask(processor, "a" * 70, picture(2), "b")
    prompts = [two_pictures, ask(processor, "no picture"), long]
    cache = model.new_cache(3, 8)
    for slot, prompt in enumerate(prompts):
        cache.begin(slot, prompt)
        encode(model, prompt, cache, slot)
    lengths = [len(prompt.token_ids) for prompt in prompts]
    assert len(set(lengths)) == 3
    found: list[list[Tensor]] = [[], [], []]
    for ends in [(13, lengths[1] - 1, 0), (20, lengths[1], 75), lengths]:
        batch = together(prompts, ends, cache)
        parts = model.forward(batch, cache).split(batch.counts)
        for slot, part in zip(batch.slots, parts, strict=True):
            found[slot].append(part)
    for prompt, parts in zip(prompts, found, strict=True):
        assert_equal(torch.cat(parts), fresh(model, prompt))


@torch.inference_mode()
def test_rows_decode_together_with_a_row_that_is_still_reading(
    model: ToyModel, processor: ToyProcessor, two_pictures: Prompt
) -> None:
    short = ask(processor, "hi")
    said = Prompt((*short.token_ids, *b"yes"), (), short.context)
    cache = model.new_cache(2, 8)
    read(model, cache, short, slot=0)
    cache.begin(1, two_pictures)
    encode(model, two_pictures, cache, 1)
    length = len(short.token_ids)
    rows = [
        model.forward(together([said, two_pictures], ends, cache), cache)
        for ends in [(length + 1, 9), (length + 2, 14)]
    ]
    alone = fresh(model, said)
    assert_equal(torch.stack([rows[0][0], rows[1][0]]), alone[length : length + 2])
    assert_equal(torch.cat([rows[0][1:], rows[1][1:]]), fresh(model, two_pictures)[:14])


@torch.inference_mode()
def test_reading_on_after_truncation_equals_a_fresh_start(
    model: ToyModel, processor: ToyProcessor, two_pictures: Prompt
) -> None:
    other = ask(processor, "is it ", picture(1), picture(3), " blue?")
    shared = common_prefix(two_pictures.fingerprint, other.fingerprint)
    assert shared == two_pictures.media[1].position
    for length in (0, 3, two_pictures.media[0].position + 5, shared):
        cache = model.new_cache(1, 4)
        read(model, cache, two_pictures)
        cache.truncate(0, length)
        assert cache.lengths[0] == length
        assert_equal(read(model, cache, other), fresh(model, other)[length:])


@torch.inference_mode()
def test_a_rejected_draft_leaves_nothing_behind(model: ToyModel, two_pictures: Prompt) -> None:
    cache = model.new_cache(1, 4)
    read(model, cache, two_pictures)
    length = len(two_pictures.token_ids)
    model.forward(Batch.all_of(torch.tensor([65, 66, 67]), length), cache)
    cache.truncate(0, length + 1)
    again = model.forward(Batch.last_of(torch.tensor([70]), length + 1), cache)
    said = Prompt((*two_pictures.token_ids, 65, 70), two_pictures.media, two_pictures.context)
    assert_equal(again, fresh(model, said)[-1:])


@torch.inference_mode()
@pytest.mark.parametrize("cut", [4, 12, 20])
def test_a_prefix_copied_to_another_slot_equals_a_fresh_start(
    model: ToyModel, processor: ToyProcessor, two_pictures: Prompt, cut: int
) -> None:
    other = ask(processor, "is it ", picture(1), picture(2), " round?")
    assert cut <= common_prefix(two_pictures.fingerprint, other.fingerprint)
    cache = model.new_cache(2, 4)
    read(model, cache, two_pictures, slot=0)
    read(model, cache, ask(processor, "what the target held before"), slot=1)
    cache.release()  # no picture is left: the copy holds what was made of them
    cache.copy(0, 1, cut)
    assert list(cache.lengths) == [len(two_pictures.token_ids), cut]
    assert_equal(read(model, cache, other, slot=1), fresh(model, other)[cut:])
    said = Prompt((*two_pictures.token_ids, 65), two_pictures.media, two_pictures.context)
    assert_equal(read(model, cache, said, slot=0), fresh(model, said)[-1:])


@torch.inference_mode()
def test_a_freed_slot_is_used_again(
    model: ToyModel, processor: ToyProcessor, two_pictures: Prompt
) -> None:
    cache = model.new_cache(2, 4)
    read(model, cache, two_pictures, slot=0)
    kept = read(model, cache, ask(processor, "stays"), slot=1)
    cache.free(0)
    assert list(cache.lengths) == [0, len(kept)]
    longer = ask(processor, "x" * 80, picture(3))  # another rotary base
    assert_equal(read(model, cache, longer, slot=0), fresh(model, longer))
    plain = ask(processor, "stays")
    said = Prompt((*plain.token_ids, 65), (), plain.context)
    assert_equal(read(model, cache, said, slot=1), fresh(model, said)[-1:])


@torch.inference_mode()
def test_scores_of_all_positions_are_those_of_the_last_of_each_prefix(
    model: ToyModel, two_pictures: Prompt
) -> None:
    scores = fresh(model, two_pictures)
    ids = torch.tensor(two_pictures.token_ids)
    for end in range(1, len(ids) + 1):
        cache = model.new_cache(1, 0)
        cache.begin(0, two_pictures)
        encode(model, two_pictures, cache)
        assert_equal(model.forward(Batch.last_of(ids[:end], 0), cache), scores[end - 1 : end])


@torch.inference_mode()
def test_a_piece_may_want_no_logits_or_a_few(model: ToyModel, two_pictures: Prompt) -> None:
    scores = fresh(model, two_pictures)
    cache = model.new_cache(1, 0)
    cache.begin(0, two_pictures)
    encode(model, two_pictures, cache)
    ids = torch.tensor(two_pictures.token_ids)
    silent = model.forward(Batch(ids[:13], (0,), (0,), (13,), ()), cache)
    assert silent.shape == (0, CONFIG.vocab_size)
    few = model.forward(Batch(ids[13:], (0,), (13,), (len(ids) - 13,), (0, 4)), cache)
    assert few.dtype == torch.float32
    assert_equal(few, scores[[13, 17]])


def test_prompts_with_another_rotary_base_share_nothing(
    model: ToyModel, processor: ToyProcessor
) -> None:
    short, long = ask(processor, "a" * 40), ask(processor, "a" * 80)
    assert short.token_ids[:40] == long.token_ids[:40]
    assert common_prefix(short.fingerprint, long.fingerprint) == 0
    alike = ask(processor, "a" * 42)
    assert common_prefix(short.fingerprint, alike.fingerprint) == 44
    # Rightly so: what comes to stand there depends on the base.
    assert (fresh(model, short)[:40] - fresh(model, long)[:40]).abs().max() > 0.1
    cache = model.new_cache(1, 0)
    read(model, cache, short)
    with pytest.raises(ValueError, match="rotary base 100, not rotary base 200"):
        cache.begin(0, long)


@torch.inference_mode()
def test_an_answer_keeps_the_rotary_base_of_its_prompt(
    model: ToyModel, processor: ToyProcessor
) -> None:
    prompt = ask(processor, "a" * 50)
    cache = model.new_cache(1, 0)
    read(model, cache, prompt)
    length = len(prompt.token_ids)
    assert length < CONFIG.rope_period <= length + 8
    said = torch.tensor(list(b"answered"))
    one_by_one = [
        model.forward(Batch.last_of(said[i : i + 1], length + i), cache) for i in range(8)
    ]
    cache.truncate(0, length)
    assert_equal(torch.cat(one_by_one), model.forward(Batch.all_of(said, length), cache))
    assert cache.rotary_base(0) == CONFIG.rope_theta


@torch.inference_mode()
def test_release_keeps_what_is_still_to_be_read(model: ToyModel, two_pictures: Prompt) -> None:
    first, second = (placed.media.content_hash for placed in two_pictures.media)
    cache = model.new_cache(1, 100)
    cache.begin(0, two_pictures)
    encode(model, two_pictures, cache)
    ids = torch.tensor(two_pictures.token_ids)
    end = two_pictures.media[1].position + 2
    begun = model.forward(Batch.all_of(ids[:end], 0), cache)
    cache.release()
    assert not cache.has_media(first)
    assert cache.has_media(second)
    cache.drop_media(second)  # needed
    rest = model.forward(Batch.all_of(ids[end:], end), cache)
    assert_equal(torch.cat((begun, rest)), fresh(model, two_pictures))
    cache.drop_media(second)
    assert not cache.has_media(second)


def test_a_row_must_go_on_where_it_ended(model: ToyModel) -> None:
    cache = model.new_cache(1, 4)
    with pytest.raises(ValueError, match=r"read \(1,\) of 1 tokens from \(3,\); they hold \(0,\)"):
        model.forward(Batch.last_of(torch.tensor([65]), 3), cache)


def test_gradient_flows_to_every_parameter(model: ToyModel, two_pictures: Prompt) -> None:
    model.zero_grad()
    fresh(model, two_pictures).square().mean().backward()
    missing = [
        name
        for name, parameter in model.named_parameters()
        if parameter.grad is None or not parameter.grad.abs().max() > 0
    ]
    assert missing == []
