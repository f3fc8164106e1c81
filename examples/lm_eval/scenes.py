"""Data sets of lm_eval tasks, drawn when they are asked for: nothing is downloaded.

The task files beside this one name its functions; `metadata` there may say how many to draw.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import datasets  # type: ignore[import-not-found]

from mmchat.evals.scenes import Question, Scene, heldout_scenes
from mmchat.evals.scenes.world import COLOURS

FEATURES = {
    "pictures": datasets.List(datasets.Image()),
    "question": datasets.Value("string"),
    "answer": datasets.Value("string"),
}


def asked(count: int) -> Iterator[tuple[Scene, Question]]:
    """The first `count` of the held-out questions with nothing asked before them."""
    scenes = heldout_scenes(2 * count)  # one in thirteen goes on with a conversation
    pairs = ((scene, question) for scene in scenes for question in scene.questions)
    single = (pair for pair in pairs if not pair[1].earlier)
    return (pair for pair, _ in zip(single, range(count), strict=False))


def _row(scene: Scene, question: Question) -> dict[str, Any]:
    return {
        "pictures": list(scene.pictures),
        "question": question.text,
        "answer": question.answer,
    }


def questions(count: int = 200, **_: Any) -> dict[str, Any]:
    rows = [_row(*pair) for pair in asked(count)]
    return {"test": datasets.Dataset.from_list(rows, features=datasets.Features(FEATURES))}


def colours(count: int = 40, **_: Any) -> dict[str, Any]:
    """Questions about a colour, with a sentence for each colour of the world to choose from."""
    answers = [f"It is {colour}." for colour in sorted(COLOURS)]
    pairs = (pair for pair in asked(30 * count) if pair[1].answer in answers)
    rows = [
        {**_row(*pair), "choices": answers, "gold": answers.index(pair[1].answer)}
        for pair, _ in zip(pairs, range(count), strict=False)
    ]
    features = {
        **FEATURES,
        "choices": datasets.List(datasets.Value("string")),
        "gold": datasets.Value("int64"),
    }
    return {"test": datasets.Dataset.from_list(rows, features=datasets.Features(features))}


def pictures(row: Mapping[str, Any]) -> list[Any]:
    return row["pictures"]
