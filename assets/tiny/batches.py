"""Turns scenes into training batches: tiles, token ids, and labels for the auxiliary heads."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

import numpy as np
import tiktoken
import torch
from PIL import Image as PILImage
from torch import Tensor

from mmchat.evals.scenes import Question, Scene, make_scene
from mmchat.evals.scenes.questions import NO_PICTURE, TALK
from mmchat.evals.scenes.world import COLOURS, KINDS, WORDS, View
from mmchat.messages import Image
from mmchat.models.mllama.config import VisionConfig
from mmchat.models.mllama.image_processor import ImageProcessorConfig, preprocess
from mmchat.models.mllama.text import CrossSegment
from mmchat.models.mllama.tiling import TileLayout

PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CLIP = ImageProcessorConfig(
    (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711), "white"
)
# Offsets of Llama 3's special tokens after the last rank.
BEGIN_OF_TEXT, PAD, START_HEADER, END_HEADER, EOT = 0, 4, 6, 7, 9
NUM_SPECIAL = 256
MAX_LENGTH = 120
ROWS_BY_TILES = {0: 16, 1: 26, 2: 20, 3: 16, 4: 14}
# Auxiliary labels of a patch and their number of classes; -1 is no label.
AUXILIARY = {
    "kind": len(KINDS) + 3, "colour": len(COLOURS), "cell": 9, "count": 4,
    "word": len(WORDS), "tens": 11, "units": 10,
}  # fmt: skip


@dataclass
class Ids:
    """Token ids, which of them the model has to predict, where each group of pictures starts."""

    ids: list[int]
    wanted: list[bool]
    starts: list[int]


class Chat:
    """Token ids of chats, in Llama 3's instruct format."""

    def __init__(self, path: Path) -> None:
        lines = path.read_text(encoding="ascii").split("\n")
        ranks = {base64.b64decode(t): int(r) for t, r in (line.split() for line in lines if line)}
        self.encoding = tiktoken.Encoding(
            "tiny", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={}
        )
        self.num_ranks = len(ranks)
        self.vocab_size = len(ranks) + NUM_SPECIAL

    def encode(self, text: str) -> list[int]:
        return self.encoding.encode_ordinary(text)

    def _special(self, offset: int) -> int:
        return self.num_ranks + offset

    def _header(self, role: str) -> list[int]:
        start, end = self._special(START_HEADER), self._special(END_HEADER)
        return [start, *self.encode(role), end, *self.encode("\n\n")]

    def ids(self, chats: Sequence[tuple[Sequence[Question], int]]) -> Ids:
        """Token ids of one conversation.

        chats: questions, and how many pictures stand before the first of them.
        """
        row = Ids([self._special(BEGIN_OF_TEXT)], [False], [])
        eot = self._special(EOT)
        for questions, images in chats:
            for turn, question in enumerate(questions):
                prompt = [*self.encode(question.text), eot, *self._header("assistant")]
                if turn == 0:
                    prompt = [self.vocab_size] * images + prompt
                prompt = self._header("user") + prompt
                answer = [*self.encode(question.answer), eot]
                if turn and len(row.ids) + len(prompt) + len(answer) > MAX_LENGTH:
                    break
                if turn == 0 and images:
                    row.starts.append(len(row.ids) + len(self._header("user")))
                row.ids += prompt + answer
                row.wanted += [False] * len(prompt) + [True] * len(answer)
        return row

    @property
    def pad_id(self) -> int:
        return self._special(PAD)


@dataclass(eq=False)
class Batch:
    """input_ids, wanted: [B, S]. tiles: [I, T, C, S, S]. labels: name -> [I, T·P].

    segments: which positions of which rows see which pictures.
    """

    input_ids: Tensor
    wanted: Tensor
    segments: tuple[CrossSegment, ...]
    tiles: Tensor | None
    aspect_ratio_ids: Tensor | None
    labels: dict[str, Tensor]
    types: tuple[str, ...] = ()


