"""Put a benchmark together: make or load the models, measure, and report as one object."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from mmchat.bench import processes, report
from mmchat.bench.entrants import Entrants, allowed_errors, gather
from mmchat.bench.plan import Plan, Say
from mmchat.bench.rounds import Clock, summary
from mmchat.bench.shapes import random_weights_of
from mmchat.bench.traffic import decode_bytes
from mmchat.bench.turns import measure_turns
from mmchat.bench.workloads import Field, Workload
from mmchat.hardware.bandwidth import measure_bandwidth
from mmchat.loading.loader import LoadedModel


def run(plan: Plan, say: Say) -> dict[str, Any]:
    """Measure all parts of the plan. Raises DisagreementError before a wrong model is timed."""
    threads = torch.get_num_threads()
    torch.set_num_threads(plan.threads or threads)
    try:
        return _run(plan, say)
    finally:
        torch.set_num_threads(threads)


def _run(plan: Plan, say: Say) -> dict[str, Any]:
    entrants = gather(plan, say)
    base = entrants.ours[0].loaded
    clock: Clock = "cpu" if base.device.type == "cpu" and torch.get_num_threads() == 1 else "wall"
    wanted, left_out = fitting(workloads(plan), entrants, plan.rounds)
    record: dict[str, Any] = {
        "schema": report.SCHEMA,
        "environment": report.environment(base.device, base.dtype, entrants.transformers),
        "model": model_record(plan, base),
        "clock": clock,
        "contestants": entrants.names(),
        "workloads": measure_workloads(plan, wanted, entrants, clock, say),
        "left_out": [workload.title for workload in left_out],
    }
    if "turns" in plan.parts:
        record["turns"] = [turns_record(plan, entrants, tiles, clock, say) for tiles in plan.tiles]
    if "bandwidth" in plan.parts:
        say("memory bandwidth")
        record["bandwidth"] = bandwidth_record(entrants, record["workloads"], clock)
    del entrants, base  # the processes to come need the memory
    if "startup" in plan.parts:
        record["startup"] = processes.startup(plan, say)
    if "memory" in plan.parts:
        record["memory"] = processes.memory(plan, say)
    return record


def measure_workloads(
    plan: Plan, wanted: Sequence[Workload], entrants: Entrants, clock: Clock, say: Say
) -> list[dict[str, Any]]:
    limits = allowed_errors(entrants, plan.variants)
    field = Field(entrants.all, limits, entrants.ours[0], plan.rounds, plan.seconds)
    records = []
    for workload in wanted:
        say(workload.title)
        measured = field.measure(workload)
        records.append(report.workload_record(measured, entrants.names(), clock))
    return records


def workloads(plan: Plan) -> list[Workload]:
    wanted = []
    if "decode" in plan.parts:
        most = max(plan.tiles, default=0)
        for tiles in (0, most) if most else (0,):
            wanted += [Workload("decode", context, tiles) for context in plan.contexts]
    if "prefill" in plan.parts:
        wanted += [Workload("prefill", tokens) for tokens in plan.prompts]
    if "picture" in plan.parts:
        wanted += [Workload("picture", 0, tiles) for tiles in plan.tiles]
    return wanted


def fitting(
    wanted: Sequence[Workload], entrants: Entrants, rounds: int
) -> tuple[list[Workload], list[Workload]]:
    """Those that all contestants have the positions for, and the others: an export has few."""
    most = min(contestant.loaded.max_seq_len for contestant in entrants.ours)
    fits = [workload for workload in wanted if workload.positions(rounds) <= most]
    return fits, [workload for workload in wanted if workload not in fits]


def turns_record(
    plan: Plan, entrants: Entrants, tiles: int, clock: Clock, say: Say
) -> dict[str, Any]:
    """First and second turn about a picture file, and the share that the second takes."""
    say(f"two turns about a picture of {tiles} tiles")
    rounds = measure_turns(entrants.ours, tiles, rounds=plan.rounds, seconds=plan.seconds)
    contestants = {}
    for name in (c.name for c in entrants.ours):
        pairs = zip(
            rounds.seconds(name, "second turn", clock),
            rounds.seconds(name, "first turn", clock),
            strict=True,
        )
        share = summary([second / first for second, first in pairs])
        contestants[name] = {
            "ms": report.timings(rounds, name, clock),
            "second_to_first": {k: report.rounded(v) for k, v in asdict(share).items()},
        }
    return {"tiles": tiles, "contestants": contestants}


def bandwidth_record(
    entrants: Entrants, records: list[dict[str, Any]], clock: Clock
) -> dict[str, Any]:
    """Reading speed of the device, and what share of it each decode measurement reaches."""
    base = entrants.ours[0].loaded
    timer = time.process_time if clock == "cpu" else time.perf_counter
    probe = measure_bandwidth(base.device, clock=timer)
    decoding = []
    for entry in (r for r in records if r["kind"] == "decode"):
        for contestant in entrants.ours:
            seconds = entry["contestants"][contestant.name]["ms"]["total"]["median"] / 1000
            read = decode_bytes(contestant.loaded, entry["tokens"], entry["tiles"])
            if read is None:
                continue
            decoding.append(
                {
                    "contestant": contestant.name,
                    "title": entry["title"],
                    "bytes_per_token": read,
                    "gigabytes_per_second": report.rounded(read / seconds / 1e9),
                    "share": report.rounded(read / seconds / probe.bytes_per_second),
                }
            )
    return {
        "probe_gigabytes_per_second": report.rounded(probe.bytes_per_second / 1e9),
        "threads": probe.threads,
        "decode": decoding,
    }


def model_record(plan: Plan, loaded: LoadedModel) -> dict[str, Any]:
    params = loaded.params
    layers, vision_layers = random_weights_of(params).depth(params.config)
    return {
        "name": params.name,
        "weights": "random" if plan.shapes else "as loaded",
        "seed": plan.shapes.seed if plan.shapes else None,
        "layers": layers,
        "vision_layers": vision_layers,
        "parameters": params.parameters,
    }
