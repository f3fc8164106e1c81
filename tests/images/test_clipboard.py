"""Pictures from the clipboard: by programs that behave like wl-paste and xclip."""

import io
import os
import stat

import pytest
from PIL import Image

from mmchat.errors import ImageError
from mmchat.images import clipboard, load_image

# Answers as the real programs do: kinds that nobody offers are an error, but an xclip that owns
# the clipboard itself gives whatever it has for any kind.
PROGRAM = """#!/bin/sh
echo "$@" >> {folder}/asked
case "$*" in
  *list-types*|*TARGETS*) {wait} cat {folder}/kinds 2>/dev/null || exit 1 ;;
  *) for kind; do :; done
     file={folder}/$(echo "$kind" | tr / _)
     [ -e "$file" ] || {{ echo "Error: target $kind not available" >&2; exit 1; }}
     cat "$file" ;;
esac
"""


class Desktop:
    """A clipboard with a program that reads it."""

    def __init__(self, folder, monkeypatch) -> None:
        self.folder = folder
        self._patch = monkeypatch
        for name in ("DISPLAY", "WAYLAND_DISPLAY"):
            monkeypatch.delenv(name, raising=False)

    def has(self, program: str, variable: str, *, wait: str = "") -> None:
        path = self.folder / program
        path.write_text(PROGRAM.format(folder=self.folder, wait=wait))
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        self._patch.setenv("PATH", f"{self.folder}{os.pathsep}/usr/bin:/bin")
        self._patch.setenv(variable, ":9")

    def holds(self, **kinds: bytes) -> None:
        (self.folder / "kinds").write_text("".join(k.replace("_", "/") + "\n" for k in kinds))
        for kind, data in kinds.items():
            (self.folder / kind.replace("uri/", "uri-")).write_bytes(data)


def copied():
    """The picture as the chat takes it."""
    found = clipboard.clipboard()
    return load_image(found, name=None if isinstance(found, str) else "clipboard")


@pytest.fixture
def desktop(tmp_path, monkeypatch):
    return Desktop(tmp_path, monkeypatch)


def png(color: tuple[int, int, int]) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (30, 20), color).save(buffer, "PNG")
    return buffer.getvalue()


PROGRAMS = [("wl-paste", "WAYLAND_DISPLAY"), ("xclip", "DISPLAY")]


@pytest.mark.process
@pytest.mark.parametrize(("program", "variable"), PROGRAMS)
def test_a_copied_picture_is_read(desktop, program, variable):
    desktop.has(program, variable)
    desktop.holds(text_html=b"<img>", image_png=png((200, 0, 0)))
    image = copied()
    assert (image.source, image.width, image.height) == ("clipboard", 30, 20)
    assert image.pixels.getpixel((0, 0)) == (200, 0, 0)
    assert (desktop.folder / "asked").read_text().splitlines()[-1].endswith("image/png")


@pytest.mark.process
@pytest.mark.parametrize(("program", "variable"), PROGRAMS)
def test_a_copied_file_is_read(desktop, program, variable):
    desktop.has(program, variable)
    (desktop.folder / "my dog.png").write_bytes(png((0, 200, 0)))
    desktop.holds(**{"text_uri-list": f"file://{desktop.folder}/my%20dog.png\r\n".encode()})
    assert copied().pixels.getpixel((0, 0)) == (0, 200, 0)


@pytest.mark.process
@pytest.mark.parametrize(("program", "variable"), PROGRAMS)
@pytest.mark.parametrize("kinds", [{}, {"TEXT": b"hello"}, {"text_uri-list": b"https://x/a\n"}])
def test_text_or_nothing_is_no_picture(desktop, program, variable, kinds):
    desktop.has(program, variable)
    if kinds:
        desktop.holds(**kinds)
    with pytest.raises(ImageError, match=r"^there is no picture on the clipboard; copy one first$"):
        copied()


@pytest.mark.process
def test_a_damaged_picture_is_named(desktop):
    desktop.has("xclip", "DISPLAY")
    desktop.holds(image_png=png((1, 2, 3))[:40])
    with pytest.raises(ImageError, match=r"^'clipboard' "):
        copied()


@pytest.mark.process
def test_a_clipboard_that_does_not_answer_is_given_up(desktop, monkeypatch):
    desktop.has("xclip", "DISPLAY", wait="exec sleep 60;")
    monkeypatch.setattr(clipboard, "SECONDS", 0.3)
    with pytest.raises(ImageError, match=r"did not answer within 0\.3 s"):
        copied()


@pytest.mark.parametrize(
    ("variable", "message"),
    [
        ("WAYLAND_DISPLAY", "the clipboard cannot be read without wl-clipboard; install it"),
        ("DISPLAY", "the clipboard cannot be read without xclip; install it"),
        (None, "there is no desktop here whose clipboard could be read"),
    ],
)
def test_what_is_missing_is_named(desktop, monkeypatch, variable, message):
    monkeypatch.setenv("PATH", str(desktop.folder))
    if variable:
        monkeypatch.setenv(variable, ":9")
    with pytest.raises(ImageError) as caught:
        copied()
    assert str(caught.value).startswith(message)
