"""Linear layers of the 11B beside those of ONNX Runtime and OpenVINO, and what this core can do.

Neither runs Mllama, so it is layers alone: those of its MLP, one after the other, on the same
weights and with float32 activations. Reading memory and products of 8-bit numbers are timed in the
same rounds: what share of them the layers reach is said of each round.
"""

from __future__ import annotations

import ctypes
import importlib
import math
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import agreement
from benchmarks.clock import Elapsed, Rounds, Stopwatch
from benchmarks.random_mllama import config_of
from benchmarks.report import gain, timings
from benchmarks.shapes import Shapes, shaped_spec
from mmchat.bench.rounds import environment, interleave, spread
from mmchat.errors import MissingExtra
from mmchat.hardware.bandwidth import measure_bandwidth
from mmchat.nn.linear import Linear
from mmchat.quant.schemes import find_scheme

PAIRS = 2  # up and down again so often: no cache holds them
ROWS = (1, 8, 64)
GROUP = 64
LIMIT = 0.1  # relative error of outputs: all round activations to 8 bits, once a layer
CPU = torch.device("cpu")
Infer = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Weight:
    """w = (q - 8) · scale of int4, w = q · scale of int8: what all engines can say.

    levels: [N, K], uint8 0..15 or int8. scale: float32 [N, groups of K].
    """

    levels: Tensor
    scale: Tensor

    @property
    def bits(self) -> int:
        return 4 if self.levels.dtype == torch.uint8 else 8

    @property
    def nbytes(self) -> int:
        """As mmchat holds it: a group of int4 has a scale and a zero, a row of int8 a scale."""
        return self.levels.numel() * self.bits // 8 + 4 * self.scale.numel()

    @property
    def centred(self) -> Tensor:
        """int8 [N, K]: the levels around 0."""
        return self.levels.to(torch.int8) - (8 if self.bits == 4 else 0)

    def widen(self) -> Tensor:
        rows, columns = self.levels.shape
        groups = self.centred.float().view(rows, self.scale.shape[1], -1)
        return (groups * self.scale[:, :, None]).view(rows, columns)