def patch_labels(view: View, layout: TileLayout, config: VisionConfig) -> dict[str, np.ndarray]:
    """For every auxiliary head the label of each vision token of a picture: [T·P]."""
    tiles_h, tiles_w = layout.aspect_ratio
    grid, patch = config.patches_per_side, config.patch_size
    planes = {n: np.full((tiles_h * grid, tiles_w * grid), -1, np.int64) for n in AUXILIARY}
    inside_h, inside_w = (-(-side // patch) for side in layout.resized)
    planes["kind"][:] = len(KINDS) + 2
    planes["kind"][:inside_h, :inside_w] = 0
    scale_y = layout.resized[0] / view.height / patch
    scale_x = layout.resized[1] / view.width / patch
    for item in view.items:
        left, top, width, height = item.box
        where = _span(top, height, scale_y), _span(left, width, scale_x)
        planes["kind"][where] = 1 + (len(KINDS) if item.text else KINDS.index(item.kind))
        planes["colour"][where] = tuple(COLOURS).index(item.colour)
        planes["cell"][where] = item.cell[0] * 3 + item.cell[1]
        planes["count"][where] = sum(other.kind == item.kind for other in view.items) - 1
        if item.kind == "word":
            planes["word"][where] = WORDS.index(item.text)
        elif item.kind == "number":
            planes["tens"][where] = int(item.text[0]) if len(item.text) == 2 else 10
            planes["units"][where] = int(item.text[-1])
    labels = {}
    for name, plane in planes.items():
        tiles = plane.reshape(tiles_h, grid, tiles_w, grid).transpose(0, 2, 1, 3)
        tiles = tiles.reshape(tiles_h * tiles_w, grid * grid)
        labels[name] = np.pad(tiles, ((0, 0), (1, 0)), constant_values=-1).reshape(-1)
    return labels


def _span(start: int, size: int, scale: float) -> slice:
    """The patches that a stretch of picture pixels covers, at least one."""
    first = round(start * scale)
    return slice(first, max(round((start + size) * scale), first + 1))


# How likely a type is among the next questions of a training chat; captions come separately.
TYPE_WEIGHTS = {
    "colour": 0.6, "count": 1.2, "where": 0.6, "presence": 1.5, "text": 1.2, "order": 1.0,
    "size": 1.0, "absent": 1.0, "unknown": 0.1,
}  # fmt: skip


def choose_questions(rng: Random, scene: Scene) -> Scene:
    """Keep one question of each type, most often the caption, in random order."""
    by_type: dict[str, list[Question]] = {}
    for question in scene.questions:
        by_type.setdefault(question.type, []).append(question)
    if "caption" not in by_type:
        return scene
    caption = rng.choice(by_type.pop("caption"))
    names = sorted(by_type, key=lambda name: rng.random() ** (1 / TYPE_WEIGHTS[name]))[::-1]
    if rng.random() < 0.5 and any(q.answer.startswith("Yes") for q in by_type["presence"]):
        by_type["presence"] = [q for q in by_type["presence"] if q.answer.startswith("Yes")]
    chosen = [rng.choice(by_type[name]) for name in names]
    if rng.random() < 0.8:
        chosen.insert(rng.randrange(4), caption)
    if rng.random() < 0.06:
        answer = rng.choice([answer for answer in TALK if answer != NO_PICTURE])
        chosen.insert(rng.randrange(3), Question("talk", rng.choice(TALK[answer]), answer))
    return replace(scene, questions=tuple(loosen(rng, question) for question in chosen))


def loosen(rng: Random, question: Question) -> Question:
    """Now and then the question as people type it: in small letters, without a question mark."""
    text = question.text
    if rng.random() < 0.08:
        text = text[0].lower() + text[1:]
    if rng.random() < 0.08:
        text = text.rstrip("?.")
    return replace(question, text=text)


def make_batch(
    scenes: Sequence[Scene],
    chat: Chat,
    config: VisionConfig,
    rng: Random | None = None,
    per_row: int = 1,
) -> Batch:
    """One batch of scenes with equal numbers of pictures and tiles; `rng` turns some into JPEG.

    per_row: how many scenes follow each other in one conversation.
    """
    groups = [scenes[first : first + per_row] for first in range(0, len(scenes), per_row)]
    rows = [chat.ids([(s.questions, len(s.views)) for s in group]) for group in groups]
    length = max(len(row.ids) for row in rows)
    input_ids = torch.full((len(rows), length), chat.pad_id)
    wanted = torch.zeros(len(rows), length, dtype=torch.bool)
    for index, row in enumerate(rows):
        input_ids[index, : len(row.ids)] = torch.tensor(row.ids)
        wanted[index, : len(row.ids)] = torch.tensor(row.wanted)
    types = tuple(group[0].questions[0].type for group in groups)
    if not scenes[0].views:
        return Batch(input_ids, wanted, (), None, None, {}, types)
    tiled, labels = [], []
    for scene in scenes:
        for view, picture in zip(scene.views, scene.pictures, strict=True):
            if rng and rng.random() < 0.2:
                picture = as_jpeg(picture, rng.randint(60, 95))
            tiled.append(preprocess(Image(picture, "", ""), config, CLIP))
            labels.append(patch_labels(view, tiled[-1].layout, config))
    return Batch(
        input_ids,
        wanted,
        cross_segments([row.starts for row in rows], length - 1, len(scenes[0].views)),
        torch.stack([each.pixel_values for each in tiled]),
        torch.tensor([each.layout.aspect_ratio_id for each in tiled]),
        {name: torch.from_numpy(np.stack([each[name] for each in labels])) for name in AUXILIARY},
        types,
    )


def cross_segments(starts: list[list[int]], length: int, images: int) -> tuple[CrossSegment, ...]:
    """Segments of rows whose groups of `images` pictures begin at `starts`."""
    pictures = iter(range(10**6))
    seen = [[tuple(next(pictures) for _ in range(images)) for _ in row] for row in starts]
    if all(len(row) == 1 for row in starts):
        rows = tuple(range(len(starts)))
        return (CrossSegment(rows, starts[0][0], length, tuple(row[0] for row in seen)),)
    segments = []
    for index, row in enumerate(starts):
        for start, end, group in zip(row, [*row[1:], length], seen[index], strict=True):
            segments.append(CrossSegment((index,), start, end, (group,)))
    return tuple(segments)


def as_jpeg(picture: PILImage.Image, quality: int) -> PILImage.Image:
    """The picture after a round trip through JPEG."""
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=quality)
    return PILImage.open(stream).convert("RGB")


CANVASES = {
    1: ((1, 1),), 2: ((1, 2), (2, 1)), 3: ((1, 3), (3, 1)), 4: ((2, 2), (2, 2), (1, 4), (4, 1)),
}  # fmt: skip


def training_batch(index: int, stage: float, chat: Chat, config: VisionConfig, seed: int) -> Batch:
    """Batch number `index`; `stage` 0..1 is how far the world has grown."""
    rng = Random(f"batch {seed} {index}")  # noqa: S311
    level = 0 if stage < 0.06 else 1 if stage < 0.15 else 2
    first = index * 64 + seed * 10**9
    kind = "single"
    if level == 2:
        kind = rng.choices(("single", "pair", "talk", "later"), (79, 16, 3, 2))[0]
    if kind in ("pair", "talk"):
        count = ROWS_BY_TILES[2 if kind == "pair" else 0]
        scenes = [make_scene(first + n, kind=kind) for n in range(count)]
        return make_batch(scenes, chat, config, rng)
    if kind == "later":  # a second picture in a later turn
        scenes = [make_scene(first + n, kind="objects", canvas=(1, 1)) for n in range(24)]
        scenes = [choose_questions(rng, scene) for scene in scenes]
        scenes = [replace(scene, questions=scene.questions[:2]) for scene in scenes]
        return make_batch(scenes, chat, config, rng, per_row=2)
    weights = ((90, 10, 0, 0), (70, 20, 5, 5), (54, 20, 9, 17))[level]
    tiles = rng.choices((1, 2, 3, 4), weights)[0]
    kinds = ("objects", "count", "text")
    shares = ((70, 15, 15), (60, 18, 22), (58, 17, 25))[level]
    scenes = [
        make_scene(
            first + n,
            level=max(0, level - rng.choices((0, 1, 2), (55, 20, 25))[0]),
            kind=rng.choices(kinds, shares)[0],
            canvas=rng.choice(CANVASES[tiles]),
        )
        for n in range(ROWS_BY_TILES[tiles])
    ]
    return make_batch([choose_questions(rng, scene) for scene in scenes], chat, config, rng)
