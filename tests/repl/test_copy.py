"""`\\copy`: the last answer on the clipboard, whichever way there is."""

import base64
import os
import re
import stat
import sys

import pytest

from mmchat.cli.console import buffer_console
from mmchat.errors import UsageError
from mmchat.repl.screen import PlainScreen
from mmchat.repl.terminal_screen import OSC_52_BYTES, TerminalScreen
from mmchat.repl.thumbnail import Thumbnails

HOSTILE = "A dog.\x1b]0;title\x07 \x9b31m犬 rm -rf\x00\n"
HARMLESS = "A dog.␛ ␛犬 rm -rf\n"


@pytest.fixture
def screen(monkeypatch):
    for name in ("SSH_CONNECTION", "DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    written = []
    screen = TerminalScreen(written.append, buffer_console, Thumbnails(), color=False)
    return screen, written


def no_clipboard(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "pyperclip", None)


def test_without_a_clipboard_the_terminal_is_told_to_copy(screen, monkeypatch):
    screen, written = screen
    no_clipboard(monkeypatch)
    assert screen.copy(HOSTILE) == "through the terminal, if it allows that"
    [sequence] = written
    found = re.fullmatch(r"\x1b\]52;c;([A-Za-z0-9+/=]+)\x07", sequence)
    assert found is not None
    assert base64.b64decode(found[1]).decode() == HARMLESS


def test_over_ssh_the_clipboard_of_the_other_machine_is_not_used(screen, monkeypatch):
    screen, written = screen
    monkeypatch.setenv("SSH_CONNECTION", "1.2.3.4 5 6.7.8.9 22")
    monkeypatch.setitem(sys.modules, "pyperclip", pytest)  # its use would raise AttributeError
    assert screen.copy("x").startswith("through the terminal")
    assert written == ["\x1b]52;c;eA==\x07"]


def test_what_a_terminal_would_drop_is_said(screen, monkeypatch):
    screen, written = screen
    no_clipboard(monkeypatch)
    with pytest.raises(UsageError, match="too long for the terminal's clipboard"):
        screen.copy("x" * OSC_52_BYTES)
    assert written == []


def test_a_script_gets_the_reason(monkeypatch):
    no_clipboard(monkeypatch)
    plain = PlainScreen(lambda text: None, lambda text: None)
    with pytest.raises(UsageError, match=r"pip install 'mmchat\[clipboard\]'"):
        plain.copy("x")


@pytest.mark.process
def test_a_clipboard_program_gets_the_text(screen, monkeypatch, tmp_path):
    pyperclip = pytest.importorskip("pyperclip")
    program = tmp_path / "xclip"
    program.write_text(f"#!/bin/sh\ncat > {tmp_path}/copied\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}/usr/bin:/bin")
    monkeypatch.setenv("DISPLAY", ":9")
    monkeypatch.setattr(pyperclip, "copy", pyperclip.init_xclip_clipboard()[0])
    screen, written = screen
    assert screen.copy(HOSTILE) == "to the clipboard"
    assert written == []
    assert (tmp_path / "copied").read_text() == HARMLESS
