import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mmchat.catalog.find import find_model
from mmchat.checkpoints.checkpoint import INDEX_NAME, open_checkpoint
from mmchat.errors import CheckpointError
from tests.checkpoints.hostile_files import small_tensors, write_pth, write_safetensors


def refusal(path: Path, **options: object) -> str:
    """The message with which `path` is refused."""
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path, **options)  # type: ignore[arg-type]
    message = str(caught.value)
    assert message.isprintable()
    return message


def shard_name(number: int, total: int = 3) -> str:
    return f"model-{number:05d}-of-{total:05d}.safetensors"


def write_sharded(folder: Path) -> dict[str, str]:
    """Three shards and their index; returns the weight map."""
    weight_map: dict[str, str] = {}
    groups = [["half", "ids"], ["wide.weight"], ["gate", "patch.weight"]]
    for number, names in enumerate(groups, start=1):
        tensors = {name: small_tensors()[name] for name in names}
        write_safetensors(folder / shard_name(number), tensors)
        weight_map |= dict.fromkeys(names, shard_name(number))
    write_index(folder, weight_map)
    return weight_map


def write_index(folder: Path, weight_map: object) -> None:
    content = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / INDEX_NAME).write_text(json.dumps(content))


def assert_reads(path: Path, expected: dict[str, torch.Tensor], **options: object) -> None:
    with open_checkpoint(path, **options) as checkpoint:  # type: ignore[arg-type]
        assert checkpoint.entries.keys() == expected.keys()
        for name, tensor in expected.items():
            assert checkpoint.entries[name].shape == tuple(tensor.shape)
            assert torch.equal(checkpoint.read(name), tensor)


# Which files of a folder


def test_a_sharded_checkpoint_is_read_by_folder_index_or_shard(tmp_path):
    write_sharded(tmp_path)
    for path in (tmp_path, tmp_path / INDEX_NAME, tmp_path / shard_name(2)):
        assert_reads(path, small_tensors())
    with open_checkpoint(str(tmp_path)) as checkpoint:
        assert [file.name for file in checkpoint.files] == [shard_name(i) for i in (1, 2, 3)]
        sizes = [file.stat().st_size for file in tmp_path.glob("*.safetensors")]
        assert checkpoint.total_bytes == sum(sizes)


def test_the_index_comes_before_the_single_file_and_that_before_meta(tmp_path):
    marks = {name: {name: torch.ones(1)} for name in ("meta", "single", "index", "original")}
    (tmp_path / "original").mkdir()
    for path, name in (
        (tmp_path / "original/consolidated.00.pth", "original"),
        (tmp_path / "consolidated.pth", "meta"),
    ):
        write_pth(path, marks[name])
        assert_reads(tmp_path, marks[name])
    write_safetensors(tmp_path / "model.safetensors", marks["single"])
    assert_reads(tmp_path, marks["single"])
    write_safetensors(tmp_path / shard_name(1, 1), marks["index"])
    write_index(tmp_path, {"index": shard_name(1, 1)})
    assert_reads(tmp_path, marks["index"])


def test_the_format_is_told_as_opening_finds_it(tmp_path):
    """Other files beside the weights, such as adapters, say nothing about their format."""
    one = {"one": torch.ones(1)}
    for name in ("adapter.safetensors", "training.pth"):
        (write_pth if name.endswith("pth") else write_safetensors)(tmp_path / name, one)
    steps = (
        (lambda: write_pth(tmp_path / "consolidated.00.pth", one), "meta"),
        (lambda: write_safetensors(tmp_path / "model.safetensors", one), "hf"),
    )
    for add, expected in steps:
        add()
        with open_checkpoint(tmp_path) as checkpoint:
            assert checkpoint.format == expected
    with open_checkpoint(tmp_path / "consolidated.00.pth") as checkpoint:
        assert checkpoint.format == "meta"
    with pytest.raises(CheckpointError, match="no such file"):
        open_checkpoint(tmp_path / "none.pth")


def test_any_single_file_that_is_named_is_read(tmp_path):
    assert_reads(write_safetensors(tmp_path / "other.safetensors"), small_tensors())
    assert_reads(write_pth(tmp_path / "other.pth"), small_tensors())


def test_pickles_are_refused_by_name(tmp_path):
    write_pth(tmp_path / "model.pkl")
    assert "may run code" in refusal(tmp_path / "model.pkl")
    assert "holds 'model.pkl'" in refusal(tmp_path)


