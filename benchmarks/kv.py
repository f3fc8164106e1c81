"""What keys and values in int8 gain and cost: `python -m benchmarks.kv`.

The gain: a token after long texts, at 11B's widths with random weights in int4 and random keys and
values, beside keys and values in bfloat16. They take turns; the times are processor time of one
thread. Few layers are timed and the head alone, from which follows a token in full depth. The cost:
how far the logits of the built-in model are from those without, before each token of the right
answers to questions about held-out scenes, and how many of its answers are right. Writes
figures/kv.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import mmchat
from benchmarks.entrants import contestant
from benchmarks.quantization import answer_logits, compare_logits, rounded
from benchmarks.random_mllama import config_of, random_context
from benchmarks.shapes import RandomTensors, Shapes, shaped_spec
from mmchat.bench.run import Variant
from mmchat.nn.attention import held
from mmchat.quant.kernels import ops

RESULTS = Path(__file__).parent / "figures" / "kv.json"
CPU = torch.device("cpu")
WAYS = {"bfloat16": None, "int8": torch.int8}
TOKENS = 4  # of one round
LAYERS = 32  # of self-attention in the 11B


def seconds(work: Callable[[], object], count: int) -> float:
    """Processor time of one of `count` calls."""
    begin = time.process_time()
    for _ in range(count):
        work()
    return (time.process_time() - begin) / count


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def compared(times: dict[str, list[float]]) -> dict[str, Any]:
    """Milliseconds of each way, and how many times as fast int8 is, round by round."""
    pairs = zip(times["bfloat16"], times["int8"], strict=True)
    milliseconds = {way: spread([1000 * t for t in each]) for way, each in times.items()}
    return {**milliseconds, "times as fast": spread([a / b for a, b in pairs])}


@torch.inference_mode()
def attention(context: int, rounds: int) -> dict[str, Any]:
    """Of one layer, in its kernel alone; as many layers take turns as no cache holds."""
    query = torch.randn(1, 32, 1, 128).bfloat16()
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    plain = [torch.randn(2, 1, 8, context, 128).bfloat16() for _ in range(3)]
    kept = {"bfloat16": plain, "int8": [held(pair, torch.int8) for pair in plain]}
    for turn in range(rounds + 1):
        for way, layers in kept.items():

            def read(layers: list[torch.Tensor] = layers) -> None:
                for key, value in layers:
                    ops.attend(query, key, value, None)

            taken = seconds(read, 2) / len(layers)
            if turn:
                times[way].append(taken)
    return compared(times)


def decoding(name: str, contexts: list[int], rounds: int) -> dict[str, Any]:
    spec = shaped_spec(Shapes(name), CPU)
    tensors = RandomTensors(spec, 0, torch.bfloat16, CPU, keep=False)
    ours = contestant(spec, tensors, Variant("int4"))
    model: Any = ours.loaded.runtime.model  # type: ignore[attr-defined]
    config = config_of(spec)
    layers = len(config.text_config.self_attention_layers)
    hidden = torch.randn(1, config.text_config.hidden_size).bfloat16()
    with torch.inference_mode():
        seconds(lambda: model.language_model.lm_head(hidden), 3)
        head = min(seconds(lambda: model.language_model.lm_head(hidden), 3) for _ in range(5))
    found = {}
    for context in contexts:
        caches = {}
        for way, dtype in WAYS.items():
            model.kv_dtype = dtype
            known = random_context(config, context, 0, torch.bfloat16, CPU)
            caches[way] = ours.begin(known, rows=1)
            del known
        times: dict[str, list[float]] = {way: [] for way in WAYS}
        for turn in range(rounds + 1):
            for way, cache in caches.items():
                taken = seconds(lambda cache=cache: ours.decode((5,), cache), TOKENS)
                if turn:
                    times[way].append((taken - head) / layers * LAYERS + head)
        found[f"{context}"] = {
            "attention of a layer": attention(context, rounds),
            "a token in full depth": compared(times),
        }
    return {"layers": LAYERS, "weights": "int4", "threads": torch.get_num_threads(), "after": found}


def exactness(scenes: int) -> dict[str, Any]:
    found: dict[str, Any] = {"model": "tiny", "scenes": scenes}
    for dtype in ("float32", "bfloat16"):
        expected, right = answer_logits(mmchat.load("tiny", dtype=dtype), scenes)
        logits, kept = answer_logits(mmchat.load("tiny", dtype=dtype, kv="int8"), scenes)
        largest = max(float((a - b).abs().max()) for a, b in zip(logits, expected, strict=True))
        found[dtype] = {
            **compare_logits(logits, expected),
            "largest_difference": largest,
            "right": {"auto": right, "int8": kept},
        }
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", default="11B")
    parser.add_argument("--contexts", type=int, nargs="*", default=[1024, 16_384, 65_536])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--scenes", type=int, default=200)
    parser.add_argument("-o", "--output", type=Path, default=RESULTS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    record = {
        "versions": {"mmchat": mmchat.__version__, "torch": torch.__version__},
        "decoding": decoding(given.shapes, given.contexts, given.rounds),
        "exactness": exactness(given.scenes),
    }
    text = json.dumps(rounded(record), indent=1) + "\n"
    given.output.write_text(text, encoding="utf-8")
    print(text)
