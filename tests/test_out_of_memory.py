"""Memory that runs out in the middle ends the turn; the chat goes on as if it was not asked."""

import random
import weakref
from math import prod

import pytest
import torch
from PIL import Image as PILImage

import mmchat
from mmchat.chat.session import ChatSession
from mmchat.engine.events import Finished, TextDelta
from mmchat.engine.sampling import Sampler, SamplingParams
from mmchat.errors import MemoryError_
from mmchat.hardware.allocation import memory_error
from mmchat.images import from_pil
from mmchat.models.mllama.text import TextModel
from mmchat.nn.kv_cache import LayerCache
from tests.loading.test_loader import small_config, write_hf_folder
from tests.models.mllama.oracle import random_weights

CPU_ALLOCATOR = RuntimeError(
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: "
    "you tried to allocate 1099511627776 bytes. Error code 12 (Cannot allocate memory)"
)
FAILURES = {
    "host": MemoryError(),
    "device": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "cpu allocator": CPU_ALLOCATOR,
    "cublas": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"),
}
SIZES = (70, 40), (30, 90)  # of pictures


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    config = small_config()
    folder = tmp_path_factory.mktemp("models") / "random"
    return mmchat.load(write_hf_folder(folder, config, random_weights(config)), device="cpu")


@pytest.fixture(scope="module")
def pictures():
    draw = random.Random(1)  # the same at each run, as are the answers and their lengths
    made = [PILImage.frombytes("RGB", size, draw.randbytes(3 * prod(size))) for size in SIZES]
    return [from_pil(picture) for picture in made]


def ask(session, text, images=(), **options):
    # without drafts, whose lengths follow the clock, a call has the same number every time
    usual = {"temperature": 0.0, "max_new_tokens": 8, "speculate": "off"}
    params = SamplingParams(**{**usual, **options})
    *_, last = session.send(text, images, params)
    assert isinstance(last, Finished)
    return last


class Fault:
    """Makes a function fail from its `at`-th call on, and watch what it had allocated by then.

    times: after so many failures it works again.
    """

    def __init__(self, monkeypatch, owner, name, error, at=1, times=99):
        self.calls, self.allocated, self.at, self.error = 0, None, at, error
        original = getattr(owner, name)

        def failing(*args, **options):
            self.calls += 1
            if self.at <= self.calls < self.at + times:
                taken = torch.zeros(1000)
                self.allocated = weakref.ref(taken)
                raise self.error
            return original(*args, **options)

        monkeypatch.setattr(owner, name, failing)


def bytes_held(session):
    layers = sum(t.nbytes for layer in session.loaded.engine.cache.layers for t in layer.row(0))
    encoded = session.loaded.engine.cache.encoded.values()
    return layers + sum(t.nbytes for picture in encoded for pair in picture for t in pair)


def forget(model):
    """Let the next conversation have an engine that has read nothing."""
    vars(model).pop("engine", None)


def held_marks(session):
    [slot] = session.loaded.engine.prefixes.slots
    return slot.marks


PLACES = {
    "preprocessing": lambda model: (model.processor, "chat", 1),
    "vision": lambda model: (model.runtime.model.vision_model, "slices", 1),
    "the projection of a picture": lambda model: (model.runtime.model, "cross_key_values", 1),
    "prefill": lambda model: (TextModel, "forward", 1),
    "the first growth": lambda model: (LayerCache, "grow", 1),
    "a growth in the middle": lambda model: (LayerCache, "grow", 4),
    "the first sampling": lambda model: (Sampler, "sample", 1),
    "decoding": lambda model: (model.runtime.model, "step", 1),
    "later decoding": lambda model: (model.runtime.model, "step", 5),
    "growth while decoding": lambda model: (LayerCache, "grow", 8),  # the second layer's
    "later sampling": lambda model: (Sampler, "sample", 6),
}


def question(place, length=600):
    """Of so many tokens; where a row is to grow while it writes, up to the end of its room."""
    return "x" * (length if place != "growth while decoding" else length + 132)


@pytest.mark.parametrize(
    ("place", "failure"),
    [
        *((place, "cpu allocator") for place in PLACES),
        *(("later decoding", failure) for failure in FAILURES if failure != "cpu allocator"),
    ],
)
def test_the_turn_is_as_if_it_had_not_been_asked(place, failure, model, pictures, monkeypatch):
    fresh = ChatSession(model)
    ask(fresh, "What is it?", pictures[:1])
    expected = ask(fresh, "And what now?", pictures[1:])
    forget(model)

    session = ChatSession(model)
    ask(session, "What is it?", pictures[:1])
    before, held = session.conversation, bytes_held(session)
    cached = list(held_marks(session))
    with monkeypatch.context() as patch:
        fault = Fault(patch, *PLACES[place](model)[:2], FAILURES[failure], PLACES[place](model)[2])
        with pytest.raises(MemoryError_, match="out of memory while running the model") as caught:
            ask(session, question(place), pictures[1:])
    is_of_one_row = place == "preprocessing" or "sampling" in place
    assert fault.calls - fault.at == (not is_of_one_row)  # what the engine steps is tried twice
    assert caught.value.exit_code == 5
    assert session.conversation is before
    assert bytes_held(session) <= held
    assert held_marks(session) == cached[: len(held_marks(session))]
    # the first turn is still there
    assert session.loaded.engine.cache.lengths[0] == len(held_marks(session)) > 10
    assert caught.value.__context__ is None

    following = ask(session, "And what now?", pictures[1:])
    assert following.output_ids == expected.output_ids
    assert following.usage.cached_tokens > 10


