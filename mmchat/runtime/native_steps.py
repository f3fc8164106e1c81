"""Run a CPU's decode steps as native code: layers compiled ahead of time, each kind once.

A program takes its layer's weights as arguments, so one serves all layers of a kind. It is kept on
disk under a hash of all that it was made from. The next start loads it in milliseconds, without
torch's compiler, which alone takes seconds to import.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import mmchat
from mmchat.errors import disk_errors
from mmchat.hardware.cpu import processor_identity
from mmchat.hardware.kept_code import find, keep
from mmchat.models.base import CompilableModel, Example
from mmchat.nn.linear import Linear
from mmchat.progress import ProgressCallback
from mmchat.quant.formats.base import Format
from mmchat.runtime.aoti import open_program
from mmchat.runtime.compiler import check_cpp_compiler, compile_errors, keep_compiled_code
from mmchat.runtime.eager import EagerRuntime

if TYPE_CHECKING:
    from torch._C._aoti import AOTIModelPackageLoader

TRACED = ("models", "nn", "quant")  # folders of mmchat whose code ends up in a program
ENDING = ".pt2"
OPTIONS = {"cpp.dynamic_threads": True}  # as many as the process that runs it has
SETTINGS = bool | int | float | str | tuple | Format | None  # types of a module's settings


class NativeStepsRuntime(EagerRuntime):
    """Decodes by compiled layers; compiles those that the cache does not hold when it is made.

    All else is eager: there, matrix products take the time. Raises CompileError and DiskError, and
    leaves the model as it was.
    """

    def __init__(
        self,
        model: CompilableModel,
        device: torch.device,
        progress: ProgressCallback | None = None,
    ) -> None:
        super().__init__(model, device)
        begin = time.perf_counter()
        steps = _steps(model)
        programs = _programs(steps, keep_compiled_code() / "steps", progress)
        for step in steps:
            replacement = NativeStep(step, programs[step.key])
            step.layer.forward = replacement  # found before the method of the class
        self.compile_seconds = time.perf_counter() - begin


@dataclass(frozen=True)
class Step:
    """A layer in steps. key: the same for all layers that one program serves."""

    layer: nn.Module
    example: Example
    weights: Mapping[str, Tensor]
    key: str


class NativeStep:
    """Runs a step by its program, or as plain PyTorch where the arguments are of another shape."""

    def __init__(self, step: Step, program: AOTIModelPackageLoader) -> None:
        self._eager = MethodType(type(step.layer).forward, step.layer)
        self._program = program
        self._weights = list(step.weights.values())
        self._expected = _expected(step.example)

    def __call__(self, *args: Any) -> Tensor:
        leaves = pytree.tree_leaves(args)
        if len(leaves) != len(self._expected) or not all(map(_fits, leaves, self._expected)):
            return self._eager(*args)
        given = [leaf for leaf in leaves if leaf is not None]
        return self._program.boxed_run([*self._weights, *given])[0]


# None: an axis of any size but 0 and 1, which torch takes for constants.
Shape = tuple[torch.dtype, tuple[int | None, ...]]


def _expected(example: Example) -> list[Shape | None]:
    """Of all leaves of the arguments; None where an argument is None."""
    dynamic = {(id(tensor), axis) for tensor, axis in example.dynamic}

    def shape(leaf: Tensor) -> Shape:
        sizes = enumerate(leaf.shape)
        return leaf.dtype, tuple(None if (id(leaf), axis) in dynamic else n for axis, n in sizes)

    leaves = pytree.tree_leaves(example.args)
    return [None if leaf is None else shape(leaf) for leaf in leaves]


def _fits(leaf: Tensor | None, expected: Shape | None) -> bool:
    if leaf is None or expected is None:
        return leaf is expected
    dtype, sizes = expected
    return (
        leaf.dtype == dtype
        and leaf.is_contiguous()  # a program computes addresses as its example lay
        and leaf.dim() == len(sizes)
        and all(
            n > 1 if size is None else n == size for n, size in zip(leaf.shape, sizes, strict=True)
        )
    )


def _steps(model: CompilableModel) -> list[Step]:
    found = []
    for block in model.blocks():
        if block.use != "decode":
            continue
        with torch.inference_mode():
            example = block.example()
        for layer in block.layers:
            for part in layer.modules():
                if isinstance(part, Linear):
                    part.repack()  # into the order that it has when a program is given it
            vars(layer).pop("forward", None)  # of another runtime: what is traced is the class's
            weights = dict(layer.named_parameters()) | dict(layer.named_buffers())
            described = (
                _origin(_code_of(type(layer))),
                _expected(example),
                [(n, w.dtype, w.shape, w.stride()) for n, w in weights.items()],
                [_described(name, module) for name, module in layer.named_modules()],
            )
            key = hashlib.sha256(repr(described).encode()).hexdigest()[:24]
            found.append(Step(layer, example, weights, key))
    return found


def _described(name: str, module: nn.Module) -> tuple[object, ...]:
    """What a module is but for its tensors and parts."""
    plain = {n: value for n, value in vars(module).items() if isinstance(value, SETTINGS)}
    return name, type(module).__qualname__, plain


def _code_of(kind: type) -> Path:
    """The folder of a class's package, or the file of a module that is in none."""
    file = Path(inspect.getfile(kind))
    return file.parent if "." in kind.__module__ else file


