"""Run programs that ExecuTorch lowered, from a .pte file that holds their weights too."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmchat.errors import ExportError, MissingExtra, quoted

PROGRAM_NAME = "programs.pte"


def missing_extra(error: ImportError) -> MissingExtra:
    """What to say when ExecuTorch cannot be imported."""
    reason = " ".join(str(error).split())
    return MissingExtra(
        f"ExecuTorch cannot be imported ({reason}); install it: pip install 'mmchat[executorch]'"
    )


def executorch_version() -> str:
    """The version that is installed. Raises MissingExtra."""
    try:
        return metadata.version("executorch").split("+")[0]
    except metadata.PackageNotFoundError as error:
        raise missing_extra(error) from None


class ExecutorchPrograms:
    """The methods of a .pte file: call with a name and a flat list of arguments.

    A method is loaded when it is first called; XNNPACK then packs its weights in memory. The native
    library of `executorch.runtime` is called directly: its Python part imports the compiler, which
    takes seconds.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._methods: dict[str, Any] = {}
        with self._refusing("the programs"):
            self._library = _library()
            self._program = self._library._load_program(
                str(path), program_verification=self._library.Verification.InternalConsistency
            )

    def __call__(self, name: str, tensors: Sequence[Tensor]) -> list[Tensor]:
        if name not in self._methods:
            with self._refusing(f"program {quoted(name)}"):
                self._methods[name] = self._program.load_method(name)
        return self._methods[name]([tensor.contiguous() for tensor in tensors])

    @contextlib.contextmanager
    def _refusing(self, what: str) -> Iterator[None]:
        said: list[str] = []
        try:
            with _native_messages(said):
                yield
        except (RuntimeError, IndexError) as error:
            reason = next((line for line in reversed(said) if line), str(error).strip())
            raise ExportError(
                f"{what} of {quoted(self._path, 300)} cannot be loaded:"
                f" {reason.splitlines()[0]}; export the model again"
            ) from None


def _library() -> Any:
    try:
        return import_module("executorch.extension.pybindings._portable_lib")
    except ImportError as error:
        raise missing_extra(error) from None


@contextlib.contextmanager
def _native_messages(lines: list[str]) -> Iterator[None]:
    """Collect what native code writes to stderr: how it finds out about the processor, and why it
    fails."""
    with contextlib.ExitStack() as stack:
        kept = stack.enter_context(tempfile.TemporaryFile())
        try:
            sys.stderr.flush()
            saved = os.dup(2)
        except (OSError, ValueError, AttributeError):  # there is no stderr
            yield
            return
        os.dup2(kept.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(saved, 2)
            os.close(saved)
            kept.seek(0)
            lines += kept.read().decode(errors="replace").splitlines()
