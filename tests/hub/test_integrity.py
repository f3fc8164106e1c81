import random

import pytest

from mmchat.checkpoints.manifest import (
    MANIFEST_NAME,
    FileRecord,
    Manifest,
    read_manifest,
    sha256_of,
    write_manifest,
)
from mmchat.errors import CheckpointError
from mmchat.hub.integrity import verify_folder


@pytest.fixture
def folder(tmp_path):
    chance = random.Random(3)
    for name, size in (("model.safetensors", 20_000), ("config.json", 300), ("empty", 0)):
        (tmp_path / name).write_bytes(chance.randbytes(size))
    records = {
        path.name: FileRecord(path.stat().st_size, sha256_of(path), None, True)
        for path in tmp_path.iterdir()
    }
    write_manifest(tmp_path / MANIFEST_NAME, Manifest(records, source="a test"))
    return tmp_path


def test_a_manifest_comes_back_as_it_was_written(folder):
    manifest = read_manifest(folder / MANIFEST_NAME)
    assert manifest.source == "a test"
    assert sum(record.size for record in manifest.files.values()) == 20_300
    assert verify_folder(folder).faults == ()


@pytest.mark.parametrize("count", [40, pytest.param(500, marks=pytest.mark.slow)])
def test_every_flipped_bit_is_found_and_its_file_named(folder, count):
    chance = random.Random(count)
    files = [path for path in sorted(folder.iterdir()) if path.stat().st_size]
    assert MANIFEST_NAME in {path.name for path in files}
    for _ in range(count):
        path = chance.choice(files)
        data = path.read_bytes()
        flipped = bytearray(data)
        flipped[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        path.write_bytes(flipped)
        assert [fault.file for fault in verify_folder(folder).faults] == [path.name]
        path.write_bytes(data)
    assert verify_folder(folder).faults == ()


def test_a_manifest_of_a_later_kind_is_refused(folder):
    (folder / MANIFEST_NAME).write_text('{"format": 2, "files": {}}')
    with pytest.raises(CheckpointError, match="written by a later mmchat; upgrade mmchat"):
        read_manifest(folder / MANIFEST_NAME)
