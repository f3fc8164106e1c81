"""Seeded pictures of a small world, with questions and their right answers.

Training and held-out scenes come from different random streams: the stream is named by the split
and the seed together, so no seed of one split gives a scene of the other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from random import Random
from typing import TYPE_CHECKING, Literal

from mmchat.evals.scenes.phrasings import Wording
from mmchat.evals.scenes.questions import (
    QUESTION_TYPES,
    Asker,
    Question,
    ask_outside,
    ask_pair,
    ask_talk,
)
from mmchat.evals.scenes.textures import HELDOUT
from mmchat.evals.scenes.world import (
    CANVAS_SIDES,
    MAX_LEVEL,
    SCENE_KINDS,
    Kind,
    View,
    arrange_count,
    arrange_objects,
    arrange_outside,
    arrange_pair,
    arrange_text,
)

if TYPE_CHECKING:
    from PIL import Image

Split = Literal["train", "heldout"]
# How often a canvas (tiles_h, tiles_w) is drawn when none is asked for.
CANVAS_WEIGHTS = {
    (1, 1): 50, (1, 2): 12, (2, 1): 12, (2, 2): 8, (1, 3): 6, (3, 1): 4, (1, 4): 5, (4, 1): 3,
}  # fmt: skip
LONGEST_PAIR = 2  # tiles along a side of each of two pictures
# Which scenes hold a question of a type.
SCENES_OF_TYPE: dict[str, tuple[Kind, ...]] = {
    "count": ("count", "count", "objects"),
    "text": ("text", "text", "text", "objects"),
    "caption": ("objects", "objects", "count", "text"),
    "same": ("pair",),
    "change": ("pair",),
    "talk": ("talk",),
    "follow": ("objects", "objects", "count"),
    "outside": ("outside",),
}


@dataclass(frozen=True)
class Scene:
    """A few pictures (none for small talk, two for a comparison) and questions about them.

    canvas: (tiles_h, tiles_w) of each picture.
    """

    seed: int
    kind: Kind
    views: tuple[View, ...]
    questions: tuple[Question, ...]
    canvas: tuple[int, int] | None = None

    @cached_property
    def pictures(self) -> tuple[Image.Image, ...]:
        """The RGB pictures, drawn when first asked for."""
        from mmchat.evals.scenes.draw import draw_view

        return tuple(draw_view(view) for view in self.views)


def make_scene(
    seed: int,
    split: Split = "train",
    *,
    level: int = MAX_LEVEL,
    kind: Kind | None = None,
    canvas: tuple[int, int] | None = None,
    wording: Wording = "plain",
    textures: Sequence[str] = HELDOUT,
) -> Scene:
    """The scene of a seed: the same arguments always give the same pictures and questions.

    level: 0 has one object, 1 at most two, 2 up to three. kind: "objects", "count" (equal objects),
    "text" (printed), "pair" (two pictures), "talk" (none) or "outside" (no drawing of the world).
    canvas: (tiles_h, tiles_w) that the picture fills with tiles of 112 px. wording: "plain", "rich"
    (for training) or "unseen" (never in training). textures: the names of those that are outside.
    """
    rng = Random(f"{split} {seed}")  # noqa: S311
    kind = kind or rng.choices(SCENE_KINDS, (54, 17, 17, 8, 3, 1))[0]
    canvas = canvas or rng.choices(tuple(CANVAS_SIDES), tuple(CANVAS_WEIGHTS.values()))[0]
    if kind == "talk":
        return Scene(seed, kind, (), tuple(ask_talk(rng, wording)))
    if kind == "pair":
        canvas = canvas if max(canvas) <= LONGEST_PAIR else (1, 1)
        first, second, change = arrange_pair(rng, canvas)
        return Scene(seed, kind, (first, second), tuple(ask_pair(rng, change, wording)), canvas)
    if kind == "outside":
        view = arrange_outside(rng, canvas, textures)
        return Scene(seed, kind, (view,), tuple(ask_outside(rng, wording)), canvas)
    arrange = {"objects": arrange_objects, "count": arrange_count, "text": arrange_text}[kind]
    view = arrange(rng, canvas, level)
    return Scene(seed, kind, (view,), tuple(Asker(rng, view, wording).all()), canvas)


def heldout_scenes(
    limit: int, types: tuple[str, ...] = QUESTION_TYPES, wording: Wording = "plain"
) -> Iterator[Scene]:
    """`limit` held-out scenes with one question each, the question types in turn."""
    seed = 0
    for index in range(limit):
        wanted = types[index % len(types)]
        kinds = SCENES_OF_TYPE.get(wanted, ("objects",))
        while True:
            kind = kinds[index // len(types) % len(kinds)]
            scene = make_scene(seed, "heldout", kind=kind, wording=wording)
            seed += 1
            fitting = [question for question in scene.questions if question.type == wanted]
            if fitting:
                yield replace(scene, questions=(fitting[0],))
                break
