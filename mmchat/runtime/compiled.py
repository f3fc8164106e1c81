"""Run a model whose layers are compiled, each kind of layer once, and its steps as CUDA graphs.

Compiling block by block takes as long for 100 layers as for 10. It happens before the first token,
not beside eager decoding: while torch.fx traces, it replaces nn.Module.__call__ for all threads.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from types import MethodType, NoneType
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from mmchat.errors import CompileError, DiskError
from mmchat.hardware.allocation import memory_errors
from mmchat.models.base import Batch, Block, Cache, CompilableModel, Use
from mmchat.models.prompt import Media
from mmchat.progress import ProgressCallback
from mmchat.runtime.compiler import compile_errors, keep_compiled_code
from mmchat.runtime.eager import EagerRuntime
from mmchat.runtime.native_steps import NativeStepsRuntime

CompileMode = Literal["auto", "on", "off"]

_STATIC = Tensor | int | NoneType
ALL_USES: tuple[Use, ...] = ("decode", "verify", "vision")
WARM_UPS = 3  # runs before a capture, for libraries that set themselves up on first use
Recorder = Callable[[Callable[[], Tensor]], tuple[Callable[[], None], Tensor]]


def make_runtime(
    model: CompilableModel,
    device: torch.device,
    mode: CompileMode = "auto",
    progress: ProgressCallback | None = None,
) -> EagerRuntime:
    """The runtime that `mode` asks for.

    "auto" compiles on CUDA only: on a CPU the layers' matrix products dominate, and the start
    costs more than an answer gains. If compiling fails, "auto" runs eagerly and says why in
    `notices`; "on" raises CompileError or DiskError.
    """
    if mode == "off" or (mode == "auto" and device.type != "cuda"):
        return EagerRuntime(model, device)
    compiled = NativeStepsRuntime if device.type == "cpu" else CompiledRuntime
    try:
        return compiled(model, device, progress)
    except (CompileError, DiskError) as error:
        if mode == "on":
            raise
        runtime = EagerRuntime(model, device)
        runtime.notices.append(f"not compiled: {error}")
        return runtime


def _where_static(compiled: Callable[..., Tensor], eager: Callable[..., Tensor]) -> Any:
    """`compiled` for tensors, numbers and tuples of them, `eager` for other arguments."""

    def forward(layer: Any, *args: object, **named: object) -> Tensor:
        is_static = all(isinstance(leaf, _STATIC) for leaf in pytree.tree_leaves(args))
        return (compiled if is_static else eager)(layer, *args, **named)

    return forward


class CompiledRuntime(EagerRuntime):
    """By torch.compile, when it is made. Raises CompileError and DiskError, and leaves the model as
    it was.

    uses: what is compiled. Shapes that come later and do not fit what is compiled are compiled when
    they come; if that fails, the model goes on eagerly and `notices` says so.
    """

    def __init__(
        self,
        model: CompilableModel,
        device: torch.device,
        progress: ProgressCallback | None = None,
        uses: Collection[Use] = ALL_USES,
        backend: str = "inductor",
    ) -> None:
        super().__init__(model, device)
        begin = time.perf_counter()
        self._backend = backend
        self.uses = uses
        self._compiled: dict[Any, Callable[..., Any]] = {}
        self._replaced: list[tuple[Any, str]] = []
        with compile_errors():
            try:
                self._compile(model, progress)
            except BaseException:
                self._go_eager()
                raise
        self.compile_seconds = time.perf_counter() - begin

    def _compile(self, model: CompilableModel, progress: ProgressCallback | None) -> None:
        keep_compiled_code()
        blocks = [block for block in model.blocks() if block.use in self.uses]
        for done, block in enumerate(blocks):
            if progress:
                progress("compile", done, len(blocks))
            self._compile_block(block)
        if progress:
            progress("compile", len(blocks), len(blocks))
        if self.device.type == "cuda":
            self._replace(model, "step", StepGraph(model.step))

    def _compile_block(self, block: Block) -> None:
        """Compile a kind of layer by running one; give the result to all of that kind."""
        eager = type(block.layers[0]).forward
        if eager not in self._compiled:
            self._compiled[eager] = self._compile_function(eager, block.use)
        compiled = self._compiled[eager]
        with torch.inference_mode(), memory_errors():
            example = block.example()
            for tensor, axis in example.dynamic:
                torch._dynamo.mark_dynamic(tensor, axis)
            for tensor, axis in example.static:
                torch._dynamo.mark_static(tensor, axis)
            compiled(block.layers[0], *example.args)
        for layer in block.layers:
            self._replace(layer, "forward", MethodType(_where_static(compiled, eager), layer))

    def _compile_function(self, function: Callable[..., Any], use: Use) -> Callable[..., Any]:
        # on CUDA, products with few rows become reductions, into which dequantisation fuses
        tunes = self.device.type == "cuda" and use != "vision"
        return torch.compile(
            function,
            fullgraph=True,
            backend=self._backend,
            dynamic=True if use == "vision" else None,  # None: the axes that examples mark
            options={"coordinate_descent_tuning": True} if tunes else None,
        )

    def _replace(self, module: Any, method: str, replacement: object) -> None:
        setattr(module, method, replacement)  # found before the method of the class
        if (module, method) not in self._replaced:
            self._replaced.append((module, method))

    def _go_eager(self, error: CompileError | None = None) -> None:
        self.compile_seconds = None
        while self._replaced:
            module, method = self._replaced.pop()
            vars(module).pop(method, None)  # a layer that models share may be eager already
        if error:
            self.notices.append(f"no longer compiled: {error}")

    def encode(self, media: Sequence[Media], cache: Cache) -> Iterator[Sequence[Media]]:
        try:
            with compile_errors():
                yield from super().encode(media, cache)
        except CompileError as error:  # nothing of the picture is in the cache before its end
            self._go_eager(error)
            yield from super().encode(media, cache)

    def forward(self, batch: Batch, cache: Cache) -> Tensor:
        """Run again without compiled layers if a new shape cannot be compiled.

        Nothing has run by then but layers that write the same values at the same positions.
        """
        try:
            with compile_errors():
                return super().forward(batch, cache)
        except CompileError as error:
            self._go_eager(error)
            return super().forward(batch, cache)


def record_cuda(step: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """Capture `step`; what replays it, and the tensor that each replay overwrites.

    Running `step` again must change nothing that one run did not.
    """
    side = torch.cuda.Stream()  # torch asks that what is captured has run on another stream before
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UPS):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()
    return graph.replay, result


class StepGraph:
    """`step(token_ids, *tensors)` by replay: one launch instead of a thousand.

    A graph is bound to the addresses of the tensors that it was captured with, so it is captured
    anew when the cache has grown or another picture or conversation is read. There is one recording
    for each shape of token_ids. Not measured: it has been written without a GPU at hand, and all
    but `record_cuda` is tested with a recorder for the CPU.

    tensors: nested sequences of tensors that stay where they are, of which `step` writes some in
    place, and the same values if it runs twice. -> a new tensor each time.
    """

    def __init__(self, step: Callable[..., Tensor], record: Recorder = record_cuda) -> None:
        self.step = step
        self.record = record
        self._tensors: Sequence[Any] = ()  # held, so that no other tensor gets their addresses
        self._places: list[object] = []
        # a captured step: its input of token ids, what replays it, its logits
        self._recordings: dict[torch.Size, tuple[Tensor, Callable[[], None], Tensor]] = {}

    def __call__(self, token_ids: Tensor, *tensors: Any) -> Tensor:
        places = [_place(tensor) for tensor in _flat(tensors)]
        if places != self._places:
            self._recordings.clear()
            self._tensors, self._places = tensors, places
        if token_ids.shape not in self._recordings:
            static_ids = token_ids.clone()
            recorded = self.record(lambda: self.step(static_ids, *tensors))
            self._recordings[token_ids.shape] = static_ids, *recorded
        static_ids, replay, logits = self._recordings[token_ids.shape]
        static_ids.copy_(token_ids)
        replay()
        return logits.clone()  # the next replay overwrites them


def _flat(value: Any) -> Iterator[Tensor | None]:
    if value is None or isinstance(value, Tensor):
        yield value
    else:
        for item in value:
            yield from _flat(item)


def _place(tensor: Tensor | None) -> object:
    """What must be equal for a recording to read the same memory."""
    return None if tensor is None else (tensor.data_ptr(), tensor.shape, tensor.stride())
