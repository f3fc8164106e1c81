"""What a benchmark is asked to measure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch

    from mmchat.bench.shapes import Shapes
    from mmchat.loading.loader import LoadedModel

Part = Literal["decode", "prefill", "picture", "turns", "bandwidth", "memory", "startup"]
PARTS: tuple[Part, ...] = (
    "decode", "prefill", "picture", "turns", "bandwidth", "memory", "startup",
)  # fmt: skip
Say = Callable[[str], None]  # told what is being done


@dataclass(frozen=True)
class Variant:
    """One way of running the model: a quantisation scheme, and whether it is compiled.

    exported: from the folder that `mmchat export` wrote, not from the model that it was made of.
    """

    quantize: str = "none"
    compile: str = "off"
    exported: bool = False

    @classmethod
    def parse(cls, text: str) -> Variant:
        """The inverse of `str`."""
        quantize, _, way = text.partition("+")
        return cls(quantize, "on" if way == "compiled" else "off", way == "exported")

    def __str__(self) -> str:
        return self.quantize + self._way("+")

    def _way(self, before: str) -> str:
        if self.exported:
            return f"{before}exported"
        return f"{before}compiled" if self.compile == "on" else ""

    @property
    def bits(self) -> int | None:
        """Of a quantised weight, None for plain ones."""
        if self.quantize == "none":
            return None
        return 4 if self.quantize.startswith("int4") else 8

    def options(self) -> dict[str, Any]:
        """Arguments of the loader that differ from its defaults."""
        given = {"quantize": self.quantize, "compile": self.compile}
        return {name: value for name, value in given.items() if value not in ("none", "off")}

    def label(self, dtype: torch.dtype) -> str:
        plain = str(dtype).removeprefix("torch.")
        weights = plain if self.quantize == "none" else self.quantize
        return f"mmchat {weights}" + self._way(" ")


@dataclass(frozen=True)
class Plan:
    """What to measure. `load` gives a variant of the model when `shapes` is None.

    variants: the first is plain, and what the others are compared with.

    contexts: decode after so many tokens. prompts: read so many. tiles: of pictures, may be empty.
    """

    shapes: Shapes | None
    load: Callable[[Variant], LoadedModel]
    versus_transformers: bool
    variants: tuple[Variant, ...]
    device: str
    dtype: str
    contexts: tuple[int, ...]
    prompts: tuple[int, ...]
    tiles: tuple[int, ...]
    parts: tuple[Part, ...]
    rounds: int
    seconds: float
    threads: int | None
    selection: tuple[str, ...] = ()  # the command's arguments that choose the same model