@pytest.mark.parametrize("place", [p for p in PLACES if p != "preprocessing" and "samp" not in p])
def test_a_step_that_has_memory_the_second_time_goes_on(place, model, pictures, monkeypatch):
    """As when the room that other pictures had was given back."""
    forget(model)
    text = question(place, 624)
    expected = ask(ChatSession(model), text, pictures[1:])
    for shrinks in (True, False):  # layers that have grown are made small again, or cannot be
        forget(model)
        with monkeypatch.context() as patch:
            owner, name, at = PLACES[place](model)
            fault = Fault(patch, owner, name, CPU_ALLOCATOR, at, times=1)
            if not shrinks:
                Fault(patch, LayerCache, "shrink", CPU_ALLOCATOR)
            assert ask(ChatSession(model), text, pictures[1:]).output_ids == expected.output_ids
        assert fault.allocated is not None


def test_nothing_of_the_failed_call_is_held_by_the_error(model, pictures, monkeypatch):
    forget(model)
    session = ChatSession(model)
    fault = Fault(monkeypatch, model.runtime.model.vision_model, "slices", MemoryError())
    with pytest.raises(MemoryError_) as caught:
        ask(session, "What is it?", pictures[:1])
    fault.error.__traceback__ = None  # the test's own hold on the frames
    assert fault.allocated() is None
    assert caught.value.__context__ is None


def test_a_layer_that_cannot_grow_stays_whole(monkeypatch):
    layer = LayerCache(1, 2, 4, 3)
    for value, tensor in enumerate(layer.row(0), start=1):
        tensor.fill_(value)
    original, calls = torch.Tensor.new_zeros, []

    def failing(*args, **options):
        calls.append(args)
        if len(calls) == 2:
            raise MemoryError
        return original(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "new_zeros", failing)
        with pytest.raises(MemoryError):
            layer.grow(0, 9)
    assert {tensor.shape for tensor in layer.row(0)} == {(1, 2, 4, 3)}
    layer.grow(0, 9)
    assert {tensor.shape for tensor in layer.row(0)} == {(1, 2, 9, 3)}
    for value, tensor in enumerate(layer.row(0), start=1):
        assert tensor[:, :, :4].eq(value).all()
    layer.shrink(0, 2)
    for value, tensor in enumerate(layer.row(0), start=1):
        assert tensor.eq(value).all()
        assert tensor.shape == (1, 2, 2, 3)


def test_failing_again_while_memory_is_given_back_still_ends_the_turn_only(
    model, pictures, monkeypatch
):
    session = ChatSession(model)
    first = ask(session, "What is it?", pictures[:1])
    with monkeypatch.context() as patch:
        Fault(patch, TextModel, "forward", MemoryError())
        Fault(patch, LayerCache, "shrink", CPU_ALLOCATOR)
        with pytest.raises(MemoryError_):
            ask(session, "x" * 600)
    assert ask(session, "What is it?", pictures[:1]).text is not None
    assert session.conversation.turns[0].answer == first.text


@pytest.mark.parametrize("error", [ValueError("out of memory"), RuntimeError("shape mismatch")])
def test_other_errors_are_not_taken_for_it(error):
    assert memory_error(error) is None


def test_a_failure_of_another_kind_keeps_what_was_shared(model, monkeypatch):
    session = ChatSession(model)
    ask(session, "What is it?")
    with monkeypatch.context() as patch:
        Fault(patch, model.runtime.model, "step", RuntimeError("a bug"), at=2)
        with pytest.raises(RuntimeError, match="a bug"):
            ask(session, "And now?")
    got = ask(session, "And now?")
    fresh = ChatSession(model)
    ask(fresh, "What is it?")
    assert got.output_ids == ask(fresh, "And now?").output_ids
    assert got.usage.cached_tokens > 10


def test_tokens_before_the_failure_were_shown(model, monkeypatch):
    session = ChatSession(model)
    Fault(monkeypatch, model.runtime.model, "step", MemoryError(), at=3)
    events = session.send("Hi", sampling=SamplingParams(temperature=0.0, speculate="off"))
    shown = []
    with pytest.raises(MemoryError_):
        shown.extend(events)
    assert sum(isinstance(event, TextDelta) for event in shown) == 3
    assert session.messages == []
