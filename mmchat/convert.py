"""Translate a checkpoint between Meta's format and the Hub's: tensor by tensor, compared, whole.

The new folder appears under its name only when everything in it was read back and found equal.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from mmchat.catalog.find import ModelParams, ModelSource, find_model, load_params
from mmchat.catalog.params_file import params_document
from mmchat.checkpoints.checkpoint import Checkpoint, open_checkpoint
from mmchat.checkpoints.manifest import (
    MANIFEST_NAME,
    FileRecord,
    Manifest,
    sha256_of,
    write_manifest,
)
from mmchat.checkpoints.writers import (
    Piece,
    papers_beside,
    write_json,
    write_pth,
    write_safetensors,
)
from mmchat.errors import CheckpointError, DiskError, UsageError, quoted
from mmchat.storage.staged_folder import staged_folder
from mmchat.tokenizers import open_tokenizer

Format = Literal["hf", "meta"]
# progress(stage, tensors done, tensors in all); stages "writing" and "comparing"
Progress = Callable[[str, int, int], None]

META_NAME = "consolidated.00.pth"
_NO_PROGRESS: Progress = lambda stage, done, total: None  # noqa: E731, ARG005


def convert(
    source: ModelSource,
    target: Format,
    folder: Path,
    *,
    max_shard_bytes: int = 5 * 10**9,
    progress: Progress = _NO_PROGRESS,
) -> list[str]:
    """Write the model of `source` to the new `folder` in the `target` format; returns notes.

    Peak memory is that of one tensor. Raises UsageError, CheckpointError, DiskError.
    """
    params = source.params
    if source.checkpoint is None:
        raise CheckpointError(f"{params.name}: its weights are needed to convert it")
    tokenizer = source.tokenizer_file()
    papers_beside(source.checkpoint)  # raises now, not after hours
    _check_free(folder)
    rules = params.family.resolve("weights").shard_dims
    with open_checkpoint(source.checkpoint, merge_rules=rules) as opened:
        if opened.format == target:
            raise UsageError(f"{params.name} is in the {target} format already")
        pieces = _pieces(opened, params)
        _check_space(folder, sum(piece.num_bytes for piece in pieces))
        with staged_folder(folder) as work:
            count = _Counter("writing", len(pieces), progress)
            if target == "hf":
                write_safetensors(work, pieces, max_shard_bytes, count)
            else:
                write_pth(work / META_NAME, pieces, count)
            _compare(work, pieces, params, _Counter("comparing", len(pieces), progress))
            source.copy_papers(work)
            notes = _describe(work, target, params, pieces[0].dtype, tokenizer)
            _record(work, source.checkpoint)
    return notes


class _Counter:
    def __init__(self, stage: str, total: int, progress: Progress) -> None:
        self._stage, self._total, self._progress = stage, total, progress
        self._done = 0

    def __call__(self, _piece: Piece) -> None:
        self._done += 1
        self._progress(self._stage, self._done, self._total)


def _pieces(opened: Checkpoint, params: ModelParams) -> list[Piece]:
    """What is written, in an order that reads the source's files forwards."""
    weights = params.family.resolve("weights")
    entries = weights.check_weights(opened, params.config)
    rules = weights.meta_rules(params.config)
    if opened.format == "meta":
        shapes = weights.hf_shapes(params.config)
        pieces = [_to_hub(opened, rule, shapes, entries) for rule in rules]
    else:
        shapes = weights.meta_shapes(params.config)
        pieces = [piece for rule in rules for piece in _to_meta(opened, rule, shapes, entries)]
    order = {name: index for index, name in enumerate(opened.entries)}
    return [piece for _, piece in sorted(pieces, key=lambda pair: order[pair[0]])]


def _to_hub(opened: Checkpoint, rule: Any, shapes: Any, entries: Any) -> tuple[str, Piece]:
    def make() -> Any:
        return rule.transform.forward([opened.read(name) for name in rule.sources])

    def done() -> None:
        for name in rule.sources:
            opened.release(name)

    dtype = entries[rule.sources[0]].dtype
    return rule.sources[0], Piece(rule.target, dtype, shapes[rule.target], make, done)


def _to_meta(
    opened: Checkpoint, rule: Any, shapes: Any, entries: Any
) -> Iterator[tuple[str, Piece]]:
    stored = entries[rule.target].name
    for index, name in enumerate(rule.sources):

        def make(index: int = index) -> Any:
            return rule.transform.inverse(opened.read(stored))[index]

        def done() -> None:
            opened.release(stored)

        yield stored, Piece(name, entries[rule.target].dtype, shapes[name], make, done)


def _compare(work: Path, pieces: list[Piece], params: ModelParams, count: _Counter) -> None:
    """Read the new files back: names, shapes and every bit."""
    import torch

    with open_checkpoint(work, merge_rules=lambda _: None) as written:
        params.family.resolve("weights").check_weights(written, params.config)
        for piece in pieces:
            found, wanted = written.read(piece.name), piece.make()
            bits = [t.contiguous().reshape(-1).view(torch.uint8) for t in (found, wanted)]
            if not torch.equal(*bits):
                raise CheckpointError(
                    f"tensor {quoted(piece.name)} was not written as it is; is the disk faulty?"
                )
            written.release(piece.name)
            piece.done()
            count(piece)


# The folder and the files beside the weights


def _check_free(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{quoted(folder, 300)} is there already; name a new folder with --output")
    if not folder.parent.is_dir():
        raise DiskError(f"the folder {quoted(folder.parent, 300)} does not exist")


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder.parent).free
    if needed * 1.01 > free:
        raise DiskError(
            f"{needed:,} bytes are needed in {quoted(folder.parent, 300)}, and {free:,} are free;"
            " choose another disk with --output"
        )


def _describe(
    work: Path, target: Format, params: ModelParams, dtype: str, tokenizer_path: Path
) -> list[str]:
    """Write the JSON files that say what the model is; returns what the user should know."""
    documents = params.family.resolve("documents")
    generation = asdict(params.generation)
    if target == "hf":
        tokenizer = open_tokenizer(tokenizer_path)
        stops = params.family.resolve("prompt").stop_ids(tokenizer)
        if params.chat_format == "base":
            stops = {tokenizer.special_id("<|end_of_text|>")}
        token_ids = {
            "bos_token_id": tokenizer.special_id("<|begin_of_text|>"),
            "eos_token_id": sorted(stops),
            "pad_token_id": tokenizer.special_id("<|finetune_right_pad_id|>"),
        }
        files = documents.hf_documents(
            params.config, params.image_processor, dtype, generation, token_ids
        )
        for name, content in files.items():
            write_json(work / name, content)
        return []
    write_json(work / "params.json", documents.meta_params(params.config))
    with contextlib.suppress(Exception):
        found = load_params(work / "params.json")
        if (found.config, found.chat_format) == (params.config, params.chat_format):
            return []
    (work / "params.json").unlink()
    write_json(work / "params.json", params_document(params))
    return ["params.json is in mmchat's own form: Meta's cannot say what this model is"]


def _record(work: Path, checkpoint: Path) -> None:
    """Check that the folder is understood, then write the manifest."""
    find_model(work)
    records = {
        path.name: FileRecord(path.stat().st_size, sha256_of(path), None, True)
        for path in sorted(work.iterdir())
    }
    write_manifest(work / MANIFEST_NAME, Manifest(records, source=os.fspath(checkpoint)))
