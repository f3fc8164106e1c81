"""A family from elsewhere passes everything that a user can ask, without a change of the package.

A picture takes nine positions, the rotary base depends on the length of the prompt, and nothing is
cross-attended.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from typer.testing import CliRunner

import mmchat
from mmchat.api import Model
from mmchat.catalog import find
from mmchat.cli.app import app
from mmchat.engine.events import Event, Finished
from mmchat.engine.generation import encode
from mmchat.engine.sampling import SamplingParams
from mmchat.errors import CheckpointError, ExportError, UsageError
from mmchat.estimate.memory import Setup
from mmchat.export.aoti import trace
from mmchat.models.base import Batch, Cache, ExportLimits, common_prefix
from mmchat.models.prompt import Prompt
from mmchat.models.registry import FAMILIES
from mmchat.nn.kv_cache import PastSteps
from mmchat.nn.linear import Linear
from mmchat.runtime import native_steps
from mmchat.runtime.base import Runtime
from mmchat.runtime.compiled import CompiledRuntime
from mmchat.runtime.compiler import CACHE_VARIABLE
from mmchat.runtime.eager import EagerRuntime
from tests.toy.build import ToyBuild
from tests.toy.config import CONFIG
from tests.toy.mirror import MirroredRuntime
from tests.toy.model import ToyLayer, ToyModel
from tests.toy.pictures import ask, picture

pytestmark = [
    pytest.mark.timeout(120),
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
]
GREEDY = SamplingParams(temperature=0.0, max_new_tokens=8, speculate="off", logprobs=3)
CPU = torch.device("cpu")


@pytest.fixture
def png(tmp_path: Path) -> str:
    picture(1).pixels.save(tmp_path / "picture.png")
    return str(tmp_path / "picture.png")


def run(*arguments: str, stdin: str | None = None) -> str:
    done = CliRunner().invoke(app, list(arguments), input=stdin)
    assert done.exit_code == 0, done.stderr
    return done.stdout


def ask_json(folder: str | Path, png: str, *more: str) -> dict:
    """The answer of `mmchat generate --json`."""
    question = ("-p", "hi?", "-i", png, "-n", "8", "--temperature", "0", "--json")
    return json.loads(run("generate", str(folder), *question, *more))


def said(model: Model, *turns: tuple[str, Sequence[object]]) -> list[Finished]:
    """The greedy answers of one conversation."""
    chat = model.chat()
    return [finish(chat.send(text, images, GREEDY)) for text, images in turns]


def finish(events: Iterator[Event]) -> Finished:
    *_, last = events
    assert isinstance(last, Finished)
    return last


def test_it_is_in_the_registry_only_while_it_is_asked_for(folder: Path) -> None:
    assert "toy" not in FAMILIES
    with pytest.raises(mmchat.MmchatError, match="unknown model type 'toy'"):
        mmchat.load(folder)


# ---- asked by command


def test_generate_answers_about_a_picture(toy: str, png: str) -> None:
    answer = ask_json(toy, png)
    assert answer["usage"] == {
        "prompt_tokens": 1 + 3 + 9 + 3 + 1 + 3,
        "cached_tokens": 0,
        "completion_tokens": 8,
        "image_count": 1,
        "image_tokens": 9,
    }
    picture(2).pixels.save(png)
    assert ask_json(toy, png)["output_ids"] != answer["output_ids"]


def test_penalties_and_drafts_pass_over_ids_that_are_no_tokens(toy: str, png: str) -> None:
    repeated = ("-p", "abcabcabcabc", "-i", png, "-i", png, "-n", "16", "--temperature", "0")
    more = ("--json", "--repetition-penalty", "1.3", "--speculate")
    answers = [json.loads(run("generate", toy, *repeated, *more, s)) for s in ("off", "8")]
    assert answers[0]["prompt_ids"].count(CONFIG.image_token_id) == 18
    assert answers[0]["output_ids"] == answers[1]["output_ids"]


def test_chat_takes_pictures_and_commands(toy: str, png: str) -> None:
    lines = run("chat", toy, "-n", "4", "--temperature", "0", "-i", png, stdin="a\nb\n\\tiles\n")
    assert "patches  3 x 3 patches of 8 px" in lines


def test_dry_run_counts_positions_and_memory(toy: str, png: str) -> None:
    found = ask_json(toy, png, "--dry-run")
    assert found["prompt_tokens"] == 20
    assert found["images"][0]["tokens"] == 9
    memory = {name: found["memory"][name] for name in ("weights", "cache", "pictures", "working")}
    assert memory == {
        "weights": 4 * (61_696 + 32_832),  # decoder and head: the rest stays in its file
        "cache": 28 * 4 * 2 * 2 * 2 * 16,  # positions, bytes, keys and values, layers, heads, D
        "pictures": 4 * 9 * 64,
        "working": 256 * 2**20 + 20 * (4 * 64 + 3 * 96) * 4 + 2 * 4 * 512,
    }


def test_inspect_tells_parts_and_bytes(toy: str) -> None:
    found = json.loads(run("inspect", toy, "--json"))
    assert found["parameters_by_part"] == {
        "picture encoder": (192 * 64 + 64) + 9 * 64 + (64 * 96 + 96) + (96 * 64 + 64),
        "decoder": 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96 + 2 * 64),
        "token embedding": 512 * 64,
        "head": 512 * 64 + 64,
    }
    assert found["weight_bytes"]["bfloat16"] == 2 * 152_672
    # one byte a weight of a linear layer, four a row of it, two for all else
    rows = 2 * (3 * 64 + 2 * 32 + 2 * 96) + 512 + (64 + 96 + 64)
    other = 2 * 2 * 64 + 64 + (9 * 64 + 64 + 96 + 64) + 512 * 64
    assert found["weight_bytes"]["int8"] == 152_672 - other + 4 * rows + 2 * other
    assert "2 layers, 9 patches of 8 px a picture" in run("inspect", toy)


def test_tiles_draws_what_the_model_sees(toy: str, png: str, tmp_path: Path) -> None:
    preview = tmp_path / "preview.png"
    lines = run("tiles", png, "--model", toy, "-o", str(preview)).splitlines()
    assert lines[1:] == [
        "model    toy-model, 9 patches of 8 px",
        "patches  3 x 3 patches of 8 px",
        "tokens   9 to attend to",
    ]
    assert preview.read_bytes().startswith(b"\x89PNG")


def test_list_has_a_row_of_it(toy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = find.load_spec(f"{toy}/params.json")
    monkeypatch.setattr(find, "known_specs", lambda: (spec,))
    row = next(line for line in run("list").splitlines() if line.startswith("toy-model"))
    assert row.split("\t") == ["toy-model", "instruct", "152,672", "24 px", "no", "", ""]


def test_bench_times_pictures_of_its_own_number_of_cells(toy: str) -> None:
    found = json.loads(
        run("bench", toy, "--context", "8", "--vision", "4,9", "--rounds", "1", "--json")
    )
    assert {each["prompt"] for each in found["measured"]} == {"8 tokens", "9 tiles"}
    assert found["left_out"] == ["4 tiles"]


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
    wanted = {"text": text, "head": torch.float32, "vision": torch.int8}
    for name, part in the_toy(model).linear_parts().items():
        layer = the_toy(model).get_submodule(name)
        assert isinstance(layer, Linear)
        assert layer.held()[0].dtype == wanted[part], name
    assert len(said(model, ("hi", [picture(1)]))[0].output_ids) == 8


def the_toy(model: Model) -> ToyModel:
    assert isinstance(model.runtime, EagerRuntime)
    assert isinstance(model.runtime.model, ToyModel)
    return model.runtime.model


TURNS = [("a?", [picture(1)]), ("b?", [])]


def test_a_second_turn_reads_what_is_new_and_equals_a_fresh_one(toy: str) -> None:
    model = mmchat.load(toy)
    first, second = said(model, *TURNS)
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


def assert_same(one: Finished, other: Finished) -> None:
    assert one.output_ids == other.output_ids
    for mine, its in zip(one.logprobs, other.logprobs, strict=True):
        assert mine.logprob == pytest.approx(its.logprob, abs=1e-4)


def test_a_turn_over_the_length_of_a_rotary_base_is_read_anew(toy: str) -> None:
    _, second = said(mmchat.load(toy), TURNS[0], ("b" * 40, []))
    assert second.usage.prompt_tokens > CONFIG.rope_period
    assert second.usage.cached_tokens == 0


# ---- read by the runtime that loading gives


@pytest.fixture(params=["none", "int8"])
def loaded(toy: str, request: pytest.FixtureRequest) -> Model:
    return mmchat.load(toy, quantize=request.param)


def read(runtime: Runtime, cache: Cache, prompt: Prompt, piece: int = 1000) -> Tensor:
    """Logits [N, V] of what the first slot does not hold, read piece by piece."""
    encode(runtime, prompt, cache)
    ids = torch.tensor(prompt.token_ids)
    starts = range(cache.lengths[0], len(ids), piece)
    return torch.cat([runtime.forward(Batch.all_of(ids[s : s + piece], s), cache) for s in starts])


def assert_close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """tolerance: a share of the largest logit."""
    assert found.shape == expected.shape
    assert (found - expected).abs().max() < tolerance * expected.abs().max()


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
            list(runtime.encode(media, cache))
    ids = torch.tensor(other.token_ids)
    close(runtime.forward(Batch.all_of(ids[14:], 14, 1), cache), fresh[14:])
    cache = runtime.new_cache(1, 0)
    encode(runtime, other, cache)
    close(runtime.forward(Batch.last_of(ids[:-3], 0), cache), fresh[-4:-3])


# ---- compiled


@pytest.fixture
def compiled_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
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


def steps(runtime: Runtime, prompt: Prompt, tokens: Sequence[int]) -> Tensor:
    """Logits after the prompt, of tokens one by one, and of three at once."""
    cache = runtime.new_cache(1, 0)
    rows = [read(runtime, cache, prompt)[-1:]]
    for count in (*[1] * len(tokens), 3, 5):
        ids = torch.tensor([*tokens, *tokens][:count])
        rows.append(runtime.forward(Batch.all_of(ids, cache.lengths[0]), cache))
    return torch.cat(rows)


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


# ---- exported


@pytest.mark.parametrize("scheme", ["none", "int8", "int4"])
def test_an_export_as_safetensors_says_the_same(
    toy: str, png: str, tmp_path: Path, scheme: str
) -> None:
    out = tmp_path / "out"
    run("export", toy, "-o", str(out), "--format", "safetensors", "--quantize", scheme)
    answers = [ask_json(out, png), ask_json(toy, png, "--quantize", scheme)]
    assert answers[0]["output_ids"] == answers[1]["output_ids"]
    assert json.loads(run("inspect", str(out), "--json"))["export"]["scheme"] == scheme


def test_an_export_as_a_folder_of_the_hub_says_the_same(toy: str, png: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run("export", toy, "-o", str(out), "--format", "hf")
    assert (out / "config.json").exists()
    assert not (out / "params.json").exists()
    assert ask_json(out, png)["output_ids"] == ask_json(toy, png)["output_ids"]


def test_its_graphs_say_the_same(toy: str) -> None:
    """What is compiled ahead of time, before it is compiled."""
    model = mmchat.load(toy)
    limits = ExportLimits(max_seq_len=128, max_images=2)
    made = ToyBuild().programs("aoti")
    graphs: dict[str, Callable[..., object]] = {}
    for program in made.export_programs(the_toy(model), limits):
        graph, spec = trace(program).module(), pytree.tree_structure(program.args)
        graphs[program.name] = lambda tensors, graph=graph, spec=spec: graph(
            *pytree.tree_unflatten(tensors, spec)
        )

    def call(name: str, tensors: Sequence[Tensor]) -> list[Tensor]:
        return pytree.tree_leaves(graphs[name](list(tensors)))

    programs = made.model(CONFIG, limits, CPU, torch.float32, call, {})
    prompt = ask(model.processor, "is it ", picture(1), picture(2))
    expected = steps(model.runtime, prompt, b"abcd")
    assert_close(steps(EagerRuntime(programs, CPU), prompt, b"abcd"), expected)
    pieces = [read(EagerRuntime(programs, CPU), programs.new_cache(1, 0), prompt, 4)]
    assert_close(torch.cat(pieces), read(model.runtime, model.runtime.new_cache(1, 0), prompt))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_its_programs_say_the_same(toy: str, png: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run("export", toy, "-o", str(out), "--format", "aoti", "--max-seq-len", "128")
    for mine, plain in zip(*(said(mmchat.load(f), *TURNS) for f in (out, toy)), strict=True):
        assert_same(mine, plain)


def test_a_format_without_programs_is_refused() -> None:
    with pytest.raises(ExportError, match="use --format aoti"):
        ToyBuild().programs("executorch")


# ---- mirrored


def test_a_second_process_follows(toy: str) -> None:
    model = mmchat.load(toy)
    mirrored = MirroredRuntime(model.runtime, Path(toy))
    try:
        answers = said(replace(model, runtime=mirrored), *TURNS, ("c" * 40, [picture(2)]))
        assert answers[-1].usage.cached_tokens == 0
        count = len(mirrored.differences)
        assert count == 3 * 8
        prompt = ask(model.processor, picture(1), picture(2), "?")
        cache = mirrored.new_cache(2, 0)
        cache.free(0)  # what the chat left there
        read(mirrored, cache, prompt, piece=4)
        cache.copy(0, 1, 7)
        cache.begin(1, prompt)
        cache.free(0)
        short = ask(model.processor, "short")
        encode(mirrored, short, cache)
        ids = [*short.token_ids, *prompt.token_ids[7:12]]
        rows = Batch(torch.tensor(ids), (0, 1), (0, 7), (len(ids) - 5, 5), (0, len(ids) - 1))
        mirrored.forward(rows, cache)
        assert len(mirrored.differences) > count + 5
        assert max(mirrored.differences) < 1e-6
    finally:
        exit_code = mirrored.close()
    assert exit_code == 0
