"""How tests ask the toy: by command, in a conversation, and by what loading gives."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from mmchat.api import Model
from mmchat.cli.app import app
from mmchat.engine.events import Event, Finished
from mmchat.engine.reading import encode
from mmchat.engine.sampling import SamplingParams
from mmchat.models.base import Batch, Cache
from mmchat.models.prompt import Prompt
from mmchat.runtime.base import Runtime
from mmchat.runtime.eager import EagerRuntime
from tests.toy.model import ToyModel
from tests.toy.pictures import picture

GREEDY = SamplingParams(temperature=0.0, max_new_tokens=8, speculate="off", logprobs=3)
TURNS = [("a?", [picture(1)]), ("b?", [])]


def run(*arguments: str, stdin: str | None = None) -> str:
    done = CliRunner().invoke(app, list(arguments), input=stdin)
    assert done.exit_code == 0, done.stderr
    return done.stdout


def ask_json(folder: str | Path, png: str, *more: str) -> dict:
    """The answer of `mmchat generate --json`."""
    question = ("-p", "hi?", "-i", png, "-n", "8", "--temperature", "0", "--json")
    return json.loads(run("generate", str(folder), *question, *more))


def said(model: Model, *turns: tuple[str, Sequence[object]]) -> list[Finished]:
    """The greedy answers of one conversation."""
    chat = model.chat()
    return [finish(chat.send(text, images, GREEDY)) for text, images in turns]


def finish(events: Iterator[Event]) -> Finished:
    *_, last = events
    assert isinstance(last, Finished)
    return last


def the_toy(model: Model) -> ToyModel:
    assert isinstance(model.runtime, EagerRuntime)
    assert isinstance(model.runtime.model, ToyModel)
    return model.runtime.model


def assert_same(one: Finished, other: Finished) -> None:
    assert one.output_ids == other.output_ids
    for mine, its in zip(one.logprobs, other.logprobs, strict=True):
        assert mine.logprob == pytest.approx(its.logprob, abs=1e-4)


def read(runtime: Runtime, cache: Cache, prompt: Prompt, piece: int = 1000) -> Tensor:
    """Logits [N, V] of what the first slot does not hold, read piece by piece."""
    encode(runtime, prompt, cache)
    ids = torch.tensor(prompt.token_ids)
    starts = range(cache.lengths[0], len(ids), piece)
    return torch.cat([runtime.forward(Batch.all_of(ids[s : s + piece], s), cache) for s in starts])


def assert_close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """tolerance: a share of the largest logit."""
    assert found.shape == expected.shape
    assert (found - expected).abs().max() < tolerance * expected.abs().max()


def steps(runtime: Runtime, prompt: Prompt, tokens: Sequence[int]) -> Tensor:
    """Logits after the prompt, of tokens one by one, and of three at once."""
    cache = runtime.new_cache(1, 0)
    rows = [read(runtime, cache, prompt)[-1:]]
    for count in (*[1] * len(tokens), 3, 5):
        ids = torch.tensor([*tokens, *tokens][:count])
        rows.append(runtime.forward(Batch.all_of(ids, cache.lengths[0]), cache))
    return torch.cat(rows)
