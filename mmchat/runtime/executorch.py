"""Run programs that ExecuTorch lowered, from a .pte file that holds their weights too."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Sequence
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

from torch import Tensor

from mmchat.errors import ExportError, MissingExtra, quoted


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
            self._load(name)
        return self._methods[name]([tensor.contiguous() for tensor in tensors])

    def _load(self, name: str) -> None:
        """Methods named alike up to the first "_" hold the same weights: the last one stays."""
        kind = name.split("_")[0]
        self._methods = {n: m for n, m in self._methods.items() if n.split("_")[0] != kind}
        with self._refusing(f"program {quoted(name)}"):
            self._methods[name] = self._program.load_method(name)

    @contextlib.contextmanager
    def _refusing(self, what: str) -> Iterator[None]:
        """Keep what the library logs: of the processor it finds, and why it fails."""
        said = io.StringIO()
        try:
            with contextlib.redirect_stderr(said):
                yield
        except RuntimeError as error:
            first = (said.getvalue().strip() or str(error)).splitlines()[0]
            raise ExportError(
                f"{what} of {quoted(self._path, 300)} cannot be loaded: {first}; make it again"
                " with mmchat export"
            ) from None


def _library() -> Any:
    try:
        return import_module("executorch.extension.pybindings._portable_lib")
    except ImportError as error:
        raise missing_extra(error) from None
