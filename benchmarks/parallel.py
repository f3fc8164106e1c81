"""A token of one process, of two that share the model, and of two that do not talk.

python -m benchmarks.parallel --scheme int8 --layers 5

The models have the widths of the 11B, random weights, few layers and few tokens. Each process runs
on one thread and has its share of the weights, so two that do not talk are as fast as two can be
here: what is missing to that is the price of the sums. All are timed in turn, so that what else
runs on the machine slows all alike.
"""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks import random_mllama
from benchmarks.clock import Clock, Stopwatch
from benchmarks.shapes import RandomTensors, Shapes, shaped_spec
from mmchat.checkpoints.adapter import Adapters
from mmchat.loading.options import LoadOptions
from mmchat.loading.prepared import Prepared
from mmchat.loading.shares import join
from mmchat.loading.weights import load_weights
from mmchat.models.base import Batch
from mmchat.parallel import launch
from mmchat.parallel.slices import Shares
from mmchat.runtime.eager import EagerRuntime
from mmchat.runtime.mirrored import Follower, MirroredRuntime, driver_of

VOCABULARY = 8192  # tokens, of whose embedding each process holds the whole
TOKENS = 8  # a turn, of which the median counts
TIMEOUT = 900.0
CLOCKS: tuple[Clock, Clock] = ("wall", "cpu")
WAYS = {"one process": ("whole",), "two that share": ("shared", "shared"),
        "two that do not talk": ("silent", "silent")}  # fmt: skip


class Silent:
    """In place of a Group: a rank that adds up nothing and waits for nobody."""

    def sum(self, x: Tensor) -> Tensor:
        return x

    def gather(self, x: Tensor, sizes: Sequence[int], *, first: bool) -> Tensor:
        return x if first else x.repeat(*(1 for _ in x.shape[:-1]), len(sizes))


def run_of(kind: str, rank: int, given: argparse.Namespace) -> Any:
    """The runtime of one process; that of a follower is not given back."""
    cpu = torch.device("cpu")
    spec = shaped_spec(Shapes(given.shapes, given.layers, 3), cpu)
    config = random_mllama.config_of(spec)
    text = replace(config.text_config, vocab_size=VOCABULARY)
    spec = replace(spec, config=replace(config, text_config=text))
    options = LoadOptions(device="cpu", dtype="bfloat16", quantize=given.scheme)
    files = RandomTensors(spec, 0, torch.bfloat16, cpu, keep=False).checkpoint()
    shares = None if kind == "whole" else Shares(spec.family.cuts(spec.config), rank, 2)
    prepared = Prepared(files, spec, options, options.placement(spec), None, Adapters(()))
    model = load_weights(prepared, shares=shares)
    own = EagerRuntime(model, cpu)
    if shares is None:
        return own
    group: Any = launch.join(TIMEOUT, TIMEOUT) if kind == "shared" else Silent()
    join(model, group, shares)
    if kind == "silent":
        return own
    if rank:
        Follower(group, lambda *_: own).follow()
        os._exit(0)
    driver = driver_of(group)
    number = driver.new_number()
    driver.tell("model", number, {}, True)
    return MirroredRuntime(driver, own, number)


def work(kind: str, rank: int, given: argparse.Namespace) -> None:
    """Writes a line when it is ready, and for each that it reads what a token took, milliseconds:
    by the clock, and of this process's processor."""
    torch.set_num_threads(1)
    runtime, clock = run_of(kind, rank, given), Stopwatch(torch.device("cpu"))
    cache = runtime.new_cache(1, 1024)
    runtime.forward(Batch.last_of(torch.arange(64), 0), cache)
    print("ready", flush=True)
    for _ in sys.stdin:
        taken = []
        for _ in range(TOKENS):
            token = Batch.last_of(torch.tensor([7]), cache.lengths[0])
            taken.append(clock.time(partial(runtime.forward, token, cache))[1])
        cache.truncate(0, 64)
        print(*(1e3 * median(getattr(one, by) for one in taken) for by in CLOCKS), flush=True)


class Way:
    """Processes that are timed together."""

    def __init__(self, kinds: Sequence[str], port: int) -> None:
        again = [sys.executable, "-m", "benchmarks.parallel", *sys.argv[1:]]
        place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        self._processes = [
            subprocess.Popen(  # noqa: S603
                [*again, "--as", kind, str(rank)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                env={**os.environ, **place, "RANK": str(rank), "OMP_NUM_THREADS": "1",
                     "GLOO_SOCKET_IFNAME": "lo"},
            )
            for rank, kind in enumerate(kinds)
        ]  # fmt: skip
        self._told = self._processes[: 1 if "shared" in kinds else None]

    def read(self) -> list[str]:
        return [(process.stdout or sys.stdin).readline().strip() for process in self._told]

    def time(self) -> dict[Clock, float]:
        """Milliseconds of a token, by the slower process."""
        for process in self._told:
            print(file=process.stdin, flush=True)
        slowest = map(max, zip(*(map(float, line.split()) for line in self.read()), strict=True))
        return dict(zip(CLOCKS, slowest, strict=True))

    def end(self) -> None:
        for process in self._processes:
            process.kill()
            process.wait()


def measure(given: argparse.Namespace) -> list[dict[str, dict[Clock, float]]]:
    """For each round, milliseconds of a token by the way."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    ways = {name: Way(kinds, port) for name, kinds in WAYS.items()}
    try:
        for name, way in ways.items():
            if set(way.read()) != {"ready"}:
                sys.exit(f"{name}: a process ended")
        return [{name: way.time() for name, way in ways.items()} for _ in range(given.rounds)]
    finally:
        for way in ways.values():
            way.end()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--shapes", default="11B")
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--scheme", default="int8")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--as", nargs=2, dest="role", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.role:
        work(given.role[0], int(given.role[1]), given)
        return
    print(f"{given.layers} layers of the {given.shapes}, {given.scheme}; load"
          f" {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")  # fmt: skip
    rounds = measure(given)
    for by in CLOCKS:
        title = "by the clock" if by == "wall" else "processor time of a process"
        print(f"a token, {title}:")
        for name in WAYS:
            taken = [each[name][by] for each in rounds]
            ratios = sorted(each["one process"][by] / each[name][by] for each in rounds)
            low, high = ratios[len(ratios) // 4], ratios[3 * len(ratios) // 4]
            print(f"  {name:20} {min(taken):7.1f} ms at best, {median(taken):7.1f} usually;"
                  f" **{median(ratios):.2f}×** as fast ({low:.2f} to {high:.2f})")  # fmt: skip


if __name__ == "__main__":
    main()
