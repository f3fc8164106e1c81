"""Where the bytes of a picture come from: a file, an address, a `data:` URL, bytes or a stream.

Decides by the form of what was given, reads at most `limits.IMAGE_BYTES`, decodes nothing.
"""

from __future__ import annotations

import base64
import errno
import io
import itertools
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO
from urllib.parse import unquote, unquote_to_bytes, urlsplit

from mmchat import limits
from mmchat.errors import ImageError, UsageError, quoted
from mmchat.images.formats import PAGED, explain_foreign, picture_format
from mmchat.images.pages import HOW, split_pages
from mmchat.spelling import closest

Source = str | os.PathLike[str] | bytes | bytearray | memoryview | BinaryIO

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):")
_ENTRIES_SEARCHED = 2_000  # of a folder, for a name like the one that is missing
_URL_LETTERS = bytes.maketrans(b"-_", b"+/")
_DATA_KINDS = ("application/octet-stream", "application/pdf")
_REASONS = {
    errno.ENAMETOOLONG: "the name is too long",
    errno.ELOOP: "its links go round in a circle",
    errno.EIO: "the disk reports an error",
}


@dataclass(frozen=True)
class Encoded:
    """A picture file in memory. name: what the user called it, unescaped, for display.

    pages: those that were asked for of a document, as in `paper.pdf#3-5`. page: the one that this
    is, from 1; None: the first, and what is left out is said. document: one object for all pages of
    a document, whose bytes go to the decoder once; None for other pictures.
    """

    data: bytes
    name: str
    pages: str = ""
    page: int | None = None
    document: object = None


def read_source(source: Source, *, name: str | None = None, allow_fetch: bool = True) -> Encoded:
    """Read the bytes of a picture, whatever it was given as.

    Strings that start with `data:`, `http:`, `https:` or `file:` are addresses, all others paths;
    `~` is expanded. name: overrides the name shown. Raises ImageError, and NetworkError from a
    fetch; UsageError if `source` is nothing of the kind.
    """
    if isinstance(source, bytes | bytearray | memoryview):
        return Encoded(_capped(bytes(source), name or "bytes"), name or "bytes")
    if isinstance(source, str):
        try:
            return _read_text(source, name, allow_fetch)
        except ValueError:  # of Python's own reading of addresses: stray bytes, half a bracket
            raise ImageError(f"{quoted(source)} is not a valid address") from None
    if isinstance(source, os.PathLike):
        try:
            path = Path(source)
        except TypeError:  # of an object that gives bytes, or anything else
            raise UsageError(f"{type(source).__name__} gives no path as text") from None
        return _read_path(str(path), name or str(path))
    if hasattr(source, "read"):
        return Encoded(_read_stream(source, name or "stream"), name or "stream")
    each = "; give each of them by itself" if isinstance(source, list | tuple) else ""
    raise UsageError(
        "a picture comes from a path, an address, bytes, a file opened for reading, Pillow, numpy"
        f" or torch, not from {type(source).__name__} {quoted(source)}{each}"
    )


def _read_text(text: str, name: str | None, allow_fetch: bool) -> Encoded:
    found = _SCHEME.match(text)
    scheme = found[1].lower() if found else ""
    if scheme == "data":
        return Encoded(_read_data_url(text), name or "data: URL")
    if scheme in ("http", "https"):
        if not allow_fetch:
            raise ImageError("pictures from the network are switched off; give a file")
        from mmchat.images.web import fetch

        data = fetch(text)
        place, pages = split_pages(text)
        if pages and picture_format(data) in PAGED:  # else it is a place in the picture
            return Encoded(data, name or place, pages)
        return Encoded(data, name or text)
    if scheme == "file":
        path = str(_file_url_path(text))
        return _read_path(path, name or path)
    if "://" in text[:32] and found:
        raise ImageError(
            f"{quoted(text)} cannot be opened: addresses start with http: or https:; "
            "download the picture and give the file"
        )
    if not text:
        raise ImageError("the name of the picture is empty; give a file or an address")
    return _read_path(text, name or text)


