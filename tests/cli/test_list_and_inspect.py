import json
import re
import struct
from dataclasses import replace

import pytest

from mmchat.catalog.find import find_model
from mmchat.catalog.known import known_specs
from mmchat.cli import console
from mmchat.cli.inspect import _facts
from tests.cli.fake_loading import known_spec


def test_list_piped_is_plain_columns(run_real):
    done = run_real("list")
    header, *rows = [line.split("\t") for line in done.stdout.splitlines()]
    assert header == ["NAME", "KIND", "PARAMETERS", "IMAGE", "ON DISK", "FORMAT", "ALIASES"]
    by_name = {row[0]: row for row in rows}
    assert by_name["Llama-3.2-11B-Vision"][1:5] == ["base", "10.6 B", "448 px", "no"]
    assert by_name["Llama-3.2-90B-Vision-Instruct"][1:5] == ["instruct", "88.6 B", "560 px", "no"]
    assert (done.stderr, done.exit_code) == ("", 0)


@pytest.mark.parametrize("columns", ["60", "80", "200"])
def test_list_on_a_terminal_is_a_table_that_cuts_no_name(run_real, monkeypatch, columns):
    monkeypatch.setattr(console, "is_terminal", lambda stream: True)
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setenv("TERM", "xterm")
    shown = re.sub(r"\x1b\[\d*m", "", run_real("list").stdout)
    titles = shown.split()[:7]
    assert titles == ["NAME", "KIND", "PARAMETERS", "IMAGE", "ON", "DISK", "FORMAT"]
    first, *rest = shown.splitlines()
    start = first.index("KIND")
    rows = [line for line in rest if not line.startswith("  ")]
    assert all(line[start:].startswith(("base", "instruct")) for line in rows)
    assert max(map(len, (first, *rest))) <= int(columns)
    words = {word.rstrip(",") for line in rest for word in line.split()}
    assert {name for spec in known_specs() for name in (spec.name, *spec.aliases)} <= words


def test_what_cannot_be_read_of_one_model_hides_no_other(run_real, monkeypatch):
    bad = "meta-llama/Llama-3.2-11B-Vision"

    def cached(repo):
        if repo == bad:
            raise OSError(5, "Input/output error", "config.json")

    monkeypatch.setattr("mmchat.hub.holdings.cached_snapshot", cached)
    found = {model["repo"]: model for model in json.loads(run_real("list", "--json").stdout)}
    assert (found[bad]["state"], found[bad]["bytes"]) == ("unreadable", None)
    assert {one["state"] for repo, one in found.items() if repo and repo != bad} == {"absent"}
    assert "unreadable" in run_real("list").stdout


def test_list_as_json_has_every_model_once(run_real):
    found = json.loads(run_real("list", "--json").stdout)
    names = [model["name"] for model in found]
    assert len(set(names)) == len(names) >= 5
    guard = next(model for model in found if model["name"] == "Llama-Guard-3-11B-Vision")
    assert guard["parameters"] == 10_670_220_835
    assert guard["repo"] == "meta-llama/Llama-Guard-3-11B-Vision"
    assert (guard["path"], guard["bytes"]) == (None, None)


@pytest.mark.parametrize(
    ("name", "parameters", "vision"),
    [
        ("llama3.2-11B-base", 10_642_941_475, 836_288_019),
        ("llama3.2-11B", 10_670_220_835, 863_567_379),
        ("llama3.2-90B", 88_593_355_323, 863_567_379),
    ],
)
def test_inspect_counts_the_parameters_of_each_part(run_real, name, parameters, vision):
    found = json.loads(run_real("inspect", name, "--json").stdout)
    assert found["parameters"] == parameters
    assert sum(found["parameters_by_part"].values()) == parameters
    assert found["parameters_by_part"]["vision encoder"] == vision
    assert found["weight_bytes"]["bfloat16"] == 2 * parameters


def test_inspect_estimates_cache_and_quantised_weights(run_real):
    found = json.loads(run_real("inspect", "llama3.2-11B", "--json").stdout)
    # 32 self-attention layers, 8 key/value heads of 128, keys and values, 2 bytes
    assert found["cache_bytes_per_token"] == 32 * 8 * 128 * 2 * 2
    # 8 cross-attention layers, 1,601 tokens a tile
    assert found["cache_bytes_per_tile"] == 8 * 8 * 128 * 2 * 2 * 1601
    weights = found["weight_bytes"]
    assert weights["int4"] < weights["int8"] < weights["bfloat16"]
    assert weights["int8"] > found["parameters"]  # embeddings and tables stay 16-bit


def test_inspect_prints_aligned_facts(run_real):
    lines = run_real("inspect", "llama3.2-11B").stdout.splitlines()
    assert lines[0] == (
        "model                     Llama-3.2-11B-Vision-Instruct (mllama, instruct)"
    )
    assert "parameters                10,670,220,835 (10.7 B)" in lines
    assert lines[-1] == "checkpoint                not on this machine"


def write_safetensors(path, tensors):
    """A file with zeros in the tensors given as name -> (dtype, shape, bytes)."""
    header, offset = {}, 0
    for name, (dtype, shape, length) in tensors.items():
        offsets = [offset, offset + length]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        offset += length
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(offset))


def test_inspect_refuses_what_loading_refuses(run_real, tmp_path):
    path = tmp_path / "model.safetensors"
    write_safetensors(path, {"a": ("BF16", [3, 4], 24), "b": ("F32", [5], 20)})
    params = known_spec("llama3.2-11B").source
    done = run_real("inspect", str(path), "--params-path", str(params), "--json")
    assert (done.stdout, done.exit_code) == ("", 3)
    assert "does not fit the model" in done.stderr
    assert "2 unexpected: 'a' in 'model.safetensors'" in done.stderr


def test_inspect_of_a_damaged_file_is_exit_code_3(run_real, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"<html>404</html>")
    params = known_spec("llama3.2-11B").source
    done = run_real("inspect", str(path), "--params-path", str(params))
    assert (done.stdout, done.exit_code, done.stderr.count("\n")) == ("", 3, 1)
    assert "model.safetensors" in done.stderr


def test_inspect_of_an_unknown_name_is_exit_code_3(run_real):
    assert run_real("inspect", "llama9").exit_code == 3


def test_inspect_counts_no_vision_of_a_language_model_alone():
    spec = find_model("llama3.2-11B", checkpoint_required=False).spec
    words = spec.family.describe(spec.config)
    found = _facts(replace(spec, text_only=True), words)
    assert "vision encoder" not in found["parameters_by_part"]
    assert found["weight_bytes"]["bfloat16"] == 2 * found["parameters"] < 20e9
