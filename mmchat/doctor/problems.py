"""What makes this machine slower or smaller than it could be, each with what to do."""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from mmchat.doctor.machine import Machine
from mmchat.words import size

_SPACE_FOR_THE_11B = 21 * 1024**3


@dataclass(frozen=True)
class Problem:
    """problem: what is found; remedy: the next step."""

    problem: str
    remedy: str


def find_problems(machine: Machine) -> Iterator[Problem]:
    """The heaviest first."""
    has_gpu = any(device.name != "cpu" for device in machine.devices)
    if not has_gpu and shutil.which("nvidia-smi"):
        if torch.version.cuda is None:
            yield Problem(
                "this torch cannot use the NVIDIA GPU: it is the build for processors alone",
                "install the CUDA build, as pytorch.org says",
            )
        else:
            yield Problem(
                f"torch is built for CUDA {torch.version.cuda} and finds no GPU",
                "see whether nvidia-smi shows one, and whether its driver is new enough",
            )
    on_cpu = machine.device.name == "cpu"
    if on_cpu and machine.threads < machine.cores // 2:
        chosen = os.environ.get("OMP_NUM_THREADS")
        remedy = f"unset OMP_NUM_THREADS, which is {chosen}" if chosen else "set OMP_NUM_THREADS"
        yield Problem(f"torch uses {machine.threads} of {machine.cores} processors", remedy)
    if on_cpu and any(choice.kernel.startswith("torch") for choice in machine.kernels):
        yield Problem(
            f"the C kernels are not in use: {machine.kernels[0].reason}",
            "install gcc, then run mmchat doctor again",
        )
    if machine.load is not None and machine.load > machine.cores:
        yield Problem(
            f"the machine is busy (load {machine.load:.1f} on {machine.cores} processors), so"
            + (" the speeds above are low" if machine.reading else " no speeds are given"),
            "run mmchat doctor again when it is idle; while it is not, fewer threads"
            " (OMP_NUM_THREADS=1) may be faster, as each step waits for the slowest",
        )
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    if soft != resource.RLIM_INFINITY:
        yield Problem(
            f"this shell lets a process map {size(soft)} (ulimit -v), and weights are mapped whole",
            "run ulimit -v unlimited",
        )
    if machine.disk_free is not None and machine.disk_free < _SPACE_FOR_THE_11B:
        yield Problem(
            f"{size(machine.disk_free)} are free at {machine.cache}, and the 11B takes 20 GiB",
            "free some space, or set HF_HOME to a larger disk",
        )
