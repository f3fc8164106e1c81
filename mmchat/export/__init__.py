"""Write a model in a form that starts at once and needs neither its checkpoint nor a compiler."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmchat.catalog.find import ModelSource, find_params
from mmchat.catalog.params_file import params_document
from mmchat.checkpoints.manifest import (
    MANIFEST_NAME,
    ExportRecord,
    FileRecord,
    Manifest,
    read_manifest,
    sha256_of,
    write_manifest,
)
from mmchat.checkpoints.writers import papers_beside, write_json
from mmchat.errors import CheckpointError, DiskError, UsageError, quoted
from mmchat.export.plan import DEFAULT_MAX_SEQ_LEN, ExportPlan
from mmchat.export.token_table import write_token_table
from mmchat.storage.safe_files import sync
from mmchat.storage.staged_folder import staged_folder

if TYPE_CHECKING:
    from mmchat.loading.loader import LoadedModel

# progress(stage, done, total)
Progress = Callable[[str, int, int], None]

__all__ = ["ExportPlan", "ExportReport", "export_model"]

_NO_PROGRESS: Progress = lambda stage, done, total: None  # noqa: E731, ARG005


@dataclass(frozen=True)
class ExportReport:
    """What was written: bytes by file. difference: of logits, as a share of the largest one."""

    folder: Path
    record: ExportRecord
    sizes: dict[str, int]
    difference: float | None
    seconds: float
    peak_memory: int


def export_model(plan: ExportPlan, progress: Progress = _NO_PROGRESS) -> ExportReport:
    """Load the model of `plan`, write it to its folder, and compare the two before it appears.

    Raises UsageError, ParamsError, CheckpointError, DeviceError, MemoryError_, ExportError,
    DiskError.
    """
    begin = time.perf_counter()
    source = plan.model.find()
    replaces = _check_target(plan, source)
    if source.checkpoint:
        papers_beside(source.checkpoint)  # raises now, not after minutes
    made_by_us = source.exported
    if made_by_us and made_by_us.record.programs:
        source_name = quoted(made_by_us.source, 300)
        raise UsageError(
            f"{quoted(made_by_us.path, 300)} holds programs; export {source_name} instead"
        )
    if plan.format == "executorch":
        from mmchat.runtime.executorch import executorch_version

        executorch_version()  # raises MissingExtra
    original = _load(plan, source, progress)
    record = _record(plan, original)
    _check_space(plan.folder, original)
    with staged_folder(plan.folder, replace=replaces) as work:
        programs = _write(work, plan, original, record, progress)
        record = replace(record, programs=programs)
        _describe(work, source, original)
        if programs:
            write_token_table(work, original.tokenizer)
        _write_manifest(work, record, source)
        difference = _check(work, original, record, progress) if programs else None
        sizes = {path.name: path.stat().st_size for path in sorted(work.iterdir())}
    seconds = time.perf_counter() - begin
    return ExportReport(plan.folder, record, sizes, difference, seconds, original.peak_memory())


def _load(plan: ExportPlan, source: ModelSource, progress: Progress) -> LoadedModel:
    from mmchat.loading.loader import load

    most = source.params.config.text_config.max_position_embeddings
    options = replace(
        plan.model,
        max_seq_len=plan.model.max_seq_len or min(DEFAULT_MAX_SEQ_LEN, most),
        progress=lambda stage, done, total: progress(
            "loading" if stage == "weights" else stage, done, total
        ),
    )
    if plan.format != "executorch":
        return load(options, source)
    loaded = load(replace(options, dtype="float32", quantize="none", quantize_keep=()), source)
    if plan.model.plan.scheme is None:
        return loaded
    from mmchat.export.executorch import quantize_linears

    progress("quantising", 0, 1)
    model: Any = loaded.runtime.model  # type: ignore[attr-defined]
    quantize_linears(model, plan.model.plan)
    return replace(loaded, options=options)


def _record(plan: ExportPlan, original: LoadedModel) -> ExportRecord:
    import torch

    from mmchat.loading.programs import processor_name
    from mmchat.runtime.executorch import executorch_version

    return ExportRecord(
        format=plan.format,
        model=original.params.name,
        dtype=str(original.dtype).removeprefix("torch."),
        scheme=original.options.quantize,
        keep=original.options.plan.keep,
        torch=torch.__version__.split("+")[0],
        device=original.device.type,
        executorch=executorch_version() if plan.format == "executorch" else "",
        processor=processor_name() if plan.format == "aoti" else "",
        max_seq_len=original.max_seq_len,
        max_images=plan.max_images,
        programs=(),
    )


def _write(
    work: Path, plan: ExportPlan, original: LoadedModel, record: ExportRecord, progress: Progress
) -> tuple[str, ...]:
    """Weights and programs; returns the names of the programs."""
    from mmchat.export.aoti import compile_programs
    from mmchat.export.executorch import lower_programs
    from mmchat.export.weights import model_tensors, write_tensors
    from mmchat.loading.programs import FAMILY_EXPORTS
    from mmchat.models.base import ExportLimits

    model: Any = original.runtime.model  # type: ignore[attr-defined]
    limits = ExportLimits(record.max_seq_len, record.max_images)
    if plan.format == "executorch":
        family_export = original.params.family.resolve(FAMILY_EXPORTS[plan.format])
        return lower_programs(work, family_export, model, limits, progress)
    tensors = model_tensors(model)
    if plan.format == "safetensors":
        stored = model.state_dict()
        tensors = {name: tensor for name, tensor in tensors.items() if name in stored}
    write_tensors(work, tensors, lambda done, total: progress("writing the weights", done, total))
    if plan.format == "safetensors":
        return ()
    return compile_programs(
        work,
        original.params.family.resolve(FAMILY_EXPORTS[plan.format]),
        model,
        limits,
        lambda name, number, count: progress(f"compiling {name}", number, count),
    )


def _describe(work: Path, source: ModelSource, original: LoadedModel) -> None:
    """Params, tokenizer and licence: all that is needed to run the folder alone."""
    params = source.params
    pictures = replace(params.image_processor, alpha=original.processor.alpha)
    write_json(work / "params.json", params_document(replace(params, image_processor=pictures)))
    source.copy_papers(work)


def _write_manifest(work: Path, record: ExportRecord, source: ModelSource) -> None:
    """The commit record, when everything else is on the disk."""
    records = {}
    for path in sorted(work.iterdir()):
        sync(path)
        records[path.name] = FileRecord(path.stat().st_size, sha256_of(path), None, True)
    manifest = Manifest(records, source=_origin(source), export=record)
    write_manifest(work / MANIFEST_NAME, manifest)


def _origin(source: ModelSource) -> str:
    """What to name in order to export the model again."""
    known = find_params(source.params.name)
    is_known = known is not None and known.source == source.params.source
    return source.params.name if is_known else str(source.checkpoint)


def _check(work: Path, original: LoadedModel, record: ExportRecord, progress: Progress) -> float:
    from mmchat.export.check import check_same
    from mmchat.loading.loader import load
    from mmchat.loading.options import LoadOptions

    progress("comparing with the model", 0, 1)
    exported = load(LoadOptions(work, device=str(original.device)))
    return check_same(original, exported, record.max_images)


# What must not be overwritten


def _check_target(plan: ExportPlan, source: ModelSource) -> bool:
    """Whether the folder replaces one that is there. Raises UsageError, DiskError."""
    folder = plan.folder
    if not folder.parent.is_dir():
        raise DiskError(f"the folder {quoted(folder.parent, 300)} does not exist")
    if not os.access(folder.parent, os.W_OK):
        raise DiskError(f"no permission to write in {quoted(folder.parent, 300)}")
    if not folder.exists() and not folder.is_symlink():
        return False
    if folder.is_symlink() or not folder.is_dir():
        raise UsageError(f"{quoted(folder, 300)} is no folder; name another with --output")
    if not any(folder.iterdir()):
        return False
    _check_not_precious(folder, source)
    if not plan.force and not _is_ours(folder):
        raise UsageError(
            f"{quoted(folder, 300)} holds what mmchat export did not write; name a new folder with"
            " --output, or give --force to replace it"
        )
    return True


def _check_not_precious(folder: Path, source: ModelSource) -> None:
    """Not even --force replaces a folder that holds home, the model, or where the user stands."""
    inside = [Path.home(), Path.cwd(), source.checkpoint, source.tokenizer]
    for path in filter(None, inside):
        if path.resolve().is_relative_to(folder.resolve()):
            raise UsageError(
                f"{quoted(folder, 300)} holds {quoted(path, 300)} and is not replaced; name another"
                " folder with --output"
            )


def _is_ours(folder: Path) -> bool:
    """Whether an export wrote all that is in the folder."""
    try:
        manifest = read_manifest(folder / MANIFEST_NAME)
    except CheckpointError:
        return False
    if manifest is None or manifest.export is None:
        return False
    return {path.name for path in folder.iterdir()} <= {*manifest.files, MANIFEST_NAME}


def _check_space(folder: Path, original: LoadedModel) -> None:
    from mmchat.export.weights import model_tensors

    model: Any = original.runtime.model  # type: ignore[attr-defined]
    needed = sum(t.numel() * t.element_size() for t in model_tensors(model).values())
    free = shutil.disk_usage(folder.parent).free
    if needed * 1.01 + 64e6 > free:
        raise DiskError(
            f"{needed:,} bytes are needed in {quoted(folder.parent, 300)}, and {free:,} are free;"
            " choose another disk with --output"
        )
