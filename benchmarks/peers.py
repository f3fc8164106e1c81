"""mmchat beside all peers that are installed: `python -m benchmarks.peers`.

What each does best is compared: transformers whole, in both dtypes; llama.cpp the text, for it
knows no Mllama; ONNX Runtime and OpenVINO linear layers. One thread, processor time, rounds in
turn. Prints tables; `-o FILE` also keeps what is measured in that file as it comes, beside what the
file has of parts that were not asked for.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import compare, linears, llama_cpp, table, transformers_mllama
from benchmarks.compare import say
from benchmarks.plan import parse
from mmchat.errors import MmchatError
from mmchat.storage import atomic_file

# What benchmarks.compare is asked for each part that is a whole model.
ARGUMENTS = {
    "transformers float32": "--vs transformers --dtype float32 --context 64,1024"
    " --prompt-tokens 128 --vision 1,4 --measure decode,prefill,picture",
    "transformers bfloat16": "--vs transformers --dtype bfloat16 --context 64,1024"
    " --prompt-tokens 128 --vision 1,4 --measure decode,prefill,picture",
    "llama.cpp": "--vs llama.cpp --dtype bfloat16 --context 64 --rows 8"
    " --prompt-tokens 128,512 --measure decode,prefill,bandwidth",
}
PARTS = (*ARGUMENTS, "linears")
_ABSENT = "left out"


def installed() -> dict[str, str]:
    """Peer -> its version, or how to install it."""
    checks = {"transformers": transformers_mllama.version, "llama.cpp": llama_cpp.version}
    found = {name: _version(check) for name, check in checks.items()}
    for peer in linears.PEERS:
        found[peer] = _version(lambda peer=peer: linears.version_of(peer))
    return found


def _version(check: Callable[[], str]) -> str:
    try:
        return check()
    except MmchatError as error:
        return f"{_ABSENT}: {error}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure as `arguments` say, the process's own if left out; ends the process on an error."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers", description=(__doc__ or "").split("\n\n")[0]
    )
    add = parser.add_argument
    add("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; all if left out")
    add("--shapes", default="11B", help="widths of this model")
    add("--rounds", type=int, default=5)
    add("--seconds", type=float, default=40.0, help="for each workload: begin no round beyond this")
    add("-o", "--output", type=Path, help="write the records there, as JSON")
    given = parser.parse_args(arguments)
    if wrong := [part for part in given.parts if part not in PARTS]:
        parser.error(f"{wrong[0]!r} is none of {', '.join(PARTS)}")
    peers = installed()
    for name, state in peers.items():
        say(f"{name}: {state}")
    try:
        if given.output is not None:
            atomic_file.check_writable(given.output)
        _measure(given, [name for name, state in peers.items() if _ABSENT not in state])
    except MmchatError as error:
        print(f"benchmarks.peers: error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


def _measure(given: argparse.Namespace, peers: Sequence[str]) -> None:
    records: dict[str, Any] = {}
    if given.output is not None and given.output.exists():
        records = json.loads(given.output.read_text(encoding="utf-8"))

    def keep(part: str, record: dict[str, Any]) -> None:
        records[part] = record
        if given.output is not None:
            compare.write(given.output, {p: records[p] for p in PARTS if p in records})

    for part in given.parts or PARTS:
        if part in ARGUMENTS and part.split()[0] not in peers:
            continue
        say(f"== {part}")
        begin = time.perf_counter()
        keep(part, _record(part, given, peers, lambda grown, part=part: keep(part, grown)))
        gc.collect()  # the weights of the next part need the memory
        say(f"== {part} took {time.perf_counter() - begin:.0f} s")
        print(table.section(records[part]))


def _record(
    part: str, given: argparse.Namespace, peers: Sequence[str], keep: compare.Keep
) -> dict[str, Any]:
    rounds, seconds = given.rounds, given.seconds
    if part in ARGUMENTS:
        asked = f"--shapes {given.shapes} --rounds {rounds} --seconds {seconds} --threads 1"
        plan, _ = parse([*asked.split(), "--quantize", "int8,int4", *ARGUMENTS[part].split()])
        return compare.run(plan, say, keep)
    torch.set_num_threads(1)
    engines = [peer for peer in linears.PEERS if peer in peers]
    return linears.record(given.shapes, engines, rounds=rounds, seconds=seconds)


if __name__ == "__main__":
    main()