@pytest.mark.parametrize("name", ["other.bin", "model.ckpt", "model.pt", "weights.pth"])
def test_zips_of_tensors_are_read_whatever_their_ending(tmp_path, name):
    write_pth(tmp_path / name)
    with open_checkpoint(tmp_path / name) as checkpoint:
        assert set(checkpoint.entries) == set(small_tensors())
    assert f"if {name!r} holds the weights, give --checkpoint-path" in refusal(tmp_path)
    torch.save({"model": small_tensors(), "step": 5}, tmp_path / name)
    assert "is not a tensor" in refusal(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "tensor", "format"),
    [
        ("consolidated.00.pth", "language_model.model.embed_tokens.weight", "hf"),
        ("pytorch_model.bin", "text_model.tok_embeddings.weight", "meta"),
        ("epoch_0.pt", "text_model.tok_embeddings.weight", "meta"),
        ("model.pt", "_orig_mod.module.base_model.model.model.embed_tokens.weight", "hf"),
    ],
)
def test_names_tell_the_format_and_not_the_ending(tmp_path, name, tensor, format):
    write_pth(tmp_path / name, {tensor: torch.ones(2, 2)})
    with open_checkpoint(tmp_path / name) as checkpoint:
        assert checkpoint.format == format


def test_wrappers_in_front_of_every_name_are_dropped(tmp_path):
    for name in ("module.base_model.model.", "base_model.model.", "base_model.model._orig_mod."):
        write_safetensors(
            tmp_path / "model.safetensors", {name + "a": torch.ones(1), name + "b": torch.ones(2)}
        )
        with open_checkpoint(tmp_path) as checkpoint:
            assert set(checkpoint.entries) == {"a", "b"}


def test_a_wrong_path_is_named_with_the_nearest(tmp_path):
    write_safetensors(tmp_path / "model.safetensors")
    message = refusal(tmp_path / "modle.safetensors")
    assert "no such file" in message
    assert "'model.safetensors'" in message
    assert "no such file" in refusal(tmp_path / "nowhere/model.safetensors")
    assert r"a\x00b" in refusal(Path("a\0b.safetensors"))


