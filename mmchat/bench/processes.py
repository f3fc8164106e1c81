"""Start-up and peak memory: each figure is that of a process of its own."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from mmchat.bench import fresh, report
from mmchat.bench.contestants import PicturePrompt, picture_file, picture_size, tiled
from mmchat.bench.entrants import from_tensors, named
from mmchat.bench.plan import Plan, Say, Variant
from mmchat.bench.shapes import RandomTensors, byte_tokenizer, shaped_params
from mmchat.bench.traffic import weights_of
from mmchat.bench.turns import two_turns
from mmchat.hardware.memory import peak_memory
from mmchat.hardware.placement import choose_placement
from mmchat.images import load_image

TRANSFORMERS = "transformers"
_HELP_RUNS = 5


def startup(plan: Plan, say: Say) -> dict[str, Any]:
    """Seconds until `--help` is done, and until the first token about a picture is, each way."""
    say("start-up")
    found = {"help": _median([fresh.help_text() for _ in range(_HELP_RUNS)])}
    if plan.versus_transformers:
        found["import transformers"] = _median([fresh.import_transformers() for _ in range(2)])
    selection = () if plan.shapes else plan.selection
    picture = picture_file(*picture_size(1, 112), seed=1)
    exported = any(variant.exported for variant in plan.variants)
    for variant in [Variant()] if exported else plan.variants:  # a folder starts in one way
        options = [f"--{name}={value}" for name, value in variant.options().items()]
        suffix = f", {variant}" if options else ""
        with tempfile.TemporaryDirectory() as cache:
            for state in ("cold", "warm"):
                done = fresh.first_token([*selection, *options], picture, Path(cache))
                found[f"first token, {state} cache{suffix}"] = _median([done])
    return {"model": "tiny" if plan.shapes else "as measured", "seconds": found}


def memory(plan: Plan, say: Say) -> list[dict[str, Any]]:
    """Peak memory of loading and of two turns about the largest picture, for each contestant."""
    who = [str(variant) for variant in plan.variants]
    if plan.versus_transformers:
        who.insert(0, TRANSFORMERS)
    records = []
    for name in who:
        say(f"peak memory of {name}")
        done = fresh.run_fresh(["-m", "mmchat", "bench", *plan.selection, "--once", name])
        records.append(json.loads(done.stdout))
    return records


def once(plan: Plan, who: str) -> dict[str, Any]:
    """What the process of one contestant does: load, two turns about a picture, and report.

    Random tensors are made one by one as they are asked for, so that none is in memory twice.
    """
    tiles = max(plan.tiles, default=1)
    if plan.shapes is None:
        contestant = named(plan.load(Variant.parse(who)), Variant.parse(who))
    else:
        device = choose_placement(plan.device, "float32", 0).device
        params = shaped_params(plan.shapes, device)
        placement = choose_placement(plan.device, plan.dtype, params.parameters)
        tensors = RandomTensors(params, plan.shapes.seed, placement.dtype, device, keep=False)
        if who == TRANSFORMERS:
            return _once_transformers(params, tensors, tiles)
        variant = Variant.parse(who)
        contestant = named(from_tensors(params, tensors, variant), variant)
    two_turns(contestant, tiles, seed=1)
    loaded = contestant.loaded
    weights = weights_of(loaded).values()
    return _memory_record(contestant.name, weights, loaded.device, tiles)


def _once_transformers(params: Any, tensors: RandomTensors, tiles: int) -> dict[str, Any]:
    from mmchat.bench import transformers_mllama

    theirs = transformers_mllama.build(
        params, tensors.read, list(tensors.shapes), tensors.dtype, tensors.device
    )
    tokenizer = byte_tokenizer(params.config.text_config.vocab_size)
    make_processor = params.family.resolve("processor")
    processor = make_processor(params.config, params.image_processor, tokenizer, "white")
    picture = load_image(picture_file(*picture_size(tiles, params.tile_size), seed=1))
    ids = (params.config.image_token_id, *range(32))
    theirs.prefill_picture(PicturePrompt(ids, tiled(processor, picture)))
    weights = (*theirs.model.parameters(), *theirs.model.buffers())
    return _memory_record(theirs.name, weights, tensors.device, tiles)


def _memory_record(
    name: str, weights: Iterable[torch.Tensor], device: torch.device, tiles: int
) -> dict[str, Any]:
    held = {t.data_ptr(): t.nbytes for t in weights}
    return {
        "contestant": name,
        "tiles": tiles,
        "weight_bytes": sum(held.values()),
        "peak_memory_bytes": peak_memory(device),
    }


def _median(runs: list[fresh.Process]) -> dict[str, float]:
    return {
        "wall": report.rounded(median(run.wall for run in runs)),
        "cpu": report.rounded(median(run.cpu for run in runs)),
        "runs": len(runs),
    }
