"""The tokenizer as a plain table, for programs that are not Python (examples/native reads it)."""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from mmchat.storage import atomic_file
from mmchat.tokenizers.byte_pair import LLAMA3_SPLIT, BytePairTokenizer

if TYPE_CHECKING:
    from mmchat.tokenizers.base import Tokenizer

TABLE_NAME = "tokens.txt"
_CLASSES = {"L": "letters", "N": "numbers"}


def write_token_table(folder: Path, tokenizer: Tokenizer) -> None:
    """Write tokens.txt, if `tokenizer` is of Llama 3's kind: for another no table is enough.

    Lines: `letters` and `numbers` with the ranges of code points (hexadecimal) that its splitting
    takes for such; `token ID BYTES` for each ordinary token, in hexadecimal, by rank; `special ID
    NAME`. Raises DiskError.
    """
    if isinstance(tokenizer, BytePairTokenizer) and tokenizer.split == LLAMA3_SPLIT:
        atomic_file.write_text(folder / TABLE_NAME, "\n".join((*_lines(tokenizer), "")))


def _lines(tokenizer: BytePairTokenizer) -> Iterator[str]:
    yield "mmchat tokens 1"
    ranges: dict[str, list[str]] = {name: [] for name in _CLASSES.values()}
    code_points = range(sys.maxunicode + 1)
    for kind, run in groupby(code_points, key=lambda i: unicodedata.category(chr(i))[0]):
        if kind in _CLASSES:
            members = list(run)
            ranges[_CLASSES[kind]].append(f"{members[0]:x}-{members[-1]:x}")
    for name, found in ranges.items():
        yield " ".join((name, *found))
    for token_id, token in enumerate(tokenizer.tokens):
        yield f"token {token_id} {token.hex()}"
    for name, token_id in tokenizer.special_tokens.items():
        yield f"special {token_id} {name}"