def test_a_folder_without_weights_says_what_it_holds(tmp_path):
    assert "is empty; needs model.safetensors" in refusal(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert "holds 'config.json'; needs" in refusal(tmp_path)
    write_safetensors(tmp_path / shard_name(1))
    assert f"no {INDEX_NAME}" in refusal(tmp_path)
    (tmp_path / "model.onnx").write_bytes(b"\x08\x07")
    assert "is of ONNX, which mmchat does not read" in refusal(tmp_path / "model.onnx")
    (tmp_path / "model.xyz").write_bytes(b"\x08\x07")
    assert "mmchat reads" in refusal(tmp_path / "model.xyz")


@pytest.mark.parametrize(
    ("names", "kind", "step"),
    [
        (["q4k.uqff", "residual.safetensors"], "UQFF of mistral.rs", "--quantize int4"),
        (["__0_0.distcp", ".metadata"], "DCP", "dcp_to_torch"),
        (["global_step5", "latest"], "DeepSpeed", "zero_to_fp32.py"),
        (["checkpoint-500", "runs"], "the output of a training", "name one of the folders in it"),
        (["model.onnx", "model.onnx_data"], "ONNX", "--quantize int4"),
        (["StatefulLlama.mlpackage"], "Core ML", "--quantize int4"),
        (["qmodel.pt"], "HQQ", "--quantize int4"),
        (["output.safetensors"], "exl2", "--quantize int4"),
        (["flax_model.msgpack"], "Flax", "--quantize int4"),
    ],
)
@pytest.mark.parametrize("has_config", [False, True])
def test_what_others_read_is_named_with_the_next_step(tmp_path, names, kind, step, has_config):
    for name in names:
        (tmp_path / name).touch()
    if has_config:
        (tmp_path / "config.json").write_text("{}")
        message = refusal(tmp_path)
    else:
        with pytest.raises(CheckpointError) as caught:
            find_model(tmp_path)
        message = str(caught.value)
    assert kind in message
    assert step in message
    assert "neither config.json" not in message


def test_control_characters_of_a_path_are_escaped(tmp_path):
    assert r"\x1b]0;t\x07" in refusal(tmp_path / "\x1b]0;t\x07.safetensors")


# The index


BAD_NAMES = ["../up.safetensors", "/etc/passwd.safetensors", "..\\up.safetensors",
             "C:\\a.safetensors", "a/b.safetensors", "model.bin", "", ".safetensors\n",
             "x" * 130 + ".safetensors",
             "weights.safetensors\0", "é.safetensors", 3, None, ["a.safetensors"]]  # fmt: skip


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_shard_name_that_is_no_plain_name_is_refused(tmp_path, name):
    weight_map = write_sharded(tmp_path)
    write_safetensors(tmp_path.parent / "up.safetensors")
    write_index(tmp_path, weight_map | {"half": name})
    message = refusal(tmp_path)
    assert "'half' is said to be in" in message
    assert "no plain name" in message


def test_missing_shards_are_named(tmp_path):
    write_sharded(tmp_path)
    (tmp_path / shard_name(1)).unlink()
    assert f"1 of 3 shards are missing: '{shard_name(1)}'" in refusal(tmp_path)
    (tmp_path / shard_name(3)).unlink()
    assert f"2 of 3 shards are missing: '{shard_name(1)}', '{shard_name(3)}'" in refusal(tmp_path)


def test_a_truncated_shard_is_named_with_its_tensor_and_sizes(tmp_path):
    write_sharded(tmp_path)
    path = tmp_path / shard_name(2)
    size = path.stat().st_size
    os.truncate(path, size - 7)
    message = refusal(tmp_path)
    assert f"{shard_name(2)}': is cut off in tensor 'wide.weight'" in message
    assert f"{size - 7:,} bytes of {size:,}" in message


def test_an_index_that_does_not_fit_its_shards_is_refused(tmp_path):
    weight_map = write_sharded(tmp_path)
    write_index(tmp_path, weight_map | {"half": shard_name(2)})
    assert f"'half' is not in '{shard_name(2)}'" in refusal(tmp_path)
    write_index(tmp_path, weight_map | {"other": shard_name(2)})
    assert f"'other' is not in '{shard_name(2)}'" in refusal(tmp_path)
    write_index(tmp_path, weight_map)
    write_safetensors(
        tmp_path / shard_name(2), {"wide.weight": torch.ones(1), "half": torch.ones(1)}
    )
    assert f"'half' is also in '{shard_name(1)}'" in refusal(tmp_path)


BAD_INDEXES = {
    "no weight_map": (b'{"metadata": {}}', "no weight_map"),
    "an empty weight_map": (b'{"weight_map": {}}', "no weight_map"),
    "a list": (b"[1]", "no weight_map"),
    "a string": (b'{"weight_map": "model.safetensors"}', "no weight_map"),
    "duplicate keys": (b'{"weight_map": {"a": "b.safetensors", "a": "c.safetensors"}}', "twice"),
    "not JSON": (b'{"weight_map": ', "not valid JSON"),
    "a web page": (b"<!DOCTYPE html><html>", "web page"),
    "an LFS pointer": (b"version https://git-lfs.github.com/spec/v1\n", "LFS"),
    "empty": (b"", "empty"),
    "too big": (b" " * (16 * 2**20 + 1), "at most"),
    "deep": (b'{"a":' * 50_000, "nested"),
}


@pytest.mark.parametrize("kind", BAD_INDEXES)
def test_a_bad_index_is_refused(tmp_path, kind):
    content, expected = BAD_INDEXES[kind]
    (tmp_path / INDEX_NAME).write_bytes(content)
    message = refusal(tmp_path)
    assert INDEX_NAME in message
    assert expected in message


def test_a_fifo_for_an_index_or_shard_does_not_hang(tmp_path):
    write_sharded(tmp_path)
    (tmp_path / shard_name(3)).unlink()
    os.mkfifo(tmp_path / shard_name(3))
    assert "not a regular file" in refusal(tmp_path)
    (tmp_path / INDEX_NAME).unlink()
    os.mkfifo(tmp_path / INDEX_NAME)
    assert "not a regular file" in refusal(tmp_path)


# Links


def test_links_into_a_hub_cache_are_followed(tmp_path):
    blobs = tmp_path / "hub/models--org--name/blobs"
    snapshot = tmp_path / "hub/models--org--name/snapshots/0123abcd"
    blobs.mkdir(parents=True)
    (snapshot / "original").mkdir(parents=True)
    write_safetensors(blobs / "sha1")
    (snapshot / "model.safetensors").symlink_to("../../blobs/sha1")
    assert_reads(snapshot, small_tensors())
    assert_reads(snapshot / "model.safetensors", small_tensors())
    write_pth(blobs / "sha2")
    (snapshot / "original/consolidated.00.pth").symlink_to("../../../blobs/sha2")
    assert_reads(snapshot / "original", small_tensors())


@pytest.mark.parametrize("kind", ["single", "index", "shard", "meta"])
def test_links_out_of_the_folder_are_refused(tmp_path, kind):
    folder, outside = tmp_path / "model", tmp_path / "outside"
    folder.mkdir()
    outside.mkdir()
    write_sharded(folder)
    write_sharded(outside)
    name = {"single": "model.safetensors", "index": INDEX_NAME, "shard": shard_name(2)}.get(
        kind, "consolidated.00.pth"
    )
    if kind in ("single", "meta"):
        (folder / INDEX_NAME).unlink()
        (write_safetensors if kind == "single" else write_pth)(outside / name)
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(outside / name)
    message = refusal(folder)
    assert "outside the model's folder" in message
    assert repr(str(folder / name)) in message


def test_links_inside_the_folder_and_to_the_folder_are_followed(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    write_safetensors(folder / "weights")
    (folder / "model.safetensors").symlink_to("weights")
    (tmp_path / "link").symlink_to(folder)
    assert_reads(tmp_path / "link", small_tensors())


def test_broken_and_circular_links_are_refused(tmp_path):
    (tmp_path / "model.safetensors").symlink_to("nothing")
    assert "No such file" in refusal(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors").symlink_to("model.safetensors")
    assert re.search("leads nowhere|levels of symbolic links", refusal(tmp_path))  # Python 3.13


# Meta's shards


def axes(name: str) -> int | None:
    return {"rows": 0, "columns": 1, "bias": 0}.get(name)


def write_ranks(folder: Path, count: int) -> dict[str, torch.Tensor]:
    whole = {
        "rows": torch.randn(3 * count, 5),
        "columns": torch.randn(7, 2 * count),
        "bias": torch.randn(count).to(torch.bfloat16),
        "norm": torch.randn(11),
        "gate": torch.randn([]),
    }
    for rank in range(count):
        parts = {
            name: tensor if axes(name) is None else tensor.chunk(count, axes(name))[rank].clone()
            for name, tensor in whole.items()
        }
        write_pth(folder / f"consolidated.{rank:02d}.pth", parts)
    return whole


@pytest.mark.parametrize("count", [2, 8, 11])
def test_shards_are_joined(tmp_path, count):
    whole = write_ranks(tmp_path, count)
    assert_reads(tmp_path, whole, merge_rules=axes)
    assert_reads(tmp_path / "consolidated.01.pth", whole, merge_rules=axes)
    with open_checkpoint(tmp_path, merge_rules=axes) as checkpoint:
        assert len(checkpoint.files) == count
        assert checkpoint.entries["columns"].num_bytes == whole["columns"].nbytes


def test_a_missing_rank_is_named(tmp_path):
    write_ranks(tmp_path, 8)
    (tmp_path / "consolidated.03.pth").unlink()
    (tmp_path / "consolidated.00.pth").unlink()
    message = refusal(tmp_path, merge_rules=axes)
    assert "missing consolidated.00.pth, consolidated.03.pth" in message


def test_shards_without_a_rule_are_refused(tmp_path):
    write_ranks(tmp_path, 2)
    assert "no rule says how to join" in refusal(tmp_path)


def test_shards_that_do_not_fit_together_are_refused(tmp_path):
    write_ranks(tmp_path, 2)
    other = tmp_path / "consolidated.01.pth"
    good = torch.load(other, weights_only=True)
    for change, expected in (
        ({"rows": torch.ones(4, 5)}, "'rows' is [4, 5] float32, but [3, 5] float32"),
        ({"norm": torch.ones(11).half()}, "'norm' is [11] float16, but [11] float32"),
        ({"new": torch.ones(2)}, "'new' is in only one"),
    ):
        write_pth(other, good | change)
        message = refusal(tmp_path, merge_rules=axes)
        assert "consolidated.01.pth" in message
        assert expected in message
    write_pth(other, {name: tensor for name, tensor in good.items() if name != "bias"})
    assert "'bias' is in only one" in refusal(tmp_path, merge_rules=axes)


def test_a_scalar_cannot_be_joined(tmp_path):
    write_ranks(tmp_path, 2)
    assert "'gate': [] cannot be joined" in refusal(tmp_path, merge_rules=lambda name: 0)


# What it costs


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.process
def test_headers_are_read_without_torch_numpy_or_safetensors(tmp_path):
    write_sharded(tmp_path)
    write_pth(tmp_path / "consolidated.pth")
    code = f"""
import sys
from mmchat.checkpoints.checkpoint import open_checkpoint
for path in ({str(tmp_path)!r}, {str(tmp_path / "consolidated.pth")!r}):
    assert len(open_checkpoint(path).entries) == 5
print([name for name in ("torch", "numpy", "safetensors", "PIL") if name in sys.modules])
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
def test_files_are_closed_also_when_one_is_refused(tmp_path):
    write_sharded(tmp_path)
    write_index(tmp_path, {"half": shard_name(1), "nothing": shard_name(2)})
    before = open_files()
    refusal(tmp_path)
    path = write_safetensors(tmp_path / "single.safetensors")
    with open_checkpoint(path) as checkpoint:
        kept = checkpoint.read("half")
    assert open_files() <= before + 1  # the mapping of `kept` holds one
    assert torch.equal(kept, small_tensors()["half"])
