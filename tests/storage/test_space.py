import pytest

from mmchat.errors import DiskError
from mmchat.storage.space import check_space, free_bytes, size_of


def test_too_little_space_is_said_with_numbers(tmp_path):
    folder = tmp_path / "not" / "there yet"
    check_space(folder, 1, "a note")
    with pytest.raises(DiskError) as caught:
        check_space(folder, 10**17, "the export", "--output")
    assert str(caught.value).startswith(
        f"the export needs 101,000,000,000,000,000 bytes more in '{folder}', and "
    )
    assert " are free; free " in str(caught.value)
    assert str(caught.value).endswith(", or choose another disk with --output")
    assert not folder.parent.exists()


def test_a_folder_that_is_not_there_has_the_space_of_its_disk(tmp_path):
    assert free_bytes(tmp_path / "a" / "b") > 0


def test_a_missing_file_has_no_size(tmp_path):
    (tmp_path / "empty").touch()
    assert (size_of(tmp_path / "empty"), size_of(tmp_path / "none")) == (0, None)
