"""A compiled model against the same model as plain PyTorch."""

from __future__ import annotations

import errno
import os
from dataclasses import replace

import pytest
import torch
from torch._dynamo.exc import InternalTorchDynamoError
from torch._dynamo.utils import counters
from torch._inductor.exc import CppCompileError, InductorError

import mmchat
from benchmarks.random_mllama import fill_cache, random_context
from mmchat.errors import CompileError, DiskError
from mmchat.models import row_cache
from mmchat.models.base import Batch
from mmchat.runtime.compiled import ALL_USES, CompiledRuntime, make_runtime
from mmchat.runtime.compiler import CACHE_VARIABLE, compile_errors, keep_compiled_code
from mmchat.runtime.eager import EagerRuntime
from tests.kinds import some
from tests.models.mllama import oracle
from tests.models.mllama.oracle import CASES, CONFIG, distance

CPU = torch.device("cpu")
TOLERANCE = 1e-5
# PyTorch warns about its own use of TorchScript when the inductor is imported.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")

ROWS = {
    "text only": CASES["D_text_only"],
    "one picture": CASES["A_start_picture_text"],
    "two pictures": CASES["B_text_between_pictures"],
    "two pictures together": CASES["C_adjacent"],
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Compiled code of the tests goes to a folder of theirs."""
    folder = tmp_path_factory.getbasetemp() / "inductor"
    monkeypatch.setenv(CACHE_VARIABLE, str(folder))
    return folder


@pytest.fixture(scope="module")
def weights():
    return oracle.random_weights()


def compile_model(model, backend="eager", uses=ALL_USES, **kwargs) -> CompiledRuntime:
    torch._dynamo.reset()
    counters.clear()
    return CompiledRuntime(model, CPU, uses=uses, backend=backend, **kwargs)


@pytest.fixture(scope="module")
def traced(weights, tmp_path_factory):
    """All that is compiled, without the slow compiler behind it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(CACHE_VARIABLE, str(tmp_path_factory.getbasetemp() / "inductor"))
        return compile_model(oracle.build(weights))


def compare(compiled: CompiledRuntime, weights, rows: list[oracle.Row], steps: int) -> None:
    expected = oracle.write(EagerRuntime(oracle.build(weights), CPU), rows, steps)
    with torch.compiler.set_stance("fail_on_recompile"):
        got = oracle.write(compiled, rows, steps)
    for mine, plain in zip(got, expected, strict=True):
        assert torch.equal(mine.argmax(-1), plain.argmax(-1))
        assert distance(mine, plain) < TOLERANCE
    assert compiled.notices == []


@pytest.mark.parametrize("case", ROWS)
def test_compiled_equals_eager_and_growth_compiles_nothing(case, traced, weights, monkeypatch):
    monkeypatch.setattr(row_cache, "CAPACITY_STEP", 8)  # grows twice
    compare(traced, weights, ROWS[case], steps=14)


@pytest.mark.parametrize(
    ("uses", "kinds"), [(["decode"], 2), pytest.param(ALL_USES, 7, marks=pytest.mark.slow)]
)
def test_each_kind_of_layer_is_compiled_once_however_deep_the_model_is(uses, kinds):
    text = replace(CONFIG.text_config, num_hidden_layers=12, cross_attention_layers=(2, 6, 9))
    vision = replace(CONFIG.vision_config, num_hidden_layers=9, num_global_layers=4)
    deep = replace(CONFIG, text_config=text, vision_config=vision)
    model = oracle.build(oracle.random_weights(deep), deep)
    stages: list[tuple[str, int, int]] = []
    compile_model(model, uses=uses, progress=lambda *stage: stages.append(stage))
    assert stages == [("compile", done, kinds) for done in range(kinds + 1)]
    assert counters["stats"]["unique_graphs"] == kinds
    assert not counters["graph_break"]


def test_a_text_only_model_compiles_only_its_own_layers(weights):
    model = oracle.build(weights)
    for name, module in model.named_modules():
        if name.startswith("vision_model") or "cross_attn" in name:
            module.to("meta")
    compile_model(model, uses=["decode", "vision"])
    assert counters["stats"]["unique_graphs"] == 1


def test_more_rows_than_the_example_has_are_compiled_when_they_come(weights):
    runtime = compile_model(oracle.build(weights), uses=["decode"])
    rows = oracle.NO_PICTURE_IN_ONE_ROW
    expected = oracle.write(EagerRuntime(oracle.build(weights), CPU), rows, 3)
    for mine, plain in zip(oracle.write(runtime, rows, 3), expected, strict=True):
        assert distance(mine, plain) < TOLERANCE
    assert runtime.notices == []


@pytest.mark.slow
def test_more_shapes_than_torch_compiles_are_read_eagerly(weights):
    plain = EagerRuntime(oracle.build(weights), CPU)
    with torch._dynamo.config.patch(recompile_limit=1):
        runtime = compile_model(oracle.build(weights), uses=["decode"])
        found, expected = (_checks_a_draft(each) for each in (runtime, plain))
    assert runtime.notices == [
        "no longer compiled: more shapes came than torch.compile keeps code for"
    ]
    assert torch.equal(found, expected)


def _checks_a_draft(runtime: EagerRuntime) -> torch.Tensor:
    """Logits of three tokens that are read at once after a prompt of four."""
    cache = runtime.new_cache(1, 8)
    runtime.forward(Batch.last_of(torch.arange(4), 0), cache)
    return runtime.forward(Batch.all_of(torch.arange(3), 4), cache)


def test_a_random_context_compiles_nothing_either(traced):
    reader = oracle.Reader(traced)
    fill_cache(reader.cache, random_context(CONFIG, 20, 2, torch.float32, CPU))
    with torch.compiler.set_stance("fail_on_recompile"):
        reader.decode(torch.tensor([[5]]))
    assert traced.notices == []


@pytest.mark.slow
def test_a_compiler_that_fails_later_leaves_a_model_that_goes_on_eagerly(weights):
    runtime = compile_model(oracle.build(weights), uses=["decode"])
    layer = runtime.model.blocks()[0].layers[1]

    def fail(*_: object) -> None:
        raise InternalTorchDynamoError("no")

    layer.forward = fail
    rows = CASES["A_start_picture_text"]
    got = oracle.write(runtime, rows, 3)
    assert runtime.notices == ["no longer compiled: torch.compile failed (no); --debug shows more"]
    assert runtime.compile_seconds is None
    expected = oracle.write(EagerRuntime(oracle.build(weights), CPU), rows, 3)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_auto_runs_eagerly_and_says_so_where_compiling_fails(weights, monkeypatch):
    model = oracle.build(weights)

    def fail() -> None:
        raise InternalTorchDynamoError("this GPU is too old\nand more")

    monkeypatch.setattr(model, "blocks", fail)
    runtime = make_runtime(model, torch.device("cuda"), "auto")
    assert type(runtime) is EagerRuntime
    assert runtime.notices == [
        "not compiled: torch.compile failed (this GPU is too old); --debug shows more"
    ]


@pytest.mark.parametrize("mode", ["auto", "off"])
def test_on_a_cpu_only_on_compiles(mode, weights):
    runtime = make_runtime(oracle.build(weights), CPU, mode)
    assert type(runtime) is EagerRuntime
    assert runtime.compile_seconds is None


def test_compiled_code_is_kept_in_the_users_cache(tmp_path, monkeypatch):
    monkeypatch.delenv(CACHE_VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("platformdirs.user_cache_path", lambda *_, **__: tmp_path / "mmchat")
    folder = keep_compiled_code()
    assert str(folder) == os.environ[CACHE_VARIABLE]
    assert folder == tmp_path / "mmchat" / "inductor"
    assert folder.stat().st_mode & 0o777 == 0o700
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "mine"))
    keep_compiled_code()
    assert os.environ[CACHE_VARIABLE] == str(tmp_path / "mine")


