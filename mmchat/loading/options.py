"""Every option of loading a model, once; the command line takes its own from here."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import KW_ONLY, dataclass, fields, replace
from functools import partial
from numbers import Integral
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, TypeVar

from mmchat.errors import DeviceError, UsageError, check_type, quoted
from mmchat.hardware.placement import check_device_name, choose_placement
from mmchat.leads import OF_LOAD, lead
from mmchat.parallel.slices import check_ranks
from mmchat.progress import ProgressCallback
from mmchat.quant.schemes import AUTO, Plan, find_scheme, make_plan

if TYPE_CHECKING:
    import torch

    from mmchat.catalog.source import ModelSource
    from mmchat.catalog.spec import ModelSpec
    from mmchat.checkpoints.exported_folder import ExportedFolder
    from mmchat.estimate.memory import Setup
    from mmchat.hardware.placement import Placement

P = ParamSpec("P")
T = TypeVar("T")

LONGEST_TIMEOUT = 86_400
# What stands in for schemes that are read by compiled kernels alone.
_WITHOUT_KERNELS = {
    "int4-b32": "int4-g32", "int6": "int8", "int8-b32": "int8", "nf4": "int4-g64",
    "fp4": "int4-g64",
}  # fmt: skip

PATHS = ("name", "checkpoint_path", "tokenizer_path", "params_path", "vision_tower")


@dataclass(frozen=True)
class LoadOptions:
    """Which model to load, and how to run it. Raises UsageError and DeviceError for wrong values.

    name: a known name, a Hub id, a folder or a weights file; None: what the paths say, or the
    built-in model. The paths overrule what the name leads to. vision_tower: path or Hub id of a
    vision encoder that is not among the model's weights. adapter: LoRA adapters that are merged
    into the weights, folders or Hub ids, each perhaps with `:SCALE` behind it; "none" leaves out
    one that lies beside them. device and dtype may be torch's own. quantize: a scheme of
    mmchat.quant.schemes; "auto" is none, or the nearest to what another program quantised the
    checkpoint to. quantize_keep: parts ("text", "head", "vision") that it leaves alone.
    kv: in which format keys and values are kept, "int8" or that of the activations ("auto").
    max_seq_len: positions of prompt and answer. text_only leaves vision and
    cross-attention unloaded. alpha overrides how transparent pictures are flattened. compile:
    compile the layers before the first token; "auto" does so on CUDA. parallel: how many processes
    share the model, of which this is the first; None is one. parallel_timeout: seconds after which
    one of them that does not answer ends all. progress is told how far loading is.
    """

    name: str | Path | None = None
    _: KW_ONLY
    device: str | torch.device = "auto"
    dtype: str | torch.dtype = "auto"
    quantize: str = AUTO
    quantize_keep: Collection[str] = ()
    kv: Literal["auto", "int8"] = "auto"
    max_seq_len: int | None = None
    checkpoint_path: str | Path | None = None
    tokenizer_path: str | Path | None = None
    params_path: str | Path | None = None
    vision_tower: str | Path | None = None
    adapter: str | Path | Sequence[str | Path] = ()
    text_only: bool = False
    alpha: Literal["white", "drop"] | None = None
    compile: Literal["auto", "on", "off"] = "auto"
    parallel: int | None = None
    parallel_timeout: float = 60.0
    progress: ProgressCallback | None = None

    def __post_init__(self) -> None:
        take = partial(object.__setattr__, self)
        take("device", _name_in_torch(self.device))
        take("dtype", _name_in_torch(self.dtype))
        if isinstance(self.quantize_keep, str):
            take("quantize_keep", (self.quantize_keep,))
        given: Any = self.adapter
        listed = [given] if isinstance(given, str | os.PathLike) else given
        check_type("adapter", listed, Sequence, "a string, a path or a list of them")
        for one in listed:
            check_type("adapter", one, (str, os.PathLike), "a string, a path or a list of them")
        take("adapter", tuple(listed))
        for name in PATHS:
            paths = (str, os.PathLike, NoneType)
            check_type(name, getattr(self, name), paths, "a string or a path")
        check_type("device", self.device, str, "a string")
        check_type("dtype", self.dtype, str, "a string")
        if self.max_seq_len is not None:
            check_type("max_seq_len", self.max_seq_len, Integral, "a whole number")
            take("max_seq_len", int(self.max_seq_len))
        check_type("text_only", self.text_only, bool, "True or False")
        check_type("quantize", self.quantize, str, "a string")
        check_type("quantize_keep", self.quantize_keep, Collection, "a list of strings")
        self._check_parallel()
        if self.compile not in ("auto", "on", "off"):
            raise UsageError(f"compile must be auto, on or off, not {quoted(self.compile)}")
        if self.kv not in ("auto", "int8"):
            raise UsageError(f"kv must be auto or int8, not {quoted(self.kv)}")
        if self.progress is not None and not callable(self.progress):
            raise UsageError(f"progress must be a function, not {type(self.progress).__name__}")
        if self.alpha not in (None, "white", "drop"):
            raise UsageError(f"alpha must be 'white' or 'drop', not {quoted(self.alpha)}")
        check_device_name(str(self.device))
        take("quantize_keep", self.plan.keep)

    def _check_parallel(self) -> None:
        if self.parallel is not None:
            check_type("parallel", self.parallel, Integral, "a whole number")
            if self.parallel < 1:
                raise UsageError(f"parallel must be 1 or more, not {self.parallel}")
        check_type("parallel_timeout", self.parallel_timeout, (int, float), "a number of seconds")
        if not 1 <= self.parallel_timeout <= LONGEST_TIMEOUT:
            raise UsageError(
                f"parallel_timeout must be from 1 to {LONGEST_TIMEOUT:,} seconds, not"
                f" {self.parallel_timeout}"
            )

    @property
    def ranks(self) -> int:
        """How many processes share the model."""
        return self.parallel or 1

    @property
    def plan(self) -> Plan:
        """What to quantise, where the files do not decide it."""
        return make_plan(self.quantize, self.quantize_keep)

    def find(self, *, checkpoint_required: bool = True) -> ModelSource:
        """Params and files; ParamsError or CheckpointError if there are none, or no tokenizer.

        What is kept of weights that would be rounded is found too. UsageError if the model's
        context is shorter than what is asked, or nothing is quantised of which parts are to be
        kept.
        """
        from mmchat.catalog.find import find_model

        paths = {name: getattr(self, name) for name in PATHS[1:]}
        source = find_model(
            self.name,
            **paths,
            adapter=self.adapter,
            checkpoint_required=checkpoint_required,
            companion_required=not self.text_only,
        )
        source.spec.context_limit(self.max_seq_len)
        if self.ranks > 1:
            self._check_shared(source)
        if self.quantize == AUTO and not source.spec.packing and not source.exported:
            make_plan("none", self.quantize_keep)  # raises for parts that are kept of nothing
        if source.adapters and source.exported:
            raise UsageError(
                f"{quoted(source.exported.path, 300)} was exported, and adapters are merged before;"
                f" give --adapter to: {source.exported.again()}"
            )
        if source.exported:  # which has a record of its files
            return source
        if checkpoint_required:
            source.tokenizer_file()
        if self.quantize in (AUTO, "none") or source.checkpoint is None or self.ranks > 1:
            return source
        from mmchat.catalog.kept import with_kept

        return with_kept(source, self.quantize, self.plan.keep, str(self.dtype))

    def _check_shared(self, source: ModelSource) -> None:
        """Raises UsageError for what so many ranks do not share, before anything is read."""
        spec, folder = source.spec, source.exported
        check_ranks(spec.name, self.ranks, spec.family.cuts(spec.config))
        if folder and folder.record.programs:
            raise UsageError(
                f"{quoted(folder.path, 300)} holds compiled programs, which --parallel"
                " cannot share; give it the checkpoint, or an export in safetensors"
            )
        if self.compile == "on":
            raise UsageError("--compile on does not go with --parallel yet; leave one of them out")

    def as_exported(self, folder: ExportedFolder) -> LoadOptions:
        """These, with what `folder` was exported for in place of what they leave open.

        Raises UsageError or ExportError for what it was not exported for.
        """
        record = folder.record
        folder.check_scheme(self.quantize, self.quantize_keep)
        folder.check_dtype(str(self.dtype))
        taken = replace(self, dtype=record.dtype, quantize=record.scheme, quantize_keep=record.keep)
        if not record.programs:
            return taken
        if self.compile == "on":
            raise UsageError(f"{str(folder.path)!r} is compiled already; leave out --compile on")
        if self.kv != "auto":
            raise UsageError(
                f"{str(folder.path)!r} holds compiled programs, which keep keys and values in"
                f" {record.dtype}; leave out --kv, or give it the checkpoint or an export in"
                " safetensors"
            )
        device = folder.device_for(str(self.device))
        return replace(taken, device=device, max_seq_len=folder.context_limit(self.max_seq_len))

    def placement(self, spec: ModelSpec) -> Placement:
        """Where the model will run, and in which dtype. Raises DeviceError."""
        released = spec.family.released_dtype
        return choose_placement(str(self.device), str(self.dtype), spec.parameters, released)

    def scheme(self, spec: ModelSpec, placement: Placement) -> str:
        """The one to load with: as asked, or the nearest to how the checkpoint is packed.

        Raises UsageError for parts that are to be kept, where nothing is packed.
        """
        if self.quantize != AUTO:
            return self.quantize
        found = spec.packing.scheme if spec.packing else "none"
        if found in _WITHOUT_KERNELS and not _has_kernels(placement):
            found = _WITHOUT_KERNELS[found]
        try:
            find_scheme(found).check_device(placement.device)
        except DeviceError:  # of the same bits, for every device
            return "int8"
        return make_plan(found, self.quantize_keep).scheme

    def as_json(self) -> dict[str, Any]:
        """Arguments that make the same options, but for `progress`, of plain values."""
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        del given["progress"]
        given["adapter"] = [str(one) for one in self.adapter]  # type: ignore[union-attr]
        return {n: str(v) if isinstance(v, os.PathLike) else v for n, v in given.items()}

    def identity(self, source: ModelSource) -> list[Any]:
        """What stands for the weights and how they are held, on every machine that has them."""
        names = ("dtype", "quantize", "quantize_keep", "kv", "max_seq_len", "text_only", "alpha")
        loaded = [str(getattr(self, name)) for name in names]
        found = source.checkpoint, source.companion, self.params_path
        places = [Path(place).name if place else "" for place in found]  # of the Hub: the commit
        adapters = [[one.folder.resolve().name, one.scale] for one in source.adapters]
        scheme, spec = self.quantize, source.spec
        if scheme == AUTO and spec.packing is not None:  # which may depend on the device
            scheme = self.scheme(spec, self.placement(spec))
        return [spec.name, places, adapters, scheme, loaded]

    def setup(self, spec: ModelSpec, placement: Placement, **known: Any) -> Setup:
        """What will be loaded, for the estimate of its memory. known: more fields of Setup."""
        from mmchat.estimate.memory import Setup

        return Setup.of(
            spec,
            placement,
            quantize=self.scheme(spec, placement),
            keep=self.plan.keep,
            text_only=self.text_only or spec.text_only,
            max_seq_len=self.max_seq_len,
            ranks=self.ranks,
            kv=self.kv,
            **known,
        )


def _has_kernels(placement: Placement) -> bool:
    from mmchat.quant.kernels import native

    return placement.device.type == "cpu" and native.is_possible()


def _name_in_torch(value: Any) -> Any:
    """`cpu` of torch.device("cpu"), `float32` of torch.float32; without importing torch."""
    kind = type(value)
    if kind.__module__ == "torch" and kind.__name__ in ("device", "dtype"):
        return str(value).removeprefix("torch.")
    return value


def called_with(make: Callable[P, Any]) -> Callable[[Callable[[Any], T]], Callable[P, T]]:
    """Let a function of one object be called with the arguments that make the object.

    Type checkers and inspect.signature see the arguments of `make`, and help() its own text too.
    """

    def decorate(function: Callable[[Any], T]) -> Callable[P, T]:
        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> T:
            try:
                given.bind(*args, **kwargs)
            except TypeError as error:  # by the name that was called
                found = lead(kwargs, OF_LOAD)
                raise TypeError(f"{function.__name__}(): {error}{found}") from None
            return function(make(*args, **kwargs))

        call.__doc__ = "\n\n".join(filter(None, map(inspect.getdoc, (function, make))))
        given = inspect.signature(make)
        returns = inspect.signature(function).return_annotation
        call.__signature__ = given.replace(return_annotation=returns)  # type: ignore[attr-defined]
        return call

    return decorate
