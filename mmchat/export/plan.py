"""What to export, refused before anything is loaded where a format does not have it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mmchat.errors import UsageError
from mmchat.loading.options import LoadOptions

Format = Literal["aoti", "executorch", "safetensors"]

DEFAULT_MAX_SEQ_LEN = 4096  # positions; the static cache of an 11B model takes 537 MB for them
LEAST_MAX_SEQ_LEN = 64
MOST_IMAGES = 16  # the default too


@dataclass(frozen=True)
class ExportPlan:
    """What to export, where to, and as what.

    A model whose max_seq_len is open takes the default, or its own if that is less. max_images:
    pictures that one question may see, 1 to MOST_IMAGES.

    Raises UsageError when it is made.
    """

    model: LoadOptions
    folder: Path
    format: Format = "aoti"
    max_images: int = MOST_IMAGES
    force: bool = False

    def __post_init__(self) -> None:
        if self.format == "executorch":
            self._check_executorch()
        if not 1 <= self.max_images <= MOST_IMAGES:
            raise UsageError(
                f"--max-images {self.max_images} is out of range: programs are made for 1 to"
                f" {MOST_IMAGES} pictures; give a number of these"
            )
        asked = self.model.max_seq_len
        if asked is None:
            return
        if self.format == "safetensors":
            raise UsageError(
                f"--max-seq-len {asked} is for aoti and executorch; safetensors takes any length,"
                " so leave it out"
            )
        if asked < LEAST_MAX_SEQ_LEN:
            raise UsageError(
                f"--max-seq-len {asked} is too short for a prompt and its answer; give"
                f" {LEAST_MAX_SEQ_LEN} positions or more"
            )

    def _check_executorch(self) -> None:
        """Whether ExecuTorch has a form for this."""
        if self.model.device not in ("auto", "cpu"):
            raise UsageError(
                f"XNNPACK runs on the cpu, not {self.model.device}; leave out --device"
            )
        if self.model.dtype not in ("auto", "float32"):
            raise UsageError(
                f"XNNPACK computes in float32, not {self.model.dtype}; leave out --dtype, or give"
                " --quantize int8 or int4 for a smaller file"
            )
        scheme = self.model.plan.scheme
        if scheme and scheme.is_float:
            raise UsageError(
                f"ExecuTorch has no form for {scheme.name}; use --quantize int8, int4, int4-g32,"
                " int4-g64 or int4-g128"
            )
