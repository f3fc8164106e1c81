"""What quantising while loading costs in memory, at the true widths, in a process of its own."""

import json
import math
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.shapes import Shapes, shaped_spec
from tests.checkpoints.test_memory import GIB, available_memory

ROOT = Path(__file__).parents[1]
# Loads the 11B's widths with few layers and says its bytes and how far the process grew.
LOAD = """
import sys, torch
from benchmarks.shapes import Shapes, byte_tokenizer, shaped_spec
from mmchat.checkpoints.checkpoint import open_checkpoint
from mmchat.loading.loader import load_from_tensors
from mmchat.loading.options import LoadOptions

def memory(field):
    for line in open("/proc/self/status"):
        if line.startswith(field):
            return int(line.split()[1]) * 1024

spec = shaped_spec(Shapes("11B"), torch.device("cpu"))
tokenizer = byte_tokenizer(spec.config.text_config.vocab_size)
before = memory("VmRSS")
with open_checkpoint(sys.argv[1], merge_rules=lambda name: 0) as files:
    options = LoadOptions(device="cpu", quantize=sys.argv[2])
    loaded = load_from_tensors(spec, files, tokenizer, options)
model = loaded.runtime.model
print(sum(t.nbytes for t in (*model.parameters(), *model.buffers())), memory("VmHWM") - before)
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """4.6 GB of bfloat16: a header and a hole."""
    if available_memory() < 6 * GIB:
        pytest.skip("needs Linux and 6 GiB of free memory")
    spec = shaped_spec(Shapes("11B"), torch.device("cpu"))
    header, end = {}, 0
    for name, shape in spec.family.shapes(spec.config).items():
        begin, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # as the format asks: else every tensor is copied
    path = tmp_path_factory.mktemp("wide") / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    os.truncate(path, 8 + len(text) + end)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_loading_needs_less_than_1_gb_beyond_the_quantised_weights(checkpoint, scheme):
    command = [sys.executable, "-c", LOAD, str(checkpoint), scheme]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    size, growth = map(int, result.stdout.split())
    assert size < checkpoint.stat().st_size * 0.8
    assert growth < size + 1e9