def _read_path(path: str, name: str) -> Encoded:
    """A file, or pages of one: what is there by its whole name has no pages behind it."""
    file, pages = split_pages(path)
    if not pages or _is_there(path):
        return Encoded(_read_file(Path(path)), name)
    return Encoded(_read_file(Path(file)), file if name == path else name, pages)


def _is_there(path: str) -> bool:
    try:
        return os.path.lexists(Path(path).expanduser())
    except (OSError, ValueError, RuntimeError):
        return False


def _file_url_path(url: str) -> Path:
    parts = urlsplit(url)
    if parts.netloc not in ("", "localhost"):
        raise ImageError(f"{quoted(url)} names another computer; file: works for this one only")
    path = unquote(url[len("file:") :].removeprefix("//" + parts.netloc))
    if not path.startswith("/"):
        raise ImageError(f"{quoted(url)} names no file; write file:///folder/picture.png")
    return Path(path)


def _read_file(path: Path) -> bytes:
    """Read a file, or a pipe such as a shell's `<(…)`. Raises ImageError with the reason."""
    shown = quoted(path)
    try:
        path = path.expanduser()
        # Opening a pipe would wait for its writer: O_NONBLOCK, then look at what was opened.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise ImageError(f"{shown} does not exist{_suggestion(path)}") from None
    except NotADirectoryError:
        raise ImageError(f"{shown} does not exist: a part of the path is no folder") from None
    except PermissionError:
        raise ImageError(f"{shown} may not be read: permission denied") from None
    except (OSError, ValueError, RuntimeError) as problem:  # RuntimeError: no such ~user
        reason = _REASONS.get(getattr(problem, "errno", None) or 0, "it is no usable file name")
        raise ImageError(f"{shown} cannot be opened: {reason}") from None
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode) or stat.S_ISFIFO(mode):
        os.set_blocking(descriptor, True)  # a pipe that nobody writes to ends at once all the same
        with os.fdopen(descriptor, "rb") as file:
            return _read_stream(file, str(path))
    os.close(descriptor)
    if stat.S_ISDIR(mode):
        raise ImageError(f"{shown} is a folder; give a picture file")
    raise ImageError(f"{shown} is a device, not a file; give a picture file")


def file_of(source: str) -> Path | None:
    """The file that a text names as a picture; None for an address.

    Raises ImageError, ValueError or RuntimeError if it can be none.
    """
    found = _SCHEME.match(source)
    scheme = found[1].lower() if found else ""
    if scheme in ("data", "http", "https"):
        return None
    path = str(_file_url_path(source)) if scheme == "file" else source
    return Path(path if _is_there(path) else split_pages(path)[0]).expanduser()


def check_file(source: str) -> None:
    """Raise ImageError if a path or `file:` address is no picture by its first bytes.

    Nothing is asked of the network, and no pipe is read, which cannot be read again.
    """
    try:
        file = file_of(source)
        if file is None or stat.S_ISFIFO(file.stat().st_mode):
            return
    except (OSError, ValueError, RuntimeError, ImageError):  # reading it says why
        pass
    encoded = read_source(source)
    kind = picture_format(encoded.data)
    if kind is None:
        raise ImageError(f"{quoted(encoded.name)} {explain_foreign(encoded.data)}")
    check_paged(encoded, kind)


def check_paged(encoded: Encoded, kind: str) -> None:
    """Raise ImageError if pages are asked for of what has none. kind: its format."""
    if encoded.pages and kind not in PAGED:
        pages = quoted("#" + encoded.pages)
        raise ImageError(
            f"{quoted(encoded.name)} is a picture ({kind}) without pages; omit {pages}"
        )


