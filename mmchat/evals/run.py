"""Measure how often a model gives the one right answer to questions about held-out scenes."""

from __future__ import annotations

import html
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import TYPE_CHECKING, Literal

from mmchat.conversation import Message, Text
from mmchat.engine.driver import Talk, hold
from mmchat.engine.sampling import SamplingParams

if TYPE_CHECKING:
    from mmchat.evals.scenes import Question, Scene
    from mmchat.loading.loader import LoadedModel

LONGEST_ANSWER = 64  # tokens; the longest right answer is far shorter
NORMAL_95 = 1.959964  # quantile of the normal distribution for an interval of 95 %

By = Literal["type", "canvas", "tiles", "objects"]


@dataclass(frozen=True)
class Verdict:
    """One question about a scene and the model's answer."""

    scene: Scene
    question: Question
    answer: str

    @property
    def is_right(self) -> bool:
        return self.answer.strip() == self.question.answer

    def group(self, by: By) -> str:
        """The part of the evaluation that the question belongs to."""
        if by == "type":
            return self.question.type
        if not self.scene.views:
            return "no picture"
        if by == "canvas":
            return "{} x {}".format(*self.scene.canvas or ("?", "?"))
        if by == "tiles":
            rows, columns = self.scene.canvas or (0, 0)
            return str(rows * columns * len(self.scene.views))
        return str(len(self.scene.views[0].items))


@dataclass(frozen=True)
class Score:
    """Right answers out of all, for one part of the questions or for all."""

    right: int
    total: int

    @property
    def accuracy(self) -> float:
        return self.right / self.total if self.total else 0.0

    @property
    def interval(self) -> tuple[float, float]:
        """Where the accuracy lies with 95 % confidence (Wilson 1927)."""
        if not self.total:
            return 0.0, 1.0
        share = NORMAL_95**2 / self.total
        middle = (self.accuracy + share / 2) / (1 + share)
        spread = self.accuracy * (1 - self.accuracy) / self.total + share / (4 * self.total)
        half = NORMAL_95 * sqrt(spread) / (1 + share)
        return max(0.0, middle - half), min(1.0, middle + half)


@dataclass(frozen=True)
class Report:
    """Scores of the parts, in order of first appearance, and every wrong answer."""

    overall: Score
    parts: dict[str, Score]
    wrong: tuple[Verdict, ...]
    seconds: float


def judge_scenes(model: LoadedModel, scenes: Iterable[Scene], rows: int = 1) -> Iterator[Verdict]:
    """Ask every question of every scene, each in a conversation of its own, greedily.

    rows: conversations at once; an exported folder of programs has one.
    """
    sampling = SamplingParams(temperature=0, speculate="off", max_new_tokens=LONGEST_ANSWER)
    talks = (
        _talk(model, scene, question, sampling) for scene in scenes for question in scene.questions
    )
    return hold(model.engine_of(rows), talks)


def _talk(
    model: LoadedModel, scene: Scene, question: Question, sampling: SamplingParams
) -> Talk[Verdict]:
    """The answer, after the questions that go before it in the same conversation."""
    from mmchat.images import from_pil

    images = [from_pil(picture, source=f"scene {scene.seed}") for picture in scene.pictures]
    messages: list[Message] = []
    answer = ""
    for asked in (*question.earlier, question):
        content = (*images, Text(asked.text)) if not messages else (Text(asked.text),)
        messages.append(Message("user", content))
        finished = yield model.request(model.processor.chat(messages), sampling)
        answer = finished.text
        messages.append(Message("assistant", (Text(answer),)))
    return Verdict(scene, question, answer)


def report(verdicts: Sequence[Verdict], seconds: float = 0.0, by: By = "type") -> Report:
    """The scores, taken in `seconds`; parts that are numbers or canvases in their order."""
    groups: dict[str, list[Verdict]] = {}
    for verdict in verdicts:
        groups.setdefault(verdict.group(by), []).append(verdict)
    names = list(groups) if by == "type" else sorted(groups)
    parts = {name: _score(groups[name]) for name in names}
    wrong = tuple(verdict for verdict in verdicts if not verdict.is_right)
    return Report(_score(verdicts), parts, wrong, seconds)


def _score(verdicts: Sequence[Verdict]) -> Score:
    return Score(sum(verdict.is_right for verdict in verdicts), len(verdicts))


def wrong_answers(model: str, wrong: Sequence[Verdict], asked: int) -> str:
    """One HTML page, as text, with the pictures of what was answered wrongly."""
    from mmchat.images.contact_sheet import contact_sheet

    title = f"{model}: {len(wrong)} of {asked} answers are wrong"
    return contact_sheet(title, ((one.scene.pictures, _caption(one)) for one in wrong))


def _caption(verdict: Verdict) -> str:
    scene, question = verdict.scene, verdict.question
    asked = "<br>".join(html.escape(each.text) for each in (*question.earlier, question))
    return (
        f"<small>{html.escape(question.type)}, scene {scene.seed},"
        f" {html.escape(verdict.group('canvas'))}</small><br>{asked}<br>"
        f"<b>{html.escape(verdict.answer)}</b><br>right: {html.escape(question.answer)}"
    )
