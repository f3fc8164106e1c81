"""What a comparison is asked to measure: the options of `python -m benchmarks.compare`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.shapes import Shapes
from mmchat.bench.run import Variant
from mmchat.errors import UsageError
from mmchat.quant.schemes import find_scheme

PARTS = ("decode", "prefill", "picture", "turns", "bandwidth")
PEERS = ("transformers", "compiled", "llama.cpp", "nothing")
Say = Callable[[str], None]  # told what is being done


@dataclass(frozen=True)
class Plan:
    """What to measure. variants: the first is plain.

    peer: of PEERS, what is compared with; "compiled" is transformers both ways. contexts: decode
    after so many tokens. rows: so many at once after the first context. prompts: read so many.
    tiles: of pictures, may be empty.
    """

    shapes: Shapes
    peer: str
    variants: tuple[Variant, ...]
    device: str
    dtype: str
    contexts: tuple[int, ...]
    rows: tuple[int, ...]
    prompts: tuple[int, ...]
    tiles: tuple[int, ...]
    parts: tuple[str, ...]
    rounds: int
    seconds: float
    threads: int | None


def parse(arguments: Sequence[str]) -> tuple[Plan, Path | None]:
    """The plan, and the file for the record.

    Raises UsageError for a scheme or a part that does not exist.
    """
    given = _parser().parse_args(arguments)
    for part in given.measure:
        if part not in PARTS:
            raise UsageError(f"{part!r} is none of {', '.join(PARTS)}")
    for scheme in given.quantize:
        find_scheme(scheme)
    if given.vs == "llama.cpp" and {"picture", "turns"} & set(given.measure):
        raise UsageError("llama.cpp knows no pictures of Mllama: say --measure decode,prefill")
    asked = (Variant(scheme, way) for way in given.compile for scheme in given.quantize)
    plan = Plan(
        shapes=Shapes(given.shapes, given.layers, given.vision_layers, given.seed),
        peer=given.vs,
        variants=tuple(dict.fromkeys((Variant(compile=given.compile[0]), *asked))),
        device=given.device,
        dtype=given.dtype,
        contexts=given.context,
        rows=given.rows,
        prompts=given.prompt_tokens,
        tiles=given.vision,
        parts=given.measure,
        rounds=given.rounds,
        seconds=given.seconds,
        threads=given.threads,
    )
    return plan, given.output


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compare",
        description="mmchat beside a peer on the same random weights, after checking that both say"
        " the same.",
    )
    add = parser.add_argument
    add("--shapes", default="11B", help="widths of this model: 11B, 90B or a known name")
    add("--layers", type=int, help="text layers; all on a GPU and few on a CPU if left out")
    add("--vision-layers", type=int, help="the same of the vision encoder")
    add("--seed", type=int, default=0, help="of the random weights")
    add("--vs", choices=PEERS, default="transformers")
    add("--quantize", type=_words, default=(), help="schemes to compare, such as int8,int4")
    add("--compile", type=_ways, default=("auto",), help="for each scheme: auto, off or on")
    add("--measure", type=_words, default=PARTS, help=f"any of {','.join(PARTS)}")
    add("--context", type=_counts, default=(64, 1024, 4096), help="decode after so many tokens")
    add("--rows", type=_counts, default=(), help="decode so many rows at once, after the first")
    add("--prompt-tokens", type=_counts, default=(64, 512), help="read prompts of so many")
    add("--vision", type=_counts, default=(1, 4), help="pictures of so many tiles")
    add("--rounds", type=int, default=5)
    add("--seconds", type=float, default=60.0, help="begin no round beyond this")
    add("--threads", type=int, help="with 1, processor time is compared, not the wall clock's")
    add("--device", default="auto")
    add("--dtype", default="auto")
    add("-o", "--output", type=Path, help="write the record there, as JSON")
    return parser


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


def _ways(text: str) -> tuple[str, ...]:
    ways = _words(text)
    if not set(ways) <= {"auto", "off", "on"}:
        raise argparse.ArgumentTypeError(f"{text!r} is not made of auto, off and on")
    return ways


def _counts(text: str) -> tuple[int, ...]:
    counts = tuple(map(int, _words(text)))
    if any(count < 1 for count in counts):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers from 1")
    return counts
