"""What a record, an index or a checklist names is a file of its folder, whoever wrote it."""

import json
import os
from pathlib import Path

import pytest

from mmchat.checkpoints import names
from mmchat.checkpoints.checkpoint import open_checkpoint
from mmchat.checkpoints.manifest import (
    MANIFEST_NAME,
    FileRecord,
    Manifest,
    read_manifest,
    write_manifest,
)
from mmchat.errors import CheckpointError
from mmchat.hub.client import HubFile
from mmchat.hub.download import repair_plan
from mmchat.hub.holdings import folder_removal, remove
from mmchat.hub.integrity import recorded_sizes, verify_folder
from mmchat.hub.places import FolderPlace
from mmchat.storage.safe_files import open_regular

HOSTILE = [
    "../victim/thesis.txt", "/etc/passwd", "..", ".", "", "a/../b", "a//b", "a/", "/", "a\\b",
    "a\0b", "a\nb", "\x1b[2J", ".hidden", ".mmchat/placed", "-rf", "~", "C:x", "x" * 256,
    "a/" * 128 + "b", "\u202egpj", "LICENSE\u2215x", "caf\u00e9", None, 7, ["a"],
]  # fmt: skip
HASH = "0" * 64


def record_of(folder, name="thesis.txt", **changes):
    fields = {"size": 9, "sha256": HASH, "etag": HASH, "put": True} | changes
    manifest = Manifest({name: FileRecord(**fields)}, repo="a/b", commit="0" * 40)
    folder.mkdir(exist_ok=True)
    write_manifest(folder / MANIFEST_NAME, manifest)
    return manifest


@pytest.fixture
def victim(tmp_path):
    """A file outside of the folder; it must stay as it is."""
    folder = tmp_path / "victim"
    folder.mkdir()
    path = folder / "thesis.txt"
    path.write_text("years of ")
    yield path
    assert path.read_text() == "years of "
    assert [p.name for p in folder.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("name", HOSTILE, ids=repr)
def test_hostile_names_break_the_rule(tmp_path, name):
    assert not names.is_path(name)
    assert not names.is_name(name)
    if isinstance(name, str):
        with pytest.raises(CheckpointError, match="no name of a file"):
            names.place_of(tmp_path, name)


@pytest.mark.parametrize("name", ["a", "original/consolidated.00.pth", "USE_POLICY +1.md", "_x"])
def test_ordinary_names_keep_it(name):
    assert names.is_path(name)


@pytest.mark.parametrize("name", [name for name in HOSTILE if isinstance(name, str)], ids=repr)
def test_a_record_with_a_hostile_name_is_refused(tmp_path, name):
    record_of(tmp_path, name)
    with pytest.raises(CheckpointError, match="no name of a file in the folder") as caught:
        read_manifest(tmp_path / MANIFEST_NAME)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "change",
    [
        {"etag": "../../victim/thesis.txt"},
        {"sha256": "../x"},
        {"repo": "../../x"},
        {"commit": "../../../x"},
        {"revision": "a/../../x"},
        {"source": ["x"]},
    ],
    ids=lambda change: next(iter(change)),
)
def test_nothing_else_in_a_record_becomes_a_path_either(tmp_path, change):
    record = FileRecord(9, *(change.get(key, HASH) for key in ("sha256", "etag")), put=True)
    others = {key: value for key, value in change.items() if key not in ("sha256", "etag")}
    write_manifest(tmp_path / MANIFEST_NAME, Manifest({"a": record}, **others))
    with pytest.raises(CheckpointError):
        read_manifest(tmp_path / MANIFEST_NAME)


def test_the_journal_names_only_hashes(tmp_path):
    place = FolderPlace(tmp_path)
    place.work.mkdir()
    place.journal.write_text(f"../../victim/thesis.txt\n{HASH}\n/etc/passwd\n")
    assert place.put_etags() == {HASH}


