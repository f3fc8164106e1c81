"""Compile a model's programs ahead of time and pack them into one .pt2 file."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from mmchat.checkpoints.exported_folder import PACKAGE_NAME
from mmchat.errors import ExportError
from mmchat.models.base import ExportProgram
from mmchat.progress import ProgressCallback

# constants: the weights lie beside the package, once, for all programs. dynamic threads: as many
# as the machine that runs them has.
_OPTIONS = {
    "aot_inductor.package": True,
    "aot_inductor.package_constants_in_so": False,
    "cpp.dynamic_threads": True,
}


def compile_programs(
    folder: Path, programs: Sequence[ExportProgram], progress: ProgressCallback
) -> tuple[str, ...]:
    """Write programs.pt2; returns the names of its programs. Raises ExportError."""
    from torch._inductor.package.package import package_aoti

    files = {}
    with quiet():
        for number, program in enumerate(programs, start=1):
            progress(f"compiling {program.name}", number, len(programs))
            files[program.name] = _compile(program)
        package_aoti(str(folder / PACKAGE_NAME), files)
    return tuple(files)


def trace(program: ExportProgram) -> torch.export.ExportedProgram:
    """The graph of a program, free of Python: every shape outside its ranges is refused."""
    with torch.no_grad():
        return torch.export.export(
            program.module,
            program.args,
            dynamic_shapes=program.dynamic_shapes,
            strict=False,
            prefer_deferred_runtime_asserts_over_guards=True,
        )


def _compile(program: ExportProgram) -> Any:
    graph = trace(program).module(check_guards=False)
    try:
        with torch.no_grad():
            return torch._inductor.aot_compile(graph, program.args, options=dict(_OPTIONS))
    except Exception as error:
        if type(error).__name__ not in ("CppCompileError", "InvalidCxxCompiler"):
            raise
        reason = str(error).strip().splitlines()[0]
        raise ExportError(
            f"the C++ compiler failed on program {program.name!r}: {reason}; a working g++ or clang"
            " is needed to export, not to run"
        ) from None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """What the compilers say of their own code is not for the user to mend."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
