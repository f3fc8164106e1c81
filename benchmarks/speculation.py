"""What guessing tokens from the text so far gains and costs: `python -m benchmarks.speculation`.

The model has 11B's widths and random weights, which say nothing, so the answer is given: whatever
the model's logits are, the next token is that of a written text. Drafts are then right or wrong as
they would be for a model that gives this answer. Four texts: a document given back with a word
changed now and then; the same with words changed, left out and added; prose that goes on; and
pairs of words that keep coming back with another word after them, which is made to mislead. Each
answer begins a conversation of its own. With and without drafts take turns; the times are processor
time of one thread. Writes figures/speculation.json.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import statistics
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

import mmchat
from benchmarks.entrants import contestant
from benchmarks.shapes import RandomTensors, Shapes, shaped_spec
from mmchat.bench.run import Variant
from mmchat.engine import row
from mmchat.engine.driver import run
from mmchat.engine.engine import Engine
from mmchat.engine.events import TextDelta
from mmchat.engine.request import Request
from mmchat.engine.sampling import Sampler, SamplingParams
from mmchat.loading.loader import LoadedModel
from mmchat.models.prompt import Prompt

RESULTS = Path(__file__).parent / "figures" / "speculation.json"
DOCUMENT = Path(__file__).parents[1] / "README.md"
FIRST_WORD = 1000  # ids below are bytes and special tokens


class Scripted(Sampler):
    """Does the work of sampling, and says the next token of `answer`."""

    answer: list[int]

    def sample(self, logits: Tensor, allowed: Tensor | None = None) -> Tensor:
        super().sample(logits, allowed)
        return torch.tensor([[self.answer.pop(0)]])


def texts(length: int) -> dict[str, tuple[list[int], list[int]]]:
    """Name -> tokens of the prompt and of the answer; a word or a sign is a token."""
    words = re.findall(r"\w+|[^\w\s]|\n", DOCUMENT.read_text(encoding="utf-8"))
    number: dict[str, int] = {}
    ids = [number.setdefault(word, FIRST_WORD + len(number)) for word in words]
    draw = random.Random(1)  # noqa: S311

    def new_word() -> int:
        return draw.randrange(9000, 20000)

    copied = [token if draw.random() > 0.04 else new_word() for token in ids]
    pairs = [(new_word(), new_word()) for _ in range(8)]
    misleading = [
        t for _ in range(length) for t in (*draw.choice(pairs), draw.randrange(2000, 9000))
    ]
    edited: list[int] = []
    for token in ids:
        kept = draw.random() > 0.04
        edited += [token] if kept else draw.choice(([], [new_word()], [token, new_word()]))
    return {
        "copied": (ids[:length], copied[:length]),
        "edited": (ids[:length], edited[:length]),
        "prose": (ids[:length], ids[length : 2 * length]),
        "misleading": (misleading[:length], misleading[length : 2 * length]),
    }


def decode_seconds(
    loaded: LoadedModel, prompt: list[int], answer: list[int], speculate: Any
) -> float:
    """Processor seconds for all tokens after the first."""
    params = SamplingParams(temperature=0, max_new_tokens=len(answer), speculate=speculate)
    sampler = Scripted(params, prompt, loaded.vocab_size, loaded.runtime.device)
    sampler.answer = list(answer)
    engine = Engine(loaded)
    request = Request(Prompt(tuple(prompt)), params, ignore_stop=True)
    found: list[int] = []
    begin = 0.0
    with patch.object(row, "Sampler", lambda *_: sampler):
        for _, event in run(engine, [engine.submit(request)]):
            if isinstance(event, TextDelta) and event.token_id is not None:
                begin = begin or time.process_time()
                found.append(event.token_id)
    seconds = time.process_time() - begin
    if found != answer:
        raise SystemExit(f"the answer is not the given one: {found[:20]} for {answer[:20]}")
    return seconds


def measure(loaded: LoadedModel, length: int, rounds: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, given_ids in texts(length).items():
        prompt, answer = ([token % loaded.vocab_size for token in ids] for ids in given_ids)
        decode_seconds(loaded, prompt, answer[:8], "auto")  # warm-up
        ratios = []
        for index in range(rounds):
            ways = ("off", "auto") if index % 2 else ("auto", "off")
            seconds = {way: decode_seconds(loaded, prompt, answer, way) for way in ways}
            ratios.append(round(seconds["off"] / seconds["auto"], 3))
        found[name] = {"times_as_fast": statistics.median(ratios), "rounds": ratios}
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", default="11B")
    parser.add_argument("--quantize", default="none,int8,int4")
    parser.add_argument("--tokens", type=int, default=128, help="of prompt and answer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("-o", "--output", type=Path, default=RESULTS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device("cpu")
    spec = shaped_spec(Shapes(given.shapes), device)
    tensors = RandomTensors(spec, 0, torch.bfloat16, device, keep=True)
    record: dict[str, Any] = {
        "model": f"{given.shapes} widths, random weights",
        "tokens": given.tokens,
        "versions": {"mmchat": mmchat.__version__, "torch": torch.__version__},
        "ways": {},
    }
    for scheme in given.quantize.split(","):
        ours = contestant(spec, tensors, Variant(scheme))
        record["ways"][ours.name] = measure(ours.loaded, given.tokens, given.rounds)
        text = json.dumps(record, indent=1) + "\n"
        given.output.write_text(text, encoding="utf-8")  # each way takes minutes
        print(text)
