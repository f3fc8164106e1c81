"""Text from outside: bytes of a pipe, arguments, typed lines. What is no UTF-8 text is refused."""

from __future__ import annotations

import codecs
import io
from collections.abc import Callable, Iterator
from typing import BinaryIO

from mmchat import limits
from mmchat.errors import PromptError

_UTF16 = codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE
_CONVERT = "save it as UTF-8"
_FIRST_BYTES = 8192  # what is looked at, whatever Python buffers


class NotTextError(PromptError):
    """Bytes that are no UTF-8 text. data: the bytes."""

    def __init__(self, message: str, data: bytes) -> None:
        super().__init__(message)
        self.data = data


def decoded(data: bytes, name: str, *, whole: bool = True) -> str:
    """The text of UTF-8 bytes, without a byte order mark.

    name: of the bytes, in messages. whole: False if they may end within a character. Raises
    NotTextError, also for NUL bytes.
    """
    try:
        text = codecs.getincrementaldecoder("utf-8-sig")().decode(data, whole)
    except UnicodeDecodeError as error:
        place = f"byte {data[error.start]:#04x} at {error.start}"
        kind = "UTF-16, not UTF-8 text" if data.startswith(_UTF16) else f"not UTF-8 text ({place})"
        raise NotTextError(f"{name} is {kind}; {_CONVERT}", data) from None
    if "\0" in text:
        place = data.index(b"\0")
        raise NotTextError(f"{name} is not text (byte 0x00 at {place}); {_CONVERT}", data)
    return text


def checked(text: str, name: str) -> str:
    """`text` of an argument or a terminal, without a byte order mark.

    Raises NotTextError for bytes that were no UTF-8, which Python keeps as surrogates.
    """
    return decoded(text.encode("utf-8", "surrogateescape"), name)


def lines(
    stream: BinaryIO, name: str, check: Callable[[bytes], None] = lambda _: None
) -> Iterator[str]:
    """Each line as soon as it is there, without its end or a byte order mark.

    The first bytes that come are looked at before any line is given, so that a file that is no text
    gives none. check: refuses more of them, by an error of its own. Raises NotTextError,
    PromptError for a line over the limit or a stream without data.
    """
    number, most = 1, limits.PROMPT_BYTES
    mib = most // limits.MIB
    try:
        if not isinstance(stream, io.BufferedReader):  # bytes in memory
            stream = io.BufferedReader(stream)  # type: ignore[arg-type]
        first = stream.peek(1)[:_FIRST_BYTES]
        if not first:  # the end, which a terminal tells once
            return
        decoded(first, name, whole=False)
        check(first)
        while line := stream.readline(most + 1):
            if len(line) > most:
                raise PromptError(f"line {number} of {name} is longer than {mib} MiB")
            yield decoded(line, f"line {number} of {name}").rstrip("\r\n")
            number += 1
    except OSError as error:
        raise PromptError(f"{name} cannot be read: {error.strerror or error}") from None