@functools.cache
def _origin(code: Path) -> str:
    """Changes with the code that is traced, the compiler and the processor.

    code: a layer's own file or folder, which a family from elsewhere has outside of mmchat.
    """
    digest = hashlib.sha256(f"{torch.__version__} {processor_identity()} {OPTIONS}".encode())
    package = Path(mmchat.__file__).parent
    sources = {Path(__file__)}
    for place in (code, *(package / folder for folder in TRACED)):
        sources |= {place} if place.is_file() else set(place.rglob("*.py"))
    for path in sorted(sources):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _programs(
    steps: Sequence[Step], folder: Path, progress: ProgressCallback | None
) -> dict[str, AOTIModelPackageLoader]:
    """One for each key, from `folder`, where those that are compiled now are kept."""
    kinds = {step.key: step for step in steps}
    found: dict[str, AOTIModelPackageLoader] = {}
    for key in kinds:
        with suppress(RuntimeError):  # an earlier start's, which may be one that cannot be loaded
            if path := find(folder, key, ENDING):
                found[key] = open_program(path, "model")
    missing = [step for key, step in kinds.items() if key not in found]
    if missing:
        check_cpp_compiler()
    for done, step in enumerate(missing):
        if progress:
            progress("compile", done, len(missing))
        with disk_errors(f"cannot write {str(folder)!r}"), compile_errors():
            path = keep(folder, step.key, ENDING, functools.partial(_compile, step))
        found[step.key] = open_program(path, "model")
    if missing and progress:
        progress("compile", len(missing), len(missing))
    return found


def _compile(step: Step, target: Path) -> None:
    import torch._inductor

    leaves, spec = pytree.tree_flatten(step.example.args)  # torch stores no types of others
    dynamic = torch.export.Dim.DYNAMIC
    axes = tuple(
        shape and {axis: dynamic for axis, size in enumerate(shape[1]) if size is None}
        for shape in _expected(step.example)
    )
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler's own use of old interfaces
        program = torch.export.export(
            _PureStep(step.layer, spec),
            (dict(step.weights), *leaves),
            dynamic_shapes=(dict.fromkeys(step.weights), axes),
        )
        torch._inductor.aoti_compile_and_package(
            program, package_path=str(target), inductor_configs=dict(OPTIONS)
        )


class _PureStep(nn.Module):
    """A layer as a function of its weights and of the leaves of its arguments."""

    def __init__(self, layer: nn.Module, spec: pytree.TreeSpec) -> None:
        super().__init__()
        self._spec = spec
        self._layer = (layer,)  # in a tuple, so that its weights are not this module's

    def forward(self, weights: dict[str, Tensor], *leaves: object) -> Tensor:
        args = pytree.tree_unflatten(leaves, self._spec)
        return torch.func.functional_call(self._layer[0], weights, args)
