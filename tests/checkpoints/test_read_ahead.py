import os
import sys

import pytest

from mmchat.checkpoints import read_ahead as module
from mmchat.checkpoints.read_ahead import CHUNK_BYTES, read_ahead

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="what the system is told")


@pytest.fixture
def told(monkeypatch):
    calls = []
    advise = os.posix_fadvise

    def recorded(descriptor, start, length, advice):
        calls.append((start, length, advice))
        advise(descriptor, start, length, advice)

    monkeypatch.setattr(module.os, "posix_fadvise", recorded)
    return calls


def test_every_byte_is_asked_for_in_pieces(tmp_path, told):
    first, second = tmp_path / "a", tmp_path / "b"
    first.write_bytes(b"x" * (2 * CHUNK_BYTES + 5))
    second.write_bytes(b"y" * 7)
    assert read_ahead([first, second], memory=2**40) == 2 * CHUNK_BYTES + 12
    starts = [start for start, _, _ in told]
    assert starts == [0, CHUNK_BYTES, 2 * CHUNK_BYTES, 0]
    assert {advice for _, _, advice in told} == {os.POSIX_FADV_WILLNEED}


def test_files_larger_than_memory_are_left_alone(tmp_path, told):
    file = tmp_path / "a"
    file.write_bytes(b"x" * 10)
    assert read_ahead([file], memory=9) == 0
    assert told == []


def test_missing_files_are_left_to_the_loader(tmp_path):
    assert read_ahead([tmp_path / "gone"], memory=2**40) == 0
