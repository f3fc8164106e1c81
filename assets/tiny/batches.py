"""Turns scenes into training batches: tiles, token ids, and labels for the auxiliary heads."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import tiktoken
import torch
from loosen import loosen
from PIL import Image as PILImage
from textures import LEARNT
from torch import Tensor

from mmchat.conversation import Image
from mmchat.evals.scenes import Question, Scene, make_scene
from mmchat.evals.scenes.questions import Asker
from mmchat.evals.scenes.world import COLOURS, KINDS, WORDS, View
from mmchat.models.mllama.config import ImageProcessorConfig, MllamaConfig, VisionConfig
from mmchat.models.mllama.processor import preprocess
from mmchat.models.mllama.tiling import TileLayout, layout_of

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
SMALLEST_CUT = 20  # rows
PICTURES_BY_TILES = {1: 24, 2: 16, 3: 12, 4: 10}
# A conversation: groups of questions, and the pictures before each group by their numbers.
Row = Sequence[tuple[Sequence[Question], Sequence[int]]]
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
    last_answer: int = 0


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

    def answer(self, ids: Sequence[int]) -> str:
        """The text of an answer's tokens, up to the end of the turn."""
        end = ids.index(self._special(EOT)) if self._special(EOT) in ids else len(ids)
        return self.encoding.decode([i for i in ids[:end] if i < self.num_ranks])

    def _special(self, offset: int) -> int:
        return self.num_ranks + offset

    def _header(self, role: str) -> list[int]:
        start, end = self._special(START_HEADER), self._special(END_HEADER)
        return [start, *self.encode(role), end, *self.encode("\n\n")]

    def ids(self, chats: Row) -> Ids:
        """Token ids of one conversation; pictures stand before the first question of a group."""
        row = Ids([self._special(BEGIN_OF_TEXT)], [False], [])
        eot = self._special(EOT)
        for questions, images in chats:
            for turn, question in enumerate(questions):
                prompt = [*self.encode(question.text), eot, *self._header("assistant")]
                if turn == 0:
                    prompt = [self.vocab_size] * len(images) + prompt
                prompt = self._header("user") + prompt
                answer = [*self.encode(question.answer), eot]
                if turn and len(row.ids) + len(prompt) + len(answer) > MAX_LENGTH:
                    break
                if turn == 0 and images:
                    row.starts.append(len(row.ids) + len(self._header("user")))
                row.ids += prompt + answer
                row.last_answer = len(answer)
                row.wanted += [False] * len(prompt) + [True] * len(answer)
        return row

    @property
    def pad_id(self) -> int:
        return self._special(PAD)


@dataclass(eq=False)
class Rows:
    """Conversations of like length. input_ids, wanted: [B, S].

    pictures: of each row, (position, number) of each picture. types, last_answer: the type of each
    row's last question, and which tokens are its answer, [B, S]. numbers: of the rows as given.
    """

    input_ids: Tensor
    wanted: Tensor
    pictures: tuple[tuple[tuple[int, int], ...], ...]
    types: tuple[str, ...]
    last_answer: Tensor
    numbers: tuple[int, ...]

    @property
    def targets(self) -> Tensor:
        """The tokens that the model has to predict: [N]."""
        return self.input_ids[:, 1:][self.wanted[:, 1:]]


@dataclass(eq=False)
class Batch:
    """Pictures and what is asked about them. tiles: [I, T, C, S, S]. labels: name -> [I, T·P]."""

    parts: tuple[Rows, ...]
    tiles: Tensor | None = None
    aspect_ratio_ids: Tensor | None = None
    labels: dict[str, Tensor] = field(default_factory=dict)

    @property
    def targets(self) -> Tensor:
        return torch.cat([part.targets for part in self.parts])

    def to(self, device: str | torch.device) -> Batch:
        """The batch on another device."""
        return Batch(
            tuple(replace(p, **_moved(vars(p), device)) for p in self.parts),
            **_moved({"tiles": self.tiles, "aspect_ratio_ids": self.aspect_ratio_ids}, device),
            labels=_moved(self.labels, device),
        )


def _moved(values: dict[str, Any], device: str | torch.device) -> dict[str, Any]:
    return {n: v.to(device, non_blocking=True) for n, v in values.items() if isinstance(v, Tensor)}


