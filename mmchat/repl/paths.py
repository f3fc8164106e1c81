"""Pictures as people name them: dropped, pasted or typed paths and addresses in a line of text.

Terminals insert dropped files bare, quoted, with escaped spaces or as file: addresses, often with a
space behind, several at once. macOS puts U+202F into the names of screenshots.
"""

from __future__ import annotations

import itertools
import re
import shlex
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from mmchat.errors import quoted

# The last ones are not read, but the reason is then given.
EXTENSIONS = frozenset(
    "jpg jpeg jpe png webp gif bmp tif tiff avif heic heif svg jxl jp2 ico psd".split()  # noqa: SIM905
)
CLIPBOARD = "clipboard"
_ADDRESS = re.compile(r"(https?|file)://", re.IGNORECASE)
_DATA = re.compile(r"data:image/", re.IGNORECASE)
_WORD = re.compile(r"""(?:[^ \t\r\n"'\\]|\\.|"(?:\\.|[^"])*"|'[^']*'|["'\\])+""")
_ENTRIES_SEARCHED = 2_000


@dataclass(frozen=True)
class Found:
    """What a line says about pictures.

    sources: paths and addresses to attach. text: the line without them. missing: words that look
    like pictures but are no files. mentioned: names of files that prose only speaks of.
    """

    sources: tuple[str, ...] = ()
    text: str = ""
    missing: tuple[str, ...] = ()
    mentioned: tuple[str, ...] = ()


def read_line(line: str) -> Found:
    """Find the pictures in a message.

    A line of nothing but picture names attaches them. In prose, a path with a folder in it, or an
    address, that ends like a picture is attached too; a bare file name is left alone, unless it is
    a file and comes first. Text of several lines is searched only if it names nothing but files.
    """
    stripped = line.strip()
    alone = _only_names(stripped)
    if alone is not None:
        return alone
    if "\n" in stripped:
        return Found(text=line)
    return _prose(stripped)


def read_argument(argument: str) -> Found:
    r"""Split what follows `\image`: one or more pictures, then a question."""
    rest = argument.strip()
    sources: list[str] = []
    while rest:
        source, rest_after = _leading_source(rest, first=not sources)
        if source is None:
            break
        sources.append(source)
        rest = rest_after
    if sources or not rest:
        return Found(tuple(sources), rest)
    word, rest_after = _first_word(rest)
    return Found((), rest_after, (plain(word),))


def folder_named(line: str) -> str:
    """What to say of a line that is the path of a folder; empty if it is none.

    A bare word is no path: a question may be the name of a folder.
    """
    name = plain(line.strip())
    if "\n" in name or (not _has_folder(name) and not name.endswith("/")):
        return ""
    try:
        path = Path(unquote(re.sub(r"(?i)^file://(localhost)?", "", name))).expanduser()
        return _folder_text(path) if path.is_dir() else ""
    except (OSError, ValueError, RuntimeError):
        return ""


def _folder_text(path: Path) -> str:
    names = (entry.name for entry in itertools.islice(path.iterdir(), _ENTRIES_SEARCHED))
    pictures = sorted(name for name in names if looks_like_picture(name))
    if not pictures:
        return f"{quoted(path)} is a folder without pictures"
    shown = ", ".join(map(quoted, pictures[:5])) + (", …" if len(pictures) > 5 else "")
    first = shlex.quote(str(path / pictures[0]))
    return f"{quoted(path)} is a folder; in it: {shown}; \\image {first} attaches the first"


def existing(name: str) -> Path | None:
    """The file that `name` means, or None; spaces and accents may be coded otherwise."""
    try:
        path = Path(name).expanduser()
        if path.exists():
            return None if path.is_dir() else path
        wanted = _folded(path.name)
        for count, entry in enumerate(path.parent.iterdir()):
            if count > _ENTRIES_SEARCHED:
                return None
            if _folded(entry.name) == wanted:
                return entry
    except (OSError, ValueError, RuntimeError):
        pass
    return None


def plain(word: str) -> str:
    """A word as the shell would read it: quotes and escapes taken off."""
    try:
        parts = shlex.split(word)
    except ValueError:
        return word
    return parts[0] if len(parts) == 1 else word


def looks_like_picture(name: str) -> bool:
    """True if a path or address ends like the name of a picture, whatever its case."""
    if _DATA.match(name):
        return True
    path = urlsplit(name).path if _ADDRESS.match(name) else name
    return path.rpartition(".")[2].lower() in EXTENSIONS and "." in path


