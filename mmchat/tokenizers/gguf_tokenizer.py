"""The tokenizer inside a GGUF file, as the tokenizer.json that it was made from."""

from __future__ import annotations

from collections.abc import Mapping
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
    file = MappedFile(path)
    try:
        return _document(read_header(file).metadata, Where(str(path), error=CheckpointError))
    finally:
        file.close()


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
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {
                    "type": "Split",
                    "pattern": {"Regex": LLAMA3_SPLIT},
                    "behavior": "Isolated",
                    "invert": False,
                },
                _byte_level(add_prefix_space=False, use_regex=False),
            ],
        },
        "post_processor": _byte_level(add_prefix_space=True, use_regex=True),
        "decoder": _byte_level(add_prefix_space=True, use_regex=True),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,
            "vocab": {name: i for i, (name, kind) in numbered if kind == _PLAIN},
            "merges": merges,
        },
    }


def _texts(value: Any, key: str, where: Where) -> list[str]:
    if not isinstance(value, list):  # of which the header's are of texts alone
        raise where.child(_KEYS + key).fail("expected a list of texts")
    return value


def _byte_level(*, add_prefix_space: bool, use_regex: bool) -> dict[str, Any]:
    return {
        "type": "ByteLevel",
        "add_prefix_space": add_prefix_space,
        "trim_offsets": True,
        "use_regex": use_regex,
    }
