"""From a model's name to a model that is ready to run."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from mmchat import quantization
from mmchat.checkpoints.checkpoint import Checkpoint, open_checkpoint
from mmchat.device import Placement, check_float8, choose_placement
from mmchat.errors import CheckpointError, MmchatError, UsageError
from mmchat.machine.memory import available_memory, peak_memory
from mmchat.memory_estimate import Setup, check_memory, used_in_place
from mmchat.nn.linear import Float8Linear, QuantizedLinear
from mmchat.params import ModelParams, ModelSource, find_model, params_for_tile_size
from mmchat.quantization import Plan
from mmchat.runtime.base import Runtime
from mmchat.runtime.compiled import CompileMode, make_runtime
from mmchat.runtime.exported import ExportedFolder, exported_folder, open_exported
from mmchat.sampling import SamplingParams
from mmchat.saved_weights import load_saved
from mmchat.tokenizers import open_tokenizer
from mmchat.tokenizers.base import Tokenizer

# progress(stage, done, total): stage "weights" in tensors, "compile" in kinds of layer
ProgressCallback = Callable[[str, int, int], None]


@dataclass(frozen=True)
class LoadedModel:
    """A model with all that a conversation needs.

    max_seq_len: positions of prompt and answer. quantize: the scheme of the weights.
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
    of mmchat.quantization; quantize_keep: parts ("text", "head", "vision") that it leaves alone.
    compile: compile the layers before the first token; "auto" does so on CUDA.
    Raises ParamsError, CheckpointError, DeviceError, MemoryError_, UsageError, CompileError.
    """
    begin = time.perf_counter()
    source = find_model(
        name,
        checkpoint_path=checkpoint_path,
        tokenizer_path=tokenizer_path,
        params_path=params_path,
    )
    params = source.params
    limit = _context_limit(params, max_seq_len)
    exported = exported_folder(source.checkpoint)
    if exported:
        loaded = _load_exported(
            exported,
            params,
            device,
            dtype,
            max_seq_len,
            quantize,
            quantize_keep,
            text_only,
            compile,
            progress,
        )
        rule = alpha or params.image_processor.alpha_for("hf")
        return _ready(params, *loaded, _open_tokenizer(source), text_only, rule, begin)
    placement = choose_placement(device, dtype, params.parameters)
    plan = _plan(quantize, quantize_keep, placement)
    tokenizer = _open_tokenizer(source)
    merge_rules = params.family.resolve("weights").shard_dims
    with open_checkpoint(_given(source.checkpoint, params), merge_rules=merge_rules) as files:
        setup = _setup(params, placement, plan, text_only, max_seq_len)
        model = _load_weights(files, setup, placement, plan, progress)
        rule = alpha or params.image_processor.alpha_for(files.format)
    runtime = make_runtime(model, placement.device, compile, progress)
    return _ready(params, runtime, placement, plan, limit, tokenizer, text_only, rule, begin)


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
    """`load_model` of tensors in memory (InMemoryCheckpoint), shared where device and dtype fit."""
    begin = time.perf_counter()
    limit = _context_limit(params, max_seq_len)
    placement = choose_placement(device, dtype, params.parameters)
    plan = _plan(quantize, quantize_keep, placement)
    setup = _setup(params, placement, plan, False, max_seq_len)
    model = _load_weights(tensors, setup, placement, plan, None)
    alpha = params.image_processor.alpha_for(tensors.format)
    runtime = make_runtime(model, placement.device, compile)
    return _ready(params, runtime, placement, plan, limit, tokenizer, False, alpha, begin)


def _load_exported(
    folder: ExportedFolder,
    params: ModelParams,
    device: str,
    dtype: str,
    max_seq_len: int | None,
    quantize: str,
    keep: Collection[str],
    text_only: bool,
    compile: CompileMode,
    progress: ProgressCallback | None,
) -> tuple[Runtime, Placement, Plan, int]:
    """The runtime of a folder that `mmchat export` wrote, and what it was exported for."""
    record = folder.record
    folder.check_options(quantize, keep)
    if record.programs:
        if compile == "on":
            raise UsageError(f"{str(folder.path)!r} is compiled already; leave out --compile on")
        limit = folder.context_limit(max_seq_len)
        runtime, placement = open_exported(folder, params, device, dtype)
        return runtime, placement, quantization.make_plan(record.scheme, record.keep), limit
    limit = _context_limit(params, max_seq_len)
    placement = choose_placement(device, record.dtype if dtype == "auto" else dtype, 0)
    folder.check_dtype(placement)
    plan = _plan(record.scheme, record.keep, placement)
    with open_checkpoint(folder.path, merge_rules=None) as files:
        setup = _setup(params, placement, plan, text_only, max_seq_len)
        check_memory(replace(setup, from_file=True), available_memory(placement.device))
        model = load_saved(files, params, plan, placement.device, text_only=text_only)
    return make_runtime(model, placement.device, compile, progress), placement, plan, limit


def _plan(quantize: str, keep: Collection[str], placement: Placement) -> Plan:
    plan = quantization.make_plan(quantize, keep)
    if plan.scheme and plan.scheme.is_float:
        check_float8(placement.device)
    return plan


def _setup(
    params: ModelParams, placement: Placement, plan: Plan, text_only: bool, max_seq_len: int | None
) -> Setup:
    """What will be loaded, for the estimate of its memory."""
    return Setup.of(
        params,
        placement,
        quantize=plan.name,
        keep=plan.keep,
        text_only=text_only,
        max_seq_len=max_seq_len,
    )


def _ready(
    params: ModelParams,
    runtime: Runtime,
    placement: Placement,
    plan: Plan,
    limit: int,
    tokenizer: Tokenizer,
    text_only: bool,
    alpha: Literal["white", "drop"],
    begin: float,
) -> LoadedModel:
    """Put the parts together; `begin` is when loading began."""
    make_processor = params.family.resolve("processor")
    return LoadedModel(
        params=params,
        runtime=runtime,
        processor=make_processor(params.config, params.image_processor, tokenizer, alpha),
        tokenizer=tokenizer,
        placement=placement,
        max_seq_len=limit,
        sampling_defaults=SamplingParams(**vars(params.generation)),
        text_only=text_only,
        quantize=plan.name,
        load_seconds=time.perf_counter() - begin,
    )


def _context_limit(params: ModelParams, asked: int | None) -> int:
    most = params.config.text_config.max_position_embeddings
    if asked is None:
        return most
    if not 1 <= asked <= most:
        raise UsageError(f"max_seq_len must be between 1 and {most} for this model, not {asked}")
    return asked


def _given(checkpoint: Path | None, params: ModelParams) -> Path:
    if checkpoint is None:
        raise CheckpointError(f"no weights of {params.name} are here; give --checkpoint-path")
    return checkpoint


def _open_tokenizer(source: ModelSource) -> Tokenizer:
    if source.tokenizer is None:
        raise CheckpointError(
            f"no tokenizer beside the weights of {source.params.name}; give --tokenizer-path "
            "(tokenizer.model or tokenizer.json)"
        )
    tokenizer = open_tokenizer(source.tokenizer)
    rows = source.params.config.text_config.vocab_size
    if tokenizer.vocab_size != rows:
        raise CheckpointError(
            f"the tokenizer {str(source.tokenizer)!r} has {tokenizer.vocab_size} tokens, but the "
            f"model {source.params.name} has {rows}; give the tokenizer that came with the weights"
        )
    return tokenizer


def _load_weights(
    files: Checkpoint,
    setup: Setup,
    placement: Placement,
    plan: Plan,
    progress: ProgressCallback | None,
) -> Any:
    """Build on the meta device, then give each parameter its tensor, one at a time.

    A layer that is quantised takes its weights rounded, so that no more than one of them is in
    memory as it was. Raises MemoryError_ before anything is allocated.
    """
    in_place = used_in_place(files, str(placement.dtype).removeprefix("torch."))
    check_memory(replace(setup, from_file=in_place), available_memory(placement.device))
    params, family = setup.params, setup.params.family
    with torch.device("meta"):
        model = family.resolve("model")(params.config)
    model.requires_grad_(False).eval()
    wanted = model.weight_names(text_only=setup.text_only)
    quantization.replace_linears(model, plan)
    try:
        tensors = family.resolve("weights").iter_weights(files, params.config, wanted)
        for done, (name, tensor) in enumerate(tensors, start=1):
            _assign(model, name, tensor, placement)
            if progress:
                progress("weights", done, len(wanted))
    except CheckpointError as error:
        raise _with_fitting_params(error, params) from None
    stays_in_file = plan.scheme is None and placement.device.type == "cpu"
    if not stays_in_file:
        model.fuse_projections()
    model.materialize_buffers(placement.device)
    return model


def _assign(model: torch.nn.Module, name: str, tensor: torch.Tensor, placement: Placement) -> None:
    owner, _, last = name.rpartition(".")
    module = model.get_submodule(owner)
    if last == "weight" and isinstance(module, QuantizedLinear | Float8Linear):
        module.quantize(tensor.to(placement.device))
        return
    tensor = tensor.to(placement.device, placement.dtype)
    setattr(module, last, torch.nn.Parameter(tensor, requires_grad=False))


def _with_fitting_params(error: CheckpointError, params: ModelParams) -> MmchatError:
    """Add which params file fits, when the checkpoint's tile size is not that of the params."""
    tile_size = getattr(error, "tile_size", None)
    fitting = params_for_tile_size(tile_size, params) if tile_size else None
    return CheckpointError(f"{error}; {fitting} fits") if fitting else error
