"""Pictures a minute: `mmchat batch` beside `mmchat generate` processes and one chat in a loop.

python -m benchmarks.batch --pictures 500

All three ask the built-in model the same about drawn pictures, greedily, and are timed from start
to end of their processes; of `generate` some are run. Answers must be equal.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mmchat.evals.scenes import heldout_scenes

QUESTION = "What's in this image?"
OPTIONS = ("-p", QUESTION, "-t", "0", "-n", "64", "-q")
LOOP = """
import sys, mmchat
model = mmchat.load()
sampling = mmchat.SamplingParams(temperature=0, max_new_tokens=64)
for name in sys.argv[2:]:
    print(model.ask(sys.argv[1], name, sampling=sampling))
"""


def draw(folder: Path, count: int) -> list[str]:
    """Files of drawn scenes, of all canvases."""
    scenes = (scene for scene in heldout_scenes(4 * count) if len(scene.pictures) == 1)
    names = []
    for number, scene in zip(range(count), scenes, strict=False):
        names.append(str(folder / f"{number:05}.png"))
        scene.pictures[0].save(names[-1])
    return names


@dataclass
class Spent:
    """Seconds by the clock and of processors, of processes that were run; what they wrote."""

    clock: float = 0.0
    processor: float = 0.0
    output: list[str] = field(default_factory=list)

    def run(self, *command: str) -> Spent:
        begin, used = time.perf_counter(), _children()
        done = subprocess.run(  # noqa: S603
            [sys.executable, *command], stdout=subprocess.PIPE, text=True, check=True
        )
        self.clock += time.perf_counter() - begin
        self.processor += _children() - used
        self.output += done.stdout.splitlines()
        return self


def _children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def measure(count: int, processes: int, rows: Sequence[str]) -> dict[str, tuple[int, Spent]]:
    """How many pictures each way was asked about, and what that took."""
    generate, loop, batch = Spent(), Spent(), Spent()
    with tempfile.TemporaryDirectory() as folder:
        names = draw(Path(folder), count)
        for name in names[:processes]:
            generate.run("-m", "mmchat", "generate", *OPTIONS, "-i", name)
        loop.run("-c", LOOP, QUESTION, *names)
        out = Path(folder) / "out.jsonl"
        batch.run("-m", "mmchat", "batch", folder, "-o", str(out), *OPTIONS, *rows)
        lines = map(json.loads, out.read_text("utf-8").splitlines())
        answers = {line["custom_id"]: line["text"] for line in lines}
    same = sum(answers[name] == text for name, text in zip(names, loop.output, strict=True))
    if generate.output != loop.output[:processes] or same < 0.98 * count:  # but for near ties
        sys.exit(f"the answers differ: {same} of {count} are those of the loop")
    return {"generate": (processes, generate), "loop": (count, loop), "batch": (count, batch)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--pictures", type=int, default=500)
    parser.add_argument("--processes", type=int, default=20, help="of generate")
    parser.add_argument("--rows", type=int, help="of batch; as usual if left out")
    given = parser.parse_args()
    print(f"{given.pictures} pictures, load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    rows = ["--rows", str(given.rows)] if given.rows else []
    found = measure(given.pictures, given.processes, rows)
    count, best = found["batch"]
    for name, (asked, spent) in found.items():
        times = spent.clock / asked * count / best.clock
        work = spent.processor / asked * count / best.processor
        rate = 60 * asked / spent.clock
        print(
            f"{name:9} {rate:8,.1f} pictures a minute; batch is **{times:.2f}×** as fast,"
            f" in processor time **{work:.2f}×**"
        )


if __name__ == "__main__":
    main()
