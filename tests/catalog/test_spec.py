import ast
import copy
import json
import random
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from mmchat.catalog import spec as spec_module
from mmchat.catalog.find import find_model, load_spec
from mmchat.catalog.known import data_path, find_spec, folder_on_disk, known_specs, params_file_for
from mmchat.catalog.source import ModelSource
from mmchat.checkpoints.hub_cache import cache_folder, cached_snapshot
from mmchat.cli.model_choice import alpha_rule
from mmchat.errors import CheckpointError, ParamsError
from mmchat.loading.options import LoadOptions
from mmchat.models.hub_config import CLIP_MEAN, CLIP_STD
from mmchat.models.mllama import config as mllama_config
from mmchat.strict_json import parse_json
from tests.checkpoints.hostile_files import write_pth
from tests.models.mllama.test_translate import META_11B, META_90B, hub_config

INSTRUCT = data_path("model_params", "Llama-3.2-11B-Vision-Instruct.json")
GOOD = json.loads(INSTRUCT.read_text())


@pytest.fixture(autouse=True)
def empty_hub_cache(tmp_path, monkeypatch):
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def write(folder, name, value):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def changed(key_path, value, remove=False):
    found = copy.deepcopy(GOOD)
    *parents, last = key_path.split(".")
    place = found
    for key in parents:
        place = place[key]
    if remove:
        del place[last]
    else:
        place[last] = value
    return found


def read_json_of(text):
    """A read_json that finds `text` in every file; opening thousands of files is slow."""
    return lambda path, where: parse_json(text.encode(), where)


def cached_model(tmp_path, repo, commit="0a1b2c3d4e", files=("model.safetensors",)):
    root = tmp_path / "cache/huggingface/hub" / f"models--{repo.replace('/', '--')}"
    write(root, "refs/main", commit)
    for name in files:
        write(root / "snapshots" / commit, name, "x")
    return root / "snapshots" / commit


# Our params files


def test_every_params_file_is_named_after_its_model_and_names_are_unique():
    folder = data_path("model_params")
    assert {f"{spec.name}.json" for spec in known_specs()} == {
        path.name for path in folder.iterdir()
    }
    assert known_specs()[0].name == "tiny"
    names = [n.lower() for p in known_specs() for n in (p.name, p.repo or "", *p.aliases) if n]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("name", "model", "tile", "chat_format"),
    [
        ("llama3.2-11B", "Llama-3.2-11B-Vision-Instruct", 560, "instruct"),
        ("LLAMA3.2-11b-base", "Llama-3.2-11B-Vision", 448, "base"),
        ("Llama-3.2-11B-Vision", "Llama-3.2-11B-Vision", 448, "base"),
        ("llama3.2-90b", "Llama-3.2-90B-Vision-Instruct", 560, "instruct"),
        ("llama3.2-90B-base", "Llama-3.2-90B-Vision", 560, "base"),
        ("meta-llama/llama-3.2-90b-vision", "Llama-3.2-90B-Vision", 560, "base"),
        ("meta-llama/Llama-Guard-3-11B-Vision", "Llama-Guard-3-11B-Vision", 560, "instruct"),
        ("llama3.2-vision", "Llama-3.2-11B-Vision-Instruct", 560, "instruct"),
        ("llama3.2-vision:latest", "Llama-3.2-11B-Vision-Instruct", 560, "instruct"),
        ("llama3.2-vision-instruct", "Llama-3.2-11B-Vision-Instruct", 560, "instruct"),
        ("llama3.2-vision:11b-instruct-q4_K_M", "Llama-3.2-11B-Vision-Instruct", 560, "instruct"),
        ("llama3.2:10.7b", "Llama-3.2-11B-Vision-Instruct", 560, "instruct"),
        ("llama3.2-vision:90b", "Llama-3.2-90B-Vision-Instruct", 560, "instruct"),
        ("Llama3.2-Vision:90B-instruct-fp16", "Llama-3.2-90B-Vision-Instruct", 560, "instruct"),
        ("Tiny", "tiny", 112, "instruct"),
    ],
)
def test_names_users_know(name, model, tile, chat_format):
    spec = find_spec(name)
    image_size = spec.family.describe(spec.config).image_size
    assert (spec.name, image_size, spec.chat_format) == (model, tile, chat_format)


