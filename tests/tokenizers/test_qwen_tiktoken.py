"""qwen.tiktoken: ids as the original's tokenizer gives them, but that text stays text."""

from __future__ import annotations

import os
import random
import unicodedata
from functools import cache
from pathlib import Path

import pytest
import tiktoken

from mmchat.errors import CheckpointError
from mmchat.export.token_table import write_token_table
from mmchat.tokenizers import name_as_found, open_tokenizer, tokenizer_in
from mmchat.tokenizers.base import StreamDecoder
from mmchat.tokenizers.byte_pair import BytePairTokenizer
from mmchat.tokenizers.tiktoken_file import QWEN_TAGS, qwen_special_tokens, qwen_tokenizer
from tests.synthetic_tokenizer import tiktoken_lines, trained_tokens

TOKENS = trained_tokens()
TOKENIZER = qwen_tokenizer(TOKENS)
# As the original's tokenization_qwen.py has it.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
STRINGS = 10_000
WORDS = [
    "dog", " dog", "Dog's", "they're", "12345", "3.14", "٣٤", "½", "  ", "\n", "\r\n", " \n\n ",
    "\t", "é", "e\u0301", "ǆ", "Å", "한국", "\u1100\u1161", "这是什么", "犬",
    "🐶", "👩\u200d👧", "…", ".....", "!?",
    "<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>", "<ref", "(517,508)", "<img>",
    "</img>", "<imgpad>", "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|extra_3|>", "\x00",
    "\u200b", "ﬁ", "a" * 30, "_x", "HTTP://", "ŉ", "\u0345",
]  # fmt: skip


@cache
def original(tokenizer: BytePairTokenizer) -> tiktoken.Encoding:
    ranks = {token: rank for rank, token in enumerate(tokenizer.tokens)}
    specials = dict(tokenizer.special_tokens)
    return tiktoken.Encoding(
        "Qwen", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=specials
    )


def originals(text: str, tokenizer: BytePairTokenizer = TOKENIZER) -> list[int]:
    """With the tags of places alone allowed to be special, as mmchat has it."""
    return original(tokenizer).encode(
        unicodedata.normalize("NFC", text), allowed_special=set(QWEN_TAGS), disallowed_special=()
    )


def made_up(seed: int) -> str:
    rng = random.Random(seed)
    parts = []
    for _ in range(rng.randrange(1, 12)):
        if rng.random() < 0.8:
            parts.append(rng.choice(WORDS))
        else:
            points = (rng.randrange(0x20, rng.choice((0x7F, 0x2FFF, 0x1FFFF))) for _ in range(4))
            parts.append("".join(chr(p) for p in points if not 0xD800 <= p < 0xE000))
    return "".join(parts)


def compare(tokenizer: BytePairTokenizer) -> None:
    for seed in range(STRINGS):
        text = made_up(seed)
        ids = tokenizer.encode(text)
        assert ids == originals(text, tokenizer), (seed, text)
        assert tokenizer.decode(ids) == unicodedata.normalize("NFC", text)


def test_ids_are_those_of_the_original_on_10_000_strings():
    compare(TOKENIZER)


def test_special_tokens_follow_the_ranks_in_the_originals_order():
    n = len(TOKENS)
    expected = {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2, "<|extra_0|>": 3,
                "<|extra_204|>": 207, "<ref>": 208, "</quad>": 213, "<img>": 214, "</img>": 215,
                "<imgpad>": 216}  # fmt: skip
    assert {name: TOKENIZER.special_id(name) - n for name in expected} == expected
    assert len(qwen_special_tokens()) == 217
    assert TOKENIZER.vocab_size == n + 217


def test_only_tags_of_places_become_special_and_are_text_again():
    typed = "".join(qwen_special_tokens())
    special = {i for i in TOKENIZER.encode(typed) if i >= len(TOKENS)}
    assert special == set(TOKENIZER.tags.values())
    assert TOKENIZER.decode(TOKENIZER.encode(typed)) == typed
    for name in QWEN_TAGS:
        assert not TOKENIZER.is_special(TOKENIZER.special_id(name))
    end = TOKENIZER.special_id("<|im_end|>")
    assert TOKENIZER.is_special(end)
    assert TOKENIZER.decode([end]) == ""


def test_a_stream_shows_tags_and_leaves_out_other_specials():
    ids = [*TOKENIZER.encode("<ref>犬</ref>"), TOKENIZER.special_id("<|im_end|>")]
    decoder = StreamDecoder(TOKENIZER)
    assert "".join(map(decoder.push, ids)) == "<ref>犬</ref>"
    assert decoder.flush() == ""


def test_the_file_is_known_by_its_ending_with_both_ends_of_lines(tmp_path):
    for end in (b"\n", b"\r\n"):
        (tmp_path / "qwen.tiktoken").write_bytes(tiktoken_lines(TOKENS, end))
        assert tokenizer_in(tmp_path) == tmp_path / "qwen.tiktoken"
        opened = open_tokenizer(tmp_path)
        assert opened.encode("<ref>dog</ref> 12") == TOKENIZER.encode("<ref>dog</ref> 12")
    assert name_as_found(Path("other.tiktoken")) == "qwen.tiktoken"
    (tmp_path / "qwen.tiktoken").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(CheckpointError, match="a Git LFS pointer"):
        open_tokenizer(tmp_path)


def test_no_table_for_native_programs_is_written(tmp_path):
    write_token_table(tmp_path, TOKENIZER)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def released() -> BytePairTokenizer:
    path = os.environ.get("MMCHAT_QWEN_TOKENIZER")
    if not path:
        pytest.skip("MMCHAT_QWEN_TOKENIZER does not name the qwen.tiktoken of Qwen-VL")
    found = open_tokenizer(path)
    assert isinstance(found, BytePairTokenizer)
    return found


@pytest.mark.checkpoint
def test_the_released_file_on_10_000_strings(released):
    assert released.vocab_size == 151_860
    compare(released)


@pytest.mark.checkpoint
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "<ref>击掌</ref><box>(517,508),(589,611)</box>",
            "151851 52726 99933 151852 151853 7 20 16 22 11 20 15 23 23547 20 23 24 11 21 16 16 8"
            " 151854",
        ),
        ("<img>x</img><|im_end|>", "20092 28257 522 1892 1784 91 318 6213 91 29"),
        ("\n\nfoo", "271 7975"),
        ("\n  What?", "198 220 3555 30"),
        (" 1234567 \n\n x", "220 16 17 18 19 20 21 22 4710 856"),
        ("e\u0301", "963"),
        ("🙂", "145080"),
        ("这是什么", "100346 99245"),
        (
            "Generate the caption in English with grounding:",
            "31115 279 17256 304 6364 448 94741 25",
        ),
    ],
)
def test_golden_ids_of_the_released_file(released, text, expected):
    assert " ".join(map(str, released.encode(text))) == expected
