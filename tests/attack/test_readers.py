"""Random changes of whole files: each reader refuses them by its own errors, within bounds."""

from __future__ import annotations

import random

import pytest

from tests.attack.bounds import MEMORY_BYTES, Peak, cpu_bound
from tests.attack.conftest import Figures, rounds
from tests.attack.mutations import mutated
from tests.attack.readers import Reader, readers

NAMES = [
    "safetensors", "pth", "gguf", "pickle", "index", "json", "params", "config", "manifest",
    "checklist", "tokenizer.model", "tokenizer.json", "saved chat", "picture", "document",
    "address", "terminal", "markdown",
]  # fmt: skip
BATCH = 64  # inputs between two looks at the memory
pytestmark = [pytest.mark.slow, pytest.mark.timeout(3000)]


@pytest.fixture(scope="module")
def all_readers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Reader]:
    return readers(tmp_path_factory.mktemp("readers"))


def accepts(reader: Reader, data: bytes) -> bool:
    try:
        with cpu_bound():
            reader.read(data)
    except reader.errors as error:
        message = str(error)
    else:
        return True
    assert message.isprintable(), message
    assert len(message) < 2_000
    return False


def test_every_reader_is_named(all_readers: dict[str, Reader]) -> None:
    assert list(all_readers) == NAMES
    assert sum(reader.rounds for reader in all_readers.values()) >= 1_000_000


@pytest.mark.parametrize("name", NAMES)
def test_changed_files_are_read_or_refused_in_bounds(
    all_readers: dict[str, Reader], name: str, figures: Figures
) -> None:
    reader, count = all_readers[name], rounds(all_readers[name].rounds)
    draw, peak, accepted, most = random.Random(f"{name} 1"), Peak(), 0, 0
    for whole in reader.wholes:
        assert accepts(reader, whole) or name == "manifest"
    for number in range(count):
        if number % BATCH == 0:
            peak.reset()
        accepted += accepts(reader, mutated(draw, draw.choice(reader.wholes)))
        if number % BATCH == BATCH - 1:
            most = max(most, peak.grown())
            assert most < MEMORY_BYTES, f"inputs {number - BATCH + 1} to {number}"
    figures(inputs=count, accepted=accepted, most_mib=most / 2**20)
