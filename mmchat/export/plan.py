"""What to export, refused before anything is loaded where a format does not have it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from mmchat.errors import UsageError, quoted
from mmchat.loading.options import LoadOptions
from mmchat.quant.formats.blocks import Blocks
from mmchat.quant.formats.fp8 import Float8
from mmchat.quant.schemes import AUTO, SCHEMES, find_scheme
from mmchat.spelling import closest

if TYPE_CHECKING:
    from mmchat.catalog.spec import ModelSpec

Format = Literal["aoti", "executorch", "safetensors", "hf"]

FORMATS: tuple[str, ...] = get_args(Format)
DEFAULT_MAX_SEQ_LEN = 4096  # positions; the static cache of an 11B model takes 537 MB for them
LEAST_MAX_SEQ_LEN = 64
MOST_IMAGES = 16  # the default too
PROGRAMS: tuple[str, ...] = ("aoti", "executorch")  # the formats that are made of programs
_WORDS_FOR_HF = ("convert", "huggingface", "hugging-face", "hub", "transformers")


def check_format(name: str) -> None:
    """Raises UsageError for what is no format, with the one that was meant."""
    if name in FORMATS:
        return
    word = name.casefold()
    near = ["hf"] if word in _WORDS_FOR_HF else closest(word, FORMATS, cutoff=0.6)
    hint = f"did you mean --format {near[0]}?" if near else f"use one of {', '.join(FORMATS)}"
    raise UsageError(f"no export has the format {quoted(name)}; {hint}")


@dataclass(frozen=True)
class ExportPlan:
    """What to export, where to, and as what.

    A model whose max_seq_len is open takes the default, or its own if that is less. max_images:
    pictures that one question may see, 1 to MOST_IMAGES, which None takes. max_shard_bytes: of a
    file of weights; None takes the default. calibrate: a folder of samples, by which weights are
    rounded.

    Raises UsageError when it is made.
    """

    model: LoadOptions
    folder: Path
    format: Format = "aoti"
    max_images: int | None = None
    max_shard_bytes: int | None = None
    force: bool = False
    calibrate: Path | None = None

    def __post_init__(self) -> None:
        check_format(self.format)
        if self.model.quantize == AUTO:  # what is packed is rounded only where that is asked
            object.__setattr__(self, "model", replace(self.model, quantize="none"))
        if self.model.kv != "auto":
            raise UsageError(
                f"--kv {self.model.kv} is how a model keeps what it reads, of which nothing is"
                " exported; leave it out, and give it when the weights are loaded"
            )
        if self.format == "executorch":
            self._check_executorch()
        if self.format == "hf":
            self._check_hf()
        elif self.max_shard_bytes is not None:
            raise UsageError(
                f"--max-shard-size is for hf; {self.format} keeps the weights in one file, so leave"
                " it out"
            )
        self._check_sizes()
        if self.calibrate is not None:
            self._check_calibrate(self.calibrate)

    @property
    def image_limit(self) -> int:
        """Pictures that one question may see."""
        return MOST_IMAGES if self.max_images is None else self.max_images

    def check_family(self, spec: ModelSpec) -> None:
        """Raises UsageError where models of this kind have no programs for the format."""
        made = spec.family.program_formats
        if self.format in PROGRAMS and self.format not in made:
            others = [name for name in FORMATS if name in made or name not in PROGRAMS]
            raise UsageError(
                f"{quoted(spec.name)} has no programs for {self.format}; use --format"
                f" {', '.join(others[:-1])} or {others[-1]}"
            )

    def _check_sizes(self) -> None:
        images, positions = self.max_images, self.model.max_seq_len
        if self.format not in PROGRAMS:
            self._check_left_out("--max-images", images, "any number of pictures")
            self._check_left_out("--max-seq-len", positions, "any length")
        if images is not None and not 1 <= images <= MOST_IMAGES:
            raise UsageError(
                f"--max-images {images} is out of range: programs are made for 1 to"
                f" {MOST_IMAGES} pictures; give a number of these"
            )
        if positions is not None and positions < LEAST_MAX_SEQ_LEN:
            raise UsageError(
                f"--max-seq-len {positions} is too short for a prompt and its answer; give"
                f" {LEAST_MAX_SEQ_LEN} positions or more"
            )

    def _check_left_out(self, option: str, value: int | None, takes: str) -> None:
        if value is not None:
            raise UsageError(
                f"{option} {value} is for aoti and executorch; {self.format} takes {takes}, so"
                " leave it out"
            )

    def _check_hf(self) -> None:
        """Whether a checkpoint of the Hub has a form for this, and something is run at all."""
        scheme, device = self.model.quantize, self.model.device
        if scheme != "none":
            raise UsageError(
                f"--quantize {scheme} has no form in the Hub's checkpoints; use --format"
                f" safetensors --quantize {scheme}, or leave it out and quantise as you load"
            )
        if device not in ("auto", "cpu"):
            raise UsageError(
                f"--format hf copies weights and runs nothing, not on {device} either; leave out"
                " --device"
            )

    def _check_calibrate(self, folder: Path) -> None:
        """Whether samples change how weights are rounded to this."""
        scheme = self.model.quantize
        if not find_scheme(scheme).calibrates:
            names = [name for name, format in SCHEMES.items() if format.calibrates]
            raise UsageError(
                f"--calibrate {quoted(folder, 300)} does nothing with --quantize"
                f" {scheme}, which needs no samples; use --quantize {', '.join(names[:-1])} or"
                f" {names[-1]}, or leave it out"
            )
        if self.format == "executorch":
            raise UsageError(
                "--calibrate is for aoti and safetensors: ExecuTorch rounds weights in its own"
                " form; leave it out"
            )
        if "text" in self.model.quantize_keep:
            raise UsageError(
                "--quantize-keep text leaves nothing to --calibrate: it rounds the text layers;"
                " leave one of them out"
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
        if isinstance(find_scheme(scheme := self.model.quantize), Float8 | Blocks):
            raise UsageError(
                f"ExecuTorch has no form for {scheme}; use --quantize int8, int4, int4-g32,"
                " int4-g64 or int4-g128"
            )
