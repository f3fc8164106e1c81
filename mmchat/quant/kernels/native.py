"""Compile the C kernels once, check them, and call them."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmchat.errors import DiskError
from mmchat.hardware import kept_code
from mmchat.hardware.cpu import processor_identity
from mmchat.progress import ProgressCallback
from mmchat.quant.kernels import self_check
from mmchat.storage.atomic_file import write_text

BLOCK = 64  # K must be a multiple of it
GROUPS = (32, 64, 128)  # of int4 weights
LARGEST_HEAD = 256  # as in attention.c
SOURCES = ("linear.c", "attention.c", "quantize.c")
HEADERS = ("bfloat16.h",)
_FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-fPIC")
_COMPILE_SECONDS = 600  # 5 s on an idle machine


class UnavailableError(Exception):
    """Why there are no native kernels; its text completes "because"."""


@functools.cache
def library() -> Library | None:
    """The compiled kernels, or None where they cannot be had; `reason` says why."""
    return _load()[0]


def reason() -> str:
    """One clause: what the kernels use, or why there are none."""
    return _load()[1]


def is_wanted() -> bool:
    """Whether there should be kernels: on Linux, unless the user switches them off."""
    return platform.system() == "Linux" and os.environ.get("MMCHAT_NATIVE_KERNELS", "1") != "0"


def prepare(progress: ProgressCallback | None = None) -> None:
    """Compile the kernels now if that is still to be done, so that `progress` can tell of it."""
    try:
        if _kept(_fingerprint(_compiler())):
            return
    except UnavailableError:
        return
    if progress:
        progress("kernels", 0, 1)
    if library() and progress:
        progress("kernels", 1, 1)


@functools.cache
def _load() -> tuple[Library | None, str]:
    try:
        found = Library(_compiled())
        found.check(briefly=True)
    except UnavailableError as error:
        return None, str(error)
    return found, f"compiled for this machine, {found.instructions}"


def cache_folder() -> Path:
    """Where compiled kernels are kept."""
    import platformdirs

    return platformdirs.user_cache_path("mmchat", appauthor=False) / "kernels"


def _compiler() -> str:
    if platform.system() != "Linux":
        raise UnavailableError(f"not built on {platform.system()}")
    if not is_wanted():
        raise UnavailableError("switched off by MMCHAT_NATIVE_KERNELS=0")
    compiler = shutil.which(os.environ.get("CC") or "gcc")
    if compiler is None:
        raise UnavailableError("no C compiler here; install gcc")
    return compiler


def _kept(name: str) -> Path | None:
    return kept_code.find(cache_folder(), name, ".so")


def _compiled() -> Path:
    """The shared library for this machine; compiled if it is not in the cache, whole."""
    compiler, folder = _compiler(), cache_folder()
    name = _fingerprint(compiler)
    verdict = folder / f"{name}.wrong"
    try:
        if kept := _kept(name):
            return kept
        if verdict.is_file():
            raise UnavailableError(verdict.read_text())
        return kept_code.keep(folder, name, ".so", functools.partial(_make, compiler, verdict))
    except OSError as error:
        raise UnavailableError(f"cannot write {str(folder)!r}: {error.strerror}") from None


def _make(compiler: str, verdict: Path, target: Path) -> None:
    """Compile and check all branches before the library is kept; a wrong one leaves `verdict`."""
    _compile(compiler, target)
    try:
        Library(target).check()
    except UnavailableError as error:
        with contextlib.suppress(DiskError):
            write_text(verdict, str(error))
        raise


def _compile(compiler: str, target: Path) -> None:
    """The OpenMP runtime is torch's own, already in the process, so that threads are shared."""
    here = Path(__file__).parent
    command = [
        compiler, *_FLAGS, "-shared", *(str(here / name) for name in SOURCES),
        "-L", str(Path(torch.__file__).parent / "lib"), "-lm", "-o", str(target),
    ]  # fmt: skip
    try:
        done = subprocess.run(  # noqa: S603
            command,
            capture_output=True,
            text=True,
            timeout=_COMPILE_SECONDS,
            check=False,
            env={**os.environ, "TMPDIR": str(target.parent)},
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UnavailableError(f"{compiler} did not run: {error}") from None
    if done.returncode:
        complaint = done.stderr.strip().splitlines() or ["no message"]
        raise UnavailableError(f"{compiler} failed: {complaint[0]}")


def _fingerprint(compiler: str) -> str:
    """A name that changes with the source, the compiler and the processor."""
    digest = hashlib.sha256()
    for name in SOURCES + HEADERS:
        digest.update((Path(__file__).parent / name).read_bytes())
    status = Path(compiler).resolve().stat()
    digest.update(f"{compiler} {status.st_size} {status.st_mtime_ns} {_FLAGS}".encode())
    digest.update(processor_identity().encode())
    return f"kernels-{digest.hexdigest()[:24]}"


_BITS = {"mmchat_linear_bf16": 16, "mmchat_linear_int8": 8, "mmchat_linear_int4": 4}
Read = tuple[Tensor, torch.dtype, tuple[int, ...]]  # what C reads, and as what


class Library:
    """The C functions with tensors as arguments.

    What a function would read otherwise than it lies in memory is refused with ValueError: another
    dtype, shape, stride, alignment or device.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._c = ctypes.CDLL(str(path))
            self._functions: dict[str, Any] = {}  # called once, with the types of their arguments
            self._c.mmchat_instructions.restype = ctypes.c_char_p
            self.instructions = self._c.mmchat_instructions().decode()
        except (OSError, AttributeError) as error:
            raise UnavailableError(f"the compiled kernels do not load: {error}") from None

    def linear_bf16(self, x: Tensor, weight: Tensor) -> Tensor:
        """x: float32 [M, K], weight: bfloat16 [N, K] -> float32 [M, N]."""
        rows, width = weight.shape
        return self._linear("mmchat_linear_bf16", x, [(weight, torch.bfloat16, (rows, width))])

    def linear_int8(self, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        """x: float32 [M, K], weight: int8 [N, K], scale: float32 [N] -> float32 [M, N]."""
        return self._linear("mmchat_linear_int8", x, _int8(weight, scale))

    def linear_int4(self, x: Tensor, weight: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """x: float32 [M, K], weight: uint8 [N, K/2], scale, zero: [N, K/group] -> [M, N]."""
        reads, group = _int4(weight, scale, zero)
        return self._linear("mmchat_linear_int4", x, reads, group)

    def _linear(self, name: str, x: Tensor, weights: list[Read], *more: int) -> Tensor:
        tokens, width = x.shape
        weight = weights[0][0]
        rows = weight.shape[0]
        if width % BLOCK or weight.nbytes * 8 // _BITS[name] != rows * width:
            raise ValueError(f"{name}: weights {list(weight.shape)} and a width of {width}")
        out = torch.empty(tokens, rows)
        reads = [*weights, (x, torch.float32, (tokens, width))]
        if self._call(name, reads, [out], tokens, rows, width, *more):
            raise MemoryError(f"no memory for {x.numel()} activations")
        return out

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """As reference.attend; key and value as `attends` accepts them."""
        if not self.attends(key, value):
            raise ValueError("mmchat_attend: keys and values of another dtype or layout")
        batch, groups, length, width = key.shape
        scaled = query.float().reshape(batch, groups, -1, width).contiguous() * width**-0.5
        out = torch.empty_like(scaled)
        queries = scaled.shape[2]
        reads: list[Read] = [(scaled, torch.float32, (batch, groups, queries, width))]
        seen, mask_stride = None, 0
        if mask is not None:
            rows = mask.numel() // length
            seen = mask.reshape(rows, length).contiguous()
            mask_stride = length if rows > 1 else 0
            reads.append((seen, torch.bool, (batch if rows > 1 else 1, length)))
        _check("mmchat_attend", reads)
        sizes = (batch, groups, queries, length, width)
        strides = (key.stride(0), key.stride(1), mask_stride)
        if self._run("mmchat_attend", [scaled, key, value, seen, out], sizes + strides):
            raise MemoryError(f"no memory to attend to {length} positions")
        return out.reshape(query.shape).to(query.dtype)

    @staticmethod
    def attends(key: Tensor, value: Tensor) -> bool:
        """Whether `attend` reads keys and values of this dtype, width and layout."""
        width = key.shape[-1]
        return (
            key.dtype == value.dtype == torch.bfloat16
            and key.device.type == value.device.type == "cpu"
            and key.dim() == 4
            and width % 16 == 0
            and 0 < width <= LARGEST_HEAD
            and key.stride()[2:] == (width, 1)
            and key.stride() == value.stride()
            and key.shape == value.shape
        )

    def quantize_int8(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """As reference.quantize_int8, of float32 weights."""
        rows, width = weight.shape
        q, scale = torch.empty(rows, width, dtype=torch.int8), torch.empty(rows)
        reads: list[Read] = [(weight, torch.float32, (rows, width))]
        self._call("mmchat_quantize_int8", reads, [q, scale], rows, width)
        return q, scale

    def quantize_int4(self, weight: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor]:
        """As reference.quantize_int4, of float32 weights."""
        rows, width = weight.shape
        if group not in GROUPS or width % group:
            raise ValueError(f"groups of {group} in a width of {width}")
        q = torch.empty(rows, width // 2, dtype=torch.uint8)
        scale = torch.empty(rows, width // group, dtype=torch.bfloat16)
        zero = torch.empty_like(scale)
        reads: list[Read] = [(weight, torch.float32, (rows, width))]
        self._call("mmchat_quantize_int4", reads, [q, scale, zero], rows, width, group)
        return q, scale, zero

    def widen_int8(self, weight: Tensor, scale: Tensor) -> Tensor:
        """As reference.widen_int8, to bfloat16."""
        out = torch.empty(weight.shape, dtype=torch.bfloat16)
        self._call("mmchat_widen_int8", _int8(weight, scale), [out], *weight.shape)
        return out

    def widen_int4(self, weight: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """As reference.widen_int4, to bfloat16."""
        rows, width = weight.shape[0], weight.shape[1] * 2
        reads, group = _int4(weight, scale, zero)
        out = torch.empty(rows, width, dtype=torch.bfloat16)
        self._call("mmchat_widen_int4", reads, [out], rows, width, group)
        return out

    def _call(self, name: str, reads: list[Read], writes: list[Tensor], *sizes: int) -> int:
        """C functions take what they read, what they write, which is made here, and sizes."""
        _check(name, reads)
        return self._run(name, [read[0] for read in reads] + writes, sizes)

    def _run(self, name: str, tensors: Sequence[Tensor | None], sizes: tuple[int, ...]) -> int:
        function = self._functions.get(name)
        if function is None:
            function = self._functions[name] = getattr(self._c, name)
            numbers = [ctypes.c_int64] * len(sizes)
            function.argtypes = [ctypes.c_void_p] * len(tensors) + numbers + [ctypes.c_int]
        pointers = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
        return function(*pointers, *sizes, torch.get_num_threads())

    def check(self, *, briefly: bool = False) -> None:
        """Compare every function with its reference, on all its branches unless `briefly`.

        Raises UnavailableError.
        """
        if fault := self_check.first_fault(self, briefly=briefly):
            raise UnavailableError(f"the compiled kernel for {fault} is wrong here")


def _int8(weight: Tensor, scale: Tensor) -> list[Read]:
    rows, width = weight.shape
    return [(weight, torch.int8, (rows, width)), (scale, torch.float32, (rows,))]


def _int4(weight: Tensor, scale: Tensor, zero: Tensor) -> tuple[list[Read], int]:
    """What is read, and the size of the groups."""
    rows, half = weight.shape
    groups = scale.shape[-1]
    group = 2 * half // groups if groups else 0
    if group not in GROUPS or group * groups != 2 * half:
        raise ValueError(f"int4 weights {tuple(weight.shape)} with scales {tuple(scale.shape)}")
    shared = torch.bfloat16, (rows, groups)
    return [(weight, torch.uint8, (rows, half)), (scale, *shared), (zero, *shared)], group


def _check(name: str, reads: list[Read]) -> None:
    """Raises ValueError unless each tensor lies in memory as C reads it."""
    for tensor, dtype, shape in reads:
        if (
            tensor.dtype != dtype
            or tensor.shape != shape
            or not tensor.is_contiguous()
            or not tensor.is_cpu
            or tensor.data_ptr() % dtype.itemsize
        ):
            raise ValueError(
                f"{name}: expected {dtype} {list(shape)}, contiguous and aligned, on the CPU;"
                f" found {tensor.dtype} {list(tensor.shape)} with strides {tensor.stride()} on"
                f" {tensor.device}"
            )
