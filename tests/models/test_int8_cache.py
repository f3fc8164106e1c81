"""Keys and values in int8: what all families claim of their caches holds of rounded ones too.

In float64 and without kernels nearly nothing is rounded otherwise because it is read in other
pieces, so what must be equal is equal. The kernels round queries and weights as well, by little.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from mmchat.models.base import Batch
from mmchat.models.mllama.cache import MllamaCache
from mmchat.models.prompt import PlacedMedia, Prompt
from mmchat.nn.kv_cache import LayerCache
from mmchat.quant.kernels import native, reference
from tests.models.llava import oracle as llava
from tests.models.mllama import oracle as mllama
from tests.models.qwen_vl import oracle as qwen_vl
from tests.models.reading import encode, read
from tests.quant.kernels.available import needs_kernels
from tests.toy.pictures import random_toy

EXACT, BY_KERNELS = 1e-6, 0.01
NEW = (5, 9, 7, 11)  # tokens that are read one by one or as a draft


class Case(NamedTuple):
    """A model, and two prompts of different lengths, of which the first has a picture."""

    model: Any
    prompts: tuple[Prompt, Prompt]


def _mllama() -> Case:
    def prompt(row: mllama.Row) -> Prompt:
        ids, pictures = row
        placed = zip(mllama.image_positions(ids), pictures, strict=True)
        return Prompt(tuple(ids), tuple(PlacedMedia(at, 1, one) for at, one in placed))

    model = mllama.build(mllama.random_weights())
    return Case(model, (prompt(mllama.long_row(40)), prompt(mllama.CASES["D_text_only"][0])))


def _llava() -> Case:
    parts = (1, 5, 7, llava.A, 17, 33, llava.B, 4, 7, 8)
    return Case(llava.build(llava.random_weights()), (llava.prompt(parts), llava.prompt((1, 9, 9))))


def _qwen_vl() -> Case:
    return Case(qwen_vl.build(), (qwen_vl.prompt(qwen_vl.CASES["one"]), Prompt((5, 9, 33, 4))))


def _toy() -> Case:
    return Case(random_toy(), (Prompt(tuple(range(40))), Prompt((5, 9, 33, 4))))


MAKERS: dict[str, Callable[[], Case]] = {
    "mllama": _mllama,
    "llava": _llava,
    "qwen_vl": _qwen_vl,
    "toy": _toy,
}


@pytest.fixture(scope="module", params=MAKERS)
def case(request: pytest.FixtureRequest) -> Case:
    made = MAKERS[request.param]()
    made.model.double().kv_dtype = torch.int8
    return made


@pytest.fixture(params=["torch", pytest.param("C", marks=needs_kernels)])
def tolerance(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> float:
    if request.param == "C":
        return BY_KERNELS
    monkeypatch.setattr(native, "library", lambda: None)
    return EXACT


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.inference_mode():
        yield


def off(found: Tensor, expected: Tensor) -> float:
    """The error's share of the logits."""
    assert found.shape == expected.shape
    return float((found - expected).norm() / expected.norm())


def longer(prompt: Prompt) -> Prompt:
    return Prompt((*prompt.token_ids, *NEW), prompt.media, prompt.context)


def fresh(model: Any, prompt: Prompt) -> Tensor:
    return read(model, model.new_cache(1, 0), prompt)


def step(model: Any, cache: Any, *tokens: int, slot: int = 0) -> Tensor:
    return model.forward(Batch.all_of(torch.tensor(tokens), cache.lengths[slot], slot), cache)


@pytest.mark.slow
def test_a_prompt_in_pieces_or_token_by_token_equals_the_whole(case, tolerance):
    model, (prompt, _) = case
    whole = fresh(model, prompt)
    for piece in (1, 4, 7):
        found = read(model, model.new_cache(1, 0), prompt, piece=piece)
        assert off(found, whole) < tolerance, piece


def test_rounding_changes_the_logits_a_little(case, tolerance):
    model, (prompt, _) = case
    rounded = fresh(model, prompt)
    model.kv_dtype = None
    try:
        plain = fresh(model, prompt)
    finally:
        model.kv_dtype = torch.int8
    assert 1e-4 < off(rounded, plain) < 0.03


