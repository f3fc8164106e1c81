"""What is text and what is not, in bytes from outside."""

import io
import os
import threading

import pytest

from mmchat import limits
from mmchat.errors import PromptError
from mmchat.input_text import NotTextError, checked, decoded, lines


@pytest.mark.parametrize("text", ["", "a", "\ufeffa", "é 犬 🐶", "a\x1b[1m\t\r\nb"])
def test_utf8_is_text_with_or_without_a_mark(text):
    assert decoded(text.encode(), "x") == text.removeprefix("\ufeff")
    assert checked(text, "x") == text.removeprefix("\ufeff")


def test_a_beginning_may_end_within_a_character():
    assert decoded("aé".encode()[:-1], "x", whole=False) == "a"
    with pytest.raises(NotTextError):
        decoded("aé".encode()[:-1], "x")


def test_lines_come_as_they_are_written():
    inner, outer = os.pipe()
    with os.fdopen(inner, "rb") as stream, os.fdopen(outer, "wb", 0) as writer:
        writer.write("\ufeffé\r\n".encode())
        found = lines(stream, "it")
        assert next(found) == "é"
        threading.Timer(0.05, lambda: (writer.write(b"b"), writer.close())).start()
        assert list(found) == ["b"]


def test_a_file_that_is_no_text_further_on_gives_no_line():
    stream = io.BufferedReader(io.BytesIO(b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n"))  # type: ignore[arg-type]
    with pytest.raises(NotTextError, match=r"it is not UTF-8 text \(byte 0xe2 at 10\)"):
        next(lines(stream, "it"))


def test_a_line_without_end_is_refused(monkeypatch):
    monkeypatch.setattr(limits, "PROMPT_BYTES", limits.MIB)
    found = lines(io.BytesIO(b"a\n" + b"b" * (limits.MIB + 1)), "it")
    assert next(found) == "a"
    with pytest.raises(PromptError, match="line 2 of it is longer than 1 MiB"):
        next(found)


def test_one_end_of_file_is_enough():
    class Terminal(io.RawIOBase):
        """Says once that the input ends, as Ctrl-D does, and then waits for more."""

        ends = 0

        def readable(self):
            return True

        def readinto(self, _):
            self.ends += 1
            return 0

    terminal = Terminal()
    assert list(lines(io.BufferedReader(terminal), "stdin")) == []
    assert terminal.ends == 1
