"""From a model's name to a model that is ready to run."""

from __future__ import annotations

import os
import time
from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import partial
from numbers import Integral
from pathlib import Path
from types import NoneType
from typing import Any, Literal

import torch

from mmchat.catalog.find import ModelParams, ModelSource, find_model
from mmchat.checkpoints.checkpoint import Checkpoint, open_checkpoint
from mmchat.engine.sampling import SamplingParams
from mmchat.errors import CheckpointError, UsageError, check_type, quoted
from mmchat.estimate.memory import Setup, check_memory
from mmchat.hardware.memory import available_memory, peak_memory
from mmchat.hardware.placement import Placement, choose_placement
from mmchat.loading.checkpoint_weights import load_weights
from mmchat.loading.saved_weights import load_saved
from mmchat.progress import ProgressCallback
from mmchat.quant import schemes
from mmchat.quant.kernels import native
from mmchat.quant.schemes import Plan
from mmchat.runtime.base import Runtime
from mmchat.runtime.compiled import CompileMode, make_runtime
from mmchat.runtime.exported import ExportedFolder, exported_folder, open_exported
from mmchat.tokenizers import open_tokenizer
from mmchat.tokenizers.base import Tokenizer


@dataclass(frozen=True)
class LoadedModel:
    """A model with all that a conversation needs.

    max_seq_len: positions of prompt and answer. quantize: the scheme of the weights. remarks: what
    is unusual about the weights, for those who ask for details.
    """

    params: ModelParams
    runtime: Runtime
    processor: Any
    tokenizer: Tokenizer
    placement: Placement
    max_seq_len: int
    sampling_defaults: SamplingParams
    text_only: bool
    quantize: str
    load_seconds: float
    remarks: tuple[str, ...] = ()

    @property
    def device(self) -> torch.device:
        return self.placement.device

    @property
    def dtype(self) -> torch.dtype:
        return self.placement.dtype

    @property
    def vocab_size(self) -> int:
        """Tokens that the model can write."""
        return self.params.config.text_config.vocab_size

    def peak_memory(self) -> int:
        """Highest memory use so far, bytes."""
        return peak_memory(self.device)


def load_model(
    name: str | Path | None = None,
    *,
    checkpoint_path: str | Path | None = None,
    tokenizer_path: str | Path | None = None,
    params_path: str | Path | None = None,
    device: str = "auto",
    dtype: str = "auto",
    max_seq_len: int | None = None,
    text_only: bool = False,
    alpha: Literal["white", "drop"] | None = None,
    quantize: str = "none",
    quantize_keep: Collection[str] = (),
    compile: CompileMode = "auto",
    progress: ProgressCallback | None = None,
) -> LoadedModel:
    """Find, check and load a model.

    name: a known name, a Hub id or a folder. text_only leaves vision and cross-attention unloaded.
    alpha: "white" or "drop", overrides how transparent pictures are flattened. quantize: a scheme
    of mmchat.quant.schemes; quantize_keep: parts ("text", "head", "vision") that it leaves alone.
    compile: compile the layers before the first token; "auto" does so on CUDA.
    Raises ParamsError, CheckpointError, DeviceError, MemoryError_, UsageError, CompileError.
    """
    begin = time.perf_counter()
    _check_paths(name, checkpoint_path, tokenizer_path, params_path)
    options = _Options(
        device, dtype, max_seq_len, text_only, quantize, quantize_keep, compile, progress
    )
    if alpha not in (None, "white", "drop"):
        raise UsageError(f"alpha must be 'white' or 'drop', not {quoted(alpha)}")
    source = find_model(
        name,
        checkpoint_path=checkpoint_path,
        tokenizer_path=tokenizer_path,
        params_path=params_path,
    )
    exported = exported_folder(source.checkpoint)
    if exported:
        run = _run_programs if exported.record.programs else _run_saved
        running = run(exported, source.params, options)
        tokenizer = _open_tokenizer(source)
    else:
        tokenizer = _open_tokenizer(source)
        running = _run_checkpoint(source, options)
    return _ready(source.params, running, tokenizer, alpha, text_only, begin)


