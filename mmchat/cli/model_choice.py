"""Find the model that was chosen, or offer its download; say which it is, and load it.

It is loaded ahead of time where that can be, and with progress shown.
"""

from __future__ import annotations

import gc
import os
import re
import resource
import shlex
import sys
import threading
import time
from contextlib import suppress
from dataclasses import replace
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Literal

from mmchat import limits
from mmchat.cli import console
from mmchat.cli.options import as_arguments
from mmchat.errors import CheckpointError, MemoryError_
from mmchat.loading.options import PATHS
from mmchat.offline import is_hub_offline
from mmchat.parallel.launch import launched_ranks
from mmchat.progress import ProgressCallback
from mmchat.quant.schemes import AUTO
from mmchat.words import size

if TYPE_CHECKING:
    from mmchat.api import Model
    from mmchat.catalog.source import ModelSource
    from mmchat.catalog.spec import ModelSpec
    from mmchat.loading.options import LoadOptions
    from mmchat.repl.loading import LoadingModel

    AnyStages = console.Stages | LoadingModel

BUILT_IN = "tiny"
_BYTES_PER_PARAMETER = 2  # the Hub's files are in bfloat16
COMPILED = {"compile": "the layers", "kernels": "the CPU kernels"}  # by stage of loading
LONG_ROUNDING = 20.0  # seconds of processor time
# What torch imports at its end, in a third of its time, for its compiler and for GPUs.
_NOT_AT_START = ("torch._meta_registrations", "torch._native")
_GPUS = ("/dev/nvidiactl", "/dev/nvidia-uvm", "/dev/nvmap", "/dev/kfd", "/dev/dxg")
_importing: list[threading.Thread] = []
_ROUNDED_TAG = re.compile(r":\d+b-instruct-q\d")  # of Ollama
_VARIABLES_ELSEWHERE = {  # of other programs for Llama, and the options here
    "CHECKPOINT_PATH": "--checkpoint-path",
    "CHECKPOINT_DIR": "--checkpoint-path",
    "TOKENIZER_PATH": "--tokenizer-path",
    "MODEL_TYPE": "--params-path",
}


def find_or_offer(model: LoadOptions, *, looks: bool = False) -> ModelSource:
    """`model.find()`; where that fails for want of a download, ask whether to start it.

    Nothing is asked, and nothing fetched, unless a person sits at the terminal and says yes.
    looks: raises UsageError for models that do not tell where they look; they are not even asked
    for.
    """
    if looks and model.name is not None:
        from mmchat.catalog.known import find_spec
        from mmchat.explain.look import check_spec

        if named := find_spec(str(model.name)):
            check_spec(named)
    try:
        return model.find()
    except CheckpointError:
        spec = _downloadable(model)
        if spec is None:
            raise
        if not _is_wanted(spec):
            raise CheckpointError(
                f"{spec.name} is not here; 'mmchat download {spec.name}' fetches it"
            ) from None
        from mmchat.cli.download import carry_out, say_plan
        from mmchat.hub import download as hub

        with console.interrupt_says(f"stopped; 'mmchat download {spec.name}' goes on"):
            plan = hub.plan(hub.Request(spec.repo or ""))
            say_plan(plan)
            carry_out(plan)
        return model.find()


def _downloadable(model: LoadOptions) -> ModelSpec | None:
    """The known model that is meant and not here, if it can be fetched and someone can be asked.

    Raises CheckpointError or UsageError for adapters that would be refused after the download.
    """
    from mmchat.catalog.adapters import find_adapters
    from mmchat.catalog.known import base_spec, find_spec, folder_on_disk

    is_seen = console.is_terminal(sys.stdin) and console.is_terminal(sys.stderr)
    if model.name is None or model.checkpoint_path is not None or not is_seen or is_hub_offline():
        return None
    spec = find_spec(str(model.name)) or base_spec(model.name)
    if spec is None or spec.repo is None or folder_on_disk(spec) is not None:
        return None
    find_adapters(model.adapter)
    return spec


def _is_wanted(spec: ModelSpec) -> bool:
    from mmchat.checkpoints.hub_cache import cache_folder
    from mmchat.storage.space import free_bytes

    needed = spec.parameters * _BYTES_PER_PARAMETER
    free = free_bytes(cache_folder())
    console.say(f"{spec.name} is not on this machine: about {size(needed)} from {spec.repo}")
    console.say(f"{size(free)} are free in {cache_folder()}")
    return console.confirm("download it now?")


def load(options: LoadOptions, source: ModelSource, stages: AnyStages) -> Model:
    """Load the model of `options.find()` with its progress shown; torch is imported here."""
    check_address_space()
    while _importing:  # torch is not whole until its thread has ended
        _importing.pop().join()
    from mmchat.api import load_model

    def show_weights(_: str, done: int, total: int) -> None:
        stages.show(f"{stage}: {done} of {total} tensors")

    stage = first_stage(options)
    stages.show(stage)
    progress = compile_notes(stages, show_weights)
    model = load_model(replace(options, progress=progress), source)
    for notice in model.runtime.notices:
        stages.note(notice)
    if console.is_terminal(sys.stderr) and model.rounding_seconds > LONG_ROUNDING:
        for line in _offer_to_keep(options, model):
            stages.note(line)
    return model


