"""The toy as `mmchat.load` gives it: estimated, quantised, read by its runtime, compiled."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

import mmchat
from mmchat.api import Model
from mmchat.catalog import find
from mmchat.engine.events import Finished
from mmchat.engine.reading import encode
from mmchat.errors import CheckpointError, UsageError
from mmchat.estimate.memory import Setup
from mmchat.models.base import Batch, Cache, common_prefix
from mmchat.nn.kv_cache import PastSteps
from mmchat.nn.linear import Linear
from mmchat.runtime import native_steps
from mmchat.runtime.compiled import CompiledRuntime
from mmchat.runtime.compiler import CACHE_VARIABLE
from mmchat.runtime.eager import EagerRuntime
from tests.toy.asking import (
    GREEDY,
    TURNS,
    assert_close,
    assert_same,
    finish,
    read,
    said,
    steps,
    the_toy,
)
from tests.toy.config import CONFIG
from tests.toy.model import ToyLayer, ToyModel
from tests.toy.pictures import ask, picture

pytestmark = [
    pytest.mark.timeout(120),
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
]
CPU = torch.device("cpu")


# ---- loaded


def test_estimate_needs_less_without_pictures(toy: str) -> None:
    spec = find.load_spec(f"{toy}/params.json")
    whole, text = (Setup(spec, "cpu", 4, text_only=text_only).need() for text_only in (False, True))
    assert whole.weights - text.weights == 4 * 25_376
    assert whole.cache == text.cache == 512 * 4 * 128
    assert (whole.pictures, text.pictures) == (4 * 9 * 64, 0)


def test_text_only_loads_no_encoder_and_says_the_same(toy: str) -> None:
    model = mmchat.load(toy, text_only=True)
    [answer] = said(model, ("hi", []))
    assert answer.output_ids == said(mmchat.load(toy), ("hi", []))[0].output_ids
    assert the_toy(model).vision.position_embedding.is_meta
    with pytest.raises(UsageError, match="text only"):
        said(model, ("hi", [picture(1)]))


def test_a_checkpoint_that_does_not_fit_is_refused(toy: str, tmp_path: Path) -> None:
    params = json.loads(Path(toy, "params.json").read_text())
    params["toy"]["num_hidden_layers"] = 1
    params["parameters"] -= 30_848
    path = tmp_path / "params.json"
    path.write_text(json.dumps(params))
    with pytest.raises(CheckpointError, match=r"9 unexpected: 'layers.1.input_layernorm.weight'"):
        mmchat.load(toy, params_path=path)


@pytest.mark.parametrize(("scheme", "text"), [("int8", torch.int8), ("int4-g32", torch.uint8)])
def test_quantised_layers_have_their_bits_and_answer(
    toy: str, scheme: str, text: torch.dtype
) -> None:
    model = mmchat.load(toy, quantize=scheme, quantize_keep="head")
    wanted = {"layers": text, "lm_head": torch.float32, "vision": torch.int8}
    for name, layer in the_toy(model).named_modules():
        if isinstance(layer, Linear):
            assert layer.held()[0].dtype == wanted[name.split(".")[0]], name
    assert len(said(model, ("hi", [picture(1)]))[0].output_ids) == 8


class RecordingRuntime(EagerRuntime):
    """reads: where each batch of one row begins and ends."""

    def __init__(self, model: ToyModel, device: torch.device) -> None:
        super().__init__(model, device)
        self.reads: list[tuple[int, int]] = []

    def forward(self, batch: Batch, cache: Cache) -> Tensor:
        self.reads += [(row.start, row.end) for row in batch.rows()]
        return super().forward(batch, cache)


def test_a_second_turn_reads_what_is_new_and_equals_a_fresh_one(toy: str) -> None:
    model = mmchat.load(toy)
    runtime = RecordingRuntime(the_toy(model), CPU)
    first, second = said(replace(model, runtime=runtime), *TURNS)
    assert (second.usage.cached_tokens, second.usage.prompt_tokens) in runtime.reads
    assert 1 + 3 + 9 + 2 + 1 + 3 <= second.usage.cached_tokens < second.usage.prompt_tokens
    fresh = model.chat()
    fresh.messages = conversation(model, first)
    again = finish(fresh.send("b?", (), GREEDY))
    assert again.usage.cached_tokens == 0
    assert_same(second, again)


def conversation(model: Model, first: Finished) -> list:
    text, images = TURNS[0]
    return [
        mmchat.Message("user", (*images, mmchat.Text(text))),
        mmchat.Message("assistant", (mmchat.Text(first.text),)),
    ]


def test_a_turn_over_the_length_of_a_rotary_base_is_read_anew(toy: str) -> None:
    _, second = said(mmchat.load(toy), TURNS[0], ("b" * 40, []))
    assert second.usage.prompt_tokens > CONFIG.rope_period
    assert second.usage.cached_tokens == 0


# ---- read by the runtime that loading gives


@pytest.fixture(params=["none", "int8"])
def loaded(toy: str, request: pytest.FixtureRequest) -> Model:
    return mmchat.load(toy, quantize=request.param)


def test_pieces_scores_truncation_and_shared_prefixes(loaded: Model) -> None:
    # rounded weights are multiplied otherwise in few rows than in many
    close = partial(assert_close, tolerance=1e-5 if loaded.options.quantize == "none" else 0.05)
    runtime = loaded.runtime
    prompt = ask(loaded.processor, "is it ", picture(1), picture(2), " alike?")
    assert [placed.position % 4 for placed in prompt.media] == [2, 3]  # where pieces are cut
    whole = read(runtime, runtime.new_cache(1, 0), prompt)
    cache = runtime.new_cache(2, 0)
    close(read(runtime, cache, prompt, piece=4), whole)
    cache.copy(0, 1, 14)
    cache.truncate(0, 9)
    close(read(runtime, cache, prompt), whole[9:])
    other = ask(loaded.processor, "is it ", picture(1), picture(3), " round?")
    shared = common_prefix(prompt.fingerprint, other.fingerprint)
    assert shared == prompt.media[1].position
    fresh = read(runtime, runtime.new_cache(1, 0), other)
    cache.begin(1, other)
    for media in other.unread(14):
        if not cache.has_media(media.content_hash):
            list(runtime.encode([media], cache))
    ids = torch.tensor(other.token_ids)
    close(runtime.forward(Batch.all_of(ids[14:], 14, 1), cache), fresh[14:])
    cache = runtime.new_cache(1, 0)
    encode(runtime, other, cache)
    close(runtime.forward(Batch.last_of(ids[:-3], 0), cache), fresh[-4:-3])


# ---- compiled


@pytest.fixture
def compiled_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    if not any(map(shutil.which, (os.environ.get("CXX") or "g++", "clang++"))):
        pytest.skip("NOT TESTED: compiled layers; there is no C++ compiler here")
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "compiled"))
    return tmp_path / "compiled"


def test_steps_of_all_layers_become_one_program(
    toy: str, compiled_code: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[str] = []

    def compile(step: native_steps.Step, target: Path) -> None:
        compiled.append(type(step.layer).__name__)
        target.write_text("program")

    class EagerProgram:
        """Stands for the compiled step, and is told how often it was needed."""

        calls = 0

        def boxed_run(self, tensors: list[Tensor]) -> list[Tensor]:
            EagerProgram.calls += 1
            *weights, x, cos, sin, key, value, positions, mask = tensors
            layer = ToyLayer(CONFIG).requires_grad_(False)
            names = [name for name, _ in layer.named_parameters()]
            layer.load_state_dict(dict(zip(names, weights, strict=True)))
            return [layer(x, cos, sin, PastSteps(key, value, positions, mask))]

    monkeypatch.setattr(native_steps, "_compile", compile)
    monkeypatch.setattr(native_steps, "open_program", lambda path, name: EagerProgram())
    model = mmchat.load(toy, compile="on")
    assert compiled == ["ToyLayer"]
    answers = said(model, *TURNS)
    assert EagerProgram.calls == 2 * 2 * 7  # layers, turns, tokens after the first
    for mine, plain in zip(answers, said(mmchat.load(toy), *TURNS), strict=True):
        assert_same(mine, plain)


@pytest.mark.slow
def test_blocks_are_compiled_once_for_all_lengths(toy: str, compiled_code: Path) -> None:
    torch._dynamo.reset()
    model = mmchat.load(toy)
    prompt = ask(model.processor, "w" * 40, picture(1))
    expected = steps(model.runtime, prompt, b"abcdefghijkl")
    compiled = CompiledRuntime(the_toy(mmchat.load(toy)), CPU, backend="eager")
    with torch.compiler.set_stance("fail_on_recompile"):  # not even where the cache grows
        assert_close(steps(compiled, prompt, b"abcdefghijkl"), expected)
    assert compiled.notices == []


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("scheme", ["none", "int8"])
def test_native_steps_say_the_same(toy: str, compiled_code: Path, scheme: str) -> None:
    models = [mmchat.load(toy, quantize=scheme, compile=mode) for mode in ("on", "off")]
    for mine, plain in zip(*(said(model, *TURNS) for model in models), strict=True):
        assert_same(mine, plain)