def test_the_built_in_model_is_as_its_training_script_builds_it():
    source = (Path(__file__).parents[2] / "assets/tiny/trainee.py").read_text()
    tree = ast.parse(source)
    (function,) = (n for n in tree.body if getattr(n, "name", "") == "tiny_config")
    scope = dict(vars(mllama_config))
    scope["CLIP"] = mllama_config.ImageProcessorConfig(CLIP_MEAN, CLIP_STD, "white")
    exec(compile(ast.Module([function], []), "train.py", "exec"), scope)
    spec = find_spec("tiny")
    ranks = len(data_path("assets", "tiny", "tokenizer.model").read_text().splitlines())
    assert spec.config == scope["tiny_config"](ranks + 256)
    assert spec.generation.temperature == 0


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model_type", "mlama", "unknown model type 'mlama' (nearest: 'mllama')"),
        ("model_type", ["mllama"], "unknown model type"),
        ("parameters", 10, "10, but a model of these sizes has 10,670,220,835"),
        ("text_config.num_hidden_layers", 40.0, "expected an integer, found 40.0"),
        ("text_config.num_hidden_layers", True, "expected an integer, found true"),
        ("text_config.num_hidden_layers", 257, "257 is out of range; 2 to 256 is possible"),
        ("text_config.hidden_size", 10**9, "1000000000 is out of range"),
        ("text_config.num_key_value_heads", 7, "7 does not divide num_attention_heads = 32"),
        ("text_config.cross_attention_layers", [3, 40], "expected rising layer numbers from 0 to"),
        ("text_config.cross_attention_layers", [8, 3], "expected rising"),
        ("text_config.cross_attention_layers", [], "expected rising"),
        ("text_config.rope_scaling", 5, "expected an object, found 5"),
        ("vision_config.attention_heads", 15, "15 does not divide hidden_size = 1,280"),
        ("vision_config.patch_size", 15, "15 does not divide image_size = 560"),
        ("vision_config.num_channels", 4, "4 is out of range"),
        ("vision_config.intermediate_layers_indices", [3, 3], "expected rising"),
        ("image_processor.image_mean", [0.5], "expected a list of 3, found 1 entries"),
        ("image_processor.alpha", "black", "expected one of 'checkpoint', 'white', 'drop', found"),
        ("generation.temperature", 101, "101 is out of range"),
        ("name", "../x", "'../x' is not a possible name"),
        ("repo", "a/b/c", "'a/b/c' is not a possible repo"),
        ("packaged", "../x", "'../x' is not a possible packaged"),
        ("aliases", "a", "expected a list, found 'a'"),
    ],
)
def test_a_wrong_value_names_file_key_and_reason(tmp_path, key, value, message):
    path = write(tmp_path, "bad.json", changed(key, value))
    with pytest.raises(ParamsError) as caught:
        load_spec(path)
    assert str(caught.value).startswith(f"{path}: {key}: {message}")


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (changed("visionconfig", {}), "unknown key 'visionconfig' (nearest: 'vision_config')"),
        (
            changed("vision_config.image_sise", 560),
            "vision_config: unknown key 'image_sise' (nearest: 'image_size')",
        ),
        (
            changed("vision_config.image_size", 0, remove=True),
            "vision_config: missing key 'image_size'",
        ),
        (changed("chat_format", 0, remove=True), "missing key 'chat_format'"),
        (changed("text_config", 0, remove=True), "missing key 'text_config'"),
        (changed("model_type", 0, remove=True), "missing key 'model_type'"),
        (
            changed("text_config.rope_scaling.low_freq_factor", 4.0),
            "text_config.rope_scaling: low_freq_factor must be below",
        ),
        (changed("aliases", ["a b"]), "aliases[0]: 'a b' is no possible name"),
        (
            changed("image_processor.image_std", [0, 1, 1]),
            "image_processor.image_std[0]: 0 is out of range",
        ),
        (INSTRUCT.read_text().replace("1e-05", "NaN"), "number 'NaN' is not finite"),
        (INSTRUCT.read_text().replace("1e-05", "1e999"), "number '1e999' is not finite"),
        (INSTRUCT.read_text().replace('"name"', '"name": "x", "name"'), "key 'name' appears twice"),
        ("[]", "expected an object, found a list"),
        ("{}", "missing key 'model_type'"),
    ],
)
def test_a_wrong_file_names_file_place_and_reason(tmp_path, found, message):
    path = write(tmp_path, "bad.json", found)
    with pytest.raises(ParamsError) as caught:
        load_spec(path)
    assert str(caught.value).startswith(f"{path}: {message}")


