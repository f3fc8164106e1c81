"""Models that other programs packed answer as a plain checkpoint of the same values does."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from mmchat.catalog.known import data_path, find_spec
from mmchat.checkpoints.computed import PackedWeight
from mmchat.cli.app import app
from mmchat.errors import CheckpointError
from mmchat.export import ExportPlan, export_model
from mmchat.hardware.placement import choose_placement
from mmchat.loading.loader import load, load_with
from mmchat.loading.options import LoadOptions
from mmchat.loading.packed import AddedError, as_packed, fill
from mmchat.loading.prepared import prepare
from mmchat.loading.weights import load_weights
from mmchat.models.mllama.build import MllamaBuild
from mmchat.nn.linear import Linear
from mmchat.quant.formats.plain import PLAIN
from tests.adapter_folders import low_rank, write_adapter
from tests.models.mllama.test_translate import hub_config
from tests.packed_writers import KINDS, bnb4, is_packed, pack_folder

BUILD = MllamaBuild()

TINY = data_path("assets", "tiny")
SPEC = find_spec("tiny")


def hub_folder(folder, config=None):
    """config.json and tokenizer of tiny, without weights."""
    folder.mkdir(exist_ok=True)
    shutil.copy(TINY / "tokenizer.model", folder)
    (folder / "chat_template.json").write_text("{}")
    (folder / "config.json").write_text(json.dumps(config or hub_config(SPEC.config)))
    return folder


@pytest.fixture(scope="module")
def weights():
    with LoadOptions("tiny").find().open_weights() as files:
        return {name: t.clone() for name, t in BUILD.iter_weights(files, SPEC.config)}


def unpacked(weight):
    """The tensor that a packed weight stands for; a tensor as it is."""
    if isinstance(weight, PackedWeight):
        return weight.to(getattr(torch, weight.entry.dtype))
    return weight


@pytest.mark.parametrize("kind", KINDS)
def test_packed_models_answer_as_plain_ones_of_the_same_values(tmp_path, kind, weights):
    folder = hub_folder(tmp_path / kind)
    pack_folder(folder, kind, weights, hub_config(SPEC.config))
    source = LoadOptions(folder).find()
    assert source.spec.packing is not None
    with source.open_weights() as files:
        exact = {name: unpacked(t).clone() for name, t in BUILD.iter_weights(files, SPEC.config)}
    for name, weight in weights.items():
        same = torch.equal(exact[name].to(weight.dtype), weight)
        assert same != is_packed(kind, name), name
    plain = hub_folder(tmp_path / "plain")
    save_file(exact, plain / "model.safetensors")
    options = LoadOptions(folder, dtype="float32", quantize="none")
    ours, theirs = (load(o).runtime.model for o in (options, LoadOptions(plain, dtype="float32")))
    for (name, a), b in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


MEASURE = """
import sys, torch
from mmchat.checkpoints.checkpoint import open_checkpoint
from mmchat.checkpoints.packed import packing_of
from mmchat.loading.packed import AddedError, fill
from mmchat.nn.linear import Linear
from mmchat.quant.schemes import SCHEMES
from mmchat.strict_json import Where

def memory(field):
    for line in open("/proc/self/status"):
        if line.startswith(field):
            return int(line.split()[1]) * 1024

kind, path = sys.argv[1:]
config = {"quantization_config": {"quant_method": "bitsandbytes", "bnb_4bit_quant_type": "nf4"}}
if kind == "mlx":
    config = {"quantization": {"bits": 4, "group_size": 64}}
stored = open_checkpoint(path)
with torch.inference_mode(), packing_of(config, Where("c")).unpacked(stored) as files:
    weight = files.computed["x.weight"]
    rows, columns = weight.entry.shape
    with torch.device("meta"):
        layer = Linear(columns, rows, bias=False)
        layer.set_format(SCHEMES["nf4" if kind == "nf4" else "int4-g64"])
    _ = torch.ones(1000).sum()
    before = memory("VmRSS")
    fill(layer, weight, torch.device("cpu"), AddedError())
    files.release("x.weight")
