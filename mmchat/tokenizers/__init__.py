"""Tokenizers behind one protocol: files of Llama 3, Llama 2 and Qwen, tokenizer.json, and GGUF."""

from __future__ import annotations

from pathlib import Path

from mmchat.checkpoints.gguf_file import is_gguf
from mmchat.errors import CheckpointError
from mmchat.storage.safe_files import open_regular
from mmchat.strict_json import escaped
from mmchat.tokenizers.base import Tokenizer

_NAMES = ("tokenizer.model", "original/tokenizer.model", "tokenizer.json", "qwen.tiktoken")


def tokenizer_in(folder: Path) -> Path | None:
    """The first of the files that a tokenizer may be in, of those that `folder` has."""
    return next((folder / name for name in _NAMES if (folder / name).is_file()), None)


def name_as_found(path: Path) -> str:
    """The name under which `tokenizer_in` finds a copy of the file, whatever it is called."""
    names = {".json": "tokenizer.json", ".tiktoken": "qwen.tiktoken"}
    return names.get(path.suffix, "tokenizer.model")


def open_tokenizer(path: Path | str) -> Tokenizer:
    """Open a tokenizer.model, tokenizer.json or qwen.tiktoken, the first of them in a folder, or
    that of a GGUF.

    Raises CheckpointError for a missing or damaged file, MissingExtra for a tokenizer.json that
    only the `tokenizers` library can run.
    """
    path = Path(path)
    if path.is_dir():
        found = tokenizer_in(path)
        if found is None:
            raise CheckpointError(
                f"{escaped(str(path))}: no tokenizer.model, tokenizer.json or qwen.tiktoken there;"
                " name the file"
            )
        path = found
    if path.suffix == ".json" or is_gguf(path):
        from mmchat.tokenizers.tokenizer_json import open_tokenizer_json

        return open_tokenizer_json(path)
    if _first_byte(path) == b"\n":
        from mmchat.tokenizers.sentencepiece_file import open_sentencepiece_file

        return open_sentencepiece_file(path)
    from mmchat.tokenizers.tiktoken_file import open_tiktoken_file

    return open_tiktoken_file(path)


def _first_byte(path: Path) -> bytes:
    """It tells a SentencePiece model from a tiktoken file; b"" where there is none to read."""
    try:
        with open_regular(path.resolve()) as opened:
            return opened.read(1) or b""
    except (OSError, RuntimeError, ValueError):
        return b""  # the reader says what is wrong
