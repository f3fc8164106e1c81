"""Files of every kind are shared by ranks, and each rank reads its part of Meta's shards alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import mmchat
from mmchat.catalog.find import find_model
from mmchat.catalog.known import data_path
from mmchat.checkpoints.adapter import Adapters
from mmchat.checkpoints.checkpoint import open_checkpoint
from mmchat.checkpoints.mapped_file import MappedFile, TensorEntry
from mmchat.export import ExportPlan, export_model
from mmchat.loading.options import LoadOptions
from mmchat.loading.prepared import Prepared
from mmchat.loading.weights import load_weights
from mmchat.models.mllama.meta_format import shard_dims
from mmchat.parallel.slices import Shares
from mmchat.quant.formats.blocks import Blocks
from mmchat.quant.formats.int4 import Int4
from mmchat.tokenizers import open_tokenizer
from tests.adapter_folders import low_rank, write_adapter
from tests.gguf_models import write_model
from tests.loading.test_packed import hub_config, hub_folder
from tests.meta_checkpoint import write_meta_folder
from tests.packed_writers import pack_folder
from tests.parallel.scenario import logits
from tests.parallel.thread_group import ranks_of

SPEC = find_model().spec
TINY = data_path("assets", "tiny")
ATTENTION = "language_model.model.layers.2.self_attn"
MODULES = [
    f"{ATTENTION}.q_proj",
    f"{ATTENTION}.o_proj",
    "language_model.model.layers.0.mlp.up_proj",
]


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    with open_checkpoint(TINY) as files:
        return {name: files.read(name).clone() for name in files.entries}


def meta_shards(folder: Path, weights: dict[str, Tensor]) -> dict[str, Any]:
    """As the 90B lies there: eight files, of which four are those of a rank of two."""
    tables = {n: t for n, t in weights.items() if "tile" not in n or "gate" in n}
    tables |= {n: torch.zeros_like(t) for n, t in weights.items() if n not in tables}
    tokenizer = TINY / "tokenizer.model"
    place = write_meta_folder(folder, SPEC, tables, tokenizer, shards=8)
    return {"name": place}


def gguf(folder: Path, weights: dict[str, Tensor]) -> dict[str, Any]:
    write_model(folder, weights, SPEC.config, open_tokenizer(TINY / "tokenizer.model"))
    return {"name": folder}


def exported(scheme: str) -> Callable[..., dict[str, Any]]:
    def write(folder: Path, _: dict[str, Tensor]) -> dict[str, Any]:
        options = LoadOptions(device="cpu", dtype="float32", quantize=scheme)
        export_model(ExportPlan(options, folder, "safetensors"))
        return {"name": folder}

    return write


def adapters(folder: Path, weights: dict[str, Tensor]) -> dict[str, Any]:
    first = write_adapter(folder / "one", low_rank(weights, MODULES))
    second = write_adapter(folder / "two", low_rank(weights, MODULES[:1], rank=2), r=2)
    return {"adapter": [first, second]}


WRITERS = [meta_shards, gguf, exported("none"), adapters]


@pytest.fixture(scope="module", params=WRITERS, ids=lambda one: one.__qualname__)
def plain(request, weights, tmp_path_factory) -> tuple[dict[str, Any], Tensor]:
    """How a model is loaded, and the logits of one process."""
    written = request.param(tmp_path_factory.mktemp("plain") / "model", weights)
    given = {"dtype": "float32", "quantize": "none"} | written
    return given, logits(mmchat.load(**given))


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_answers_are_those_of_one_process(plain, ranks):
    given, expected = plain
    with ranks_of(ranks):
        found = logits(mmchat.load(parallel=ranks, **given))
    assert (found - expected).abs().max() < 1e-5 * expected.std().clamp(min=1)


def packed(kind: str) -> Callable[..., dict[str, Any]]:
    """As other programs quantise."""

    def write(folder: Path, weights: dict[str, Tensor]) -> dict[str, Any]:
        pack_folder(hub_folder(folder), kind, weights, hub_config(SPEC.config))
        return {"name": folder, "quantize": "auto"}

    return write


def values(model: Any) -> dict[str, Tensor]:
    """What a model holds; blocks, whose bytes lie in an order of their own, as what they are."""
    layers = [
        (n, m) for n, m in model.named_modules() if isinstance(getattr(m, "format", 0), Blocks)
    ]
    wide = {f"{name}.weight": layer.format.widen(*layer.held()) for name, layer in layers}
    return {**model.state_dict(), **wide}


@pytest.mark.slow
@pytest.mark.parametrize(
    "write", [meta_shards, gguf, exported("int8"), *map(packed, ("nf4", "awq", "fp8"))]
)
def test_rounded_weights_are_parts_of_those_of_one_process(write, weights, tmp_path, monkeypatch):
    monkeypatch.setattr(Int4, "repack", lambda *_: None)
    given = {"dtype": "float32", "quantize": "int8"} | write(tmp_path / "model", weights)
    whole = values(mmchat.load(**given).runtime.model)
    with ranks_of(2) as loaded:
        first = mmchat.load(parallel=2, **given).runtime.own
    for rank, own in enumerate((first, loaded[1])):
        shares, held = Shares(SPEC.family.cuts(SPEC.config), rank, 2), values(own.model)
        for name, tensor in whole.items():
            assert torch.equal(held[name], shares.of(name, tensor)), (rank, name)


@pytest.mark.parametrize("scheme", ["none", "int8"])
def test_a_rank_reads_its_own_of_metas_shards(scheme, weights, tmp_path, monkeypatch):
    """All of them only of tables that it holds whole, and of columns that have one scale a row."""
    place = meta_shards(tmp_path / "model", weights)["name"]
    options = LoadOptions(place, device="cpu", dtype="float32", quantize=scheme)
    source, read = options.find(), MappedFile.tensor
    seen: list[tuple[str, str]] = []

    def reading(file: MappedFile, entry: TensorEntry) -> Tensor:
        seen.append((entry.name, file.path.name))
        return read(file, entry)

    shares = Shares(SPEC.family.cuts(SPEC.config), 1, 2)
    with source.open_weights() as files, monkeypatch.context() as patch:
        patch.setattr(MappedFile, "tensor", reading)
        prepared = Prepared(files, SPEC, options, options.placement(SPEC), None, Adapters(()))
        load_weights(prepared, repack=False, shares=shares)
    others = {name for name, file in seen if file < "consolidated.04.pth"}
    joined = {name for name in others if shard_dims(name) is not None}
    whole = {
        name for name in joined if not name.endswith((".wo.weight", "w2.weight", "_proj.weight"))
    }
    assert whole == {
        "text_model.tok_embeddings.weight",
        "text_model.learnable_embedding.weight",
        "vision_model.vision_encoder.conv1._linear.weight",
    }
    assert bool(joined - whole) == (scheme == "int8")
