"""What loading costs in memory, measured in a process of its own."""

import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

GIB, MIB = 1024**3, 1024**2
TENSORS, COLUMNS = 16, 8192
ROWS = 2 * GIB // TENSORS // COLUMNS // 2  # 128 MiB of bfloat16

# Copies every tensor, as to a device, and keeps the copies: the model's own bytes.
LOAD = """
import sys, torch
from mmchat.checkpoints.checkpoint import open_checkpoint

def memory(field):  # not ru_maxrss: that begins with the parent's
    for line in open("/proc/self/status"):
        if line.startswith(field):
            return int(line.split()[1]) * 1024

torch.ones(1000).sum()
before = memory("VmRSS")
kept = []
with open_checkpoint(sys.argv[1], merge_rules=lambda name: 0) as checkpoint:
    for name in checkpoint.entries:
        kept.append(checkpoint.read(name).clone())
        checkpoint.release(name)
print(sum(tensor.nbytes for tensor in kept), memory('VmHWM') - before)
"""


def available_memory() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable"):
            return int(line.split()[1]) * 1024
    return 0


@pytest.fixture
def folder(tmp_path):
    if not Path("/proc/meminfo").exists() or available_memory() < 5 * GIB:
        pytest.skip("needs Linux and 5 GiB of free memory")
    if shutil.disk_usage(tmp_path).free < 3 * GIB:
        pytest.skip("needs 3 GiB of free disk, should the file system not keep holes")
    return tmp_path


def write_safetensors(folder: Path) -> Path:
    """2 GiB in 16 tensors: a header and a hole."""
    size = ROWS * COLUMNS * 2
    header = json.dumps(
        {
            f"layer.{i}": {
                "dtype": "BF16",
                "shape": [ROWS, COLUMNS],
                "data_offsets": [i * size, (i + 1) * size],
            }
            for i in range(TENSORS)
        }
    ).encode()
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    os.truncate(path, 8 + len(header) + TENSORS * size)
    return path


def write_shards(folder: Path) -> Path:
    """Two of Meta's shards, 1 GiB each: 8 tensors, each to be joined from two halves."""
    import torch

    for rank in range(2):
        tensors = {
            f"layer.{i}": torch.zeros(ROWS, COLUMNS, dtype=torch.bfloat16)
            for i in range(TENSORS // 2)
        }
        torch.save(tensors, folder / f"consolidated.{rank:02d}.pth")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("write", [write_safetensors, write_shards])
def test_loading_2_gib_needs_less_than_1_gib_more(folder, write):
    path = write(folder)
    command = [sys.executable, "-c", LOAD, str(path)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    loaded, growth = map(int, result.stdout.split())
    assert loaded == 2 * GIB
    assert loaded < growth < loaded + GIB


@pytest.mark.process
def test_opening_a_huge_file_reads_only_its_header(tmp_path):
    """A tensor of 64 GiB, of which nothing is on the disk, is known at once."""
    size = 64 * GIB
    header = json.dumps(
        {"w": {"dtype": "BF16", "shape": [size // 2], "data_offsets": [0, size]}}
    ).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    try:
        os.truncate(path, 8 + len(header) + size)
    except OSError:
        pytest.skip("this file system has no large sparse files")
    code = f"""
from mmchat.checkpoints.checkpoint import open_checkpoint
with open_checkpoint({str(path)!r}) as checkpoint:
    tensor = checkpoint.read("w")
    print(checkpoint.entries["w"].num_bytes, tensor[:: tensor.numel() // 3].float().sum().item())
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.split() == [str(size), "0.0"]