def holds_picture(path: Path) -> bool:
    """Whether a file begins like a picture, whatever its name."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError):
        return False
    with os.fdopen(descriptor, "rb") as file:
        try:
            is_file = stat.S_ISREG(os.fstat(descriptor).st_mode)
            return is_file and picture_format(file.read(512)) is not None
        except OSError:  # of a disk that fails, and of what only looks like a file
            return False


def _suggestion(path: Path) -> str:
    """`; is it 'x.png'?` with the name in the same folder that is most like the missing one."""
    file, mark, _ = str(path).rpartition("#")
    if mark and _is_there(file):
        return f"; {HOW}"
    try:
        with os.scandir(path.parent) as entries:
            names = [entry.name for entry in itertools.islice(entries, _ENTRIES_SEARCHED)]
    except FileNotFoundError:
        return f": there is no folder {quoted(path.parent)}"
    except (OSError, ValueError):
        return ""
    if path.name in names:
        return ": it is a link that leads nowhere"
    close = closest(path.name, names, cutoff=0.6)
    return f"; is it {quoted(path.parent / close[0])}?" if close else ""


def _read_stream(stream: BinaryIO, name: str) -> bytes:
    """Read a stream to its end, or to the cap; it need not be seekable."""
    chunks, size = [], 0
    try:
        while chunk := stream.read(limits.MIB):
            if not isinstance(chunk, bytes | bytearray | memoryview):
                raise UsageError(f"{quoted(name)} gives text, not bytes; open it with mode 'rb'")
            chunks.append(chunk)
            size += len(chunk)
            if size > limits.IMAGE_BYTES:
                raise _too_large(name)
    except UnicodeDecodeError:
        raise UsageError(f"{quoted(name)} is opened as text; open it with mode 'rb'") from None
    except (OSError, ValueError) as problem:  # ValueError: closed
        is_closed = getattr(stream, "closed", False)
        reason = "it is closed" if is_closed else "the device reports an error"
        if isinstance(problem, io.UnsupportedOperation):
            reason = "it is not opened for reading"
        raise ImageError(f"{quoted(name)} cannot be read: {reason}") from None
    return b"".join(chunks)


def _read_data_url(url: str) -> bytes:
    """The bytes inside a `data:` URL; its size is checked before it is decoded."""
    head, comma, body = url.partition(",")
    kind, *parameters = head[len("data:") :].lower().split(";")
    if not comma:
        raise ImageError("the data: URL has no comma; write data:image/png;base64,…")
    if kind and not (kind.startswith("image/") or kind in _DATA_KINDS):
        raise ImageError(f"the data: URL holds {quoted(kind)}, not a picture")
    is_base64 = "base64" in (parameter.strip() for parameter in parameters)
    if not is_base64:
        if len(body) - 2 * body.count("%") > limits.IMAGE_BYTES:
            raise _too_large("data: URL")
        return _capped(unquote_to_bytes(body), "data: URL")
    return _capped(_decode_base64(unquote_to_bytes(body)), "data: URL")


def _decode_base64(text: bytes) -> bytes:
    """Decode base64 as browsers do: white space and padding may stand there or not.

    The letters of URLs (`-_`) are taken as well. Raises ImageError.
    """
    letters = text.translate(_URL_LETTERS, delete=b" \t\n\r\f")
    if len(letters) > limits.IMAGE_BYTES * 4 / 3 + 4:
        raise _too_large("data: URL")
    if len(letters) % 4 == 0:
        letters = letters.removesuffix(b"=").removesuffix(b"=")
    try:
        if b"=" in letters:
            raise ValueError
        return base64.b64decode(letters + b"=" * (-len(letters) % 4), validate=True)
    except ValueError:
        raise ImageError("the data: URL is not valid base64; was it cut short?") from None


def _capped(data: bytes, name: str) -> bytes:
    if len(data) > limits.IMAGE_BYTES:
        raise _too_large(name)
    return data


def _too_large(name: str) -> ImageError:
    size = limits.IMAGE_BYTES / limits.MIB
    return ImageError(f"{quoted(name)} is larger than {size:g} MiB; save it smaller")
