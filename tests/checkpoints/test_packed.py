"""Weights that other programs packed are what their own libraries make of them, bit for bit."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmchat.checkpoints.checkpoint import open_checkpoint
from mmchat.checkpoints.packed import packing_of
from mmchat.strict_json import Where

GOLDEN = Path(__file__).parents[1] / "golden"
CONFIGS = json.loads((GOLDEN / "packed.json").read_text())
TENSORS = load_file(GOLDEN / "packed.safetensors")
WHERE = Where("config.json")


def stored(kind):
    start = f"{kind}/stored/"
    return {n.removeprefix(start): t for n, t in TENSORS.items() if n.startswith(start)}


def unpacked(folder, config, tensors):
    save_file(tensors, folder / "model.safetensors")
    packing = packing_of(config, WHERE)
    return packing.unpacked(open_checkpoint(folder))


@pytest.mark.parametrize("kind", CONFIGS)
def test_weights_are_those_of_the_library_that_packed_them(tmp_path, kind):
    plain = {"norm.weight": torch.ones(3)}
    with unpacked(tmp_path, CONFIGS[kind], stored(kind) | plain) as files:
        expected = TENSORS[f"{kind}/weight"]
        assert set(files.entries) == {"x.weight", "norm.weight"}
        entry, found = files.entries["x.weight"], files.read("x.weight")
        assert (entry.shape, entry.dtype) == (expected.shape, str(expected.dtype)[6:])
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)
        weight = files.computed["x.weight"]
        assert torch.equal(weight.rows(0, 16), expected[:16])
