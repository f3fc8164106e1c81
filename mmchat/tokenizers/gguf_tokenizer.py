"""The tokenizer inside a GGUF file, as the tokenizer.json that it was made from."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from mmchat.checkpoints.gguf_file import read_header
from mmchat.checkpoints.mapped_file import MappedFile
from mmchat.errors import CheckpointError, quoted
from mmchat.strict_json import Where
from mmchat.tokenizers.base import Tokenizer
from mmchat.tokenizers.byte_pair import LLAMA3_SPLIT
from mmchat.tokenizers.tokenizer_json import tokenizer_of

_KEYS = "tokenizer.ggml."
_PLAIN, _SPECIAL = 1, (3, 4)  # control tokens, and those that a user defined


def open_gguf_tokenizer(path: Path) -> Tokenizer:
    """Raises CheckpointError for another kind of tokenizer than Llama 3's, or a damaged one."""
    return tokenizer_of(tokenizer_document(path), Where(str(path), error=CheckpointError))


def tokenizer_document(path: Path) -> dict[str, Any]:
    """The content of a tokenizer.json that says the same. Raises CheckpointError."""
    with closing(MappedFile(path)) as file:
        return _document(read_header(file).metadata, Where(str(path), error=CheckpointError))


def _document(found: Mapping[str, Any], where: Where) -> dict[str, Any]:
    kinds = tuple(found.get(_KEYS + key) for key in ("model", "pre"))
    if kinds != ("gpt2", "llama-bpe"):
        raise where.fail(f"its tokenizer is {quoted(kinds)}, not that of Llama 3")
    names, merges = (_texts(found.get(_KEYS + key), key, where) for key in ("tokens", "merges"))
    types = found.get(f"{_KEYS}token_type")
    if not isinstance(types, tuple) or len(types) != len(names):
        raise where.child(f"{_KEYS}token_type").fail("expected a number for each token")
    numbered = list(enumerate(zip(names, types, strict=True)))
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [
        {"id": i, "content": name, **plain, "special": True}
        for i, (name, kind) in numbered
        if kind in _SPECIAL
    ]
    split = {"pattern": {"Regex": LLAMA3_SPLIT}, "behavior": "Isolated", "invert": False}
    bytes_ = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    return {
        "version": "1.0",
        "added_tokens": added,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{"type": "Split", **split}, {**bytes_, "use_regex": False}],
        },
        "decoder": bytes_,
        "model": {
            "type": "BPE",
            "ignore_merges": True,
            "vocab": {name: i for i, (name, kind) in numbered if kind == _PLAIN},
            "merges": merges,
        },
    }


def _texts(value: Any, key: str, where: Where) -> list[str]:
    if not isinstance(value, list):  # of which the header's are of texts alone
        raise where.child(_KEYS + key).fail("expected a list of texts")
    return value
