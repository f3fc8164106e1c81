"""A toy in memory, and one as a folder whose family is registered while a test runs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import save_file

from mmchat.models.registry import FAMILIES, register
from mmchat.tokenizers import open_tokenizer
from tests.synthetic_tokenizer import tiktoken_lines
from tests.toy.config import CONFIG
from tests.toy.family import ToyFamily
from tests.toy.model import ToyModel
from tests.toy.pictures import picture, random_toy
from tests.toy.processor import ToyProcessor


@pytest.fixture(scope="session")
def model() -> ToyModel:
    return random_toy()


@pytest.fixture(scope="session")
def folder(model: ToyModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """params.json, model.safetensors and tokenizer.model."""
    folder = tmp_path_factory.mktemp("toys") / "toy"
    folder.mkdir()
    tensors = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    tokens = [bytes([value]) for value in range(256)]
    (folder / "tokenizer.model").write_bytes(tiktoken_lines(tokens))
    params = {
        "name": "toy-model",
        "model_type": "toy",
        "description": "Sees nine patches.",
        "aliases": [],
        "repo": None,
        "chat_format": "instruct",
        "parameters": sum(tensor.numel() for tensor in tensors.values()),
        "generation": {"temperature": 0.5, "top_p": 0.8},
        **ToyFamily().to_sections(CONFIG),
    }
    (folder / "params.json").write_text(json.dumps(params))
    return folder


@pytest.fixture
def toy(folder: Path) -> Iterator[str]:
    """The folder as a command takes it, and its family in the registry."""
    register("toy", ToyFamily)
    yield str(folder)
    del FAMILIES["toy"]


@pytest.fixture(scope="session")
def processor(folder: Path) -> ToyProcessor:
    return ToyProcessor(CONFIG, open_tokenizer(folder / "tokenizer.model"), "white")


@pytest.fixture
def png(tmp_path: Path) -> str:
    picture(1).pixels.save(tmp_path / "picture.png")
    return str(tmp_path / "picture.png")