def test_rows_that_read_and_decode_together_say_what_each_says_alone(case, tolerance):
    model, prompts = case
    whole = [longer(prompt) for prompt in prompts]
    expected = [fresh(model, prompt) for prompt in whole]
    cache = model.new_cache(2, 0)
    for slot, prompt in enumerate(whole):
        cache.begin(slot, prompt)
        encode(model, prompt, cache, slot)
    lengths = tuple(len(prompt.token_ids) for prompt in prompts)
    ids = torch.tensor([token for prompt in prompts for token in prompt.token_ids])
    batch = Batch(ids, (0, 1), (0, 0), lengths, tuple(range(len(ids))))
    found = [[part] for part in model.forward(batch, cache).split(lengths)]
    for token in NEW:
        starts = tuple(cache.lengths)
        batch = Batch(torch.tensor([token, token]), (0, 1), starts, (1, 1), (0, 1))
        for slot, part in enumerate(model.forward(batch, cache).split(1)):
            found[slot].append(part)
    for mine, its in zip(found, expected, strict=True):
        assert off(torch.cat(mine), its) < tolerance


def test_a_copied_beginning_goes_on_as_its_source(case, tolerance):
    model, (prompt, other) = case
    said = longer(prompt)
    cache = model.new_cache(2, 0)
    read(model, cache, prompt)
    read(model, cache, other, slot=1)
    cache.copy(0, 1, len(prompt.token_ids) - 1)
    found = read(model, cache, said, slot=1)
    assert off(found, fresh(model, said)[-len(found) :]) < tolerance


def test_what_is_taken_back_leaves_no_trace(case, tolerance):
    """A draft of which some is rejected, then a turn that is undone."""
    model, (prompt, _) = case
    said = longer(prompt)
    expected = fresh(model, said)[-len(NEW) :]
    cache = model.new_cache(1, 0)
    read(model, cache, prompt)
    begin = cache.lengths[0]
    drafted = step(model, cache, NEW[0], NEW[1], 1, 2)[:2]
    assert off(drafted, expected[:2]) < tolerance
    cache.truncate(0, begin + 2)
    assert off(step(model, cache, *NEW[2:]), expected[2:]) < tolerance
    cache.truncate(0, begin)
    assert off(step(model, cache, *NEW), expected) < tolerance


def test_a_cache_that_grows_and_shrinks_keeps_what_it_has(case, tolerance):
    model, (prompt, _) = case
    cache = model.new_cache(1, 0)
    read(model, cache, prompt)
    cache.reserve(0, 2000)
    cache.shrink(0)
    assert off(step(model, cache, *NEW), fresh(model, longer(prompt))[-len(NEW) :]) < tolerance


@pytest.mark.parametrize("count", [1, 3])
def test_fixed_slots_as_on_a_gpu_are_read_as_rows_of_their_own(count, tolerance):
    model, prompts = _mllama()
    model.double().kv_dtype = torch.int8
    text, like = mllama.CONFIG.text_config, torch.zeros((), dtype=torch.float64)
    cache = MllamaCache(text, 3, 1, like, fixed=True, dtype=torch.int8)
    for slot, prompt in zip((2, 0), prompts, strict=True):
        read(model, cache, prompt, slot)
    tokens = torch.tensor(NEW[:count] * 2)
    starts = tuple(len(prompt.token_ids) for prompt in prompts)
    batch = Batch(tokens, (2, 0), starts, (count, count), tuple(range(2 * count)))
    assert cache.is_step(batch)
    for found, prompt in zip(model.forward(batch, cache).split(count), prompts, strict=True):
        whole = Prompt((*prompt.token_ids, *NEW[:count]), prompt.media)
        assert off(found, fresh(model, whole)[-count:]) < tolerance


def test_a_freed_slot_holds_nothing_of_what_was_no_number():
    layer = LayerCache(2, 1, 4, 16, fixed=True, dtype=torch.int8)
    broken = torch.full((1, 2, 16), torch.nan)
    key, _ = layer.row(1)
    key[:, :, :2] = reference.round_rows(broken)
    assert reference.widen_rows(key)[0, 0, :2].isnan().all()
    layer.clear(1)
    assert not layer.row(1)[0].any()


def test_pictures_of_mllama_are_kept_in_int8_too(case):
    model, (prompt, _) = case
    cache = model.new_cache(1, 0)
    read(model, cache, prompt)
    if isinstance(cache, MllamaCache):
        [layers] = cache.encoded.values()
        assert {tensor.dtype for pair in layers for tensor in pair} == {torch.int8}
    assert {tensor.dtype for layer in cache.layers for tensor in layer.row(0)} == {torch.int8}
