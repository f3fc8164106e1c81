"""Open the programs of a folder that `mmchat export` wrote: whole, and made for this machine.

They are native code. Their hashes find damage, not malice: run only folders from people whom you
would let run programs here.
"""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import torch

from mmchat.catalog.spec import ModelSpec
from mmchat.checkpoints.checkpoint import open_checkpoint
from mmchat.checkpoints.exported_folder import PACKAGE_NAME, PROGRAM_NAME, ExportedFolder
from mmchat.errors import CheckpointError, ExportError, quoted
from mmchat.hardware.placement import Placement
from mmchat.hub.integrity import fault_of
from mmchat.models.base import ExportLimits
from mmchat.progress import ProgressCallback
from mmchat.runtime.aoti import AotiPrograms
from mmchat.runtime.eager import EagerRuntime
from mmchat.runtime.executorch import ExecutorchPrograms, executorch_version

_CAPABILITIES = ("DEFAULT", "NO AVX", "AVX2", "AVX512")  # each runs code of those before it


def processor_name() -> str:
    """Architecture and vector instructions of this machine: `x86_64 AVX2`."""
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"


def check_programs(folder: ExportedFolder) -> None:
    """Raises ExportError or CheckpointError unless the programs run here and are as written.

    Sizes of all files are compared, and the hashes of all but the weights, which `mmchat verify`
    reads.
    """
    _check_versions(folder)
    for name, expected in folder.files.items():
        digest = None if name.endswith(".safetensors") else expected.sha256
        if reason := fault_of(folder.path, name, expected.size, digest):
            shown = quoted(folder.path / name, 300)
            raise CheckpointError(f"{shown} {reason}; export again: {folder.again()} --force")


def open_programs(
    folder: ExportedFolder,
    spec: ModelSpec,
    placement: Placement,
    progress: ProgressCallback | None,
) -> EagerRuntime:
    """What runs the programs. progress("weights", done, of tensors). Raises ExportError."""
    record = folder.record
    build = spec.family.build()
    weights = {}  # an ExecuTorch program holds its own
    if record.format == "executorch":
        run, programs = ExecutorchPrograms(folder.path / PROGRAM_NAME), build.programs("executorch")
    else:
        weights = _weights(folder.path, placement.device, progress)
        run = AotiPrograms(folder.path / PACKAGE_NAME, weights, placement.device)
        programs = build.programs("aoti")
    limits = ExportLimits(record.max_seq_len, record.max_images)
    model = programs.model(spec.config, limits, placement.device, placement.dtype, run, weights)
    return EagerRuntime(model, placement.device)


def _check_versions(folder: ExportedFolder) -> None:
    record = folder.record
    name, made_by = "torch", record.torch
    if record.format == "executorch":
        name, made_by, here = "executorch", record.executorch, executorch_version()
    else:
        here = torch.__version__.split("+")[0]
    if made_by != here:
        raise ExportError(
            f"{quoted(folder.path, 300)} was exported with {name} {made_by}, and this is {name}"
            f" {here}; export again: {folder.again()}"
        )
    if record.processor and not _runs(record.processor, processor_name()):
        raise ExportError(
            f"{quoted(folder.path, 300)} was exported for a processor with {record.processor}, and"
            f" this one has {processor_name()}; export again here: {folder.again()}"
        )


def _runs(made_for: str, here: str) -> bool:
    """Whether code for one processor runs on another of the same architecture."""
    (machine, _, wanted), (own_machine, _, own) = made_for.partition(" "), here.partition(" ")
    if machine != own_machine or not {wanted, own} <= set(_CAPABILITIES):
        return made_for == here
    return _CAPABILITIES.index(wanted) <= _CAPABILITIES.index(own)


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
