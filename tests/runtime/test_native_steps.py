"""Compiled decode steps on a CPU against the same model as plain PyTorch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

import mmchat
from mmchat.chat.session import ChatSession
from mmchat.engine.sampling import SamplingParams
from mmchat.errors import CompileError, DiskError
from mmchat.models import row_cache
from mmchat.models.base import Example
from mmchat.nn.linear import Linear
from mmchat.quant.formats.int4 import TorchInt4
from mmchat.quant.kernels import native
from mmchat.runtime import native_steps
from mmchat.runtime.compiled import make_runtime
from mmchat.runtime.compiler import CACHE_VARIABLE
from mmchat.runtime.eager import EagerRuntime
from mmchat.runtime.native_steps import NativeStep, NativeStepsRuntime, Step
from tests.models.mllama import oracle
from tests.models.mllama.oracle import CASES, CONFIG, distance

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
TOLERANCE = 1e-5
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")


@pytest.fixture(scope="module")
def weights():
    return oracle.random_weights()


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Programs of the tests go to a folder of theirs."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path_factory.getbasetemp() / "programs"))


@pytest.fixture
def not_compiled(tmp_path, monkeypatch):
    """What would have been compiled: files that hold a name of what they stand for."""
    compiled: list[str] = []

    def compile(step: Step, target: Path) -> None:
        compiled.append(type(step.layer).__name__)
        target.parent.mkdir(exist_ok=True)
        target.write_text(compiled[-1])

    def open_program(path: Path, name: str) -> str:
        if not (content := path.read_text()):
            raise RuntimeError("damaged")
        return content

    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    monkeypatch.setattr(native_steps, "check_cpp_compiler", lambda: None)
    monkeypatch.setattr(native_steps, "_compile", compile)
    monkeypatch.setattr(native_steps, "open_program", open_program)
    return compiled


def keys_of(model) -> set[str]:
    return {step.key for step in native_steps._steps(model)}


def test_each_kind_of_layer_is_compiled_once_and_found_again(weights, not_compiled, tmp_path):
    stages: list[tuple[str, int, int]] = []

    def make(config=CONFIG, of=weights):
        stages.clear()
        model = oracle.build(of, config)
        NativeStepsRuntime(model, CPU, lambda *stage: stages.append(stage))
        return model

    kinds = ["SelfAttentionLayer", "CrossAttentionLayer"]
    model = make()
    assert not_compiled == kinds
    assert stages == [("compile", done, 2) for done in range(3)]
    layers = model.language_model.model.layers
    assert [layer.forward._program for layer in layers] == [
        type(layer).__name__ for layer in layers
    ]

    text = replace(CONFIG.text_config, num_hidden_layers=12, cross_attention_layers=(2, 6, 9))
    deep = replace(CONFIG, text_config=text)
    make(deep, oracle.random_weights(deep))
    assert not_compiled == kinds
    assert stages == []  # nothing to wait for

    damaged = next(path for path in (tmp_path / "steps").iterdir() if path.read_text() == kinds[1])
    damaged.write_text("")
    make()
    assert not_compiled == [*kinds, kinds[1]]
    assert stages == [("compile", done, 1) for done in range(2)]


def test_a_program_with_a_changed_bit_is_not_loaded(weights, not_compiled, tmp_path):
    model = oracle.build(weights)
    NativeStepsRuntime(model, CPU)
    kept = sorted((tmp_path / "steps").iterdir())
    for path in kept:
        path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])
    NativeStepsRuntime(oracle.build(weights), CPU)
    assert len(not_compiled) == 2 * len(kept)
    assert sorted((tmp_path / "steps").iterdir()) == kept


def test_what_changes_a_program_changes_its_key(weights, monkeypatch):
    keys = keys_of(oracle.build(weights))
    assert len(keys) == 2

    other = replace(CONFIG, text_config=replace(CONFIG.text_config, rms_norm_eps=1e-6))
    assert not keys & keys_of(oracle.build(weights, other))
    assert not keys & keys_of(oracle.build(weights).bfloat16())
    monkeypatch.setattr(native_steps, "OPTIONS", {})
    native_steps._origin.cache_clear()
    assert not keys & keys_of(oracle.build(weights))
    monkeypatch.undo()
    native_steps._origin.cache_clear()
    assert keys == keys_of(oracle.build(weights))


def test_code_of_a_family_from_elsewhere_changes_a_key(tmp_path):
    code = tmp_path / "family" / "model.py"
    code.parent.mkdir()
    keys = []
    for content in ("a = 1\n", "a = 2\n"):
        code.write_text(content)
        native_steps._origin.cache_clear()
        keys += [native_steps._origin(place) for place in (code.parent, code)]
    assert keys[0] == keys[1] != keys[2] == keys[3]
    assert native_steps._code_of(Doubling) == Path(__file__).parent
    (tmp_path / "other.py").write_text("b = 1\n")  # beside a module that is in no package
    native_steps._origin.cache_clear()
    assert native_steps._origin(code) == keys[3]


@pytest.mark.slow
def test_torch_can_store_the_graph_of_each_kind_of_layer(weights, monkeypatch, tmp_path):
    """As it does when it compiles: types of ours among the arguments are unknown to it."""
    stored = []

    def compile(graph, **_) -> None:
        stored.append(pytree.treespec_dumps(graph.call_spec.in_spec))

    monkeypatch.setattr("torch._inductor.aoti_compile_and_package", compile)
    steps = {step.key: step for step in native_steps._steps(oracle.build(weights))}
    for step in steps.values():
        native_steps._compile(step, tmp_path)
    assert len(stored) == len(steps) == 2


def test_other_formats_of_weights_are_other_programs():
    keys = [
        keys_of(mmchat.load("tiny", quantize=scheme).runtime.model)
        for scheme in ("none", "int8", "int4-g32", "int4-g64")
    ]
    assert len(set.union(*keys)) == 8


class Doubling(nn.Module):
    def forward(self, x, pair, mask):
        return x * 2


class Program:
    """Answers with what it was given."""

    def boxed_run(self, tensors):
        return [tensors]


@pytest.mark.parametrize(
    ("change", "runs_natively"),
    [
        ({}, True),
        ({"pair": torch.zeros(2, 9)}, True),
        ({"pair": torch.zeros(2, 1)}, False),
        ({"pair": torch.zeros(4, 9)[::2]}, False),
        ({"pair": torch.zeros(9, 2).T}, False),
        ({"pair": torch.zeros(3, 9)}, False),
        ({"x": torch.zeros(2, 3)}, False),
        ({"x": torch.zeros(1, 1, 3)}, False),
        ({"x": torch.zeros(1, 3, dtype=torch.bfloat16)}, False),
        ({"mask": torch.zeros(1)}, False),
    ],
)
def test_only_arguments_like_the_example_go_to_the_program(change, runs_natively):
    pair = torch.zeros(2, 5)
    example = Example((torch.zeros(1, 3), (pair, torch.zeros(1)), None), dynamic=((pair, 1),))
    weight = torch.ones(1)
    step = Step(Doubling(), example, {"weight": weight}, "key")
    x, given = change.get("x", torch.ones(1, 3)), change.get("pair", pair)
    got = NativeStep(step, Program())(x, (given, torch.zeros(1)), change.get("mask"))
    if runs_natively:
        assert [id(t) for t in got[:3]] == [id(weight), id(x), id(given)]
    else:
        assert torch.equal(got, x * 2)


def test_float32_weights_need_no_c_kernels(weights, monkeypatch):
    monkeypatch.setattr(native, "library", lambda: pytest.fail("compiled for nothing"))
    assert native_steps._steps(oracle.build(weights))


def test_packed_int4_weights_are_packed_before_a_program_takes_them(monkeypatch):
    monkeypatch.setattr(native, "library", lambda: None)
    model = mmchat.load("tiny", quantize="int4-g32").runtime.model
    for step in native_steps._steps(model):
        linears = [part for part in step.layer.modules() if isinstance(part, Linear)]
        assert {type(linear.format) for linear in linears} == {TorchInt4}
        packed = {id(linear.weight) for linear in linears}
        assert packed <= {id(weight) for weight in step.weights.values()}


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"PATH": "/nowhere", "CXX": ""}, "no C.. compiler is here"),
        ({"CXX": "/nowhere/g++"}, "CXX is '/nowhere/g..', which is not there"),
    ],
)
def test_without_a_compiler_on_is_a_clear_error_and_the_model_stays_as_it_was(
    variables, message, weights, tmp_path, monkeypatch
):
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    model = oracle.build(weights)
    with pytest.raises(CompileError, match=f"^{message}; install g.. or clang, or set CXX to one$"):
        make_runtime(model, CPU, "on", lambda *_: pytest.fail("said that it compiles"))
    assert not any("forward" in vars(module) for module in model.modules())
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_a_clear_error(weights, tmp_path, monkeypatch):
    monkeypatch.setattr(native_steps, "check_cpp_compiler", lambda: None)
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    (tmp_path / "steps").write_text("")
    with pytest.raises(DiskError, match=r"^cannot write '.*steps': File exists"):
        make_runtime(oracle.build(weights), CPU, "on")


class Counting:
    def __init__(self, program) -> None:
        self.program, self.calls = program, 0

    def boxed_run(self, tensors):
        self.calls += 1
        return self.program.boxed_run(tensors)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "natively"),
    [
        ("D_text_only", 6),
        ("A_start_picture_text", 8),
        ("B_text_between_pictures", 8),
        ("C_adjacent", 8),
        ("rows", 0),
    ],
)
def test_native_steps_equal_eager_ones(case, natively, weights, monkeypatch):
    """natively: layers of each step that run as programs; several rows at once do not."""
    monkeypatch.setattr(row_cache, "CAPACITY_STEP", 8)  # grows twice
    rows = oracle.NO_PICTURE_IN_ONE_ROW if case == "rows" else CASES[case]
    runtime = NativeStepsRuntime(oracle.build(weights), CPU)
    counting = []
    for layer in runtime.model.language_model.model.layers:
        layer.forward._program = Counting(layer.forward._program)
        counting.append(layer.forward._program)
    expected = oracle.write(EagerRuntime(oracle.build(weights), CPU), rows, 14)
    for mine, plain in zip(oracle.write(runtime, rows, 14), expected, strict=True):
        assert torch.equal(mine.argmax(-1), plain.argmax(-1))
        assert distance(mine, plain) < TOLERANCE
    assert sum(program.calls for program in counting) == 14 * natively


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["none", "int8", "int4-g32"])
def test_the_built_in_model_says_the_same_compiled(scheme):
    answers = []
    for mode in ("off", "on"):
        chat = ChatSession(mmchat.load("tiny", quantize=scheme, compile=mode))
        sampling = SamplingParams(temperature=0.0, speculate="off")
        asked = [("What's in this image?", ["assets/dog.jpg"]), ("What colour is the dog?", [])]
        for text, images in asked:
            *_, finished = chat.send(text, [ROOT / image for image in images], sampling)
            answers.append(finished.output_ids)
    assert answers[:2] == answers[2:]
