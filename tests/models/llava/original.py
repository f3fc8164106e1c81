"""What the original code of LLaVA was asked (make_llava_golden.py), and its answers."""

from __future__ import annotations

import random
from functools import cache
from pathlib import Path

import numpy as np

from tests.models.llava import oracle
from tests.models.llava.oracle import CASES, CONFIG, FEATURES
from tests.sentencepiece_model import SYLLABLES

GOLDEN = Path(__file__).parents[2] / "golden" / "llava.npz"
# Name -> configuration, whether the norms are fed small numbers, cases.
MODELS = {
    "random": (CONFIG, False, tuple(CASES)),
    "small": (CONFIG, True, ("two", "text")),
    **{
        name: (oracle.with_features(*chosen), False, ("two",))
        for name, chosen in FEATURES.items()
        if chosen[0] < 0 and chosen != (-2, "default")
    },
}
# Height, width: wide, tall, square, off by one, tiny, long.
SIZES = [
    (61, 90), (90, 61), (70, 70), (32, 33), (33, 32), (31, 200), (200, 31), (9, 1), (1, 9), (1, 1),
    (70, 71), (71, 70), (139, 140), (140, 139), (69, 70), (3, 200), (200, 3), (480, 640),
    (640, 480),
    (335, 337), (336, 336), (672, 100), (100, 672), (1000, 999), (2, 2), (7, 700),
]  # fmt: skip
# The original takes the rows of a picture for its channels where there are 1 or 3 of them.
SEEN_SIZES = [size for size in SIZES if size[0] not in (1, 3)]
_ALPHABET = [
    *SYLLABLES, *" \n\t  aeé犬🙂€0129<>/:.▁", "\r\n", "<0x41>", "USER: ", "\u0301", "\u200b",
    "<image>", "<image>\n", "</s>", "</s>USER: ",
]  # fmt: skip
TURNS = (  # of a user and the model, in turn
    ("the dog",),
    ("<image>\nthe dog",),
    ("<image>\n<image>\nin",),
    ("<image>\nthe dog", "A dog.", "in?"),
    ("the", "dog", "<image>\nin?", "犬", "more"),
)


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    """A picture [height, width, 3] of bytes."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@cache
def marked_texts() -> tuple[str, ...]:
    """8,000 prompts in which <image> marks pictures and </s> ends answers."""
    chosen = random.Random(11)
    return tuple("".join(chosen.choices(_ALPHABET, k=chosen.randint(0, 14))) for _ in range(8_000))


@cache
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN) as found:
        return dict(found)