def test_what_is_removed_lies_in_the_folder(tmp_path, victim):
    evil = tmp_path / "evil"
    record_of(evil, "../victim/thesis.txt")
    with pytest.raises(CheckpointError):
        folder_removal(evil)
    record_of(evil, "sub/thesis.txt")
    (evil / "sub").symlink_to("../victim")
    with pytest.raises(CheckpointError, match="is a link"):
        folder_removal(evil)


def test_unfinished_parts_behind_a_link_are_not_removed(tmp_path, victim):
    evil = tmp_path / "evil"
    record_of(evil)
    (evil / ".mmchat").symlink_to("../parts")
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "x.mmchat.part").write_text("another's")
    remove(folder_removal(evil))
    assert (tmp_path / "parts" / "x.mmchat.part").read_text() == "another's"


def test_a_link_itself_is_removed_and_not_what_it_leads_to(tmp_path, victim):
    evil = tmp_path / "evil"
    record_of(evil)
    (evil / "thesis.txt").symlink_to(victim)
    remove(folder_removal(evil))
    assert not evil.exists()


@pytest.mark.timeout(20)
@pytest.mark.parametrize("kind", ["/dev/zero", "fifo", "outside", "folder", "circle"])
def test_verify_reads_regular_files_of_the_folder_and_ends(tmp_path, victim, kind):
    evil = tmp_path / "evil"
    record_of(evil)
    path = evil / "thesis.txt"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to({"outside": victim, "circle": path}.get(kind, kind))
    (fault,) = verify_folder(evil).faults
    assert fault.file == "thesis.txt"
    assert "recorded" not in fault.reason


def test_only_what_a_record_names_is_looked_at(tmp_path, monkeypatch):
    """`mmchat verify /` ends at once."""
    monkeypatch.setattr(Path, "rglob", lambda *_: pytest.fail("looks at all that is there"))
    with pytest.raises(CheckpointError, match="no manifest"):
        verify_folder(tmp_path)
    assert recorded_sizes(tmp_path) == {}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", ["../../../dev/zero", "/dev/zero", "a b c/d"])
def test_a_checklist_names_files_beside_it(tmp_path, name):
    (tmp_path / "checklist.chk").write_text(f"{'0' * 32}  {name}\n")
    with pytest.raises(CheckpointError, match="MD5"):
        verify_folder(tmp_path)


@pytest.mark.parametrize("name", ["../x.safetensors", "/x.safetensors", ".x.safetensors", "a/x", 1])
def test_an_index_names_files_beside_it(tmp_path, name):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"w": name}}))
    with pytest.raises(CheckpointError, match="no plain name"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("link", ["thesis.txt", "sub", ".mmchat", "part", "placed", MANIFEST_NAME])
def test_a_repair_writes_only_in_the_folder(tmp_path, victim, link):
    """Whatever in the folder is a link to elsewhere, no file there is changed or made."""
    evil = tmp_path / "evil"
    name = "sub/thesis.txt" if link == "sub" else "thesis.txt"
    record_of(evil, name)
    file = HubFile(name, 9, HASH)
    plan = repair_plan(evil, [name])
    where = {"part": FolderPlace(evil).part(file), "placed": evil / ".mmchat" / "placed"}
    path = where.get(link, evil / link)
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    path.symlink_to(victim.parent if link in ("sub", ".mmchat") else victim)
    try:
        part = plan.place.part(file)
        part.parent.mkdir(exist_ok=True)
        with open_regular(part, "r+") as opened:
            opened.write(b"malicious")
        plan.place.put(file)
        plan.place.finish([file], Manifest({}, "a/b", "main", "0" * 40))
    except (CheckpointError, OSError):
        assert link != MANIFEST_NAME
    else:
        assert (evil / name).read_bytes() == b"malicious"
        assert not (evil / link).is_symlink()


@pytest.mark.timeout(20)
def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(tmp_path):
    record_of(tmp_path, "a")
    os.mkfifo(tmp_path / "a")
    assert not FolderPlace(tmp_path).has(HubFile("a", 0, HASH))