def patch_labels(view: View, layout: TileLayout, config: VisionConfig) -> dict[str, np.ndarray]:
    """For every auxiliary head the label of each vision token of a picture: [T·P]."""
    tiles_h, tiles_w = layout.aspect_ratio
    patch = config.patch_size
    grid = config.image_size // patch
    planes = {n: np.full((tiles_h * grid, tiles_w * grid), -1, np.int64) for n in AUXILIARY}
    inside_h, inside_w = (-(-side // patch) for side in layout.resized)
    if view.texture is not None:
        return {n: np.full(tiles_h * tiles_w * config.tokens_per_tile, -1) for n in AUXILIARY}
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


# How likely a type is among the questions that are asked about a training picture.
TYPE_WEIGHTS = {
    "caption": 2.2, "colour": 0.4, "count": 1.5, "where": 0.3, "presence": 1.8, "text": 2.5,
    "order": 6.0, "size": 20.0, "absent": 0.5, "unknown": 0.3, "follow": 0.8,
}  # fmt: skip
NONE = "There are none."
# Longest question of a batch, words: rows of like length waste little. Longer ones come in
# conversations only.
WORDS_IN_ROW = (9, 10, 12, 16)


def choose_questions(rng: Random, questions: Sequence[Question], count: int) -> list[Question]:
    """`count` questions, at most two of a type, weak types and hard questions first."""
    by_type: dict[str, list[Question]] = {}
    for question in rng.sample(questions, len(questions)):
        by_type.setdefault(question.type, []).append(question)
    presence, hard = by_type.get("presence", []), rng.random()
    if hard < 0.45:
        presence.sort(key=lambda question: question.answer.startswith("No"))
    elif hard < 0.8:  # a thing that is there, in another colour
        presence.sort(key=lambda q: not (q.answer.startswith("No") and q.answer.count(" ") > 4))
    if rng.random() < 0.2:
        by_type.get("count", []).sort(key=lambda question: question.answer != NONE)
    slots = [(name, turn) for name, asked in by_type.items() for turn in range(min(2, len(asked)))]
    slots.sort(key=lambda slot: -(rng.random() ** (1 / TYPE_WEIGHTS.get(slot[0], 1.0))))
    return [by_type[name][turn] for name, turn in slots[:count]]


def make_batch(
    scenes: Sequence[Scene],
    chat: Chat,
    config: MllamaConfig,
    rng: Random | None = None,
    rows: Sequence[Row] | None = None,
) -> Batch:
    """One batch of scenes with equal numbers of pictures and tiles; `rng` turns some into JPEG.

    rows: conversations about them; each question of each scene in one of its own, if None.
    """
    if rows is None:
        per = len(scenes[0].views)
        rows = [
            [((*question.earlier, question), range(index * per, (index + 1) * per))]
            for index, scene in enumerate(scenes)
            for question in scene.questions
        ]
    encoded = [chat.ids(row) for row in rows]
    order = sorted(range(len(rows)), key=lambda number: len(encoded[number].ids))
    parts = [_rows(numbers, encoded, rows, chat.pad_id) for numbers in _cut(order)]
    if not scenes[0].views:
        return Batch(tuple(parts))
    tiled, labels = [], []
    for scene in scenes:
        for view, picture in zip(scene.views, scene.pictures, strict=True):
            if rng and rng.random() < 0.2:
                picture = as_jpeg(picture, rng.randint(60, 95))
            tiled.append(preprocess(Image(picture, "", ""), config).tensors)
            vision = config.vision_config
            layout = layout_of(vision, picture.height, picture.width)
            labels.append(patch_labels(view, layout, vision))
    tiles, aspect_ratio_ids = zip(*tiled, strict=True)
    return Batch(
        tuple(parts),
        torch.stack(tiles),
        torch.cat(aspect_ratio_ids),
        {name: torch.from_numpy(np.stack([each[name] for each in labels])) for name in AUXILIARY},
    )


def _cut(order: list[int]) -> list[list[int]]:
    """Short and long rows apart, so that less is padded."""
    at = len(order) * 7 // 10
    return [order[:at], order[at:]] if len(order) >= SMALLEST_CUT else [order]


def _rows(numbers: list[int], all_ids: list[Ids], all_rows: Sequence[Row], pad_id: int) -> Rows:
    encoded, rows = [all_ids[n] for n in numbers], [all_rows[n] for n in numbers]
    length = max(len(row.ids) for row in encoded)
    input_ids = torch.full((len(rows), length), pad_id)
    wanted = torch.zeros(len(rows), length, dtype=torch.bool)
    last_answer = wanted.clone()
    for index, row in enumerate(encoded):
        end = len(row.ids)
        input_ids[index, :end] = torch.tensor(row.ids)
        wanted[index, :end] = torch.tensor(row.wanted)
        last_answer[index, end - row.last_answer : end] = True
    pictures = tuple(
        tuple(
            (start + at, picture)
            for start, (_, group) in zip(row.starts, all_rows[number], strict=False)
            for at, picture in enumerate(group)
        )
        for row, number in zip(encoded, numbers, strict=True)
    )
    types = tuple(row[-1][0][-1].type for row in rows)
    return Rows(input_ids, wanted, pictures, types, last_answer, tuple(numbers))


def as_jpeg(picture: PILImage.Image, quality: int) -> PILImage.Image:
    """The picture after a round trip through JPEG."""
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=quality)
    return PILImage.open(stream).convert("RGB")


CANVASES = {
    1: ((1, 1),), 2: ((1, 2), (2, 1)), 3: ((1, 3), (3, 1)), 4: ((2, 2), (2, 2), (1, 4), (4, 1)),
}  # fmt: skip


# Kinds of batches and how often they come.
BATCHES = {"single": 70, "turns": 8, "pair": 12, "talk": 3, "later": 4, "outside": 3}


def training_batch(
    index: int, chat: Chat, config: MllamaConfig, seed: int, larger: int = 1
) -> Batch:
    """Batch number `index`: pictures of one number of tiles, about five questions for each."""
    rng = Random(f"batch {seed} {index}")  # noqa: S311
    first = index * 64 * larger + seed * 10**9
    kind = rng.choices(tuple(BATCHES), tuple(BATCHES.values()))[0]
    tiles = 1 if kind == "later" else rng.choices((1, 2, 3, 4), (44, 22, 10, 24))[0]
    if kind == "pair":
        tiles = rng.choices((1, 2, 4), (60, 28, 12))[0]
    canvases = CANVASES[tiles][:2]
    count = (24 if kind == "talk" else PICTURES_BY_TILES[tiles]) * larger
    scenes = []
    for seed_ in range(first, first + 64 * larger):
        if len(scenes) == count:
            break
        of = rng.choices(("objects", "count", "text"), (73, 14, 13))[0]
        of = kind if kind in ("pair", "talk", "outside") else of
        of = "pair" if kind == "later" and rng.random() < 0.35 else of
        level = rng.choices((0, 1, 2), (6, 12, 82))[0]
        canvas = rng.choice(canvases if kind == "pair" else CANVASES[tiles])
        scene = make_scene(
            seed_, level=level, kind=of, canvas=canvas, wording="rich", textures=tuple(LEARNT)
        )
        if rng.random() < _worth(scene):
            scenes.append(loosened(rng, asked_more(rng, scene)))
    if kind in ("pair", "talk", "outside"):
        return make_batch(scenes, chat, config, rng)
    if kind == "single":
        chosen, most = [], rng.choice(WORDS_IN_ROW)
        for scene in scenes:
            short = [q for q in scene.questions if not q.earlier and q.text.count(" ") < most]
            chosen.append(replace(scene, questions=tuple(choose_questions(rng, short, 5))))
        return make_batch(chosen, chat, config, rng)
    of_all = _later(rng, scenes) if kind == "later" else _turns(rng, scenes)
    return make_batch(scenes, chat, config, rng, of_all)


def _turns(rng: Random, scenes: Sequence[Scene]) -> list[Row]:
    """Several questions in turn about a picture, some that only those before make clear."""
    rows: list[Row] = []
    for n, scene in enumerate(scenes):
        alone = [question for question in scene.questions if not question.earlier]
        follow = [q for q in scene.questions if q.earlier]
        turns = [choose_questions(rng, alone, rng.randint(2, 3)) for _ in range(2)]
        if follow:
            turns[0] = [*follow[0].earlier, follow[0], *turns[0][:1]]
        rows += [[(asked, (n,))] for asked in (*turns, *([*f.earlier, f] for f in follow[1:2]))]
    return rows


def _later(rng: Random, scenes: Sequence[Scene]) -> list[Row]:
    """Conversations in which other pictures, or two at once, come later."""
    groups, start = [], 0
    for scene in scenes:
        alone = [question for question in scene.questions if not question.earlier]
        end = start + len(scene.views)
        groups.append((choose_questions(rng, alone, rng.randint(1, 2)), range(start, end)))
        start = end
    return [groups[n - rng.randint(1, 2) : n + 1] for n in range(2, len(groups))]


def _worth(scene: Scene) -> float:
    """How likely a scene is kept; those with one thing, or with nothing to compare, are common."""
    if scene.kind != "objects" or any(question.type == "size" for question in scene.questions):
        return 1.0
    [first, *others] = scene.views[0].items
    if not others and first.box[2] > min(scene.views[0].height, scene.views[0].width) / 2:
        return 0.6  # one that fills the picture
    return (0.2, 0.25, 0.6)[len(others)]


def asked_more(rng: Random, scene: Scene) -> Scene:
    """The scene with more questions of the types that are hard to learn."""
    if scene.kind not in ("objects", "count", "text"):
        return scene
    asker = Asker(rng, scene.views[0], "rich")
    makers = (asker.count, asker.count, asker.count, asker.presence, asker.order, asker.size)
    more = (question for make in makers for question in make())
    return replace(scene, questions=(*scene.questions, *more))


def loosened(rng: Random, scene: Scene) -> Scene:
    """The scene with its questions as people type them."""
    return replace(scene, questions=tuple(_loosened(rng, q) for q in scene.questions))


def _loosened(rng: Random, question: Question) -> Question:
    earlier = tuple(_loosened(rng, each) for each in question.earlier)
    return replace(question, text=loosen(rng, question.text), earlier=earlier)
