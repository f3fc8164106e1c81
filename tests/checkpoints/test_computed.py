"""Tensors that are computed from stored ones."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from mmchat.checkpoints.checkpoint import open_checkpoint
from mmchat.checkpoints.computed import Computed, ComputedCheckpoint
from mmchat.errors import CheckpointError


def test_a_computed_tensor_stands_in_place_of_its_sources(tmp_path):
    codes, scale = torch.tensor([[1, -2]], dtype=torch.int8), torch.tensor([0.5])
    save_file({"a.codes": codes, "a.scale": scale, "b": torch.ones(3)}, tmp_path / "m.safetensors")
    stored = open_checkpoint(tmp_path / "m.safetensors")
    entry = replace(stored.entries["a.codes"], name="a", dtype="float32")
    made = Computed(
        entry,
        ("a.codes", "a.scale"),
        lambda: stored.read("a.codes") * stored.read("a.scale")[:, None],
    )
    with ComputedCheckpoint(stored, [made], "one tensor was unpacked") as files:
        assert set(files.entries) == {"a", "b"}
        assert files.entries["a"] == entry
        assert files.read("a").tolist() == [[0.5, -1.0]]
        assert files.read("b").tolist() == [1.0, 1.0, 1.0]
        files.release("a")
        files.release("b")
        assert files.remarks == ("one tensor was unpacked",)
        assert files.files == stored.files


def test_a_tensor_is_not_both_computed_and_stored(tmp_path):
    """Its stored shape would be checked, and the computed one be read."""
    tensors = {"a.codes": torch.ones(1, 2), "a": torch.ones(3)}
    save_file(tensors, tmp_path / "m.safetensors")
    with open_checkpoint(tmp_path / "m.safetensors") as stored:
        entry = replace(stored.entries["a.codes"], name="a")
        made = Computed(entry, ("a.codes",), lambda: stored.read("a.codes"))
        with pytest.raises(CheckpointError, match="'a' is there as it is, and packed as well"):
            ComputedCheckpoint(stored, [made])
