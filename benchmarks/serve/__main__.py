"""How `mmchat serve` bears load and faults: `python -m benchmarks.serve [MEASURE…] [--short]`.

Each measure starts the real server of the built-in model, and asks it over sockets; without a name
all of them run, which takes an hour, half of it `soak`. What is not kept ends with exit code 1.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from dataclasses import asdict

import torch

from benchmarks.serve import crowds, speed
from benchmarks.serve.figure import PAGE, RESULTS, updated
from mmchat.bench.rounds import environment

MEASURES = {
    measure.__name__: measure
    for measure in (
        speed.streams, speed.alone, speed.gaps, speed.fair,
        crowds.opened, crowds.vanish, crowds.killed, crowds.mixed, crowds.soak,
    )
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("measures", nargs="*", metavar="MEASURE", help=", ".join(MEASURES))
    parser.add_argument("--short", action="store_true", help="a try, whose figures mean nothing")
    parser.add_argument(
        "--write", action="store_true", help="keep them, and show them in docs/server.md"
    )
    given = parser.parse_args()
    if unknown := [name for name in given.measures if name not in MEASURES]:
        parser.error(f"no measure is called {unknown[0]}; there are {', '.join(MEASURES)}")
    if given.write and given.short:
        parser.error("--short measures nothing that is worth being kept; leave out --write")
    record = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    record.setdefault("figures", {})
    all_kept = True
    for name in given.measures or MEASURES:
        figures = asyncio.run(MEASURES[name](given.short))
        print(f"{name}: {MEASURES[name].__doc__}")
        for figure in figures:
            all_kept &= figure.is_kept
            print(figure.row + ("" if figure.is_kept else "  <- NOT KEPT"), flush=True)
        record["machine"] = environment(torch.device("cpu"), torch.float32)
        record["figures"][name] = [asdict(figure) for figure in figures]
        if given.write:  # at once: each takes minutes
            RESULTS.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
            page = updated(PAGE.read_text(encoding="utf-8"), record)
            PAGE.write_text(page, encoding="utf-8")
    return 0 if all_kept else 1


if __name__ == "__main__":
    sys.exit(main())