print(sum(held.nbytes for held in layer.held()), memory("VmHWM") - before)
"""


@pytest.mark.process
@pytest.mark.parametrize("kind", ["nf4", "mlx"])
def test_a_layer_is_loaded_without_being_unpacked_as_a_whole(tmp_path, kind):
    """[32768, 4096]: 75 MB kept, 268 MB in bfloat16, 537 MB in float32."""
    rows, columns = 32768, 4096
    codes = torch.zeros(rows * columns // 2, dtype=torch.uint8)
    if kind == "nf4":
        stored = bnb4("x", torch.ones(64, 64), nested=False)
        state = {
            "quant_type": "nf4",
            "blocksize": 64,
            "dtype": "bfloat16",
            "shape": [rows, columns],
        }
        text = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
        stored |= {
            "x.weight": codes[:, None],
            "x.weight.absmax": torch.ones(rows * columns // 64),
            "x.weight.quant_state.bitsandbytes__nf4": text,
        }
    else:
        groups = torch.ones(rows, columns // 64).bfloat16()
        stored = {"x.weight": codes.view(torch.uint32).reshape(rows, -1), "x.scales": groups}
        stored["x.biases"] = -groups
    path = tmp_path / "model.safetensors"
    save_file(stored, path)
    run = [sys.executable, "-c", MEASURE, kind, str(path)]
    done = subprocess.run(run, capture_output=True, text=True, check=True)
    kept, taken = map(int, done.stdout.split())
    assert kept == 75_497_472
    # what is mapped counts as well, as long as it is read: the packed bytes, here 67 to 75 MB
    assert taken - kept < 320e6


@pytest.mark.parametrize(
    ("kind", "scheme", "keep", "error"),
    [
        ("nf4", "nf4", ("head",), 0.006),
        ("nf4-nested", "nf4", ("head",), 0.006),
        ("bnb-int8", "int8", ("head",), 0),
        ("fp8", "int8", ("head", "vision"), 0.01),
        ("w8a8", "int8", ("head", "vision"), 0),
        ("w4a16", "int4-g128", ("head", "vision"), 0),
        ("mlx4", "int4-g64", ("head", "vision"), 0.005),
        ("gptq", "int4-g128", ("head", "vision"), 0.004),
        ("awq", "int4-g128", ("head", "vision"), 0.004),
        ("auto-round", "int4-g128", ("head", "vision"), 0.004),
    ],
)
def test_codes_are_kept_where_a_format_holds_them(tmp_path, weights, kind, scheme, keep, error):
    """By default: in the scheme nearest in bits, with what it adds said once."""
    folder = hub_folder(tmp_path / kind)
    pack_folder(folder, kind, weights, hub_config(SPEC.config))
    loaded = load(LoadOptions(folder))
    assert (loaded.options.quantize, loaded.options.quantize_keep) == (scheme, keep)
    [said] = [n for n in loaded.runtime.notices if KINDS[kind] and "slower" not in n]
    percent = float(said.split("adds ")[1].split("%")[0]) / 100 if error else 0
    assert ("kept as it is" in said) == (not error)
    assert percent <= error
    assert loaded.runtime.model.language_model.lm_head.format is PLAIN
    assert any("unpacked" in remark for remark in loaded.remarks)


@pytest.mark.parametrize("scheme", ["int8", "int4-g32"])
def test_a_scheme_that_is_asked_holds_for_all_layers(tmp_path, weights, scheme):
    folder = hub_folder(tmp_path / "model")
    pack_folder(folder, "w8a8", weights, hub_config(SPEC.config))
    loaded = load(LoadOptions(folder, quantize=scheme))
    assert loaded.options.quantize_keep == ()
    assert loaded.runtime.model.language_model.lm_head.format is not PLAIN


LAYER = "language_model.model.layers.0"


def dynamic_folder(folder, weights, kind, *names):
    """As in dynamic uploads, which leave single layers in 16 bits."""
    hub_folder(folder)
    left = {f"{name}.weight": weights[f"{name}.weight"] for name in names}
    stored = {name: tensor for name, tensor in weights.items() if name not in left}
    pack_folder(folder, kind, stored, hub_config(SPEC.config))
    save_file(load_file(folder / "model.safetensors") | left, folder / "model.safetensors")
    return folder


def test_layers_that_are_not_packed_stay_as_they_are(tmp_path, weights):
    name = f"{LAYER}.mlp.down_proj"
    folder = dynamic_folder(tmp_path / "model", weights, "nf4", name)
    model = load(LoadOptions(folder)).runtime.model
    assert model.get_submodule(name).format is PLAIN
    assert torch.equal(model.get_submodule(name).weight, weights[f"{name}.weight"])


@pytest.mark.slow
def test_layers_that_are_not_packed_are_counted_as_they_are(tmp_path, weights):
    names = [f"{LAYER}.mlp.down_proj", f"{LAYER}.self_attn.q_proj", f"{LAYER}.self_attn.o_proj"]
    placement = choose_placement("cpu", "bfloat16", SPEC.parameters)
    needs = []
    for folder in (
        dynamic_folder(tmp_path / "whole", weights, "nf4"),
        dynamic_folder(tmp_path / "dynamic", weights, "nf4", *names),
    ):
        source = LoadOptions(folder).find()
        with source.open_weights() as files:
            options, _, others = as_packed(files, source.spec, LoadOptions(folder), placement)
        setup = options.setup(source.spec, placement, others=others)
        needs.append(setup.need().weights)
        shown = CliRunner().invoke(
            app, ["generate", str(folder), "-p", "x", "--dry-run", "--json", "--dtype", "bfloat16"]
        )
        assert json.loads(shown.stdout)["memory"]["weights"] == needs[-1]
    shapes = [tuple(weights[f"{name}.weight"].shape) for name in names]
    more = sum(rows * columns * 2 - setup.linear_bytes("text", rows, columns)
               for rows, columns in shapes)  # fmt: skip
    assert needs[1] - needs[0] == more > 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mlx4", "nf4"])
@pytest.mark.parametrize("left", [(), (f"{LAYER}.self_attn.k_proj",)])
def test_the_base_beside_an_adapter_is_the_packed_model(tmp_path, weights, kind, left):
    folder = dynamic_folder(tmp_path / "model", weights, kind, *left)
    modules = [f"{LAYER}.self_attn.q_proj", f"{LAYER}.mlp.down_proj"]
    adapter = write_adapter(tmp_path / "adapter", low_rank(weights, modules))
    base = load_with(load(LoadOptions(folder, adapter=adapter)), ()).runtime.model.state_dict()
    plain = load(LoadOptions(folder)).runtime.model.state_dict()
    assert base.keys() == plain.keys()
    assert [name for name, tensor in base.items() if not torch.equal(tensor, plain[name])] == []


def test_layers_of_another_shape_are_refused_and_read_in_the_order_of_the_files(tmp_path, weights):
    folder = hub_folder(tmp_path / "model")
    pack_folder(folder, "nf4", weights, hub_config(SPEC.config))
    options = LoadOptions(folder, quantize="int8")
    source, released = options.find(), []
    with source.open_weights() as files, source.open_adapters() as none:
        files.release = released.append
        load_weights(prepare(files, source.spec, options, None, none), repack=False)
        assert released == list(files.entries)
        weight = next(w for w in files.computed.values() if isinstance(w, PackedWeight))
        with pytest.raises(CheckpointError, match=r"unpacked it is \[.*\], expected \[3, 5\]"):
            fill(Linear(5, 3), weight, torch.device("cpu"), AddedError())


def test_a_packed_checkpoint_is_unpacked_whatever_names_its_params(tmp_path, weights):
    folder = hub_folder(tmp_path / "model")
    pack_folder(folder, "mlx8", weights, hub_config(SPEC.config))
    expected = load(LoadOptions(folder)).runtime.model.state_dict()
    for given in ({"name": "tiny"}, {"params_path": SPEC.source}):
        options = LoadOptions(checkpoint_path=folder, **given)
        assert options.find().spec.packing.label == LoadOptions(folder).find().spec.packing.label
        found = load(options).runtime.model.state_dict()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_text_model_needs_nothing_of_the_vision(tmp_path, weights):
    start = "language_model."
    text = {n.removeprefix(start): t for n, t in weights.items() if n.startswith(start)}
    config = {**hub_config(SPEC.config)["text_config"], "model_type": "mllama_text_model"}
    folder = hub_folder(tmp_path / "model")
    _, value, write = KINDS["nf4"]
    name = "model.layers.0.mlp.down_proj"
    save_file(text | write(name, text[f"{name}.weight"]), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": value}))
    done = CliRunner().invoke(app, ["generate", str(folder), "-p", "x", "--dry-run"])
    assert done.exit_code == 0, done.stderr


def test_an_export_of_a_packed_model_is_plain(tmp_path, weights):
    folder = hub_folder(tmp_path / "model")
    pack_folder(folder, "nf4", weights, hub_config(SPEC.config))
    plan = ExportPlan(LoadOptions(folder), tmp_path / "out", format="hf")
    export_model(plan)
    with LoadOptions(folder).find().open_weights() as files:
        exact = {name: unpacked(t) for name, t in BUILD.iter_weights(files, SPEC.config)}
        with LoadOptions(tmp_path / "out").find().open_weights() as written:
            for name, tensor in BUILD.iter_weights(written, SPEC.config):
                assert torch.equal(tensor, exact[name]), name
