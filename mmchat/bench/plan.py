"""What a benchmark is asked to measure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from mmchat.bench.shapes import Shapes
    from mmchat.loader import LoadedModel

Part = Literal["decode", "prefill", "picture", "turns", "bandwidth", "memory", "startup"]
PARTS: tuple[Part, ...] = (
    "decode", "prefill", "picture", "turns", "bandwidth", "memory", "startup",
)  # fmt: skip
Say = Callable[[str], None]  # told what is being done


@dataclass(frozen=True)
class Plan:
    """What to measure. `load` gives the model of a scheme when `shapes` is None.

    contexts: decode after so many tokens. prompts: read so many. tiles: of pictures, may be empty.
    """

    shapes: Shapes | None
    load: Callable[[str], LoadedModel]
    versus_transformers: bool
    schemes: tuple[str, ...]
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