def _folded(name: str) -> str:
    """Narrow and no-break spaces as spaces, accents in one form."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFKC", name))


def _only_names(text: str) -> Found | None:
    """The line as nothing but pictures, or None."""
    if not text:
        return Found()
    name = plain(text)
    if "\n" not in text and _is_file_like(name) and (path := existing(name)):
        return Found((str(path),))
    words = [plain(word) for word in _words(text)]
    named = [word for word in words if looks_like_picture(word) or _is_address(word)]
    explicit = [w for w in words if _has_folder(w) and (_file_of(w) or looks_like_picture(w))]
    if len(words) == 1 and _is_address(words[0]):
        return _check(words, "")
    if words and all(word in named or word in explicit for word in words):
        return _check(words, "")
    if "\n" not in text and _has_folder(text) and looks_like_picture(text) and " " in text:
        # Spaces that were not escaped, and no such file: one name, not words of prose.
        starts = [w for w in words if _has_folder(w) or _is_address(w)]
        if len(starts) == 1 and text.startswith(starts[0]) and len(named) == 1:
            return Found(text="", missing=(text,))
    return None


def _prose(text: str) -> Found:
    sources: list[str] = []
    missing: list[str] = []
    mentioned: list[str] = []
    pieces: list[str] = []
    end = 0
    words = list(_WORD.finditer(text))
    for index, match in enumerate(words):
        raw = match[0]
        if match.start() < end:
            continue
        if index == 0 and (whole := _spaced_path(text)):
            sources.append(whole[0])
            end = len(text) - len(whole[1])
            continue
        name = plain(raw.rstrip(",;:!?)."))
        if not looks_like_picture(name):
            continue
        explicit = _has_folder(name) or _is_address(name) or _DATA.match(name)
        file = _file_of(name)
        if explicit and (file or not _is_local(name)):
            sources.append(file or name)
        elif explicit:
            missing.append(name)
            continue
        elif file and index == 0:
            sources.append(file)
        else:
            if file:
                mentioned.append(name)
            continue
        pieces.append(text[end : match.start()])
        edge = index == 0 or index == len(words) - 1
        tail = raw[len(raw.rstrip(",;:!?).")) :]
        pieces.append("" if edge else Path(urlsplit(name).path).name + tail)
        end = match.end()
    pieces.append(text[end:])
    return Found(tuple(sources), "".join(pieces).strip(), tuple(missing), tuple(mentioned))


def _check(words: list[str], text: str) -> Found:
    """Pictures that are there or can be fetched, and those that are not."""
    sources, missing = [], []
    for word in words:
        file = _file_of(word)
        if file or not _is_local(word):
            sources.append(file or word)
        else:
            missing.append(word)
    return Found(tuple(sources), text, tuple(missing))


def _leading_source(text: str, *, first: bool) -> tuple[str | None, str]:
    """The picture that `text` begins with, and what follows; (None, text) if there is none."""
    word, rest = _first_word(text)
    name = plain(word)
    if first and name.lower() == CLIPBOARD:
        return CLIPBOARD, rest
    if _is_address(name) or _DATA.match(name):
        return _file_of(name) or name, rest
    if (first or looks_like_picture(name)) and (file := _file_of(name)):
        return file, rest
    if spaced := _spaced_path(text):
        return spaced
    if first and looks_like_picture(name):
        return name, rest
    return None, text


def _spaced_path(text: str) -> tuple[str, str] | None:
    """A file whose name has bare spaces at the start of `text`: (path, rest), longest first."""
    ends = [match.start() for match in re.finditer(r"\s|$", text) if match.start()]
    for end in reversed(ends[:40]):
        head = text[:end]
        if " " in head and looks_like_picture(head) and (path := existing(head)):
            return str(path), text[end:].strip()
    return None


def _first_word(text: str) -> tuple[str, str]:
    match = _WORD.match(text)
    end = match.end() if match else 0
    return text[:end], text[end:].strip()


def _words(text: str) -> Iterator[str]:
    return (match[0] for match in _WORD.finditer(text))


def _file_of(name: str) -> str | None:
    """The existing file that a path or file: address means."""
    if name.lower().startswith("file://"):
        name = unquote(re.sub(r"(?i)^file://(localhost)?", "", name))
    elif _ADDRESS.match(name) or _DATA.match(name):
        return None
    path = existing(name)
    return str(path) if path else None


def _is_address(name: str) -> bool:
    return bool(_ADDRESS.match(name))


def _is_local(name: str) -> bool:
    return not (re.match(r"https?://", name, re.IGNORECASE) or _DATA.match(name))


def _has_folder(name: str) -> bool:
    return name.startswith(("/", "./", "../", "~/")) or (
        "/" in name and looks_like_picture(name) and not _is_address(name)
    )


def _is_file_like(text: str) -> bool:
    return _has_folder(text) or bool(re.search(r"\w\.\w+$", text))
