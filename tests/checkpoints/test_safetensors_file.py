import os
import struct
from pathlib import Path

import pytest
import torch

from mmchat import limits
from mmchat.checkpoints.checkpoint import open_checkpoint
from mmchat.errors import CheckpointError
from tests.checkpoints.hostile_files import (
    header_file,
    item,
    small_tensors,
    write_pth,
    write_safetensors,
)


def refusal(path: Path) -> str:
    """The message with which `path` is refused."""
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    message = str(caught.value)
    assert path.name in message
    assert message.isprintable()
    return message


def test_tensors_equal_those_that_safetensors_wrote(tmp_path):
    path = write_safetensors(tmp_path / "model.safetensors")
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.format == "hf"
        assert checkpoint.total_bytes == path.stat().st_size
        for name, expected in small_tensors().items():
            entry, found = checkpoint.entries[name], checkpoint.read(name)
            assert found.dtype == expected.dtype
            assert torch.equal(found, expected)
            assert (entry.shape, entry.num_bytes) == (tuple(expected.shape), expected.nbytes)
        assert checkpoint.entries.keys() == small_tensors().keys()


def test_entries_are_in_the_order_of_the_file(tmp_path):
    header = {"b": item(4, 8), "a": item(8, 12), "c": item(0, 4)}
    path = header_file(tmp_path / "model.safetensors", header, bytes(12))
    with open_checkpoint(path) as checkpoint:
        assert list(checkpoint.entries) == ["c", "b", "a"]


def test_unaligned_data_is_read_right(tmp_path):
    header = '{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    assert (8 + len(header)) % 4
    path = header_file(tmp_path / "model.safetensors", header, struct.pack("<2f", 1.5, -3.0))
    with open_checkpoint(path) as checkpoint:
        found = checkpoint.read("a")
    assert found.tolist() == [1.5, -3.0]
    assert found.data_ptr() % 4 == 0


def test_a_view_outlives_its_checkpoint_and_never_changes_the_file(tmp_path):
    path = write_safetensors(tmp_path / "model.safetensors")
    before = path.read_bytes()
    with open_checkpoint(path) as checkpoint:
        view = checkpoint.read("wide.weight")
    view.mul_(2)
    assert torch.equal(view, small_tensors()["wide.weight"] * 2)
    assert path.read_bytes() == before


def test_released_pages_are_read_again(tmp_path):
    big = {"a": torch.randn(300_000), "b": torch.randn(200_001)}
    with open_checkpoint(write_safetensors(tmp_path / "model.safetensors", big)) as checkpoint:
        views = {name: checkpoint.read(name) for name in big}
        for name in big:
            checkpoint.release(name)
        assert all(torch.equal(views[name], big[name]) for name in big)


HEADER_FAULTS = {
    "not JSON": ("{nonsense", 0, "not valid JSON"),
    "a list": ("[1, 2]", 0, "length of a JSON object"),
    "no tensors": ("{}", 0, "0 tensors"),
    "metadata only": ({"__metadata__": {"format": "pt"}}, 0, "0 tensors"),
    "metadata is no object": ({"__metadata__": 3}, 0, "__metadata__"),
    "duplicate key": (
        '{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
        '"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}',
        8,
        "twice",
    ),
    "deep nesting": ("{" + '"a":{' * 100_000, 0, "nested"),
    "a number of 5000 digits": ('{"a":' + "9" * 5000 + "}", 0, "64 bits"),
    "NaN": ('{"a": NaN}', 0, "finite"),
    "unknown dtype": ({"a": item(0, 4, "C64")}, 4, "'C64'"),
    "dtype is a number": ({"a": item(0, 4, 32)}, 4, "'32'"),  # type: ignore[arg-type]
    "shape is a number": ({"a": item(0, 4, shape=1)}, 4, "shape"),
    "shape holds a float": ({"a": item(0, 4, shape=[1.0])}, 4, "whole numbers"),
    "shape holds true": ({"a": item(0, 4, shape=[True])}, 4, "whole numbers"),
    "shape is negative": ({"a": item(0, 4, shape=[-1, -1])}, 4, "whole numbers"),
    "empty tensor": ({"a": item(0, 0, shape=[0, 4])}, 0, "empty"),
    "five axes": ({"a": item(0, 4, shape=[1] * 5)}, 4, "5 axes"),
    "shape overflows": ({"a": item(0, 4, shape=[2**31, 2**31, 2**31])}, 4, "needs"),
    "shape and bytes disagree": ({"a": item(0, 4, shape=[3])}, 4, "12 bytes"),
    "three offsets": ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 2, 4]}}, 4, "pair"),
    "offsets backwards": ({"a": item(4, 0)}, 4, "bytes"),
    "extra key": ({"a": {**item(0, 4), "strides": [1]}}, 4, "nothing else"),
    "item is a list": ({"a": [0, 4]}, 4, "needs dtype"),
    "overlap": ({"a": item(0, 4), "b": item(2, 6)}, 8, "share their data"),
    "same place twice": ({"a": item(0, 4), "b": item(0, 4)}, 4, "share their data"),
    "hole": ({"a": item(0, 4), "b": item(8, 12)}, 12, "hole"),
    "hole at the start": ({"a": item(4, 8)}, 8, "hole"),
    "bytes at the end": ({"a": item(0, 4)}, 7, "3 bytes after"),
    "data missing": ({"a": item(0, 4), "b": item(4, 12, shape=[2])}, 5, "cut off in tensor 'b'"),
    "long name": ({"n" * 257: item(0, 4)}, 4, "longer than 256"),
    "surrogate in a name": ({"\ud800": item(0, 4)}, 4, "not text"),
}