@pytest.mark.slow
def test_mutated_files_of_all_kinds_raise_nothing_but_our_errors(tmp_path, monkeypatch):
    rng = random.Random(4)
    hub = hub_config(find_spec("llama3.2-11B").config)
    seeds = [json.dumps(value) for value in (GOOD, hub, META_90B, {"model": META_11B})]
    new = [
        "",
        "null",
        "[]",
        "{}",
        "-1",
        "1e999",
        "NaN",
        "true",
        '"x"',
        "0",
        "9" * 40,
        ",",
        '"',
        "[",
        "1.5",
    ]
    values = [None, [], {}, -1, 0, True, "x", 1.5, 10**17, [1], [[1]], {"dim": 1}, "mllama"]

    def places(value):
        if isinstance(value, dict | list):
            keys = value if isinstance(value, dict) else range(len(value))
            for key in keys:
                yield value, key
                yield from places(value[key])

    loaded = 0
    path = tmp_path / "config.json"
    for _ in range(2_500):
        text = rng.choice(seeds)
        if rng.random() < 0.5:
            at = rng.randrange(len(text))
            text = text[:at] + rng.choice(new) + text[at + rng.choice([0, 1, 1, 5, 40]) :]
        else:
            value = json.loads(text)
            for _ in range(rng.randrange(1, 3)):
                parent, key = rng.choice(list(places(value)))
                parent[key] = copy.deepcopy(rng.choice(values))
            text = json.dumps(value)
        monkeypatch.setattr(spec_module, "read_json", read_json_of(text))
        try:
            spec = load_spec(path)
        except ParamsError as error:
            assert "\n" not in str(error)  # noqa: PT017
        else:
            loaded += 1
            assert 0 < spec.parameters < 10**15
    assert 10 < loaded < 1_500


# Finding models


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("llama3.2-11", ParamsError, "no model 'llama3.2-11' (nearest: 'llama3.2-11B', "),
        ("xyz", ParamsError, "no model 'xyz' ('mmchat list' shows all, or give a path)"),
        ("nobody/nothing", ParamsError, "no model 'nobody/nothing'"),
        (
            "What is it?",
            ParamsError,
            "'What is it?' is not a model; to ask this",
        ),
        ("why?", ParamsError, "'why?' is not a model; to ask this, put it after --prompt"),
        ("./nothing", CheckpointError, "'./nothing': no such file or folder"),
        ("weights.pth", CheckpointError, "'weights.pth': no such file or folder"),
        ("x" * 100_000, ParamsError, "no model 'xxx"),
        ("a\0b", ParamsError, "no model 'a\\x00b'"),
        ("~nobody-of-that-name/x", CheckpointError, "'~nobody-of-that-name/x': no such file"),
    ],
)
def test_an_unknown_model_gets_a_hint(name, error, message):
    with pytest.raises(error) as caught:
        find_model(name)
    assert str(caught.value).startswith(message)
    assert len(str(caught.value)) < 400


def test_a_known_model_that_is_not_here_says_how_to_get_it(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE")
    with pytest.raises(CheckpointError) as caught:
        find_model("llama3.2-11B")
    assert "Llama-3.2-11B-Vision-Instruct is not on this machine" in str(caught.value)
    assert "mmchat download Llama-3.2-11B-Vision-Instruct" in str(caught.value)
    source = find_model("llama3.2-11B", checkpoint_required=False)
    assert source.checkpoint is source.tokenizer is None
    assert not any(folder_on_disk(spec) for spec in known_specs() if spec.repo)


@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "MMCHAT_OFFLINE"])
def test_offline_a_model_that_is_not_here_is_not_offered_for_download(monkeypatch, variable):
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv(variable, "1")
    with pytest.raises(CheckpointError) as caught:
        find_model("llama3.2-11B")
    assert str(caught.value) == (
        "Llama-3.2-11B-Vision-Instruct is not on this machine, and this run is offline; "
        "copy its files here and give their folder as the model"
    )


@pytest.mark.parametrize("name", ["llama3.2-11B", "meta-llama/Llama-3.2-11B-Vision-Instruct"])
def test_a_known_model_is_found_in_the_hub_cache(tmp_path, name):
    files = ("model-00001-of-00005.safetensors", "original/tokenizer.model", "config.json")
    folder = cached_model(tmp_path, "meta-llama/Llama-3.2-11B-Vision-Instruct", files=files)
    source = find_model(name)
    assert source.spec == find_spec("llama3.2-11B")
    assert source.checkpoint == folder
    assert source.tokenizer == folder / "original/tokenizer.model"
    assert folder_on_disk(source.spec) == folder


def test_a_cached_repository_of_somebody_else_is_read_by_its_config(tmp_path):
    folder = cached_model(tmp_path, "unsloth/Llama-3.2-11B-Vision")
    write(folder, "config.json", hub_config(find_spec("llama3.2-11B-base").config))
    source = find_model("unsloth/Llama-3.2-11B-Vision")
    assert source.checkpoint == folder
    assert source.spec.config == find_spec("llama3.2-11B-base").config


