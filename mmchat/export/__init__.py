"""Write a model in a form that starts at once and needs neither its checkpoint nor a compiler."""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from mmchat.catalog.source import ModelSource
from mmchat.checkpoints.manifest import (
    MANIFEST_NAME,
    ExportRecord,
    FileRecord,
    Manifest,
    read_manifest,
    sha256_of,
    write_manifest,
)
from mmchat.checkpoints.writers import papers_beside
from mmchat.errors import CheckpointError, DiskError, UsageError, quoted
from mmchat.export.hub_folder import HubExport
from mmchat.export.loaded import LoadedExport
from mmchat.export.plan import ExportPlan as ExportPlan
from mmchat.hardware.memory import peak_memory
from mmchat.hardware.placement import dtype_name
from mmchat.progress import ProgressCallback
from mmchat.storage.safe_files import sync
from mmchat.storage.space import check_space
from mmchat.storage.staged_folder import staged_folder

_PAPERS = 64 * 10**6  # bytes, for what comes with the weights


@dataclass(frozen=True)
class ExportReport:
    """What was written: bytes by file. difference: of logits, as a share of the largest one.

    dtype: of the activations, and of the weights that no scheme holds; None: as in the checkpoint.
    remarks: of samples by which it was calibrated.
    """

    folder: Path
    sizes: dict[str, int]
    difference: float | None
    seconds: float
    peak_memory: int
    dtype: str | None
    remarks: Sequence[str] = ()


def export_model(plan: ExportPlan, progress: ProgressCallback = lambda *_: None) -> ExportReport:
    """Write the model of `plan` to its folder, and compare the two before the folder appears.

    Raises UsageError, ParamsError, CheckpointError, DeviceError, MemoryError_, ExportError,
    DiskError.
    """
    begin = time.perf_counter()
    source = replace(plan.model.find(), kept=None)
    plan.check_family(source.spec)
    replaces = _replaces(plan, source)
    if source.checkpoint:
        papers_beside(source.checkpoint)  # raises now, not after minutes
    with _opened(plan, source, progress) as model:
        check_space(plan.folder, model.num_bytes + _PAPERS, f"the export of {source.spec.name}")
        with staged_folder(plan.folder, replace=replaces) as work:
            source.copy_papers(work)
            record = model.write(work, progress)
            _write_manifest(work, record, source)
            difference = model.compare(work, progress)
            sizes = {path.name: path.stat().st_size for path in sorted(work.iterdir())}
        peak = peak_memory(model.device)
    dtype = record.dtype if record else None
    seconds = time.perf_counter() - begin
    return ExportReport(plan.folder, sizes, difference, seconds, peak, dtype, model.remarks)


@contextmanager
def _opened(
    plan: ExportPlan, source: ModelSource, progress: ProgressCallback
) -> Iterator[HubExport | LoadedExport]:
    """What `plan` writes, loaded or open in the block, so that what can fail fails before."""
    made_by_us = source.exported
    if made_by_us and (content := _not_a_checkpoint(made_by_us.record, plan)):
        again = quoted(made_by_us.source, 300)
        raise UsageError(f"{quoted(made_by_us.path, 300)} holds {content}; export {again} instead")
    if plan.format != "hf":
        yield LoadedExport(plan, source, progress)
        return
    if source.checkpoint is None:
        raise CheckpointError(f"{source.spec.name}: its weights are needed to export it")
    with source.open_weights() as files, source.open_adapters() as adapters:
        yield HubExport(plan, source, files, adapters)


def _not_a_checkpoint(record: ExportRecord, plan: ExportPlan) -> str:
    """Why an exported folder cannot be exported as `plan` says; empty if it can."""
    if record.programs:
        return "programs"
    if plan.format == "hf":
        if record.scheme != "none":
            return f"weights in {record.scheme}, which the Hub's checkpoints have no form for"
        is_joined = record.device != "cpu"  # by loading
        return f"weights that are joined for {record.device}" if is_joined else ""
    asked = plan.model
    dtype = "float32" if plan.format == "executorch" else str(asked.dtype)
    if plan.calibrate or plan.format == "executorch":  # which round what is not rounded yet
        fits = record.scheme == "none"
    else:
        fits = asked.quantize in ("none", record.scheme)
        fits = fits and asked.quantize_keep in ((), record.keep)
    if fits and (dtype == "auto" or dtype_name(dtype) == record.dtype):
        return ""
    return f"weights in {record.dtype} with --quantize {record.scheme}, which stay so"


def _write_manifest(work: Path, record: ExportRecord | None, source: ModelSource) -> None:
    """The commit record, when everything else is on the disk."""
    records = {}
    for path in sorted(work.iterdir()):
        sync(path)
        records[path.name] = FileRecord(path.stat().st_size, sha256_of(path), None, True)
    manifest = Manifest(records, source=source.known_as, export=record)
    write_manifest(work / MANIFEST_NAME, manifest)


def _replaces(plan: ExportPlan, source: ModelSource) -> bool:
    """Whether an export of `source` replaces what is there. Raises UsageError, DiskError."""
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
    _check_not_precious(plan, source)
    if not plan.force and not _is_ours(folder):
        raise UsageError(
            f"{quoted(folder, 300)} holds what mmchat export did not write, or what was changed"
            " since; name a new folder with --output, or give --force to replace it"
        )
    return True


def _check_not_precious(plan: ExportPlan, source: ModelSource) -> None:
    """Not even --force replaces a folder that holds home, what is read, or where one stands."""
    folder, params = plan.folder, plan.model.params_path
    inside = [
        *(Path.home(), Path.cwd(), source.checkpoint, source.tokenizer, source.companion),
        *(adapter.folder for adapter in source.adapters),
        *(plan.calibrate, Path(params) if params else None),
    ]
    for path in filter(None, inside):
        if path.resolve().is_relative_to(folder.resolve()):
            raise UsageError(
                f"{quoted(folder, 300)} holds {quoted(path, 300)} and is not replaced; name another"
                " folder with --output"
            )


def _is_ours(folder: Path) -> bool:
    """Whether an export wrote all that is in the folder, and nobody changed it since.

    The record is the last file that an export writes, so none of the others is newer.
    """
    record = folder / MANIFEST_NAME
    try:
        manifest = read_manifest(record)
    except CheckpointError:
        return False
    if manifest is None or manifest.repo is not None:  # the record of a download names its own
        return False
    if manifest.export is None and "config.json" not in manifest.files:  # as the Hub's folders have
        return False
    written = record.stat().st_mtime_ns
    for path in folder.iterdir():
        known, found = manifest.files.get(path.name), path.lstat()
        is_whole = known and stat.S_ISREG(found.st_mode) and found.st_size == known.size
        if path != record and not (is_whole and found.st_mtime_ns <= written):
            return False
    return True
