"""Which model the arguments mean: find it, say what was chosen, load it with progress."""

from __future__ import annotations

import re
import resource
import threading
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mmchat import limits
from mmchat.cli import console, options
from mmchat.cli.compile_notes import CompileNotes
from mmchat.errors import MemoryError_
from mmchat.quant.schemes import make_plan
from mmchat.words import size

if TYPE_CHECKING:
    from mmchat.api import Model
    from mmchat.catalog.find import ModelParams, ModelSource

BUILT_IN = "tiny"


@dataclass(frozen=True)
class ModelChoice:
    """What selects and places the model: options of the commands, arguments of `mmchat.load`."""

    name: options.Model = None
    device: options.Device = "auto"
    dtype: options.Dtype = "auto"
    quantize: options.Quantize = "none"
    quantize_keep: options.QuantizeKeep = None
    max_seq_len: options.MaxSeqLen = None
    checkpoint_path: options.CheckpointPath = None
    tokenizer_path: options.TokenizerPath = None
    params_path: options.ParamsPath = None
    text_only: options.TextOnly = False
    alpha: options.Alpha = None
    compile: options.Compile = "auto"

    def __post_init__(self) -> None:
        make_plan(self.quantize, self.quantize_keep or ())  # raises UsageError

    def find(self, *, checkpoint_required: bool = True) -> ModelSource:
        """Params and files; ParamsError or CheckpointError if there are none, or no tokenizer.

        UsageError if the model's context is shorter than what is asked.
        """
        from mmchat.catalog.find import find_model

        source = find_model(
            self.name,
            checkpoint_path=self.checkpoint_path,
            tokenizer_path=self.tokenizer_path,
            params_path=self.params_path,
            checkpoint_required=checkpoint_required,
        )
        source.params.context_limit(self.max_seq_len)
        if checkpoint_required:
            source.tokenizer_file()
        return source

    def load(self, stages: console.Stages) -> Model:
        """`mmchat.load` with its progress shown; torch is imported here."""
        import mmchat

        check_address_space()
        label = self.name or BUILT_IN
        if self.name is None and (self.params_path or self.checkpoint_path):
            label = str(self.params_path or self.checkpoint_path)

        def show_weights(_: str, done: int, total: int) -> None:
            stages.show(f"loading {label}: {done} of {total} tensors")

        stages.show(f"loading {label}")
        model = mmchat.load(
            self.name,
            checkpoint_path=self.checkpoint_path,
            tokenizer_path=self.tokenizer_path,
            params_path=self.params_path,
            device=self.device,
            dtype=self.dtype,
            max_seq_len=self.max_seq_len,
            text_only=self.text_only,
            alpha=self.alpha,
            quantize=self.quantize,
            quantize_keep=self.quantize_keep or (),
            compile=self.compile,
            progress=CompileNotes(stages, show_weights).show,
        )
        for notice in model.runtime.notices:
            stages.note(notice)
        return model


def say_choice(choice: ModelChoice, source: ModelSource) -> None:
    """Notes on stderr: the built-in model was taken, and how its params were read."""
    if choice.name is None and not (choice.checkpoint_path or choice.params_path):
        console.note(f"using the built-in model {source.params.name!r}; see 'mmchat list'")
    for notice in source.params.notices:
        console.note(notice)
    if choice.quantize == "none" and re.search(r":\d+b-instruct-q\d", choice.name or ""):
        console.note(f"{choice.name}: weights as they are published; --quantize makes them small")


def alpha_rule(choice: ModelChoice, source: ModelSource) -> Literal["white", "drop"]:
    """What becomes of transparent pixels: as asked, or as the checkpoint's makers do."""
    if choice.alpha is not None:
        return choice.alpha
    return source.params.image_processor.alpha_for(source.format)


def _weight_files(source: ModelSource) -> list[Path]:
    from mmchat.checkpoints.hub_cache import weight_files

    place = source.checkpoint
    return weight_files(place) if place and place.is_dir() else [place] if place else []


def check_address_space() -> None:
    """Raises MemoryError_ where torch cannot even be imported: the import would end in a crash."""
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY and limit < limits.TORCH_ADDRESS_BYTES:
        raise MemoryError_(
            f"the address space is limited to {size(limit)} and torch alone takes"
            f" {size(limits.TORCH_ADDRESS_BYTES)}; allow more with ulimit -v"
        )


def begin_loading(source: ModelSource) -> None:
    """Import torch and read the weights from disk while the caller goes on."""
    check_address_space()
    threading.Thread(target=_import_torch).start()
    threading.Thread(target=_read_weights_ahead, args=(source,), daemon=True).start()


def _import_torch() -> None:
    """Not in a daemon thread: torch does not survive an end of the process within its import."""
    with suppress(Exception):  # if the process is ending; else the next import of it says why
        import_module("torch")


def _read_weights_ahead(source: ModelSource) -> None:
    from mmchat.checkpoints.read_ahead import read_ahead
    from mmchat.hardware.memory import host_memory

    memory = host_memory()
    if memory is not None:
        read_ahead(_weight_files(source), memory.available)


def family_module(params: ModelParams, name: str) -> Any:
    """A module of the model's family that loads no weights, such as its footprint or tiling."""
    return import_module(f"mmchat.models.{params.model_type}.{name}")
