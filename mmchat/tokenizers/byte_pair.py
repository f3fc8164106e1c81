"""Byte pair encoding as Llama 3 and Qwen do it, run by tiktoken on data that lies here."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Iterator, Mapping
from functools import cached_property
from typing import TYPE_CHECKING

from mmchat.tokenizers.base import Tokenizer

if TYPE_CHECKING:
    import tiktoken

# Llama 3 splits text by this expression before it merges bytes.
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# Qwen's makes each digit a token.
QWEN_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")

# Meta cuts text into pieces of bounded length first (llama_models, Tokenizer.encode).
_PIECE_CHARS = 400_000
_RUN_CHARS = 25_000


class BytePairTokenizer(Tokenizer):
    """A tokenizer given by the bytes of each token, where the id is the rank of the merge.

    split: how text is cut before bytes are merged. composes: text is brought into Unicode's normal
    form C first.
    """

    def __init__(
        self,
        tokens: list[bytes],
        special_tokens: Mapping[str, int],
        tags: Collection[str] = (),
        *,
        split: str = LLAMA3_SPLIT,
        composes: bool = False,
    ) -> None:
        super().__init__(tokens, special_tokens, tags)
        self.split, self.composes = split, composes

    @cached_property
    def _encoding(self) -> tiktoken.Encoding:
        import tiktoken

        ranks = {token: rank for rank, token in enumerate(self.tokens)}
        # No other special token is given to it, so none can come out of it.
        return tiktoken.Encoding(
            "mmchat", pat_str=self.split, mergeable_ranks=ranks, special_tokens=self.tags
        )

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = []
        if self.composes:
            text = unicodedata.normalize("NFC", text)
        tags = set(self.tags)
        for piece in pieces(text):
            ids += self._encoding.encode(piece, allowed_special=tags, disallowed_special=())
        return ids


def pieces(text: str) -> Iterator[str]:
    """Cut text every 400,000 characters, and within runs of over 25,000 (non-)space characters."""
    for start in range(0, len(text), _PIECE_CHARS):
        piece = text[start : start + _PIECE_CHARS]
        begin = 0
        for run in re.finditer(r"\s+|\S+", piece):
            for cut in range(run.start() + _RUN_CHARS, run.end(), _RUN_CHARS):
                yield piece[begin:cut]
                begin = cut
        yield piece[begin:]