def test_a_cache_that_cannot_be_made_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "file" / "cache"))
    with pytest.raises(DiskError, match=f"set {CACHE_VARIABLE} to a folder"):
        keep_compiled_code()


@pytest.mark.parametrize(
    "error",
    [
        InductorError(OSError(errno.ENOSPC, "No space left on device"), None),
        CppCompileError(["g++"], "as: a.o: No space left on device"),
        RuntimeError("[enforce fail] PytorchStreamWriter failed writing file: wrote 0 of 8 bytes"),
        OSError(errno.EIO, "Input/output error"),
    ],
    ids=["torch", "g++", "archive", "here"],
)
def test_a_full_disk_is_said_to_be_one_whoever_finds_it_full(error):
    with pytest.raises(DiskError, match="the compiled layers cannot be written"), compile_errors():
        raise error


def test_a_compiler_that_fails_is_no_full_disk():
    with pytest.raises(CompileError, match="compiler failed"), compile_errors():
        raise CppCompileError(["g++"], "error: expected ';'")


@pytest.mark.slow
def test_code_of_the_inductor_equals_eager(weights, monkeypatch):
    runtime = compile_model(oracle.build(weights), backend="inductor")
    monkeypatch.setattr(row_cache, "CAPACITY_STEP", 8)
    for rows in ROWS.values():
        compare(runtime, weights, rows, steps=14)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["int8", "int4-g32"])
@pytest.mark.parametrize("dtype", some(["float32", "bfloat16"], ["float32"]))
def test_quantised_layers_are_in_the_graph(scheme, dtype):
    model = mmchat.load("tiny", quantize=scheme, dtype=dtype, compile="off").runtime.model
    compile_model(model, uses=["decode"])
    assert counters["stats"]["unique_graphs"] == 2
