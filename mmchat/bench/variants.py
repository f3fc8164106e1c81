"""The ways of running one model that are timed side by side."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

_COMPILED = {"auto": "", "off": " eager", "on": " compiled"}


@dataclass(frozen=True)
class Variant:
    """One way of running the model. quantize, compile: as the loader takes them.

    exported: from the folder that `mmchat export` wrote, not from the model that it was made of.
    """

    quantize: str = "none"
    compile: Literal["auto", "off", "on"] = "auto"
    exported: bool = False

    def label(self, dtype: torch.dtype) -> str:
        """`int8 compiled`; the dtype stands for weights that are not quantised."""
        plain = str(dtype).removeprefix("torch.")
        weights = plain if self.quantize == "none" else self.quantize
        return weights + _COMPILED[self.compile] + " exported" * self.exported