def test_the_hub_cache_is_where_the_environment_says(tmp_path, monkeypatch):
    assert cache_folder() == tmp_path / "cache/huggingface/hub"
    monkeypatch.setenv("HF_HOME", "/home_of_hf")
    assert cache_folder() == Path("/home_of_hf/hub")
    monkeypatch.setenv("HF_HUB_CACHE", "/hub_cache")
    assert cache_folder() == Path("/hub_cache")
    monkeypatch.delenv("HF_HUB_CACHE")
    monkeypatch.delenv("HF_HOME")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache/huggingface/hub"


def test_a_damaged_hub_cache_is_passed_over(tmp_path):
    folder = cached_model(tmp_path, "a/b", commit="abcdef0123")
    refs = folder.parents[1] / "refs" / "main"
    for content in ("../../../../etc", "", "deadbeef00", "x" * 10_000):
        refs.write_text(content)
        assert cached_snapshot("a/b") == folder
    shutil.rmtree(folder)
    assert cached_snapshot("a/b") is None
    for name in ("../b", "a/../b", "a", "a/b/c", "a/..", "/a"):
        assert cached_snapshot(name) is None


@pytest.mark.parametrize(
    ("files", "chat_format"),
    [
        ({}, "base"),
        ({"chat_template.json": "{}"}, "instruct"),
        ({"chat_template.jinja": "{{ evil }}"}, "instruct"),
        ({"tokenizer_config.json": {"chat_template": "{{ x }}"}}, "instruct"),
        ({"generation_config.json": {"eos_token_id": [1, 2]}}, "instruct"),
        ({"generation_config.json": {"eos_token_id": 1}}, "base"),
    ],
)
def test_a_hub_folder_is_translated_and_chat_is_told_from_base(tmp_path, files, chat_format):
    config = hub_config(find_spec("llama3.2-11B").config)
    config["text_config"]["eos_token_id"] = 128001
    write(tmp_path, "config.json", config)
    for name, value in {**files, "model.safetensors": "", "tokenizer.json": ""}.items():
        write(tmp_path, name, value)
    for path in (tmp_path, tmp_path / "model.safetensors"):
        source = find_model(path)
        assert source.spec.config == find_spec("llama3.2-11B").config
        assert source.spec.chat_format == chat_format
        assert source.spec.parameters == 10_670_220_835
        assert source.checkpoint == path
        assert source.tokenizer == tmp_path / "tokenizer.json"


def test_the_hubs_generation_config_gives_the_sampling_defaults(tmp_path):
    write(tmp_path, "config.json", hub_config(find_spec("tiny").config))
    write(tmp_path, "generation_config.json", {"temperature": 0.3, "top_p": None})
    generation = load_spec(tmp_path / "config.json").generation
    assert (generation.temperature, generation.top_p) == (0.3, 0.9)
    write(tmp_path, "generation_config.json", {"temperature": "hot"})
    with pytest.raises(ParamsError, match=r"generation_config.json: temperature: expected"):
        load_spec(tmp_path / "config.json")


@pytest.mark.parametrize(
    ("folder", "meta", "chat_format", "notices"),
    [
        ("Llama3.2-11B-Vision-Instruct", META_11B, "instruct", 0),
        ("Llama3.2-90B-Vision", META_90B, "base", 0),
        ("Llama-3.2-90B-Vision-Instruct/original", META_90B, "instruct", 0),
        ("weights", META_11B | {"vision_chunk_size": 448}, "base", 0),
        ("weights", META_90B, "instruct", 1),
    ],
)
def test_a_folder_of_meta_is_translated(tmp_path, folder, meta, chat_format, notices):
    write(tmp_path / folder, "params.json", meta)
    weights = write(tmp_path / folder, "consolidated.00.pth", "")
    write(tmp_path / folder, "tokenizer.model", "")
    source = find_model(weights)
    assert source.spec.chat_format == chat_format
    assert len(source.spec.notices) == notices
    assert source.tokenizer == tmp_path / folder / "tokenizer.model"
    assert source.spec.config == find_model(tmp_path / folder).spec.config


def test_the_form_of_the_predecessor_works_as_documented(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "consolidated.00.pth", "")
    write(tmp_path, "tokenizer.model", "")
    source = find_model(
        checkpoint_path="consolidated.00.pth",
        tokenizer_path="tokenizer.model",
        params_path="model_params/Llama-3.2-11B-Vision-Instruct.json",
    )
    assert source.spec == find_spec("llama3.2-11B")
    assert source.checkpoint == Path("consolidated.00.pth")
    assert source.tokenizer == Path("tokenizer.model")
    write(tmp_path, "model_params/Llama-3.2-11B-Vision-Instruct.json", "{}")
    with pytest.raises(ParamsError, match="missing key"):  # the user's own file comes first
        find_model(params_path="model_params/Llama-3.2-11B-Vision-Instruct.json")


