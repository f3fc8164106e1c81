"""llama.cpp beside mmchat: the file that it is given, and its answers where it is installed."""

from __future__ import annotations

import json

import gguf
import pytest
import torch

from benchmarks import llama_cpp
from benchmarks.compare import main
from benchmarks.plan import parse
from benchmarks.shapes import RandomTensors, Shapes, shaped_spec
from mmchat.checkpoints.mapping import interleaved_to_halves
from mmchat.errors import MissingExtra

CPU = torch.device("cpu")
ASKED = ["--shapes", "tiny", "--vs", "llama.cpp", "--dtype", "bfloat16", "--device", "cpu"]
QUICK = ["--rounds", "2", "--threads", "1", "--context", "16", "--prompt-tokens", "24"]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    spec = shaped_spec(Shapes("tiny"), CPU)
    tensors = RandomTensors(spec, 0, torch.float32, CPU, keep=True)
    path = tmp_path_factory.mktemp("gguf") / "plain.gguf"
    llama_cpp.write_gguf(path, spec.config.text_config, tensors)
    reader = gguf.GGUFReader(path)
    return spec.config.text_config, tensors, {t.name: torch.tensor(t.data) for t in reader.tensors}


def test_the_file_holds_the_layers_that_text_passes(written):
    config, tensors, found = written
    assert len(found) == 4 + 9 * len(config.self_attention_layers)
    for number, layer in enumerate(config.self_attention_layers):
        ours = tensors.read(f"language_model.model.layers.{layer}.mlp.up_proj.weight")
        assert torch.equal(found[f"blk.{number}.ffn_up.weight"], ours)


def test_queries_and_keys_are_in_llama_cpps_order(written):
    config, tensors, found = written
    heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads}
    for letter, count in heads.items():
        theirs = found[f"blk.0.attn_{letter}.weight"]
        ours = tensors.read(f"language_model.model.layers.0.self_attn.{letter}_proj.weight")
        assert torch.equal(interleaved_to_halves(count)([theirs]), ours)
        assert not torch.equal(theirs, ours)


def test_without_the_library_its_command_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv(llama_cpp.FOLDER_VARIABLE, str(tmp_path))
    with pytest.raises(MissingExtra, match="npm install"):
        llama_cpp.version()


def is_installed() -> bool:
    try:
        return bool(llama_cpp.version())
    except MissingExtra:
        return False


@pytest.mark.slow
@pytest.mark.skipif(not is_installed(), reason=f"NOT TESTED: llama.cpp; {llama_cpp.INSTALL}")
def test_llama_cpp_says_the_same_on_the_same_weights(tmp_path):
    path = tmp_path / "found.json"
    measured = ["--quantize", "int8,int4", "--rows", "3", "--measure", "decode,prefill"]
    main([*ASKED, *QUICK, *measured, "-o", str(path)])
    found = json.loads(path.read_text())
    assert found["contestants"] == [
        "mmchat bfloat16", "llama.cpp BF16", "mmchat int8", "llama.cpp Q8_0", "mmchat int4",
        "llama.cpp Q4_0",
    ]  # fmt: skip
    assert [w["title"] for w in found["workloads"]] == [
        "a token after 16",
        "a token after 16, of 3 rows at once",
        "read 24 tokens",
    ]
    for workload in found["workloads"]:
        plain, eight, four = (
            workload["contestants"][f"llama.cpp {name}"]["agreement"]["relative_error"]
            for name in ("BF16", "Q8_0", "Q4_0")
        )
        assert plain < 0.02
        assert plain < eight < four < 0.6
        assert workload["contestants"]["mmchat int4"]["against"] == "llama.cpp Q4_0"


def test_its_rows_of_decoding_read_no_picture():
    plan, _ = parse([*ASKED, "--measure", "decode", "--vision", "1,4"])
    from benchmarks.compare import workloads

    assert {workload.tiles for workload in workloads(plan)} == {0}
