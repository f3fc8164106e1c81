"""Compile the C kernels once, check them, and call them."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
from pathlib import Path

import torch
from torch import Tensor

from mmchat.events import ProgressCallback
from mmchat.kernels import reference
from mmchat.machine import kept_code
from mmchat.machine.cpu import processor_identity

BLOCK = 64  # K must be a multiple of it
LARGEST_HEAD = 256  # as in attention.c
SOURCES = ("linear.c", "attention.c", "quantize.c")
HEADERS = ("bfloat16.h",)
_FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-fPIC")
_COMPILE_SECONDS = 120


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
        found.check()
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
    try:
        make = functools.partial(_compile, compiler)
        return _kept(name) or kept_code.keep(folder, name, ".so", make)
    except OSError as error:
        raise UnavailableError(f"cannot write {str(folder)!r}: {error.strerror}") from None


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


class Library:
    """The C functions with tensors as arguments. All tensors are contiguous and on the CPU."""

    def __init__(self, path: Path) -> None:
        try:
            self._c = ctypes.CDLL(str(path))
            self._c.mmchat_instructions.restype = ctypes.c_char_p
            self.instructions = self._c.mmchat_instructions().decode()
        except (OSError, AttributeError) as error:
            raise UnavailableError(f"the compiled kernels do not load: {error}") from None

    def linear_bf16(self, x: Tensor, weight: Tensor) -> Tensor:
        """x: float32 [M, K], weight: bfloat16 [N, K] -> float32 [M, N]."""
        return self._linear("mmchat_linear_bf16", x, weight.shape[0], (weight,))

    def linear_int8(self, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        """x: float32 [M, K], weight: int8 [N, K], scale: float32 [N] -> float32 [M, N]."""
        return self._linear("mmchat_linear_int8", x, weight.shape[0], (weight, scale))

    def linear_int4(self, x: Tensor, weight: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """x: float32 [M, K], weight: uint8 [N, K/2], scale, zero: [N, K/group] -> [M, N]."""
        group = x.shape[1] // scale.shape[1]
        return self._linear("mmchat_linear_int4", x, weight.shape[0], (weight, scale, zero), group)

    def _linear(
        self, name: str, x: Tensor, rows: int, weights: tuple[Tensor, ...], *more: int
    ) -> Tensor:
        tokens, width = x.shape
        out = torch.empty(tokens, rows)
        if self._call(name, *weights, x, out, tokens, rows, width, *more):
            raise MemoryError(f"no memory for {x.numel()} activations")
        return out

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """As reference.attend; key and value as `attends` accepts them."""
        batch, groups, length, width = key.shape
        scaled = query.float().reshape(batch, groups, -1, width) * width**-0.5
        out = torch.empty_like(scaled)
        mask_stride = 0
        if mask is not None:
            mask = mask.reshape(-1, length).contiguous()
            mask_stride = length if len(mask) > 1 else 0
        sizes = (batch, groups, scaled.shape[2], length, width)
        strides = (key.stride(0), key.stride(1), mask_stride)
        if self._call("mmchat_attend", scaled, key, value, mask, out, *sizes, *strides):
            raise MemoryError(f"no memory to attend to {length} positions")
        return out.reshape(query.shape).to(query.dtype)

    @staticmethod
    def attends(key: Tensor, value: Tensor) -> bool:
        """Whether `attend` reads keys and values of this dtype, width and layout."""
        width = key.shape[-1]
        return (
            key.dtype == value.dtype == torch.bfloat16
            and width % 16 == 0
            and width <= LARGEST_HEAD
            and key.stride()[2:] == (width, 1)
            and key.stride() == value.stride()
            and key.shape == value.shape
        )

    def quantize_int8(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """As reference.quantize_int8, of float32 weights."""
        rows, width = weight.shape
        q, scale = torch.empty(rows, width, dtype=torch.int8), torch.empty(rows)
        self._call("mmchat_quantize_int8", weight, q, scale, rows, width)
        return q, scale

    def quantize_int4(self, weight: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor]:
        """As reference.quantize_int4, of float32 weights."""
        rows, width = weight.shape
        q = torch.empty(rows, width // 2, dtype=torch.uint8)
        scale = torch.empty(rows, width // group, dtype=torch.bfloat16)
        zero = torch.empty_like(scale)
        self._call("mmchat_quantize_int4", weight, q, scale, zero, rows, width, group)
        return q, scale, zero

    def widen_int8(self, weight: Tensor, scale: Tensor) -> Tensor:
        """As reference.widen_int8, to bfloat16."""
        out = torch.empty(weight.shape, dtype=torch.bfloat16)
        self._call("mmchat_widen_int8", weight, scale, out, *weight.shape)
        return out

    def widen_int4(self, weight: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """As reference.widen_int4, to bfloat16."""
        rows, width = weight.shape[0], weight.shape[1] * 2
        out = torch.empty(rows, width, dtype=torch.bfloat16)
        group = width // scale.shape[1]
        self._call("mmchat_widen_int4", weight, scale, zero, out, rows, width, group)
        return out

    def _call(self, name: str, *arguments: Tensor | int | None) -> int:
        values = [
            ctypes.c_int64(a)
            if isinstance(a, int)
            else ctypes.c_void_p(None if a is None else a.data_ptr())
            for a in arguments
        ]
        return getattr(self._c, name)(*values, ctypes.c_int(torch.get_num_threads()))

    def check(self) -> None:
        """Compare every function with its reference; raises UnavailableError."""
        draw = torch.Generator().manual_seed(0)
        weight = torch.randn(11, 256, generator=draw)
        x = torch.randn(7, 256, generator=draw)
        bf16 = weight.bfloat16()
        pairs = {"bf16": (self.linear_bf16(x, bf16), x @ bf16.float().T, 1e-4)}
        query, key, value = torch.randn(3, 2, 2, 70, 64, generator=draw).bfloat16()
        mask = torch.rand(2, 1, 1, 70, generator=draw) < 0.7
        query = query[:, :, :3].reshape(2, 6, 1, 64)
        for name, seen in (("attention", None), ("attention with a mask", mask)):
            found = self.attend(query, key, value, seen)
            pairs[name] = (found, reference.attend(query, key, value, seen), 0.01)
        q, scale = self.quantize_int8(weight)
        wide = reference.widen_int8(q, scale, torch.float32)
        pairs["rounding to int8"] = (wide, weight, 0.02)
        pairs["int8"] = (self.linear_int8(x, q, scale), x @ wide.T, 0.02)
        pairs["wide int8"] = (self.widen_int8(q, scale).float(), wide, 0.01)
        for group in (32, 64, 128):
            q, scale, zero = self.quantize_int4(weight, group)
            wide = reference.widen_int4(q, scale, zero, torch.float32)
            pairs[f"rounding to int4-g{group}"] = (wide, weight, 0.15)
            pairs[f"int4-g{group}"] = (self.linear_int4(x, q, scale, zero), x @ wide.T, 0.02)
            pairs[f"wide int4-g{group}"] = (self.widen_int4(q, scale, zero).float(), wide, 0.01)
        for name, (found, expected, tolerance) in pairs.items():
            if not (found - expected).norm() <= tolerance * expected.norm():
                raise UnavailableError(f"the compiled kernel for {name} is wrong here")