def draw(bits: int, widths: tuple[int, int]) -> list[Weight]:
    """Random weights from the first width to the second and back, which keep sizes as they are.

    Normal ones, rounded: large ones are rare, as in trained ones. mmchat's time for many tokens in
    int8 with AVX2 depends on that.
    """
    generator = torch.Generator().manual_seed(0)
    found = []
    for columns, rows in (widths, widths[::-1]) * PAIRS:
        weights = torch.randn(rows, columns, generator=generator) / math.sqrt(columns)
        grouped = weights.view(rows, columns // GROUP if bits == 4 else 1, -1)
        most = 2 ** (bits - 1) - 1
        scale = (grouped.abs().amax(-1) / most).bfloat16().float()
        levels = (grouped / scale[:, :, None]).round().clamp(-most, most).view(rows, columns)
        shifted = (levels + 8).to(torch.uint8) if bits == 4 else levels.to(torch.int8)
        found.append(Weight(shifted, scale))
    return found


def _module(name: str) -> Any:
    """Of a peer, whose types are not there where it is not installed."""
    return importlib.import_module(name)


# ---- engines ------------------------------------------------------------------------------------


def mmchat(weights: Sequence[Weight]) -> Infer:
    layers = []
    for weight in weights:
        rows, columns = weight.levels.shape
        layer = Linear(columns, rows, bias=False, device="meta")
        layer.set_format(find_scheme(f"int{weight.bits}"))
        if weight.bits == 4:
            low, high = weight.levels.view(rows, -1, 2).unbind(-1)
            scale = weight.scale.bfloat16()
            held = (low | high << 4, scale, torch.zeros_like(scale))
        else:
            held = (weight.levels, weight.scale[:, 0].contiguous())
        for name, tensor in zip(layer.tensor_names, held, strict=True):
            setattr(layer, name, tensor)
        layer.repack()
        layers.append(layer)

    def infer(x: Tensor) -> Tensor:
        for layer in layers:
            x = layer(x)
        return x

    return infer


def onnx_runtime(weights: Sequence[Weight]) -> Infer:
    onnx, onnxruntime, helper, numpy_helper = map(
        _module, ("onnx", "onnxruntime", "onnx.helper", "onnx.numpy_helper")
    )
    nodes, given = [], []
    for index, weight in enumerate(weights):
        (rows, columns), bits = weight.levels.shape, weight.bits
        unsigned = (weight.centred.to(torch.int16) + 2 ** (bits - 1)).to(torch.uint8).numpy()
        if bits == 4:
            unsigned = unsigned[:, ::2] | unsigned[:, 1::2] << 4
        blocks = columns // GROUP
        scale = weight.scale.expand(rows, blocks).reshape(-1).numpy()
        given.append(numpy_helper.from_array(unsigned.reshape(rows, blocks, -1), f"w{index}"))
        given.append(numpy_helper.from_array(scale, f"s{index}"))
        options = {"K": columns, "N": rows, "bits": bits, "block_size": GROUP, "accuracy_level": 4}
        inputs = [f"x{index}", f"w{index}", f"s{index}"]
        nodes.append(
            helper.make_node(
                "MatMulNBits", inputs, [f"x{index + 1}"], domain="com.microsoft", **options
            )
        )
    kind, width = onnx.TensorProto.FLOAT, weights[0].levels.shape[1]
    ends = [helper.make_tensor_value_info(f"x{i}", kind, ["m", width]) for i in (0, len(weights))]
    graph = helper.make_graph(nodes, "linears", ends[:1], ends[1:], given)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return lambda x: torch.from_numpy(session.run(None, {"x0": x.numpy()})[0])


def openvino(weights: Sequence[Weight]) -> Infer:
    ov, op = map(_module, ("openvino", "openvino.opset13"))
    x = start = op.parameter([-1, weights[0].levels.shape[1]], np.float32)
    kept = []  # constants share the memory of their arrays
    for weight in weights:
        rows, columns = weight.levels.shape
        scale = weight.scale.half().numpy()
        if weight.bits == 4:
            levels, groups = weight.levels.numpy(), columns // GROUP
            kept.append(levels[:, ::2] | levels[:, 1::2] << 4)
            kept.append(np.full(rows * groups // 2, 0x88, np.uint8))
            wide, zero = (
                op.convert(op.constant(ov.Tensor(array, shape, ov.Type.u4)), np.float16)
                for array, shape in (
                    (kept[-2], [rows, groups, GROUP]), (kept[-1], [rows, groups, 1]),
                )
            )  # fmt: skip
            wide = op.multiply(op.subtract(wide, zero), op.constant(scale[:, :, None]))
            wide = op.reshape(wide, op.constant(np.array([rows, columns])), False)
        else:
            wide = op.convert(op.constant(weight.levels.numpy()), np.float16)
            wide = op.multiply(wide, op.constant(scale))
        x = op.matmul(x, op.convert(wide, np.float32), False, True)
    options = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
    }
    model = ov.Core().compile_model(ov.Model([x], [start]), "CPU", options)
    request = model.create_infer_request()

    def infer(x: Tensor, kept: Any = kept) -> Tensor:  # noqa: ARG001
        return torch.from_numpy(request.infer({0: x.numpy()})[0].copy())

    return infer


PEERS = {"ONNX Runtime": onnx_runtime, "OpenVINO": openvino}
PACKAGES = {"ONNX Runtime": ("onnxruntime", "onnx"), "OpenVINO": ("openvino",)}


def version_of(peer: str) -> str:
    """Raises MissingExtra where a package of the peer is not installed."""
    try:
        own, *_ = map(version, PACKAGES[peer])
        return own
    except PackageNotFoundError:
        raise MissingExtra(f"install it with: pip install {' '.join(PACKAGES[peer])}") from None


# ---- what the machine can do --------------------------------------------------------------------


def integer_ceiling() -> Callable[[int], float] | None:
    """dots(count) of ceilings.c, compiled for this processor; None without a compiler."""
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        return None
    source = Path(__file__).with_name("ceilings.c")
    with tempfile.TemporaryDirectory() as folder:
        target = f"{folder}/ceilings.so"
        command = [compiler, "-O2", "-march=native", "-shared", "-fPIC", "-o", target, source]
        if subprocess.run(command, capture_output=True, check=False).returncode:  # noqa: S603
            return None
        dots = ctypes.CDLL(target).dots
    dots.restype, dots.argtypes = ctypes.c_double, (ctypes.c_long,)
    return dots


def ceilings(dots: Callable[[int], float] | None) -> dict[str, float]:
    """Bytes a second read from memory, and operations a second; processor time of one thread."""
    read = measure_bandwidth(CPU, rounds=1, clock=time.process_time).bytes_per_second
    if dots is None:
        return {"read": read}

    def speed(count: int = 200_000) -> float:
        begin = time.process_time()
        return dots(count) / (time.process_time() - begin)

    # the best: what else runs on the core's other half slows it
    return {"read": read, "dots": max(speed() for _ in range(8))}


# ---- measuring ----------------------------------------------------------------------------------


def measure(
    weights: Sequence[Weight], peers: Sequence[str], *, rounds: int, seconds: float
) -> list[dict[str, Any]]:
    """A record for each number of rows, with the shares of what the machine can do.

    Raises DisagreementError before a wrong engine is timed.
    """
    engines = {"mmchat": mmchat(weights)} | {name: PEERS[name](weights) for name in peers}
    draw = torch.Generator().manual_seed(1)
    inputs = {n: torch.randn(n, weights[0].levels.shape[1], generator=draw) for n in ROWS}
    errors = _compare(engines, weights, inputs[ROWS[1]])
    clock = Stopwatch(CPU)

    def run(infer: Infer, _: int) -> Mapping[str, Elapsed]:
        with torch.inference_mode():
            return {str(n): clock.time(lambda x=x: infer(x))[1] for n, x in inputs.items()}

    runs: dict[str, Callable[[int], Any]] = {
        name: lambda i, infer=infer: run(infer, i) for name, infer in engines.items()
    }
    dots = integer_ceiling()
    runs["machine"] = lambda _: ceilings(dots)
    for warm_up in runs.values():
        warm_up(0)
    done = interleave(runs, rounds=rounds, seconds=seconds)
    machine = [one.pop("machine") for one in done]
    return [_workload(Rounds(done), machine, weights, rows, errors) for rows in ROWS]


def _compare(
    engines: Mapping[str, Infer], weights: Sequence[Weight], x: Tensor
) -> dict[str, float]:
    """Relative errors of outputs, none of which may be large."""
    expected = x
    for weight in weights:
        expected = F.linear(expected, weight.widen())
    errors = {}
    for name, infer in engines.items():
        found = agreement.compare(infer(x), expected)
        agreement.check(found, LIMIT, name=name, against="float32", workload="linear layers")
        errors[name] = float(f"{found.relative_error:.2g}")
    return errors


def _workload(
    found: Rounds,
    machine: Sequence[Mapping[str, float]],
    weights: Sequence[Weight],
    rows: int,
    errors: Mapping[str, float],
) -> dict[str, Any]:
    """times: how many times as long as mmchat. shares: of reading all weights once at the speed of
    memory, and of multiplying at the ceiling, round by round."""
    contestants: dict[str, Any] = {}
    for name, error in errors.items():
        ms = timings(found, name, "cpu")[str(rows)]
        contestants[name] = {"ms": {"total": ms}, "relative_error": error}
        if name != "mmchat":
            contestants[name]["times"] = spread(found.ratios(name, "mmchat", str(rows), "cpu"))
    seconds = found.seconds("mmchat", str(rows), "cpu")
    work = {
        "read": sum(weight.nbytes for weight in weights),
        "dots": 2 * rows * sum(weight.levels.numel() for weight in weights),
    }
    speeds = {kind: [one[kind] for one in machine] for kind in machine[0]}
    contestants["mmchat"]["shares"] = {
        kind: spread([work[kind] / s / speed for s, speed in zip(seconds, each, strict=True)])
        for kind, each in speeds.items()
    }
    contestants["mmchat"]["gain"] = gain(found, "mmchat", str(rows), "1", rows, "cpu")
    bits = weights[0].bits
    return {
        "title": f"int{bits}, {rows} row{'s' * (rows > 1)}",
        "bits": bits,
        "rows": rows,
        "contestants": contestants,
        "machine": {kind: spread([speed / 1e9 for speed in each]) for kind, each in speeds.items()},
    }


def record(shapes: str, peers: Sequence[str], *, rounds: int, seconds: float) -> dict[str, Any]:
    """int4 and int8 at the widths of a model, beside `peers`. Raises UsageError."""
    text = config_of(shaped_spec(Shapes(shapes), CPU)).text_config
    widths = text.hidden_size, text.intermediate_size
    found = environment(CPU, torch.float32)
    found["versions"] |= {peer: version_of(peer) for peer in peers}
    workloads = []
    for bits in (4, 8):
        workloads += measure(draw(bits, widths), peers, rounds=rounds, seconds=seconds)
    names = ["mmchat", *peers]
    return {
        "environment": found, "clock": "cpu", "widths": widths, "layers": 2 * PAIRS,
        "contestants": names, "workloads": workloads,
    }  # fmt: skip
