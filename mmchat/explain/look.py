"""Where an answer looked: for each of its words, how strongly it read each part of each picture.

One pass over the prompt and the answer, after the answer, takes the weights of cross-attention out;
nothing of the generation changes. They say where the model reads, not why it answers so.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from mmchat.conversation import Image
from mmchat.engine.driver import run
from mmchat.engine.request import Request, request_within
from mmchat.engine.sampling import SamplingParams
from mmchat.errors import UsageError
from mmchat.models.base import Watch
from mmchat.models.prompt import followed

if TYPE_CHECKING:
    from mmchat.catalog.spec import ModelSpec
    from mmchat.loading.loader import LoadedModel
    from mmchat.models.prompt import Prompt
    from mmchat.tokenizers.base import Tokenizer

# What is shown of a word: its share, times how much larger that is than the mean over the words.
# The ratio alone lights up what nobody reads, and the share alone what all words read. On drawn
# scenes of one and of three objects the brightest place lay on the word's own object in 85 and 79 %
# of 200 and 600; by the ratio alone 21 and 59 %, with its square 75 and 76 %, by the share alone 88
# and 80 %, where the built-in model has no place that all words read.
PROGRAMS = "programs do not tell where they look; load the weights instead"
_BLUR = 0.015  # of the longer side, how wide a place is: beside larger patches it is nothing
SHARED = (
    "where an answer looked is not known with --parallel, as no rank has all heads; leave it out"
)
_FLOOR = 0.5  # of the mean share, on both sides of the ratio: a rounding error is no interest


@dataclass(frozen=True)
class Word:
    """A word of the answer, text[start:end], and what it read of each picture.

    shares: [rows, columns] of a picture's patches, what of all that the word read went to each;
    beyond them only class tokens and padding are read. None for a picture that it does not see.
    """

    text: str
    start: int
    end: int
    shares: tuple[np.ndarray | None, ...]


@dataclass(frozen=True)
class Look:
    """Where an answer looked.

    grids: (rows, columns) of each picture's patches. cells: height and width of one in its pixels.
    """

    answer: str
    images: tuple[Image, ...]
    grids: tuple[tuple[int, int], ...]
    cells: tuple[tuple[float, float], ...]
    words: tuple[Word, ...]

    def heat(self, word: Word) -> list[np.ndarray | None]:
        """For each picture, what `word` read, and more than the answer's words do on average.

        [rows, columns] from 0 to 1, where 1 is the brightest place of all its pictures; None for a
        picture that the word does not see. Some places are read by every word, whatever it is:
        beside them nothing else would show. Small patches run into their neighbours, since a spot
        that is too small to be seen would leave all else dark.
        """
        maps: list[np.ndarray | None] = []
        for shares, mean in zip(word.shares, self._means, strict=True):
            if shares is None or mean is None:
                maps.append(None)
                continue
            blurred, floor = _blurred(shares), _FLOOR * float(mean.mean())
            maps.append(blurred * (blurred + floor) / (mean + floor))
        return _to_one(maps)

    def overall(self) -> list[np.ndarray | None]:
        """The same of the whole answer, which has nothing to be compared with."""
        return _to_one(self._means)

    def reach(self, image: int) -> tuple[float, float]:
        """How far the patches of a picture go over it, down and right: 1 is to its edge."""
        (rows, columns), (height, width) = self.grids[image], self.cells[image]
        pixels = self.images[image]
        return rows * height / pixels.height, columns * width / pixels.width

    def find(self, wanted: str) -> Word:
        """The first word that says `wanted`, or the word of this number, from 1.

        Raises UsageError with the words there are.
        """
        if wanted.isdecimal() and 1 <= int(wanted) <= len(self.words):
            return self.words[int(wanted) - 1]
        for word in self.words:
            if _bare(word.text) == _bare(wanted):
                return word
        listed = " ".join(f"{n} {word.text}" for n, word in enumerate(self.words[:30], start=1))
        raise UsageError(f"{wanted!r} is no word of the answer; its words are: {listed}")

    @cached_property
    def _means(self) -> list[np.ndarray | None]:
        """Of each picture, over the words that see it."""
        of_pictures = zip(*(word.shares for word in self.words), strict=True)
        means = [_mean([one for one in shares if one is not None]) for shares in of_pictures]
        return [None if mean is None else _blurred(mean) for mean in means]


def _mean(shares: Sequence[np.ndarray]) -> np.ndarray | None:
    return np.mean(shares, axis=0) if shares else None


def _blurred(shares: np.ndarray) -> np.ndarray:
    """Of each patch the mean of its neighbourhood, by a Gaussian that ends at the edges."""
    width = _BLUR * max(shares.shape)
    for axis, side in enumerate(shares.shape):
        apart = np.arange(side)[:, None] - np.arange(side)
        kernel = np.exp(-((apart / width) ** 2) / 2)
        mean = kernel / kernel.sum(1, keepdims=True)
        shares = np.moveaxis(np.tensordot(mean, shares, (1, axis)), 0, axis)
    return shares


def _to_one(maps: list[np.ndarray | None]) -> list[np.ndarray | None]:
    top = max((float(one.max()) for one in maps if one is not None), default=0.0)
    return [one / top if one is not None and top > 0 else one for one in maps]


def _bare(text: str) -> str:
    return re.sub(r"^\W+|\W+$", "", text).casefold()


def check_family(spec: ModelSpec) -> None:
    """Raises UsageError if models of this kind do not read pictures by cross-attention."""
    if spec.family.patches(spec.config, 64, 64) is None:
        raise UsageError(
            f"{spec.name} has no cross-attention: its pictures lie among the text, so there is no"
            " telling which word looked where; Llama 3.2 Vision tells"
        )


def check_spec(spec: ModelSpec) -> None:
    """Raises UsageError if models of this kind do not tell where an answer to a chat looked."""
    check_family(spec)
    if spec.chat_format == "base":
        raise UsageError(f"{spec.name} is a base model, which answers no question")


def check_model(loaded: LoadedModel) -> None:
    """The same of a loaded one, which may run in a way that does not tell."""
    check_spec(loaded.spec)
    if loaded.runs_programs:
        raise UsageError(PROGRAMS)
    if loaded.options.ranks > 1:
        raise UsageError(SHARED)
    if loaded.options.text_only:
        raise UsageError("the model was loaded for text only, and looks at nothing")


def look(loaded: LoadedModel, prompt: Prompt, images: Sequence[Image], answer: str) -> Look:
    """Where `answer` to `prompt` looked; images: those of the prompt.

    Raises UsageError for models that do not tell, for an answer without words and a prompt without
    pictures, ContextLengthExceeded, MemoryError_, NumericalError.
    """
    request = look_request(loaded, prompt, answer)
    for _ in run(loaded.engine, [loaded.engine.submit(request)]):
        pass
    return looked(loaded, images, answer, request)


def look_request(loaded: LoadedModel, prompt: Prompt, answer: str) -> Request:
    """What is asked of the engine for `looked`. Raises as `look` does."""
    check_family(loaded.spec)
    if not prompt.media:
        raise UsageError("there is no picture to look at")
    if not answer.strip():
        raise UsageError("the answer has no words")
    last = len(prompt.token_ids) - 1  # which the first token of the answer was written from
    answered = followed(loaded.processor, prompt, loaded.tokenizer.encode(answer))
    once = SamplingParams(temperature=0.0, max_new_tokens=1)
    request = request_within(loaded.max_seq_len, answered, once)
    return replace(request, watch=Watch(last))


def looked(loaded: LoadedModel, images: Sequence[Image], answer: str, request: Request) -> Look:
    """What a finished request of `look_request` tells; images may be left out, if none is drawn."""
    watch = request.watch
    if watch is None or not watch.read:
        raise UsageError(PROGRAMS)
    family, config = loaded.spec.family, loaded.spec.config
    facts = [placed.media.facts for placed in request.prompt.media]
    patches = [family.patches(config, *one.size) for one in facts]
    found = [one for one in patches if one is not None]  # of this family all or none
    number = {placed.position: i for i, placed in enumerate(request.prompt.media)}
    words = []
    for start, end, positions in _words(loaded.tokenizer, answer, watch.first):
        shares: list[list[np.ndarray]] = [[] for _ in found]
        for places, read in (watch.read[one] for one in positions if one in watch.read):
            begin = 0
            for image in map(number.__getitem__, places):
                end_of_image = begin + facts[image].tokens
                part = read[begin:end_of_image].numpy()
                shares[image].append(part[np.array(found[image].token)])
                begin = end_of_image
        words.append(Word(answer[start:end], start, end, tuple(map(_mean, shares))))
    grids = tuple((len(one.token), len(one.token[0])) for one in found)
    return Look(answer, tuple(images), grids, tuple(one.cell for one in found), tuple(words))


def _words(tokenizer: Tokenizer, answer: str, first: int) -> Iterator[tuple[int, int, list[int]]]:
    """Of each word where it begins and ends, and the positions that its tokens were read at.

    A token is written from what the position before it read: the first one from `first`.
    """
    ends = []  # of each token, in bytes
    at = 0
    for token_id in tokenizer.encode(answer):
        at += len(tokenizer.token_bytes(token_id))
        ends.append(at)
    for match in re.finditer(r"\S+", answer):
        begin = len(answer[: match.start()].encode())
        end = begin + len(match[0].encode())
        positions = [
            first + token
            for token, (left, right) in enumerate(zip([0, *ends], ends, strict=False))
            if left < end and right > begin
        ]
        yield match.start(), match.end(), positions
