"""Open a folder that `mmchat export` wrote: is it whole, and made for what is asked?

The programs of such a folder are native code. Their hashes find damage, not malice: run only
folders from people whom you would let run programs here.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mmchat.catalog.params_file import ModelParams
from mmchat.checkpoints.checkpoint import open_checkpoint
from mmchat.checkpoints.manifest import MANIFEST_NAME, ExportRecord, FileRecord, read_manifest
from mmchat.checkpoints.names import open_inside
from mmchat.errors import CheckpointError, ExportError, UsageError, quoted
from mmchat.hardware.placement import Placement, choose_placement
from mmchat.models.base import ExportLimits
from mmchat.progress import ProgressCallback
from mmchat.runtime.aoti import PACKAGE_NAME, AotiPrograms
from mmchat.runtime.eager import EagerRuntime
from mmchat.runtime.executorch import PROGRAM_NAME, ExecutorchPrograms, executorch_version

# the part of a family that has the programs of a format
FAMILY_EXPORTS = {"aoti": "export", "executorch": "export_portable"}
_CAPABILITIES = ("DEFAULT", "NO AVX", "AVX2", "AVX512")  # each runs code of those before it


@dataclass(frozen=True)
class ExportedFolder:
    """A folder and the record of what it was exported for. source: what from, for messages."""

    path: Path
    record: ExportRecord
    source: str

    def again(self, **changes: Any) -> str:
        """The command that makes it anew with the options it was made with, but for `changes`."""
        record = self.record
        options: dict[str, object] = {"dtype": record.dtype, "quantize": record.scheme}
        keep = changes.pop("quantize_keep", record.keep)
        if record.format != "safetensors":
            options |= {"max_seq_len": record.max_seq_len, "max_images": record.max_images}
        source, folder = shlex.quote(self.source), shlex.quote(str(self.path))
        words = [f"mmchat export {source} --format {shlex.quote(record.format)} -o {folder}"]
        words += [f"--quantize-keep {shlex.quote(part)}" for part in keep]
        for name, value in (options | changes).items():
            if value != "none":
                words.append(f"--{name.replace('_', '-')} {shlex.quote(str(value))}")
        return " ".join(words)

    def context_limit(self, asked: int | None) -> int:
        """Positions to use, of those the programs were made for. Raises UsageError."""
        most = self.record.max_seq_len
        if asked is not None and asked > most:
            raise UsageError(
                f"{quoted(self.path, 300)} was exported for {most} positions, not {asked}; export"
                f" again: {self.again(max_seq_len=asked)}"
            )
        return asked or most

    def check_options(self, quantize: str, keep: Collection[str]) -> None:
        """The weights are quantised already, or stay as they are. Raises UsageError."""
        record = self.record
        asked = (quantize, tuple(keep))
        if asked not in ((record.scheme, record.keep), ("none", ()), (record.scheme, ())):
            command = self.again(quantize=quantize, quantize_keep=keep)
            raise UsageError(
                f"{quoted(self.path, 300)} was exported with --quantize {record.scheme}, which"
                f" cannot be changed; export again: {command}"
            )

    def check_dtype(self, placement: Placement) -> None:
        """Raises UsageError unless `placement` has the dtype of the export."""
        name = str(placement.dtype).removeprefix("torch.")
        if name != self.record.dtype:
            raise UsageError(
                f"{quoted(self.path, 300)} was exported in {self.record.dtype}, not {name}; export"
                f" again: {self.again(dtype=name)}"
            )


def exported_folder(checkpoint: Path | None) -> ExportedFolder | None:
    """What a folder was exported for; None if `mmchat export` did not write it.

    Raises CheckpointError if its record is damaged.
    """
    if checkpoint is None or not checkpoint.is_dir():
        return None
    manifest = read_manifest(checkpoint / MANIFEST_NAME)
    if manifest is None or manifest.export is None:
        found = any((checkpoint / name).exists() for name in (PACKAGE_NAME, PROGRAM_NAME))
        if found and manifest is None:
            raise CheckpointError(
                f"{quoted(checkpoint, 300)} holds exported programs but no {MANIFEST_NAME}, which"
                " says what for; write it with mmchat export"
            )
        return None
    return ExportedFolder(checkpoint, manifest.export, manifest.source or manifest.export.model)


def processor_name() -> str:
    """Architecture and vector instructions of this machine: `x86_64 AVX2`."""
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"


def open_exported(
    folder: ExportedFolder,
    params: ModelParams,
    device: str,
    dtype: str,
    progress: ProgressCallback | None = None,
) -> tuple[EagerRuntime, Placement]:
    """The runtime of an exported folder, and where it runs. progress("weights", done, of tensors).

    Raises ExportError, CheckpointError, DeviceError, UsageError.
    """
    record = folder.record
    placement = _placement(folder, device, dtype)
    _check_versions(folder)
    _check_files(folder)
    limits = ExportLimits(record.max_seq_len, record.max_images)
    weights = {}  # an ExecuTorch program holds its own
    if record.format == "executorch":
        programs = ExecutorchPrograms(folder.path / PROGRAM_NAME)
    else:
        weights = _weights(folder.path, placement.device, progress)
        programs = AotiPrograms(folder.path / PACKAGE_NAME, weights, placement.device)
    model = params.family.resolve(FAMILY_EXPORTS[record.format]).ExportedModel(
        params.config, limits, placement.device, placement.dtype, programs, weights
    )
    return EagerRuntime(model, placement.device), placement


def _placement(folder: ExportedFolder, device: str, dtype: str) -> Placement:
    record = folder.record
    wanted = record.device if device == "auto" else device
    found = choose_placement(wanted, record.dtype if dtype == "auto" else dtype, 0)
    if found.device.type != record.device:
        raise ExportError(
            f"{quoted(folder.path, 300)} was exported for {record.device}, not {device}; export"
            f" again: {folder.again()} --device {device}"
        )
    folder.check_dtype(found)
    return Placement(found.device, found.dtype, "as exported")


def _check_versions(folder: ExportedFolder) -> None:
    record, here = folder.record, torch.__version__.split("+")[0]
    if record.format == "executorch":
        _check_executorch(folder)
    elif record.torch != here:
        raise ExportError(
            f"{quoted(folder.path, 300)} was exported with torch {record.torch}, and this is torch"
            f" {here}; export again: {folder.again()}"
        )
    if record.processor and not _runs(record.processor, processor_name()):
        raise ExportError(
            f"{quoted(folder.path, 300)} was exported for a processor with {record.processor}, and"
            f" this one has {processor_name()}; export again here: {folder.again()}"
        )


def _check_executorch(folder: ExportedFolder) -> None:
    made_by, here = folder.record.executorch, executorch_version()
    if made_by != here:
        raise ExportError(
            f"{quoted(folder.path, 300)} was exported with executorch {made_by}, and this is"
            f" executorch {here}; export again: {folder.again()}"
        )


def _runs(made_for: str, here: str) -> bool:
    """Whether code for one processor runs on another of the same architecture."""
    (machine, _, wanted), (own_machine, _, own) = made_for.partition(" "), here.partition(" ")
    if machine != own_machine or not {wanted, own} <= set(_CAPABILITIES):
        return made_for == here
    return _CAPABILITIES.index(wanted) <= _CAPABILITIES.index(own)


def _check_files(folder: ExportedFolder) -> None:
    """Sizes of all files, and the hashes of all but the weights (`mmchat verify` reads those)."""
    manifest = read_manifest(folder.path / MANIFEST_NAME)
    for name, expected in (manifest.files if manifest else {}).items():
        if reason := _fault(folder.path, name, expected):
            shown = quoted(folder.path / name, 300)
            raise CheckpointError(f"{shown} {reason}; export again: {folder.again()}")


def _fault(folder: Path, name: str, expected: FileRecord) -> str | None:
    try:
        with open_inside(folder, name) as opened:
            size = os.fstat(opened.fileno()).st_size
            if size != expected.size:
                return f"has {size:,} bytes, {expected.size:,} are recorded"
            if name.endswith(".safetensors"):
                return None
            digest = hashlib.file_digest(opened, "sha256").hexdigest()
            return None if digest == expected.sha256 else "is not what was written"
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read: {error.strerror}"


def _weights(
    folder: Path, device: torch.device, progress: ProgressCallback | None
) -> dict[str, Any]:
    """Every stored tensor, mapped from the file on the CPU, copied to another device."""
    found = {}
    with open_checkpoint(folder, merge_rules=None) as files:
        for done, name in enumerate(files.entries, start=1):
            found[name] = files.read(name).to(device)
            if progress:
                progress("weights", done, len(files.entries))
    return found
