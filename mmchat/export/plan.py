"""What to export, refused before anything is loaded where a format does not have it."""

from __future__ import annotations

from collections.abc import Iterator
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
        for reason in self._refusals():
            raise UsageError(reason)

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

    def _refusals(self) -> Iterator[str]:
        """Why this cannot be exported, with what to do."""
        model, format = self.model, self.format
        if model.kv != "auto":
            yield (
                f"--kv {model.kv} is how a model keeps what it reads, of which nothing is"
                " exported; leave it out, and give it when the weights are loaded"
            )
        if format == "executorch":
            yield from self._without_form_of_executorch()
        elif format == "hf" and model.quantize != "none":
            yield (
                f"--quantize {model.quantize} has no form in the Hub's checkpoints; use --format"
                f" safetensors --quantize {model.quantize}, or leave it out and quantise as you"
                " load"
            )
        elif format == "hf" and model.device not in ("auto", "cpu"):
            yield (
                f"--format hf copies weights and runs nothing, not on {model.device} either; leave"
                " out --device"
            )
        if format != "hf" and self.max_shard_bytes is not None:
            yield (
                f"--max-shard-size is for hf; {format} keeps the weights in one file, so leave it"
                " out"
            )
        sizes = (
            ("--max-images", self.max_images, "any number of pictures"),
            ("--max-seq-len", model.max_seq_len, "any length"),
        )
        for option, size, takes in sizes if format not in PROGRAMS else ():
            if size is not None:
                yield (
                    f"{option} {size} is for aoti and executorch; {format} takes {takes}, so leave"
                    " it out"
                )
        if not 1 <= self.image_limit <= MOST_IMAGES:
            yield (
                f"--max-images {self.max_images} is out of range: programs are made for 1 to"
                f" {MOST_IMAGES} pictures; give a number of these"
            )
        if model.max_seq_len is not None and model.max_seq_len < LEAST_MAX_SEQ_LEN:
            yield (
                f"--max-seq-len {model.max_seq_len} is too short for a prompt and its answer; give"
                f" {LEAST_MAX_SEQ_LEN} positions or more"
            )
        if self.calibrate is not None:
            yield from self._without_use_of_samples(self.calibrate)

    def _without_use_of_samples(self, folder: Path) -> Iterator[str]:
        if not find_scheme(scheme := self.model.quantize).calibrates:
            names = [name for name, format in SCHEMES.items() if format.calibrates]
            yield (
                f"--calibrate {quoted(folder, 300)} does nothing with --quantize"
                f" {scheme}, which needs no samples; use --quantize {', '.join(names[:-1])} or"
                f" {names[-1]}, or leave it out"
            )
        if self.format == "executorch":
            yield (
                "--calibrate is for aoti and safetensors: ExecuTorch rounds weights in its own"
                " form; leave it out"
            )
        if "text" in self.model.quantize_keep:
            yield (
                "--quantize-keep text leaves nothing to --calibrate: it rounds the text layers;"
                " leave one of them out"
            )

    def _without_form_of_executorch(self) -> Iterator[str]:
        device, dtype, scheme = self.model.device, self.model.dtype, self.model.quantize
        if device not in ("auto", "cpu"):
            yield f"XNNPACK runs on the cpu, not {device}; leave out --device"
        if dtype not in ("auto", "float32"):
            yield (
                f"XNNPACK computes in float32, not {dtype}; leave out --dtype, or give --quantize"
                " int8 or int4 for a smaller file"
            )
        if isinstance(find_scheme(scheme), Float8 | Blocks):
            yield (
                f"ExecuTorch has no form for {scheme}; use --quantize int8, int4, int4-g32,"
                " int4-g64 or int4-g128"
            )
