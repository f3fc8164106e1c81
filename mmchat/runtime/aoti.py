"""Run programs that AOTInductor compiled, from a .pt2 package, on weights that they share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mmchat.errors import ExportError, quoted
from mmchat.quant import operators as _operators  # noqa: F401  the programs call torch.ops.mmchat

if TYPE_CHECKING:
    from torch._C._aoti import AOTIModelPackageLoader

CPU = torch.device("cpu")
WEIGHT_PREFIX = "model."  # a program holds the model as its attribute `model`


class AotiPrograms:
    """The programs of a package: call with a name and a flat list of arguments.

    weights: by the model's own names, on the device; they are used where they lie, not copied.
    A program is loaded when it is first called.
    """

    def __init__(self, package: Path, weights: Mapping[str, Tensor], device: torch.device) -> None:
        self._package = package
        self._weights = weights
        self._device = device
        self._loaded: dict[str, AOTIModelPackageLoader] = {}

    def __call__(self, name: str, tensors: Sequence[Tensor]) -> list[Tensor]:
        if name not in self._loaded:
            self._loaded[name] = self._load(name)
        return self._loaded[name].boxed_run(list(tensors))

    def _load(self, name: str) -> AOTIModelPackageLoader:
        try:
            loader = open_program(self._package, name, self._device)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            raise ExportError(
                f"program {quoted(name)} of {quoted(self._package, 300)} cannot be loaded:"
                f" {reason}; export the model again"
            ) from None
        names = loader.get_constant_fqns()
        constants = {n: self._weights[n.removeprefix(WEIGHT_PREFIX)] for n in names}
        # the last: they stay ours, and are not copied
        loader.load_constants(constants, False, True, True)
        return loader


def open_program(package: Path, name: str, device: torch.device = CPU) -> AOTIModelPackageLoader:
    """A program of a .pt2 file, by torch's C++ loader; RuntimeError if it cannot be loaded.

    The loader's Python wrapper imports the compiler, which takes seconds.
    """
    from torch._C import _aoti  # type: ignore[attr-defined]

    index = device.index if device.type == "cuda" else None
    return _aoti.AOTIModelPackageLoader(
        str(package), name, False, 1, -1 if index is None else index
    )
