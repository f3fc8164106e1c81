"""What is on the system's clipboard, if it is a picture or a file that was copied.

On Linux wl-paste or xclip is asked, at most a few seconds; elsewhere Pillow asks the system.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from typing import Any

from mmchat.errors import ImageError

SECONDS = 5.0
# What other programs offer a copied picture as, best first.
_KINDS = ("image/png", "image/jpeg", "image/webp", "image/bmp", "image/tiff", "image/gif")
_FILES = "text/uri-list"
# Variable of a desktop, package, how kinds are listed, how one is got; what is preferred first.
_PASTE = ["wl-paste", "--no-newline", "--type"]
_XCLIP = ["xclip", "-selection", "clipboard", "-o", "-t"]
_DESKTOPS = (
    ("WAYLAND_DISPLAY", "wl-clipboard", ["wl-paste", "--list-types"], _PASTE),
    ("DISPLAY", "xclip", [*_XCLIP, "TARGETS"], _XCLIP),
)
NOTHING = "there is no picture on the clipboard; copy one first"


def clipboard() -> bytes | str | Any:
    """The encoded picture, or the path or address of a copied file, or a Pillow picture.

    Raises ImageError if there is none, or no clipboard.
    """
    return _by_pillow() if sys.platform in ("darwin", "win32") else _by_program()


def _by_pillow() -> Any:
    from PIL import ImageGrab

    try:
        found = ImageGrab.grabclipboard()
    except Exception:  # whatever the system's interface raises
        raise ImageError("the clipboard cannot be read here") from None
    if not found:
        raise ImageError(NOTHING)
    return str(found[0]) if isinstance(found, list) else found


def _by_program() -> bytes | str:
    list_kinds, get = _commands()
    offered = _output(list_kinds).decode(errors="replace").split()
    kind = next((kind for kind in _KINDS if kind in offered), None)
    if kind is not None:
        return _output([*get, kind])
    if _FILES in offered:
        lines = _output([*get, _FILES]).decode(errors="replace").splitlines()
        files = [line for line in lines if line.startswith("file:")]
        if files:
            return files[0]
    raise ImageError(NOTHING)


def _commands() -> tuple[list[str], list[str]]:
    """The command that lists what is offered, and the one that fetches a kind put behind it."""
    desktops = [desktop for desktop in _DESKTOPS if os.environ.get(desktop[0])]
    for _, _, list_kinds, get in desktops:
        if shutil.which(get[0]):
            return list_kinds, get
    if desktops:
        package = desktops[0][1]
        raise ImageError(f"the clipboard cannot be read without {package}; install it")
    raise ImageError(
        "there is no desktop here whose clipboard could be read (no DISPLAY or WAYLAND_DISPLAY); "
        "give a file"
    )


def _output(command: list[str]) -> bytes:
    """What a clipboard program prints; nothing if it fails, as it does on an empty clipboard."""
    try:
        done = subprocess.run(  # noqa: S603 - fixed words, found on PATH
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=SECONDS, check=False
        )
    except (subprocess.TimeoutExpired, OSError):
        raise ImageError(
            f"the clipboard did not answer within {SECONDS:g} s; copy the picture again"
        ) from None
    return done.stdout if done.returncode == 0 else b""
