"""Lines typed in earlier chats, when the disk does not take them."""

from pathlib import Path

import pytest

from mmchat.repl.loop import open_history


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_a_full_disk_keeps_typed_lines_in_memory(tmp_path):
    file = tmp_path / "prompts"
    file.symlink_to("/dev/full")
    history = open_history(file)
    history.append_string("Hi")
    assert history.get_strings() == ["Hi"]


def test_a_file_that_cannot_be_read_is_as_none(tmp_path):
    (tmp_path / "prompts").mkdir()
    assert list(open_history(tmp_path / "prompts").load_history_strings()) == []