def load_from_tensors(
    params: ModelParams,
    tensors: Checkpoint,
    tokenizer: Tokenizer,
    *,
    device: str = "auto",
    dtype: str = "auto",
    max_seq_len: int | None = None,
    quantize: str = "none",
    quantize_keep: Collection[str] = (),
    compile: CompileMode = "auto",
) -> LoadedModel:
    """`load_model` of tensors that are in memory, shared where device and dtype fit."""
    begin = time.perf_counter()
    options = _Options(device, dtype, max_seq_len, False, quantize, quantize_keep, compile)
    placement = choose_placement(device, dtype, params.parameters)
    running = _run_weights(params, tensors, placement, options)
    return _ready(params, running, tokenizer, None, False, begin)


def _check_paths(*paths: object) -> None:
    """Raise UsageError for what can be no name and no path."""
    names = ("name", "checkpoint_path", "tokenizer_path", "params_path")
    for name, path in zip(names, paths, strict=True):
        check_type(name, path, (str, os.PathLike, NoneType), "a string or a path")


@dataclass(frozen=True)
class _Options:
    """How to run a model: the arguments of `load_model`. Raises UsageError for wrong types."""

    device: str
    dtype: str
    max_seq_len: int | None
    text_only: bool
    quantize: str
    quantize_keep: Collection[str]
    compile: CompileMode
    progress: ProgressCallback | None = None

    def __post_init__(self) -> None:
        take = partial(object.__setattr__, self)
        if isinstance(self.device, torch.device):
            take("device", str(self.device))
        if isinstance(self.dtype, torch.dtype):
            take("dtype", str(self.dtype).removeprefix("torch."))
        if isinstance(self.quantize_keep, str):
            take("quantize_keep", (self.quantize_keep,))
        check_type("device", self.device, str, "a string")
        check_type("dtype", self.dtype, str, "a string")
        if self.max_seq_len is not None:
            kinds = () if isinstance(self.max_seq_len, bool) else Integral
            check_type("max_seq_len", self.max_seq_len, kinds, "a whole number")
            take("max_seq_len", int(self.max_seq_len))
        check_type("text_only", self.text_only, bool, "True or False")
        check_type("quantize", self.quantize, str, "a string")
        check_type("quantize_keep", self.quantize_keep, Collection, "a list of strings")
        if self.compile not in ("auto", "on", "off"):
            raise UsageError(f"compile must be auto, on or off, not {quoted(self.compile)}")
        if self.progress is not None and not callable(self.progress):
            raise UsageError(f"progress must be a function, not {type(self.progress).__name__}")


@dataclass(frozen=True)
class _Running:
    """A model that is ready, and how it was made so. format: of the weights, "hf" or "meta".

    remarks: as in LoadedModel.
    """

    runtime: Runtime
    placement: Placement
    plan: Plan
    max_seq_len: int
    format: str
    remarks: tuple[str, ...] = ()


def _run_checkpoint(source: ModelSource, options: _Options) -> _Running:
    params = source.params
    placement = choose_placement(options.device, options.dtype, params.parameters)
    merge_rules = params.family.resolve("weights").shard_dims
    with open_checkpoint(_given(source.checkpoint, params), merge_rules=merge_rules) as files:
        return _run_weights(params, files, placement, options)


def _run_weights(
    params: ModelParams, files: Checkpoint, placement: Placement, options: _Options
) -> _Running:
    limit = params.context_limit(options.max_seq_len)
    plan = _plan(options.quantize, options.quantize_keep, placement)
    setup = _setup(params, placement, plan, options)
    notices = _prepare_kernels(placement, plan, options)
    model = load_weights(files, setup, placement, plan, options.progress)
    runtime = make_runtime(model, placement.device, options.compile, options.progress)
    runtime.notices += notices
    remarks = (*files.remarks, *model.remarks)
    return _Running(runtime, placement, plan, limit, files.format, remarks)


def _run_programs(folder: ExportedFolder, params: ModelParams, options: _Options) -> _Running:
    """The programs that `mmchat export` wrote, as they were exported."""
    record = folder.record
    folder.check_options(options.quantize, options.quantize_keep)
    if options.compile == "on":
        raise UsageError(f"{str(folder.path)!r} is compiled already; leave out --compile on")
    limit = folder.context_limit(options.max_seq_len)
    runtime, placement = open_exported(
        folder, params, options.device, options.dtype, options.progress
    )
    plan = schemes.make_plan(record.scheme, record.keep)
    if record.format == "aoti":
        runtime.notices += _prepare_kernels(placement, plan, options)
    return _Running(runtime, placement, plan, limit, "hf")


