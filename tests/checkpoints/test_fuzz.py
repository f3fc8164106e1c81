"""Damaged and hostile files end in CheckpointError, whatever the damage.

tests/attack fuzzes all readers, longer and with bounds on their time and memory.
"""

import contextlib
import pickletools
import random
from pathlib import Path

import torch

from mmchat.checkpoints.checkpoint import open_checkpoint
from mmchat.checkpoints.pickle_scan import scan
from mmchat.errors import CheckpointError
from tests.attack.mutations import mutated
from tests.checkpoints.hostile_files import members_of, write_pth, write_safetensors


def survives(path: Path, content: bytes) -> bool:
    """Whether the file is accepted; then every tensor lies in the file and can be read."""
    path.unlink(missing_ok=True)  # much faster than to overwrite
    path.write_bytes(content)
    try:
        with open_checkpoint(path) as checkpoint:
            entries = checkpoint.entries.values()
            stored = getattr(checkpoint, "packed", checkpoint.entries).values()
            assert all(0 <= e.offset <= len(content) - e.num_bytes for e in stored)
            for entry in entries:
                assert tuple(checkpoint.read(entry.name).clone().shape) == entry.shape
    except CheckpointError as error:
        message = str(error)
    else:
        return True
    assert message.isprintable()
    assert path.name in message
    return False


def fuzz(path: Path, whole: bytes, rounds: int, before: int | None = None) -> None:
    rng = random.Random(20240925)
    assert survives(path, whole)
    accepted = sum(survives(path, mutated(rng, whole, before)) for _ in range(rounds))
    assert accepted < rounds / 2  # most changes are noticed: the fuzzer reaches the checks


def fuzz_safetensors(folder: Path, rounds: int) -> None:
    whole = write_safetensors(folder / "whole.safetensors").read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    fuzz(folder / "model.safetensors", whole, rounds, header)


def fuzz_pth(folder: Path, rounds: int) -> None:
    path = folder / "consolidated.00.pth"
    tensors = {"w": torch.ones(2, 3), "v": torch.ones(5, dtype=torch.bfloat16)}
    fuzz(path, write_pth(path, tensors).read_bytes(), rounds)


def fuzz_pickle(folder: Path, rounds: int) -> None:
    """Opcodes put and changed everywhere in a real pickle, as if its checksum were right."""
    rng = random.Random(9)
    tensors = torch.nn.Linear(2, 3).state_dict()
    members = members_of(write_pth(folder / "whole.pth", tensors))
    whole = next(content for name, content in members.items() if name.endswith("data.pkl"))
    codes = [op.code.encode("latin-1") for op in pickletools.opcodes]
    assert scan(whole).keys() == tensors.keys()
    for _ in range(rounds):
        if rng.random() < 0.5:
            at = rng.randrange(len(whole))
            content = whole[:at] + rng.choice(codes) + whole[at + rng.randrange(2) :]
        else:
            content = mutated(rng, whole)
        with contextlib.suppress(ValueError):
            scan(content)


def test_fuzz_safetensors_headers(tmp_path):
    fuzz_safetensors(tmp_path, 8000)


def test_fuzz_pth_files(tmp_path):
    fuzz_pth(tmp_path, 4000)


def test_fuzz_pickles(tmp_path):
    fuzz_pickle(tmp_path, 8000)
