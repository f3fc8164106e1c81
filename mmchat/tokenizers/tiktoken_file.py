"""tokenizer.model of Llama 3 and qwen.tiktoken: one token a line, base64 and rank.

The special tokens are not in the file, but follow by rule.
"""

from __future__ import annotations

import binascii
from pathlib import Path

from mmchat import limits
from mmchat.errors import CheckpointError, quoted
from mmchat.strict_json import Where, read_bounded
from mmchat.tokenizers.base import IMAGE_TOKEN
from mmchat.tokenizers.byte_pair import QWEN_SPLIT, BytePairTokenizer

SPECIAL_TOKEN_COUNT = 256
# What marks things and places in the text of Qwen-VL.
QWEN_TAGS = ("<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>")


def open_tiktoken_file(path: Path) -> BytePairTokenizer:
    """Read such a file, Qwen's by its ending. Raises CheckpointError that names the line."""
    where = Where(str(path), error=CheckpointError)
    tokens = parse_tiktoken(read_bounded(path, limits.TOKENIZER_MODEL_BYTES, where), where)
    if path.suffix == ".tiktoken":
        return qwen_tokenizer(tokens)
    return BytePairTokenizer(tokens, _numbered(tokens, llama3_special_tokens()))


def qwen_tokenizer(tokens: list[bytes]) -> BytePairTokenizer:
    """Qwen-VL's tokenizer with these ordinary tokens."""
    specials = _numbered(tokens, qwen_special_tokens())
    return BytePairTokenizer(tokens, specials, QWEN_TAGS, split=QWEN_SPLIT, composes=True)


def _numbered(tokens: list[bytes], names: list[str]) -> dict[str, int]:
    return {name: len(tokens) + i for i, name in enumerate(names)}


def qwen_special_tokens() -> list[str]:
    """The 217 special tokens of Qwen-VL in the order of their ids."""
    extras = [f"<|extra_{i}|>" for i in range(205)]
    ends = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    return [*ends, *extras, *QWEN_TAGS, "<img>", "</img>", "<imgpad>"]


def llama3_special_tokens() -> list[str]:
    """The 256 special tokens of Llama 3.2 in the order of their ids, by Meta's names."""
    names = [
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|reserved_special_token_0|>",
        "<|reserved_special_token_1|>",
        "<|finetune_right_pad_id|>",
        "<|step_id|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eom_id|>",
        "<|eot_id|>",
        "<|python_tag|>",
        IMAGE_TOKEN,
    ]
    reserved = range(2, 2 + SPECIAL_TOKEN_COUNT - len(names))
    return names + [f"<|reserved_special_token_{i}|>" for i in reserved]


def parse_tiktoken(data: bytes, where: Where) -> list[bytes]:
    """Tokens by rank. Ranks rise by one from 0, tokens are unique, every single byte is a token.

    Lines end with LF or CRLF; the last may be empty.
    """
    lines = data.split(b"\n")
    if not lines[-1]:
        lines.pop()
    if len(lines) > limits.VOCABULARY_ENTRIES:
        raise where.fail(f"{len(lines):,} lines; at most {limits.VOCABULARY_ENTRIES:,} are read")
    tokens = [_parse_line(line, rank, where) for rank, line in enumerate(lines)]
    check_vocabulary(tokens, where)
    return tokens


def _parse_line(line: bytes, rank: int, where: Where) -> bytes:
    encoded, _, number = line.removesuffix(b"\r").partition(b" ")
    place = f"line {rank + 1}"
    if number != b"%d" % rank:
        raise where.fail(f"{place}: expected a token in base64 and rank {rank}, {_found(line)}")
    try:
        token = binascii.a2b_base64(encoded, strict_mode=True)
    except binascii.Error:
        raise where.fail(f"{place}: not base64, {_found(line)}") from None
    if not 1 <= len(token) <= limits.BYTES_PER_TOKEN:
        raise where.fail(
            f"{place}: a token of {len(token)} bytes; 1 to {limits.BYTES_PER_TOKEN} are possible"
        )
    return token


def _found(line: bytes) -> str:
    return f"found {quoted(line[:40].decode('utf-8', 'backslashreplace'))}"


def check_vocabulary(tokens: list[bytes], where: Where) -> None:
    """Tokens are unique and every single byte is one; otherwise some text could not be encoded."""
    known = set(tokens)
    if len(known) < len(tokens):
        seen: set[bytes] = set()
        twice = next(rank for rank, t in enumerate(tokens) if t in seen or seen.add(t))
        raise where.fail(f"rank {twice}: token {quoted(tokens[twice])} is there twice")
    missing = [byte for byte in range(256) if bytes([byte]) not in known]
    if missing:
        raise where.fail(f"{len(missing)} single bytes are no tokens, the first is {missing[0]}")