def compile_notes(stages: AnyStages, others: ProgressCallback | None = None) -> ProgressCallback:
    """Says that layers or kernels are being compiled, which takes seconds, once.

    A note before it begins, one with the time when it is done, and between them a spinner. others:
    takes the stages that compile nothing.
    """
    begin = 0.0

    def show(stage: str, done: int, total: int) -> None:
        nonlocal begin
        what = COMPILED.get(stage)
        if what is None:
            if others:
                others(stage, done, total)
            return
        if done == 0:
            begin = time.perf_counter()
            stages.note(f"compiling {what} (once; a later start takes them from a cache)")
        seconds = time.perf_counter() - begin
        if done == total:
            stages.note(f"compiled {what} in {seconds:.1f} s")
        elif total == 1:
            stages.show(f"compiling {what}")
        else:
            stages.show(f"compiling {what} (once, {seconds:.0f} s): {done} of {total}")

    return show


def _offer_to_keep(options: LoadOptions, model: Model) -> list[str]:
    """The command that saves the next start the rounding; a line of its own, to be copied."""
    if options.quantize in (AUTO, "none") or options.ranks > 1:
        return []
    asked = as_arguments(
        options, (*PATHS, "quantize", "quantize_keep", "adapter", "device", "dtype")
    )
    command = shlex.join(["mmchat", "export", "--format", "safetensors", "--keep", *asked])
    seconds = f"{model.rounding_seconds:.0f} s"
    return [f"rounding took {seconds} of processor time; this keeps its result:", command]


def first_stage(options: LoadOptions) -> str:
    """What loading says first: `loading tiny`."""
    return f"loading {options.name or options.params_path or options.checkpoint_path or BUILT_IN}"


def load_with_notes(options: LoadOptions, source: ModelSource) -> Model:
    """`load`, after `say_choice`."""
    say_choice(options, source)
    with console.Stages() as stages:
        return load(options, source, stages)


def say_choice(options: LoadOptions, source: ModelSource) -> None:
    """Notes on stderr: the built-in model was taken, and how its params were read."""
    if options.name is None and not (options.checkpoint_path or options.params_path):
        console.note(f"using the built-in model {source.spec.name!r}; see 'mmchat list'")
        for variable, option in _VARIABLES_ELSEWHERE.items():
            if os.environ.get(variable):
                console.note(f"{variable} is set, which mmchat does not read; {option} says it")
    console.note(*source.spec.notices)
    is_rounded = options.quantize in (AUTO, "none") and _ROUNDED_TAG.search(str(options.name))
    if is_rounded and source.format != "gguf":  # which opens the checkpoint
        console.note(f"{options.name}: weights as they are published; --quantize makes them small")


def alpha_rule(options: LoadOptions, source: ModelSource) -> Literal["white", "drop"]:
    """What becomes of transparent pixels: as asked, or as the checkpoint's makers do."""
    return options.alpha or source.spec.family.alpha(source.spec.config, source.format)


def check_address_space() -> None:
    """Raises MemoryError_ where torch cannot even be imported: the import would end in a crash."""
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY and limit < limits.TORCH_ADDRESS_BYTES:
        raise MemoryError_(
            f"the address space is limited to {size(limit)} and torch alone takes"
            f" {size(limits.TORCH_ADDRESS_BYTES)}; allow more with ulimit -v"
        )


def begin_loading(options: LoadOptions, source: ModelSource) -> None:
    """Import torch and read the weights from disk while the caller goes on."""
    check_address_space()
    is_compiled = options.compile == "on" or any(map(os.path.exists, _GPUS))
    _importing.append(threading.Thread(target=_import_torch, args=(is_compiled,)))
    _importing[-1].start()
    if launched_ranks() == 1:  # else ranks of other machines may hold the most
        threading.Thread(target=_read_weights_ahead, args=(source,), daemon=True).start()


def _import_torch(is_compiled: bool) -> None:
    """Not in a daemon thread: torch does not survive an end of the process within its import.

    Where nothing is compiled there are empty modules in place of `_NOT_AT_START` meanwhile. What is
    imported stays until the process ends, so that nothing of it is ever garbage to look for.
    """
    if "torch" in sys.modules:
        return
    left_out = () if is_compiled else _NOT_AT_START
    sys.modules.update((name, ModuleType(name)) for name in left_out)
    gc.disable()
    try:
        with suppress(Exception):  # if the process is ending; else the next import of it says why
            import_module("torch")
    finally:
        for name in left_out:
            del sys.modules[name]
            vars(sys.modules.get("torch", sys)).pop(name.removeprefix("torch."), None)
    with suppress(Exception):
        import_module("torch._prims.rng_prims")  # without which torch makes no Generator
    gc.freeze()
    gc.enable()


def _read_weights_ahead(source: ModelSource) -> None:
    from mmchat.checkpoints.hub_cache import weight_files
    from mmchat.checkpoints.read_ahead import read_ahead
    from mmchat.hardware.memory import host_memory

    place, memory = source.kept or source.checkpoint, host_memory()
    if place is not None and memory is not None:
        read_ahead(weight_files(place) if place.is_dir() else [place], memory.available)
