"""Small SentencePiece models with the settings of Llama 2, trained here; no file, no network."""

from __future__ import annotations

import io
import random
from functools import cache
from typing import Any

SYLLABLES = (
    "ba",
    "co",
    "di",
    "fe",
    "gu",
    "the",
    "in",
    "er",
    "US",
    "ER",
    "image",
    "dog",
    "éa",
    "犬",
)
ENDS = ("", ".", ":")


def lines(seed: int, count: int) -> list[str]:
    chosen = random.Random(seed)
    return [
        " ".join(
            "".join((*chosen.choices(SYLLABLES, k=chosen.randint(1, 3)), chosen.choice(ENDS)))
            for _ in range(chosen.randint(2, 9))
        )
        for _ in range(count)
    ]  # fmt: skip


@cache
def trained(seed: int = 0, vocab_size: int = 600, **changed: Any) -> bytes:
    """The same bytes each time."""
    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    settings: dict[str, Any] = {
        "model_type": "bpe",
        "vocab_size": vocab_size,
        "byte_fallback": True,
        "split_digits": True,
        "allow_whitespace_only_pieces": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "add_dummy_prefix": True,
        "unk_id": 0,
        "bos_id": 1,
        "eos_id": 2,
        "pad_id": -1,
        "hard_vocab_limit": False,
        "character_coverage": 1.0,
        "num_threads": 1,
        "minloglevel": 2,
    }
    SentencePieceTrainer.train(
        sentence_iterator=iter(lines(seed, 1_500)), model_writer=model, **(settings | changed)
    )
    return model.getvalue()