def _run_saved(folder: ExportedFolder, params: ModelParams, options: _Options) -> _Running:
    """The weights that `mmchat export` wrote, in their dtype unless another is asked."""
    record = folder.record
    folder.check_options(options.quantize, options.quantize_keep)
    limit = params.context_limit(options.max_seq_len)
    dtype = record.dtype if options.dtype == "auto" else options.dtype
    placement = choose_placement(options.device, dtype, 0)
    if options.dtype == "auto":
        placement = replace(placement, reason="as exported")
    folder.check_dtype(placement)
    plan = _plan(record.scheme, record.keep, placement)
    with open_checkpoint(folder.path, merge_rules=None) as files:
        setup = _setup(params, placement, plan, options)
        check_memory(replace(setup, from_file=True), available_memory(placement.device))
        notices = _prepare_kernels(placement, plan, options)
        model = load_saved(
            files,
            params,
            plan,
            placement.device,
            placement.dtype,
            text_only=options.text_only,
            progress=options.progress,
        )
    runtime = make_runtime(model, placement.device, options.compile, options.progress)
    runtime.notices += notices
    return _Running(runtime, placement, plan, limit, "hf", tuple(model.remarks))


def _plan(quantize: str, keep: Collection[str], placement: Placement) -> Plan:
    plan = schemes.make_plan(quantize, keep)
    schemes.find_scheme(plan.scheme).check_device(placement.device)
    return plan


def _prepare_kernels(placement: Placement, plan: Plan, options: _Options) -> list[str]:
    """Compile the kernels for the CPU, where the weights take them, before anything is timed.

    Returns what to tell the user where there are none.
    """
    is_wide = plan.scheme == "none" and placement.dtype != torch.bfloat16
    if placement.device.type != "cpu" or is_wide:
        return []
    native.prepare(options.progress)
    if native.library() or not native.is_wanted():
        return []
    return [f"slower than it could be, on torch's own kernels: {native.reason()}"]


def _setup(params: ModelParams, placement: Placement, plan: Plan, options: _Options) -> Setup:
    """What will be loaded, for the estimate of its memory."""
    return Setup.of(
        params,
        placement,
        quantize=plan.scheme,
        keep=plan.keep,
        text_only=options.text_only,
        max_seq_len=options.max_seq_len,
    )


def _ready(
    params: ModelParams,
    running: _Running,
    tokenizer: Tokenizer,
    alpha: Literal["white", "drop"] | None,
    text_only: bool,
    begin: float,
) -> LoadedModel:
    """Put the parts together; `begin` is when loading began."""
    make_processor = params.family.resolve("processor")
    rule = alpha or params.image_processor.alpha_for(running.format)
    return LoadedModel(
        params=params,
        runtime=running.runtime,
        processor=make_processor(params.config, params.image_processor, tokenizer, rule),
        tokenizer=tokenizer,
        placement=running.placement,
        max_seq_len=running.max_seq_len,
        sampling_defaults=SamplingParams(**vars(params.generation)),
        text_only=text_only,
        quantize=running.plan.scheme,
        load_seconds=time.perf_counter() - begin,
        remarks=running.remarks,
    )


def _given(checkpoint: Path | None, params: ModelParams) -> Path:
    if checkpoint is None:
        raise CheckpointError(f"no weights of {params.name} are here; give --checkpoint-path")
    return checkpoint


def _open_tokenizer(source: ModelSource) -> Tokenizer:
    path = source.tokenizer_file()
    tokenizer = open_tokenizer(path)
    rows = source.params.config.text_config.vocab_size
    if tokenizer.vocab_size != rows:
        raise CheckpointError(
            f"the tokenizer {str(path)!r} has {tokenizer.vocab_size} tokens, but the "
            f"model {source.params.name} has {rows}; give the tokenizer that came with the weights"
        )
    return tokenizer
