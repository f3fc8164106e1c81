"""Llama 2's tokenizer.model: a SentencePiece model, run by its own library.

The file is a stranger's, so its fields are read here first (protobuf, of which only the skeleton is
needed), and only byte pair encoding that leaves text as it is reaches the library.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmchat import limits
from mmchat.errors import CheckpointError, quoted
from mmchat.strict_json import Where, read_bounded
from mmchat.tokenizers.base import Tokenizer

SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # how pieces write a space

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_BPE = 2
# A second normalizer_spec is merged into the first: add_dummy_prefix (field 3) becomes false.
_NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"
Field = tuple[int, int | bytes]  # its number and value


class SentencePieceTokenizer(Tokenizer):
    """Special tokens stand among the others, and no image token behind them.

    Text begins with a space that it does not have, as in training: `encode` adds it, `encode_rest`
    does not. Encoding two parts by themselves is not encoding them together.
    """

    def __init__(self, model: bytes, tokens: Sequence[bytes], specials: Mapping[str, int]) -> None:
        from sentencepiece import SentencePieceProcessor

        super().__init__(tokens, specials)
        self._special_bytes = {i: tokens[i] for i in specials.values()}  # and no image token
        self._whole: Any = SentencePieceProcessor(model_proto=model)
        self._rest: Any = SentencePieceProcessor(model_proto=model + _NO_DUMMY_PREFIX)

    def _ids(self, text: str) -> list[int]:
        """Ids of a text that begins anew; those of an empty one are none."""
        return self._whole.encode(text)

    def encode_rest(self, text: str) -> list[int]:
        """Ids of a text that goes on where another ended, such as after the end of an answer."""
        return self._encoded(text, self._rest.encode)


def open_sentencepiece_file(path: Path) -> SentencePieceTokenizer:
    """Read a tokenizer.model. Raises CheckpointError."""
    where = Where(str(path), error=CheckpointError)
    data = read_bounded(path, limits.TOKENIZER_MODEL_BYTES, where)
    tokens, specials = parse_sentencepiece(data, where)
    try:
        opened = SentencePieceTokenizer(data, tokens, specials)
    except (RuntimeError, ValueError, OSError) as error:
        raise where.fail(f"the sentencepiece library refuses it: {quoted(str(error))}") from None
    if opened._whole.vocab_size() != len(tokens):
        raise where.fail("the sentencepiece library finds other pieces in it; download it again")
    return opened


def parse_sentencepiece(data: bytes, where: Where) -> tuple[list[bytes], dict[str, int]]:
    """The bytes of each piece, and the ids of special ones by name. Raises where's error."""
    pieces: list[tuple[str, int]] = []
    settings: dict[int, list[Field]] = {2: [], 3: [], 5: []}
    try:
        for number, value in _fields(data):
            if number == 1:
                pieces.append(_piece(value))
                if len(pieces) > limits.VOCABULARY_ENTRIES:
                    most = f"{limits.VOCABULARY_ENTRIES:,}"
                    raise where.fail(f"more than {most} pieces; no more are read")
            elif number in settings:
                settings[number] += _fields(value)
            elif number != 4:  # self-test data
                raise ValueError(f"a field of number {number}")
    except ValueError as error:
        raise where.fail(
            f"is damaged or not a SentencePiece model ({quoted(str(error))}); download it again"
        ) from None
    _check_settings(settings, where)
    return _tokens(pieces, where)


def _check_settings(settings: Mapping[int, list[Field]], where: Where) -> None:
    """Only what Llama 2 has: byte pairs with bytes for the rest, and text as it is."""
    trainer, normalizer, denormalizer = (dict(settings[number]) for number in (2, 3, 5))
    if trainer.get(3, 1) != _BPE or trainer.get(35, 0) != 1:
        raise where.fail("not byte pair encoding with bytes for unknown letters, as Llama 2 has it")
    if normalizer.get(2) or denormalizer.get(2):
        raise where.fail("rewrites text before it is encoded; Llama 2's leaves it as it is")
    if (normalizer.get(3, 1), normalizer.get(4, 1), normalizer.get(5, 1)) != (1, 0, 1):
        raise where.fail("treats spaces otherwise than Llama 2")


def _tokens(pieces: Sequence[tuple[str, int]], where: Where) -> tuple[list[bytes], dict[str, int]]:
    names, kinds = [name for name, _ in pieces], [kind for _, kind in pieces]
    if names[:3] != ["<unk>", "<s>", "</s>"] or kinds[:3] != [_UNKNOWN, _CONTROL, _CONTROL]:
        raise where.fail(f"expected <unk>, <s> and </s> as its first pieces, found {names[:3]}")
    if len(set(names)) < len(names):
        raise where.fail("a piece is there twice")
    tokens: list[bytes] = []
    specials: dict[str, int] = {}
    found = set()
    for token_id, (name, kind) in enumerate(pieces):
        if kind == _BYTE:
            value = _byte(name, where)
            found.add(value)
            tokens.append(bytes([value]))
        elif kind in (_UNKNOWN, _CONTROL):
            specials[name] = token_id
            tokens.append(name.encode())
        elif kind in (_NORMAL, _USER_DEFINED, _UNUSED) and name:
            tokens.append(name.replace(SPACE, " ").encode())
        else:
            raise where.fail(f"piece {token_id} is of an unknown kind, or empty")
        if len(tokens[-1]) > limits.BYTES_PER_TOKEN:
            most = limits.BYTES_PER_TOKEN
            raise where.fail(f"piece {token_id} has {len(tokens[-1])} bytes; at most {most}")
    if len(found) < 256:
        raise where.fail(f"{256 - len(found)} single bytes are no pieces")
    return tokens, specials


def _byte(name: str, where: Where) -> int:
    """`<0x0A>` is 10."""
    found = re.fullmatch("<0x([0-9A-Fa-f]{2})>", name)
    if not found:
        raise where.fail(f"{quoted(name)} is not the name of a byte")
    return int(found[1], 16)


def _piece(data: int | bytes) -> tuple[str, int]:
    """Text and kind."""
    found = dict(_fields(data))
    name, kind = found.get(1, b""), found.get(3, _NORMAL)
    if not isinstance(name, bytes) or not isinstance(kind, int):
        raise ValueError("a piece without a text")
    return name.decode(), kind


def _fields(data: int | bytes) -> Iterator[Field]:
    """The fields of a protobuf message, in order. Raises ValueError for what is none."""
    if not isinstance(data, bytes):
        raise ValueError("a number where a message is expected")
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        number, kind = tag >> 3, tag & 7
        if kind == 0:
            value, at = _varint(data, at)
            yield number, value
            continue
        if kind == 2:
            size, at = _varint(data, at)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise ValueError(f"a field of kind {kind}")
        if at + size > len(data):
            raise ValueError("cut off")
        yield number, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A number of at most 64 bits, and where it ends."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            raise ValueError("cut off")
        byte = data[at]
        value, at = value | (byte & 127) << shift, at + 1
        if byte < 128:
            return value, at
    raise ValueError("a number of more than 64 bits")
