"""A folder that `mmchat export` wrote: what it was exported for, and the command that redoes it."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmchat.checkpoints.manifest import MANIFEST_NAME, ExportRecord, FileRecord, read_manifest
from mmchat.errors import CheckpointError, ExportError, UsageError, quoted
from mmchat.hardware.placement import DTYPES

PACKAGE_NAME = "programs.pt2"  # of AOTInductor
PROGRAM_NAME = "programs.pte"  # of ExecuTorch


def kept_folder() -> Path:
    """Where `mmchat export --keep` writes; it may not be there."""
    import platformdirs

    return platformdirs.user_cache_path("mmchat", appauthor=False) / "models"


@dataclass(frozen=True)
class ExportedFolder:
    """A folder and its record: what it was exported for, what from (for messages), its files."""

    path: Path
    record: ExportRecord
    source: str
    files: Mapping[str, FileRecord]

    def again(self, **changes: Any) -> str:
        """The command that makes it anew with the options it was made with, but for `changes`."""
        record = self.record
        options: dict[str, object] = {"dtype": record.dtype, "quantize": record.scheme}
        keep = changes.pop("quantize_keep", record.keep)
        if record.format != "safetensors":
            options |= {"max_seq_len": record.max_seq_len, "max_images": record.max_images}
        is_kept = self.path.parent == kept_folder()
        place = "--keep" if is_kept else f"-o {shlex.quote(str(self.path))}"
        words = [f"mmchat export {shlex.quote(self.source)} --format {record.format} {place}"]
        words += [f"--quantize-keep {shlex.quote(part)}" for part in keep]
        words += [f"--adapter {shlex.quote(adapter)}" for adapter in record.adapters]
        if record.calibrate:
            words.append(f"--calibrate {shlex.quote(record.calibrate)}")
        if record.companion:
            words.append(f"--vision-tower {shlex.quote(record.companion)}")
        for name, value in (options | changes).items():
            if value != "none":
                words.append(f"--{name.replace('_', '-')} {shlex.quote(str(value))}")
        return " ".join(words)

    def _other(self, was: str, **changes: Any) -> str:
        """How it was exported, and the command that makes one that does."""
        return f"{quoted(self.path, 300)} was exported {was}; export again: {self.again(**changes)}"

    def check_scheme(self, quantize: str, keep: Collection[str] = ()) -> None:
        """The weights stay as they are, which "auto" means too. Raises UsageError."""
        record = self.record
        quantize = record.scheme if quantize == "auto" else quantize
        if quantize != record.scheme or tuple(keep) not in (record.keep, ()):
            was = f"with --quantize {record.scheme}, which cannot be changed"
            raise UsageError(self._other(was, quantize=quantize, quantize_keep=keep))

    def check_dtype(self, asked: str) -> None:
        """Raises UsageError for a dtype that is not the export's; "auto" takes that."""
        name = DTYPES.get(asked.lower())
        if name not in (None, self.record.dtype):
            raise UsageError(self._other(f"in {self.record.dtype}, not {name}", dtype=name))

    def context_limit(self, asked: int | None) -> int:
        """Positions to use, of those the programs were made for. Raises UsageError."""
        most = self.record.max_seq_len
        if asked is not None and asked > most:
            raise UsageError(self._other(f"for {most} positions, not {asked}", max_seq_len=asked))
        return asked or most

    def device_for(self, asked: str) -> str:
        """Where the programs run. Raises ExportError for a device of another type."""
        made_for = self.record.device
        if asked == "auto":
            return made_for
        if asked.partition(":")[0] != made_for:
            raise ExportError(self._other(f"for {made_for}, not {asked}", device=asked))
        return asked


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
    record = manifest.export
    return ExportedFolder(checkpoint, record, manifest.source or record.model, manifest.files)
