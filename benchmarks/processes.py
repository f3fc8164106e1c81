"""Start-up and peak memory: each figure is that of a process of its own."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks import fresh
from benchmarks.contestants import PicturePrompt, tiled
from benchmarks.entrants import contestant, random_model, reference
from benchmarks.plan import Plan, Say
from benchmarks.random_mllama import config_of
from benchmarks.shapes import RandomTensors, byte_tokenizer
from benchmarks.traffic import weights_of
from benchmarks.turns import two_turns
from mmchat.bench.pictures import picture_file, picture_of
from mmchat.bench.report import rounded
from mmchat.hardware.memory import peak_memory
from mmchat.images import load_image

ROOT = Path(__file__).parents[1]
_HELP_RUNS = 5
_DEFAULTS = ("none", "auto")  # of --quantize and --compile
# At the end of the path nothing of ours is taken for an installed module.
_AGAIN = f"import sys; sys.path.append({str(ROOT)!r}); from benchmarks.compare import main; main()"


def startup(plan: Plan, say: Say) -> dict[str, Any]:
    """Seconds until `--help` is done, and until the built-in model's first token about a picture.

    The latter for each variant, with nothing in the cache of compiled code and then with all.
    """
    say("start-up")
    found = {"help": _median([fresh.help_text() for _ in range(_HELP_RUNS)])}
    if plan.transformers:
        found["import transformers"] = _median([fresh.import_transformers() for _ in range(2)])
    picture = picture_file(112, 112, seed=1)  # one tile of the built-in model
    for variant in plan.variants:
        given = {"quantize": variant.quantize, "compile": variant.compile}
        options = [f"--{name}={word}" for name, word in given.items() if word not in _DEFAULTS]
        suffix = f", {' '.join(options)}" if options else ""
        with tempfile.TemporaryDirectory() as cache:
            for state in ("cold", "warm"):
                done = fresh.first_token(options, picture, Path(cache))
                found[f"first token, {state} cache{suffix}"] = _median([done])
    return {"model": "tiny", "seconds": found}


def memory(plan: Plan, say: Say) -> list[dict[str, Any]]:
    """Peak memory of loading and of two turns about the largest picture, for each contestant."""
    records = []
    for index in range(plan.transformers + len(plan.variants)):
        say(f"peak memory of contestant {index + 1}")
        done = fresh.run_fresh(["-c", _AGAIN, *plan.arguments, "--once", str(index)])
        records.append(json.loads(done.stdout))
    return records


def once(plan: Plan, index: int) -> dict[str, Any]:
    """What the process of one contestant does: load, two turns about a picture, and report.

    Random tensors are made one by one as they are asked for, so that none is in memory twice.
    """
    tiles = max(plan.tiles, default=1)
    spec, tensors = random_model(plan, keep=False)
    if plan.transformers and index == 0:
        return _once_transformers(spec, tensors, tiles)
    ours = contestant(spec, tensors, plan.variants[index - plan.transformers])
    two_turns(ours, tiles, seed=1)
    weights = weights_of(ours.loaded).values()
    return _memory_record(ours.name, weights, ours.loaded.device, tiles)


def _once_transformers(spec: Any, tensors: RandomTensors, tiles: int) -> dict[str, Any]:
    theirs = reference(spec, tensors)
    tokenizer = byte_tokenizer(spec.config.vocab_size)
    processor = spec.family.build().processor(spec.config, tokenizer, "white")
    picture = load_image(picture_of(spec, tiles, seed=1))
    ids = (config_of(spec).image_token_id, *range(32))
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
        "wall": rounded(median(run.wall for run in runs)),
        "cpu": rounded(median(run.cpu for run in runs)),
        "runs": len(runs),
    }
