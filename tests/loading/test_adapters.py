"""Adapters, made by hand: found, merged, exported, compared; or refused, with the reason."""

import json
import os
import random
import re
import shutil
from dataclasses import replace
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import mmchat
from mmchat.catalog.adapters import find_adapters
from mmchat.catalog.find import find_model
from mmchat.catalog.known import base_spec, data_path, find_spec
from mmchat.checkpoints import adapter_config
from mmchat.checkpoints.adapter import open_adapters
from mmchat.checkpoints.checkpoint import open_checkpoint
from mmchat.cli.app import app
from mmchat.cli.download import _say_adapter
from mmchat.errors import CheckpointError, MemoryError_, UsageError
from mmchat.hub.client import HubFile
from mmchat.hub.selection import select
from mmchat.loading import loader, prepared
from mmchat.models.llava.tensor_names import hub_name as llava_name
from mmchat.models.llava.tensor_names import hub_shapes
from mmchat.models.mllama.tensor_names import hf_shapes, hub_name
from tests.adapter_folders import CONFIG, low_rank, merged, newer, write_adapter
from tests.attack.mutations import mutated
from tests.loading.test_loader import small_config, write_hf_folder
from tests.meta_checkpoint import weights_for, write_meta_folder
from tests.models.mllama.oracle import random_weights

GREEDY = mmchat.SamplingParams(temperature=0.0, max_new_tokens=6)
BASE = small_config()
WEIGHTS = {name: tensor.to(torch.bfloat16) for name, tensor in random_weights(BASE).items()}
SELF = "language_model.model.layers.0.self_attn"
MODULES = (
    f"{SELF}.q_proj",
    f"{SELF}.v_proj",
    "language_model.model.layers.2.cross_attn.q_proj",
    "language_model.model.layers.5.mlp.down_proj",
    "language_model.lm_head",
    "vision_model.transformer.layers.1.self_attn.q_proj",
    "vision_model.global_transformer.layers.0.mlp.fc1",
    "multi_modal_projector",
)
TENSORS = low_rank(WEIGHTS, MODULES)
open_for_mllama = partial(open_adapters, shapes=hf_shapes(BASE), hub_name=hub_name)
load = partial(mmchat.load, device="cpu")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_hf_folder(tmp_path_factory.mktemp("base") / "base", BASE, WEIGHTS)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The base with the adapter's exact values."""
    folder = tmp_path_factory.mktemp("plain") / "plain"
    return write_hf_folder(folder, BASE, merged(WEIGHTS, TENSORS))


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    return write_adapter(tmp_path_factory.mktemp("adapter") / "adapter", TENSORS)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of the Hub; `put` makes a repository in it."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))

    def put(repo, folder):
        place = tmp_path / "hub" / f"models--{repo.replace('/', '--')}" / "snapshots" / ("a" * 40)
        shutil.copytree(folder, place)
        return place

    return put


def same(left, right):
    ours, theirs = (model.runtime.model.state_dict() for model in (left, right))
    assert ours.keys() == theirs.keys()
    loaded = [name for name in ours if not ours[name].is_meta]
    return [name for name in loaded if not torch.equal(ours[name], theirs[name])] == []


