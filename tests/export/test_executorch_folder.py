"""What an ExecuTorch export refuses, before it starts and when it is opened."""

import importlib

import pytest
import torch

import mmchat
from mmchat.checkpoints.exported_folder import PROGRAM_NAME
from mmchat.errors import CheckpointError, ExportError, MissingExtra, UsageError
from mmchat.export import ExportPlan, export_model
from mmchat.export.executorch import quantize_linears
from mmchat.loading import programs as opening
from mmchat.loading.options import LoadOptions
from mmchat.quant.schemes import make_plan
from mmchat.runtime import executorch as runtime
from tests.export.test_folder import claim, refused


@pytest.fixture
def folder(tmp_path):
    """A folder that says it holds methods of ExecuTorch 1.4.1; they are no program at all."""
    out = tmp_path / "out"
    export_model(ExportPlan(LoadOptions(dtype="float32"), out, "safetensors"))
    (out / "model.safetensors").unlink()
    (out / PROGRAM_NAME).write_bytes(b"no flatbuffer " * 64)
    changes = {"format": "executorch", "programs": ("read",), "executorch": "1.4.1"}
    return claim(out, **changes, max_seq_len=512)


@pytest.fixture
def installed(monkeypatch):
    """ExecuTorch 1.4.1 is installed, as far as its version goes."""
    for module in (runtime, opening):
        monkeypatch.setattr(module, "executorch_version", lambda: "1.4.1")


@pytest.fixture
def without_executorch(monkeypatch):
    def fail(name, *rest):
        if name.startswith("executorch"):
            raise ImportError(f"No module named {name!r}")
        return importlib.import_module(name, *rest)

    def no_version(name):
        raise runtime.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(runtime, "import_module", fail)
    monkeypatch.setattr(runtime.metadata, "version", no_version)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "bfloat16"}, "computes in float32, not bfloat16"),
        ({"quantize": "fp8"}, "no form for fp8; use --quantize int8, int4"),
        ({"device": "cuda"}, "on the cpu, not cuda"),
    ],
)
def test_what_executorch_has_no_form_for_is_refused(tmp_path, options, message):
    with pytest.raises(UsageError, match=message):
        ExportPlan(LoadOptions(**options), tmp_path / "out", "executorch")


def test_a_missing_package_names_the_extra(folder, tmp_path, without_executorch):
    for act in (
        lambda: export_model(ExportPlan(LoadOptions(), tmp_path / "new", "executorch")),
        lambda: mmchat.load(folder),
        lambda: runtime.ExecutorchPrograms(folder / PROGRAM_NAME),
    ):
        with pytest.raises(MissingExtra, match=r"pip install 'mmchat\[executorch\]'") as caught:
            act()
        assert "\n" not in str(caught.value)


def test_another_version_is_refused(folder, installed):
    claim(folder, executorch="1.3.0")
    refused(folder, ExportError, "with executorch 1.3.0, and this is executorch 1.4.1")


def test_another_torch_is_not(folder, installed, monkeypatch):
    claim(folder, torch="2.3.0")
    monkeypatch.setattr(opening, "ExecutorchPrograms", lambda _: None)
    assert mmchat.load(folder).max_seq_len == 512


def test_a_longer_context_names_the_export(folder, installed):
    refused(folder, UsageError, "for 512 positions, not 1000; .* --max-seq-len", max_seq_len=1000)


def test_a_flipped_bit_is_found_before_anything_is_run(folder, installed):
    path = folder / PROGRAM_NAME
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    refused(folder, CheckpointError, "programs.pte' is not what was recorded")


def test_what_is_no_program_is_one_line(folder, installed):
    pytest.importorskip("executorch", reason="needs mmchat[executorch]")
    refused(folder, ExportError, "the programs of .*programs.pte' cannot be loaded: .program.cpp")


def test_a_folder_without_its_record_is_refused(folder):
    (folder / "mmchat-manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"holds exported programs but no mmchat-manifest"):
        mmchat.load(folder)


def test_weights_are_rounded_part_by_part_as_the_scheme_says():
    pytest.importorskip("torchao", reason="needs mmchat[executorch]")
    model = mmchat.load(None, device="cpu", dtype="float32").runtime.model
    quantize_linears(model, make_plan("int4-g32", ("vision",)))

    def form(name):
        weight = model.get_submodule(name).weight
        return (
            str(weight.target_dtype),
            tuple(weight.block_size),
            str(weight.activation_quantization),
        )

    text = "language_model.model.layers.1.cross_attn.q_proj"
    head = "language_model.lm_head"
    per_token = form(head)[2]
    assert "int8" in per_token
    assert form(text) == ("torch.int4", (1, 32), per_token)
    assert form(head) == ("torch.int8", (1, model.config.text_config.hidden_size), per_token)
    kept = model.get_submodule("vision_model.transformer.layers.0.self_attn.q_proj").weight
    assert type(kept) is torch.nn.Parameter
