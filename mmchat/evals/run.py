"""Measure how often a model gives the one right answer to questions about held-out scenes."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from mmchat.events import Finished

if TYPE_CHECKING:
    from mmchat.evals.scenes import Scene
    from mmchat.sampling import SamplingParams
    from mmchat.session import ChatSession

LONGEST_ANSWER = 64  # tokens; the longest right answer is far shorter


class ChatModel(Protocol):
    """What `mmchat.load` gives."""

    @property
    def sampling_defaults(self) -> SamplingParams: ...

    def chat(self, system: str | None = None) -> ChatSession: ...


@dataclass(frozen=True)
class Verdict:
    """One question, the right answer and the model's."""

    seed: int
    type: str
    question: str
    expected: str
    answer: str

    @property
    def is_right(self) -> bool:
        return self.answer.strip() == self.expected


@dataclass(frozen=True)
class Score:
    """Right answers out of all, for one question type or for all."""

    right: int
    total: int

    @property
    def accuracy(self) -> float:
        return self.right / self.total if self.total else 0.0


@dataclass(frozen=True)
class Report:
    """Scores by question type, in order of first appearance, and every wrong answer."""

    overall: Score
    by_type: dict[str, Score]
    wrong: tuple[Verdict, ...]
    seconds: float


def judge_scenes(model: ChatModel, scenes: Iterable[Scene]) -> Iterator[Verdict]:
    """Ask every question of every scene, each in a conversation of its own, greedily."""
    sampling = greedy(model.sampling_defaults)
    for scene in scenes:
        for question in scene.questions:
            answer = _ask(model, scene, question.text, sampling)
            yield Verdict(scene.seed, question.type, question.text, question.answer, answer)


def greedy(defaults: SamplingParams) -> SamplingParams:
    """The most probable token each time, whatever the model's defaults are."""
    return replace(
        defaults,
        temperature=0.0,
        repetition_penalty=1.0,
        frequency_penalty=0.0,
        presence_penalty=0.0,
        speculate="off",
        max_new_tokens=LONGEST_ANSWER,
    )


def _ask(model: ChatModel, scene: Scene, question: str, sampling: SamplingParams) -> str:
    from mmchat.images import from_pil

    images = [from_pil(picture, source=f"scene {scene.seed}") for picture in scene.pictures]
    for event in model.chat().send(question, images, sampling):
        if isinstance(event, Finished):
            return event.text
    raise RuntimeError("the engine ended without a Finished event")


class Tally:
    """Counts verdicts as they come."""

    def __init__(self) -> None:
        self._verdicts: list[Verdict] = []
        self._started = time.perf_counter()

    def add(self, verdict: Verdict) -> None:
        self._verdicts.append(verdict)

    def report(self) -> Report:
        """The scores so far."""
        types = dict.fromkeys(verdict.type for verdict in self._verdicts)
        return Report(
            overall=_score(self._verdicts),
            by_type={t: _score([v for v in self._verdicts if v.type == t]) for t in types},
            wrong=tuple(v for v in self._verdicts if not v.is_right),
            seconds=time.perf_counter() - self._started,
        )


def _score(verdicts: list[Verdict]) -> Score:
    return Score(sum(verdict.is_right for verdict in verdicts), len(verdicts))