def fails(error, match, call):
    with pytest.raises(error, match=match) as caught:
        call()
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("quantize", ["none", "int8", "int4"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merged_before_anything_is_rounded(base, plain, adapter, quantize, dtype):
    options = {"dtype": dtype, "quantize": quantize}
    assert same(load(base, adapter=adapter, **options), load(plain, **options))


def test_answers_are_those_of_the_exact_values(base, plain, adapter, picture):
    texts = [
        load(model, adapter=given).ask("What is this?", picture, sampling=GREEDY)
        for model, given in ((base, adapter), (plain, ()), (base, ()))
    ]
    assert texts[0] == texts[1] != texts[2]


@pytest.fixture
def picture(tmp_path):
    from PIL import Image

    path = tmp_path / "picture.png"
    Image.effect_noise((70, 40), 60).convert("RGB").save(path)
    return path


def test_both_spellings(tmp_path, base, adapter):
    spelt = write_adapter(tmp_path / "new", {newer(name): t for name, t in TENSORS.items()})
    raw = {name.replace("_A.", "_A.default."): tensor for name, tensor in TENSORS.items()}
    expected = load(base, adapter=adapter)
    assert same(load(base, adapter=spelt), expected)
    assert same(load(base, adapter=write_adapter(tmp_path / "raw", raw)), expected)
    assert same(load(base, adapter=write_adapter(tmp_path / "bare", TENSORS, prefix="")), expected)


def test_scales_and_sums(tmp_path, base, adapter):
    other = low_rank(WEIGHTS, MODULES[:3], rank=2, seed=1)
    second = write_adapter(tmp_path / "second", other, r=2, use_rslora=True, lora_alpha=6)
    once = merged(WEIGHTS, TENSORS, scale=2.0 * 0.5)
    both = merged(once, other, scale=6 / 2**0.5)
    folder = write_hf_folder(tmp_path / "sum", BASE, both)
    assert same(load(base, adapter=[f"{adapter}:0.5", second]), load(folder))


def test_meta_format(tmp_path, base, adapter):
    """Names and orders are the Hub's when an adapter comes in."""
    weights = weights_for(BASE)
    tokenizer = data_path("assets", "tiny", "tokenizer.model")
    folder = write_meta_folder(tmp_path / "meta", find_model(base).spec, weights, tokenizer)
    params = next(path for path in folder.iterdir() if path.suffix == ".json")
    ours = load(folder, params_path=params, adapter=adapter).runtime.model.state_dict()
    expected = merged(weights, TENSORS)
    assert all(torch.equal(ours[name], expected[name]) for name in hf_shapes(BASE))


def test_text_alone(base, adapter):
    ours = load(base, adapter=adapter, text_only=True).runtime.model
    assert ours.vision_model.class_embedding.is_meta
    wanted = merged(WEIGHTS, TENSORS)[f"{SELF}.q_proj.weight"]
    assert torch.equal(ours.get_submodule(f"{SELF}.q_proj").weight, wanted)


def test_an_adapter_as_the_model(tmp_path, cache, base, plain):
    cache("someone/base", base)
    place = cache(
        "someone/tuned",
        write_adapter(tmp_path / "tuned", TENSORS, base_model_name_or_path="someone/base"),
    )
    model = load("someone/tuned")
    assert same(model, load(plain))
    assert "is taken as the base of the adapter" in model.spec.notices[-1]
    assert same(load(place), model)
    shutil.copy(base / "tokenizer.model", place)
    assert find_model(place).tokenizer == place / "tokenizer.model"
    assert same(load(place, checkpoint_path=base), model)


@pytest.mark.parametrize("names", [("a/a",), ("a/a", "b/b")])
def test_adapters_that_name_each_other_as_their_base(tmp_path, cache, names):
    for name, base in zip(names, names[1:] + names[:1], strict=True):
        cache(name, write_adapter(tmp_path / name, TENSORS, base_model_name_or_path=base))
    fails(CheckpointError, "which is an adapter too", partial(load, names[0]))


def test_the_base_is_known_by_many_names(tmp_path, cache):
    for name, expected in {
        "meta-llama/Llama-3.2-11B-Vision-Instruct": "Llama-3.2-11B-Vision-Instruct",
        "unsloth/Llama-3.2-11B-Vision-Instruct-bnb-4bit": "Llama-3.2-11B-Vision-Instruct",
        "unsloth/llama-3.2-11b-vision-instruct-unsloth-bnb-4bit": "Llama-3.2-11B-Vision-Instruct",
        "SeanScripts/Llama-3.2-11B-Vision-Instruct-nf4": "Llama-3.2-11B-Vision-Instruct",
        "/data/models/Llama-3.2-90B-Vision/": "Llama-3.2-90B-Vision",
        "C:\\models\\Llama-3.2-11B-Vision": "Llama-3.2-11B-Vision",
        "neuralmagic/Llama-3.2-11B-Vision-Instruct-FP8-dynamic": "Llama-3.2-11B-Vision-Instruct",
        "llava-hf/llava-1.5-7b-hf": "llava-1.5-7b-hf",
        "../../etc/passwd": None,
        "someone/else": None,
        "": None,
    }.items():
        folder = write_adapter(tmp_path / "adapter", TENSORS, base_model_name_or_path=name)
        spec = base_spec(folder)
        assert (spec and spec.name) == expected
        message = (
            f"{expected} is not on this.*base of the adapter" if expected else "the base as the"
        )
        fails(CheckpointError, message, partial(load, folder))
    assert base_spec("tiny") is None


def test_one_that_lies_beside_the_weights_is_never_ignored(tmp_path, base, adapter, plain):
    folder = shutil.copytree(base, tmp_path / "both")
    for file in adapter.iterdir():
        shutil.copy(file, folder)
    fails(
        CheckpointError,
        "--adapter .* merges it, --adapter none leaves it out",
        partial(load, folder),
    )
    weights = folder / "model.safetensors"
    fails(CheckpointError, "a model and an adapter", partial(load, base, checkpoint_path=weights))
    run = CliRunner().invoke
    for words in (["inspect"], ["generate", "-p", "x", "--dry-run", "-m"]):
        assert run(app, [*words, str(folder)]).exit_code == 3
    assert run(app, ["tiles", "assets/dog.jpg", "-m", str(folder)]).exit_code == 0
    assert same(load(folder, adapter="none"), load(base))
    assert same(load(folder, adapter=folder), load(plain))


def test_what_is_given_is_said_to_be_wrong(tmp_path, base, adapter):
    for given, error, match in (
        (tmp_path / "nothing", CheckpointError, "no such folder"),
        ("a/b", CheckpointError, "mmchat download a/b"),
        (base, CheckpointError, "no adapter_config.json"),
        (f"{adapter}:much", UsageError, "behind the colon"),
        (f"{adapter}:nan", UsageError, "behind the colon"),
        (f"{adapter}:1e9", UsageError, "behind the colon"),
        ([adapter] * 17, UsageError, "at most 16"),
        (3, UsageError, "must be a string"),
        ([3], UsageError, "must be a string"),
        ("x" * 5000, CheckpointError, "no such folder"),
        ("a\0b", CheckpointError, "no such folder"),
    ):
        fails(error, match, partial(load, base, adapter=given))
    fails(CheckpointError, "is an adapter", partial(load, "tiny", checkpoint_path=adapter))
    assert find_adapters(f"{adapter}:-0.5")[0].scale == -0.5


def test_files_that_do_not_fit(tmp_path, base):
    q, rows = f"{SELF}.q_proj", WEIGHTS[f"{SELF}.q_proj.weight"].shape[0]
    a, b = f"{q}.lora_A.weight", f"{q}.lora_B.weight"
    good = low_rank(WEIGHTS, [q])
    narrow = {a: torch.ones(4, 81), b: good[b]}
    for changes, config, match in (
        ({a: None}, {}, "has lora_B, and LoRA of it would be lora_A, lora_B"),
        ({f"{q}.lora_C.weight": torch.ones(2)}, {}, "belongs to nothing in the model"),
        ({"language_model.model.layers.99.mlp.up_proj.weight": torch.ones(2)}, {}, "to nothing"),
        ({"../../x.lora_A.weight": torch.ones(2)}, {}, "belongs to nothing"),
        (narrow, {}, r"\[80, 81\], and the model's is \[80, 80\]: another size"),
        ({}, {"r": 8}, "not of the rank 8"),
        ({}, {"r": 10**17}, "no rank from 1"),
        ({}, {"r": 0}, "no rank"),
        ({}, {"r": "4"}, "no rank"),
        ({}, {"lora_alpha": 1e300}, "no number of a size"),
        ({}, {"lora_alpha": None}, "no number"),
        ({}, {"rank_pattern": {"(a+)+$": 4}}, "regular expression"),
        ({}, {"rank_pattern": {"(a|a)*b": 4}}, "regular expression"),
        ({}, {"rank_pattern": {".*" * 17 + "x": 4}}, "too many"),
        ({}, {"rank_pattern": {f"x{n}": 4 for n in range(2000)}}, "too many"),
        ({}, {"alpha_pattern": {"[": 4}}, "regular expression"),
        ({}, {"alpha_pattern": [1]}, "expected an object"),
        ({}, {"peft_type": None}, "LORA alone"),
        ({}, {"bias": "some"}, "bias"),
        ({}, {"use_dora": True}, "DoRA of it would be"),
        ({}, {"use_dora": "yes"}, "true or false"),
        ({f"{q}.lora_magnitude_vector": torch.ones(rows)}, {}, "LoRA of it would be"),
        (
            {f"{q}.lora_magnitude_vector": torch.ones(rows + 1)},
            {"use_dora": True},
            "expected",
        ),
        ({f"{q}.lora_B.bias": torch.ones(rows)}, {}, "a bias of LoRA"),
        ({f"{newer(q)}.lora_A.weight": good[a]}, {}, "in two spellings"),
        ({f"{q}.lora_A.other.weight": good[a]}, {}, "in two spellings"),
        ({a: good[a].double()}, {}, "float64"),
        ({"language_model.lm_head.weight": torch.ones(3, 80)}, {}, "another size of model"),
    ):
        tensors = {name: t for name, t in (good | changes).items() if t is not None}
        folder = write_adapter(tmp_path / "adapter", tensors, **config)
        fails(CheckpointError, match, partial(load, base, adapter=folder))
    fc1 = "vision_model.transformer.layers.1.mlp.fc1"
    folder = write_adapter(tmp_path / "adapter", low_rank(WEIGHTS, [fc1]), bias="lora_only")
    fails(CheckpointError, "newer peft", partial(load, base, adapter=folder))


def test_a_base_that_is_not_named_is_not_looked_for(tmp_path, base, monkeypatch):
    folder = write_adapter(tmp_path / "alone", TENSORS, base_model_name_or_path=None)
    fails(CheckpointError, "of no named base; give the base as the model", lambda: load(folder))
    monkeypatch.chdir(folder)  # an empty name is no name of it
    fails(CheckpointError, "no such folder", lambda: load(base, adapter=[""]))


def test_files_that_are_not_there_or_something_else(tmp_path, base, adapter):
    folder = shutil.copytree(adapter, tmp_path / "copy")
    weights = folder / "adapter_model.safetensors"
    (folder / "non_lora_trainables.bin").write_bytes(b"x")
    fails(CheckpointError, "merge_lora_weights", partial(load, base, adapter=folder))
    (folder / "non_lora_trainables.bin").unlink()
    weights.rename(folder / "adapter_model.bin")
    fails(CheckpointError, "is a pickle", partial(load, base, adapter=folder))
    (folder / "adapter_model.bin").unlink()
    fails(CheckpointError, "no such file", partial(load, base, adapter=folder))
    weights.symlink_to(adapter / "adapter_model.safetensors")
    fails(CheckpointError, "outside the model's folder", partial(load, base, adapter=folder))
    weights.unlink()
    os.mkfifo(weights)
    fails(CheckpointError, "not a regular file", partial(load, base, adapter=folder))


def test_what_sets_values_is_taken_alone(tmp_path, base, adapter):
    q = f"{SELF}.q_proj"
    magnitudes = {f"{q}.lora_magnitude_vector": torch.rand(80)}
    tensors = low_rank(WEIGHTS, [q]) | magnitudes
    dora = write_adapter(tmp_path / "dora", tensors, use_dora=True)
    fails(CheckpointError, "cannot be taken times 0.5", partial(load, base, adapter=f"{dora}:0.5"))
    fails(CheckpointError, "give one of the two", partial(load, base, adapter=[adapter, dora]))
    whole = write_adapter(
        tmp_path / "whole",
        {
            "language_model.lm_head.weight": torch.ones(
                WEIGHTS["language_model.lm_head.weight"].shape
            )
        },
    )
    assert load(base, adapter=[dora, whole]).remarks[-1].endswith("1 tensor replaced")
    unmerged = WEIGHTS[f"{q}.weight"].float()
    changed = merged(WEIGHTS, tensors)[f"{q}.weight"]
    ours = load(base, adapter=dora).runtime.model.get_submodule(q).weight
    assert not torch.equal(ours, unmerged)
    lengths = torch.linalg.norm(changed, dim=1)
    expected = (magnitudes[f"{q}.lora_magnitude_vector"] / lengths)[:, None] * changed
    assert torch.equal(ours, expected)


def fuzz_adapters(folder, rounds):
    """Whatever is changed in either file, it is refused in words or every tensor has its place."""
    tensors = low_rank(WEIGHTS, MODULES[:2])
    write_adapter(folder, tensors, rank_pattern={"q_proj": 4, ".*v_proj": 4})
    rng, accepted, messages = random.Random(24), 0, []
    files = {path: path.read_bytes() for path in folder.iterdir()}
    for _ in range(rounds):
        path = rng.choice(sorted(files))
        whole = files[path]
        header = 8 + int.from_bytes(whole[:8], "little") if path.suffix != ".json" else None
        path.unlink()
        path.write_bytes(mutated(rng, whole, header))
        try:
            with open_for_mllama([(folder, 1.0)]) as adapters:
                for name in adapters.touched:
                    shape = hf_shapes(BASE)[name]
                    assert adapters.merged(name, torch.ones(shape), torch.float32).shape == shape
            accepted += 1
        except CheckpointError as error:
            messages.append(str(error))
        path.write_bytes(whole)
    assert accepted < rounds / 2
    assert all(map(str.isprintable, messages))


@pytest.mark.slow
def test_fuzz(tmp_path):
    fuzz_adapters(tmp_path / "adapter", 1500)


def test_exported_as_merged(tmp_path, base, adapter, plain):
    run = CliRunner().invoke
    for form in ("hf", "safetensors"):
        folder = tmp_path / form
        result = run(
            app,
            ["export", str(base), "--adapter", str(adapter), "--format", form, "-o", str(folder)],
        )
        assert result.exit_code == 0, result.output
        dtype = "bfloat16" if form == "hf" else "auto"
        assert same(load(folder, dtype=dtype), load(plain, dtype=dtype))
    assert not (tmp_path / "hf" / "adapter_config.json").exists()
    with open_checkpoint(tmp_path / "hf") as files:
        assert {entry.dtype for entry in files.entries.values()} == {"bfloat16"}
    record = json.loads((tmp_path / "safetensors" / "mmchat-manifest.json").read_text())
    assert record["export"]["adapters"] == [str(adapter)]
    fails(
        UsageError,
        f"--adapter {adapter}",
        partial(load, tmp_path / "safetensors", adapter=adapter),
    )


def test_shown_before_anything_is_loaded(base, adapter):
    run = CliRunner().invoke
    result = run(app, ["inspect", str(base), "--adapter", f"{adapter}:0.5", "--json"])
    (found,) = json.loads(result.stdout)["adapters"]
    assert found["kind"] == "LoRA"
    assert (found["ranks"], found["scales"]) == ([4], [1.0])
    assert found["modules_by_part"] == {"text": 4, "head": 1, "vision": 3}
    result = run(app, ["inspect", str(base), "--adapter", str(adapter)])
    assert "rank 4, scale 2" in result.output
    result = run(app, ["generate", str(base), "--adapter", str(adapter), "-p", "x", "--dry-run"])
    assert "8 modules of rank 4" in result.output


def test_after_a_download_it_is_said_what_it_is(adapter, base, capsys):
    _say_adapter("someone/tuned", adapter)
    assert "an adapter of 'tiny'; 'mmchat chat someone/tuned'" in capsys.readouterr().err
    _say_adapter("someone/base", base)
    assert not capsys.readouterr().err


def test_fetched():
    names = [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "tokenizer.json",
        "optimizer.pt",
        "checkpoint-5/adapter_model.safetensors",
        "training_args.bin",
    ]
    files = [HubFile(name, 1, "") for name in names]
    assert [file.path for file in select(files, "a/b")] == names[1:4]
    beside = select([*files, HubFile("model.safetensors", 1, "")], "a/b")
    assert {"model.safetensors", "adapter_config.json"} <= {file.path for file in beside}


@pytest.mark.parametrize("quantize", ["none", "int8"])
def test_the_base_beside_it_shares_what_is_equal(base, adapter, quantize, monkeypatch):
    model = load(base, adapter=adapter, dtype="bfloat16", quantize=quantize)
    other = loader.load_with(model, ())
    assert type(other) is type(model)
    assert not other.adapters
    assert same(other, load(base, dtype="bfloat16", quantize=quantize))
    ours, theirs = (
        {name: tensor.data_ptr() for name, tensor in m.runtime.model.state_dict().items()}
        for m in (model, other)
    )
    apart = {name for name in ours if ours[name] != theirs[name]}
    if quantize == "none":
        assert apart == {f"{module}.weight" for module in MODULES}
    layers = {name.rsplit(".", 3)[0] for name in apart if ".layers." in name}
    assert len(layers) == 5
    for module in (loader, prepared):
        monkeypatch.setattr(module, "available_memory", lambda _: 2**30)
    beside, alone = loader.load_with(model, ()).memory, load(base, dtype="bfloat16").memory
    assert abs(beside - alone) < 2**20  # both leave what a pass works in
    monkeypatch.setattr(loader, "available_memory", lambda _: 1000)
    fails(
        MemoryError_,
        "without its adapter needs .* beside what is loaded",
        lambda: loader.load_with(model, ()),
    )


def test_the_chat_answers_with_it_and_without(base, adapter):
    lines = "hello\n\\adapter off\n\\retry\n\\adapter\n\\adapter on\n\\retry\n\\adapter up\n"
    command = ["chat", str(base), "--adapter", str(adapter), "-n", "5", "--temperature", "0"]
    result = CliRunner().invoke(app, [*command, "--no-history"], input=lines)
    answers = result.stdout.splitlines()
    alone, plain = (
        mmchat.load(base, adapter=given).ask("hello", sampling=replace(GREEDY, max_new_tokens=5))
        for given in (adapter, ())
    )
    assert [line for line in answers if line] == [
        line for text in (alone, plain, alone) for line in text.splitlines() if line
    ]
    assert "without adapter" in result.stderr
    assert "takes on or off" in result.stderr
    result = CliRunner().invoke(app, ["chat", str(base), "--no-history"], input="\\adapter off\n")
    assert "no adapter is merged" in result.stderr


def test_llava_by_the_same_code(tmp_path):
    from tests.models.llava.folders import SPARE_ROWS, with_vocabulary, write_hub_folder
    from tests.models.llava.oracle import random_weights as llava_weights

    config = with_vocabulary(SPARE_ROWS)
    weights = dict(llava_weights(config))
    modules = [
        "language_model.model.layers.0.self_attn.q_proj",
        "vision_tower.vision_model.encoder.layers.0.mlp.fc1",
        "multi_modal_projector.linear_1",
    ]
    tensors = low_rank(weights, modules)
    base = write_hub_folder(tmp_path / "base", weights)
    plain = write_hub_folder(tmp_path / "plain", merged(weights, tensors))
    newest = {
        name.replace("language_model.model.", "model.language_model.")
        .replace("vision_tower.vision_model.", "model.vision_tower.")
        .replace("multi_modal", "model.multi_modal"): tensor
        for name, tensor in tensors.items()
    }
    for spelling in (tensors, newest):
        adapter = write_adapter(tmp_path / "adapter", spelling)
        assert same(load(base, adapter=adapter), load(plain))
    assert all(llava_name(f"{module}.weight") in hub_shapes(config) for module in modules)


def test_the_11b_takes_adapters_of_its_shapes(tmp_path):
    """Of the short list of most adapters; no weight of the model is made."""
    spec = find_spec("llama3.2-11B")
    shapes = spec.family.shapes(spec.config)
    modules = [
        name.removesuffix(".weight")
        for name in shapes
        if name.endswith(("q_proj.weight", "v_proj.weight"))
    ]
    assert len(modules) == 160
    weights = {f"{m}.weight": torch.empty(shapes[f"{m}.weight"], device="meta") for m in modules}
    folder = write_adapter(tmp_path / "adapter", low_rank(weights, modules, rank=1), r=1)
    with open_adapters([(folder, 1.0)], shapes, spec.family.hub_name) as adapters:
        assert len(adapters.touched) == 160
    other = find_spec("llama3.2-90B")
    with pytest.raises(CheckpointError, match=r"\[4096, 4096\], and the model's is \[8192, 8192\]"):
        open_adapters([(folder, 1.0)], other.family.shapes(other.config), other.family.hub_name)


def test_little_memory_beside_the_weight(tmp_path, monkeypatch):
    """A head is merged by blocks of rows, whose result is that of the whole."""
    from mmchat.checkpoints import adapter as merging

    name = "language_model.lm_head"
    folder = write_adapter(tmp_path / "adapter", low_rank(WEIGHTS, [name]))
    weight = WEIGHTS[f"{name}.weight"]
    with open_for_mllama([(folder, 1.0)]) as adapters:
        at_once = adapters.merged(f"{name}.weight", weight, torch.bfloat16)
        monkeypatch.setattr(merging, "_BLOCK_NUMBERS", 7 * weight.shape[1])
        in_blocks = adapters.merged(f"{name}.weight", weight, torch.bfloat16)
    assert at_once.dtype == torch.bfloat16
    assert torch.equal(at_once, in_blocks)


def test_patterns_are_tried_in_their_order(tmp_path):
    q, v = MODULES[:2]
    tensors = low_rank(WEIGHTS, [q], rank=3) | low_rank(WEIGHTS, [v], rank=2)
    folder = write_adapter(
        tmp_path / "adapter",
        tensors,
        rank_pattern={"^language_model.*q_proj": 3, "v_proj": 2, "q_proj": 7},
        alpha_pattern={q: 6, "proj": 100},
    )
    with open_for_mllama([(folder, 1.0)]) as adapters:
        found = adapters.all[0].low_rank
        assert {name: (low.rank, low.scale) for name, low in found.items()} == {
            f"{q}.weight": (3, 2.0),
            f"{v}.weight": (2, 4.0),
        }
    assert CONFIG["lora_alpha"] == 8


@pytest.mark.parametrize(
    ("pattern", "module", "fits"),
    [
        ("a.*b.*c", "x.a.b.b.c", True),
        ("a.*b.*c", "x.a.c.b", False),
        (".*b.*.*b", "a.b.b", True),
        (".*b.*.*b", "a.b", False),
        ("a.*a", "a.a.a", True),
        ("^b.*c", "a.b.c", False),
        (r"a\..*\.c", "z.a.b.c", True),
        (".*", "a", True),
    ],
)
def test_patterns_fit_as_their_regular_expressions(pattern, module, fits):
    assert bool(adapter_config._compiled(pattern).match(module)) == fits
    assert bool(re.match(rf"(.*\.)?({pattern})$", module)) == fits


def test_a_pattern_of_many_stars_is_quick():
    """The time limit of all tests is what this one is about."""
    for text in (".*" * 16 + "x", ".*a" * 16 + "x"):
        assert not adapter_config._compiled(text).match("a." * 60)


def test_the_built_in_model_takes_one(tmp_path):
    weights = load_file(data_path("assets", "tiny", "model.safetensors"))
    names = [name.removesuffix(".weight") for name in weights if name.endswith("o_proj.weight")]
    folder = write_adapter(tmp_path / "adapter", low_rank(weights, names))
    assert load(folder).remarks[0].endswith(f"{len(names)} modules of rank 4")
    save_file({"x": torch.ones(1)}, folder / "adapter_model.safetensors")
    fails(CheckpointError, "the adapter was made for 'tiny'", partial(load, folder))