def test_paths_overrule_what_the_name_leads_to(tmp_path):
    folder = cached_model(tmp_path, "meta-llama/Llama-3.2-11B-Vision-Instruct")
    mine = write(tmp_path, "mine/model.safetensors", "")
    tokenizer = write(tmp_path, "mine/tokenizer.json", "")
    source = find_model("llama3.2-11B", checkpoint_path=mine)
    assert (source.checkpoint, source.tokenizer) == (mine, tokenizer)
    assert source.spec == find_spec("llama3.2-11B")
    assert find_model("llama3.2-11B", params_path=INSTRUCT).checkpoint == folder
    assert find_model(mine.parent, params_path=INSTRUCT).checkpoint == mine.parent
    both = find_model(mine.parent, params_path=INSTRUCT, checkpoint_path=folder)
    assert both.checkpoint == folder


@pytest.mark.parametrize("given", ["weights", "weights/model.safetensors"])
def test_a_missing_tokenizer_names_the_folder_that_it_was_looked_for_in(
    tmp_path, monkeypatch, given
):
    write(tmp_path / "weights", "model.safetensors", "")
    monkeypatch.chdir(tmp_path)
    source = find_model(checkpoint_path=given, params_path=data_path("model_params", "tiny.json"))
    with pytest.raises(CheckpointError, match=r"qwen\.tiktoken in 'weights'; copy .*, or give it"):
        source.tokenizer_file()


@pytest.mark.parametrize("option", ["checkpoint_path", "tokenizer_path"])
def test_a_path_that_is_not_there_names_its_option(option):
    with pytest.raises(CheckpointError, match=f"--{option.replace('_', '-')} 'none': no such file"):
        find_model("tiny", **{option: "none"})


def test_a_params_path_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ParamsError, match=r"none.json: no such file"):
        find_model("tiny", params_path=tmp_path / "none.json")


def test_a_folder_without_config_asks_for_params(tmp_path):
    with pytest.raises(ParamsError, match=r"neither config.json nor params.json there; name the"):
        find_model(tmp_path)
    (tmp_path / "Dog.JPG").touch()
    with pytest.raises(ParamsError, match=r"but pictures; to ask about each: mmchat batch '"):
        find_model(tmp_path)


def test_no_name_and_no_path_mean_the_built_in_model():
    source = find_model(checkpoint_required=False)
    assert source.spec.name == "tiny"
    assert find_model(data_path("assets", "tiny")).spec == source.spec


def test_the_params_file_that_fits_a_tile_size_is_named():
    base, instruct = find_spec("llama3.2-11B-base"), find_spec("llama3.2-11B")
    large = find_spec("llama3.2-90B")
    assert params_file_for(base.config, instruct) == "Llama-3.2-11B-Vision.json"
    assert params_file_for(instruct.config, base) == "Llama-3.2-11B-Vision-Instruct.json"
    vision = replace(large.config.vision_config, image_size=448)
    assert params_file_for(replace(large.config, vision_config=vision), large) is None
    assert params_file_for(large.config, large).endswith("90B-Vision-Instruct.json")


@pytest.mark.process
def test_finding_a_model_imports_nothing_heavy():
    code = (
        "import sys; from mmchat.catalog.known import *; known_specs(); "
        "import mmchat.models.mllama.prompt, mmchat.tokenizers; "
        "print({'torch', 'numpy', 'PIL', 'tiktoken', 'tokenizers'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_transparent_pictures_follow_the_format_that_the_model_is_loaded_in(tmp_path):
    """A .safetensors beside Meta's weights, such as an adapter, changes nothing."""
    spec = next(p for p in known_specs() if p.config.image_processor.alpha == "checkpoint")
    source = ModelSource(spec, tmp_path, None)
    assert source.format == "hf"  # no weights yet
    (tmp_path / "adapter.safetensors").touch()
    write_pth(tmp_path / "consolidated.00.pth")
    assert source.format == "meta"
    assert alpha_rule(LoadOptions(), source) == "drop"
    assert alpha_rule(LoadOptions(alpha="white"), source) == "white"
    (tmp_path / "model.safetensors").touch()
    assert alpha_rule(LoadOptions(), source) == "white"
    assert ModelSource(spec, None, None).format == "hf"
