"""mmchat beside a peer on the same tensors: `python -m benchmarks.compare`.

All contestants run once first, and their logits must agree: nothing wrong is timed. Prints a table;
`-o FILE` keeps all that was measured as JSON, from the first workload on.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks import plan as plans
from benchmarks import random_mllama, report, table
from benchmarks.clock import Clock
from benchmarks.entrants import Entrants, gather, peer_version
from benchmarks.plan import Plan, Say
from benchmarks.traffic import decode_bytes
from benchmarks.turns import measure_turns
from benchmarks.workloads import Field, Workload
from mmchat.bench.rounds import environment, rounded, summary
from mmchat.errors import MmchatError
from mmchat.hardware.bandwidth import measure_bandwidth
from mmchat.loading.loader import LoadedModel
from mmchat.storage import atomic_file

SCHEMA = 2
Keep = Callable[[dict[str, Any]], None]  # is given the record as it grows


def run(plan: Plan, say: Say, keep: Keep) -> dict[str, Any]:
    """Measure all parts of the plan. Raises DisagreementError before a wrong model is timed."""
    threads = torch.get_num_threads()
    torch.set_num_threads(plan.threads or threads)
    try:
        return _run(plan, say, keep)
    finally:
        torch.set_num_threads(threads)


def _run(plan: Plan, say: Say, keep: Keep) -> dict[str, Any]:
    entrants = gather(plan, say)
    base = entrants.ours[0].loaded
    clock: Clock = "cpu" if base.device.type == "cpu" and torch.get_num_threads() == 1 else "wall"
    record: dict[str, Any] = {
        "schema": SCHEMA,
        "environment": _environment(plan, base),
        "model": _model_record(plan, base),
        "clock": clock,
        "contestants": entrants.names(),
        "workloads": [],
    }
    for workload in _measured(plan, entrants, clock, say):
        record["workloads"].append(workload)
        keep(record)
    if "bandwidth" in plan.parts:
        say("memory bandwidth")
        record["bandwidth"] = _bandwidth_record(entrants, record["workloads"], clock)
    if "turns" in plan.parts:
        record["turns"] = [_turns_record(plan, entrants, tiles, clock, say) for tiles in plan.tiles]
    keep(record)
    return record


def workloads(plan: Plan) -> list[Workload]:
    wanted = []
    if "decode" in plan.parts:
        most = 0 if plan.peer == "llama.cpp" else max(plan.tiles, default=0)
        for tiles in (0, most) if most else (0,):
            wanted += [Workload("decode", context, tiles) for context in plan.contexts]
        wanted += [Workload("decode", plan.contexts[0], rows=rows) for rows in plan.rows]
    if "prefill" in plan.parts:
        wanted += [Workload("prefill", tokens) for tokens in plan.prompts]
    if "picture" in plan.parts:
        wanted += [Workload("picture", 0, tiles) for tiles in plan.tiles]
    return wanted


def _measured(plan: Plan, entrants: Entrants, clock: Clock, say: Say) -> Iterator[dict[str, Any]]:
    field = Field(entrants.all, entrants.limits, entrants.ours[0], plan.rounds, plan.seconds)
    for workload in workloads(plan):
        say(workload.title)
        yield report.workload_record(
            field.measure(workload), entrants.names(), entrants.rivals, clock
        )


def _turns_record(
    plan: Plan, entrants: Entrants, tiles: int, clock: Clock, say: Say
) -> dict[str, Any]:
    """First and second turn about a picture file, and the share that the second takes."""
    say(f"two turns about a picture of {tiles} tiles")
    rounds = measure_turns(entrants.ours, tiles, rounds=plan.rounds, seconds=plan.seconds)
    contestants = {}
    for name in (c.name for c in entrants.ours):
        first, second = (
            rounds.seconds(name, f"{turn} turn", clock) for turn in ("first", "second")
        )
        share = summary([after / before for before, after in zip(first, second, strict=True)])
        contestants[name] = {
            "ms": report.timings(rounds, name, clock),
            "second_to_first": {k: rounded(v) for k, v in asdict(share).items()},
        }
    return {"tiles": tiles, "contestants": contestants}


def _bandwidth_record(
    entrants: Entrants, records: list[dict[str, Any]], clock: Clock
) -> dict[str, Any]:
    """Reading speed of the device, and what share of it each decode measurement reaches."""
    base = entrants.ours[0].loaded
    timer = time.process_time if clock == "cpu" else time.perf_counter
    probe = measure_bandwidth(base.device, clock=timer)
    decoding = []
    for entry in (r for r in records if r["kind"] == "decode" and r["rows"] == 1):
        for contestant in entrants.ours:
            ms = entry["contestants"][contestant.name]["ms"]["total"]
            read = decode_bytes(contestant.loaded, entry["tokens"], entry["tiles"])
            least = 1000 * read / probe.bytes_per_second  # milliseconds
            shares = {"median": ms["median"], "low": ms["high"], "high": ms["low"]}
            decoding.append(
                {
                    "contestant": contestant.name,
                    "title": entry["title"],
                    "bytes_per_token": read,
                    "gigabytes_per_second": rounded(read / ms["median"] / 1e6),
                    "share": {key: rounded(least / value) for key, value in shares.items()},
                }
            )
    return {
        "probe_gigabytes_per_second": rounded(probe.bytes_per_second / 1e9),
        "threads": probe.threads,
        "decode": decoding,
    }


def _environment(plan: Plan, loaded: LoadedModel) -> dict[str, Any]:
    found = environment(loaded.device, loaded.dtype)
    found["versions"] |= peer_version(plan)
    return found


def _model_record(plan: Plan, loaded: LoadedModel) -> dict[str, Any]:
    spec = loaded.spec
    layers, vision_layers = random_mllama.depth(random_mllama.config_of(spec))
    return {
        "name": spec.name,
        "weights": "random",
        "seed": plan.shapes.seed,
        "layers": layers,
        "vision_layers": vision_layers,
        "parameters": spec.parameters,
    }


def agreements(record: dict[str, Any]) -> Iterator[str]:
    """How far each contestant's logits are from those of the first, over all workloads."""
    reference, *others = record["contestants"]
    for name in others:
        found = [workload["contestants"][name]["agreement"] for workload in record["workloads"]]
        if found:
            error, kl = (max(each[key] for each in found) for key in ("relative_error", "kl"))
            same = sum(each["top1"] for each in found)
            yield (
                f"{name} against {reference}: relative error of logits up to {error:.1e}, "
                f"KL up to {kl:.1e} nats, the same likeliest token in {same} of {len(found)}"
            )


def say(text: str) -> None:
    """What is being done; to stderr."""
    print(text, file=sys.stderr, flush=True)


def write(path: Path, record: dict[str, Any]) -> None:
    """Replace the file by the record as JSON."""
    atomic_file.write_text(path, json.dumps(record, indent=1, allow_nan=False) + "\n")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure as `arguments` say, the process's own if left out; ends the process on an error."""
    try:
        plan, output = plans.parse(sys.argv[1:] if arguments is None else arguments)
        if output is not None:
            atomic_file.check_writable(output)
        record = run(plan, say, lambda grown: write(output, grown) if output else None)
    except MmchatError as error:
        print(f"benchmarks.compare: error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    print(table.section(record))
    print("\n".join(agreements(record)))


if __name__ == "__main__":
    main()