@pytest.mark.parametrize("fault", HEADER_FAULTS)
def test_a_faulty_header_is_refused(tmp_path, fault):
    header, size, expected = HEADER_FAULTS[fault]
    path = tmp_path / "model.safetensors"
    assert expected in refusal(header_file(path, header, bytes(size)))


def test_a_header_that_is_not_utf8_is_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 8) + b'{"\xff": 1}')
    assert "not UTF-8" in refusal(path)


def test_a_file_cut_off_anywhere_is_refused_with_both_sizes(tmp_path):
    whole = write_safetensors(tmp_path / "whole.safetensors").read_bytes()
    path = tmp_path / "model.safetensors"
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    for size in range(len(whole)):
        path.unlink(missing_ok=True)
        path.write_bytes(whole[:size])
        message = refusal(path)
        assert "download it again" in message
        if size >= header:
            assert f"{size:,} bytes of {len(whole):,}" in message
            assert "cut off in tensor" in message


@pytest.mark.slow
def test_a_header_of_a_million_tensors_is_refused(tmp_path):
    header = '{"n":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},' + " " * 60_000_000
    path = header_file(tmp_path / "model.safetensors", header)
    assert f"at most {limits.SAFETENSORS_HEADER_BYTES:,}" in refusal(path)
    many = {f"{i}": item(4 * i, 4 * i + 4) for i in range(limits.TENSORS_PER_FILE + 1)}
    assert "20,001 tensors" in refusal(header_file(path, many, bytes(4 * len(many))))


@pytest.mark.slow
def test_as_many_tensors_as_allowed_are_read(tmp_path):
    many = {f"{i}": item(4 * i, 4 * i + 4) for i in range(limits.TENSORS_PER_FILE)}
    path = header_file(tmp_path / "model.safetensors", many, bytes(4 * len(many)))
    with open_checkpoint(path) as checkpoint:
        assert len(checkpoint.entries) == limits.TENSORS_PER_FILE


def test_a_header_longer_than_the_file_is_refused(tmp_path):
    path = header_file(tmp_path / "model.safetensors", {"a": item(0, 4)}, length=5000)
    assert "5,008 needed" in refusal(path)


def test_escape_sequences_in_a_name_are_shown_escaped(tmp_path):
    header = {"\x1b]52;c;ZXZpbA==\x07../../w": item(0, 4, "C64")}
    message = refusal(header_file(tmp_path / "model.safetensors", header, bytes(4)))
    assert r"\x1b]52;c;ZXZpbA==\x07../../w" in message


FOREIGN = {
    "a web page": (b"<!DOCTYPE html>\n<html><body>Sign in</body></html>", "web page"),
    "a web page after blanks": (b"\n\n  <HTML lang=en>", "web page"),
    "an XML error": (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "web page"),
    "an LFS pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4976698672\n",
        "git lfs pull",
    ),
    "a JSON error": (b'{"error":"Repository not found"}', "is text"),
    "a line of text": (b"Invalid username or password.", "Invalid username"),
    "nothing": (b"", "is empty"),
    "gzip": (b"\x1f\x8b\x08\x00" + bytes(100), "compressed"),
}


@pytest.mark.parametrize("ending", ["model.safetensors", "consolidated.00.pth"])
@pytest.mark.parametrize("kind", FOREIGN)
def test_something_else_than_weights_is_named(tmp_path, kind, ending):
    content, expected = FOREIGN[kind]
    path = tmp_path / ending
    path.write_bytes(content)
    assert expected in refusal(path)


def test_a_zip_named_safetensors_is_named(tmp_path):
    path = write_pth(tmp_path / "model.safetensors")
    assert "zip" in refusal(path)


@pytest.mark.parametrize("ending", ["model.safetensors", "consolidated.00.pth"])
def test_what_is_no_regular_file_is_refused_at_once(tmp_path, ending):
    os.mkfifo(tmp_path / ending)
    assert "not a regular file" in refusal(tmp_path / ending)
    (tmp_path / ending).unlink()
    (tmp_path / ending).mkdir()
    with pytest.raises(CheckpointError, match="is empty; needs"):
        open_checkpoint(tmp_path / ending)
    with pytest.raises(CheckpointError):
        open_checkpoint(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_file_is_refused(tmp_path):
    path = write_safetensors(tmp_path / "model.safetensors")
    path.chmod(0)
    assert "Permission denied" in refusal(path)
