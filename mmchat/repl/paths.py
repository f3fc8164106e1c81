"""Pictures as people name them: dropped, pasted or typed paths and addresses in a text.

Terminals insert dropped files bare, quoted, with escaped spaces or as file: addresses, often with a
space behind, several at once. macOS puts U+202F into the names of screenshots. Each step is linear
in the length of the text, and the disk is asked a bounded number of times.
"""

from __future__ import annotations

import itertools
import re
import shlex
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal
from urllib.parse import unquote

from mmchat.errors import quoted
from mmchat.terminal import one_line
from mmchat.words import PICTURE_ENDINGS

CLIPBOARD = "clipboard"
_ADDRESS = re.compile(r"(https?|file)://", re.IGNORECASE)
_DATA = re.compile(r"data:(image/|application/pdf[;,])", re.IGNORECASE)
_DRIVE = re.compile(r"[A-Za-z]:\\")  # of Windows
# Not \s: names of files hold no-break spaces.
_BARE = re.compile(r"(?:[^ \t\r\n\\]++|\\.|\\$)++", re.DOTALL)
_PIECE = re.compile(
    r"""[^ \t\r\n"'\\]++|\\.|\\$|"(?:[^"\\]++|\\.)*+"|'[^']*+'""", re.DOTALL
)  # of a word as a shell reads it; shlex joins its characters, in time that grows with the square
_QUOTED = re.compile(f"(?:{_PIECE.pattern})++", re.DOTALL)
_OPENING, _CLOSING = "([{<\"'", "\"'.,;:!?)]}>"
_BESIDE = " \t\n,;:\"'()[]{}<>"  # between pictures that stand together
_SENTENCE_ENDS = ("?", "!", ".", ":", "…", "？", "。", "！")
_ENDINGS = tuple(f".{ending}" for ending in PICTURE_ENDINGS)
_ENTRIES_SEARCHED = 2_000
_LOOKS = 400  # questions to the disk about one text
_PATH_CHARACTERS = 4_096
_WORDS_IN_NAME = 12  # of a name with bare spaces

Kind = Literal["word", "source", "missing", "mentioned", "file"]


@dataclass(frozen=True)
class Found:
    """What a text says about pictures.

    sources: paths and addresses to attach. text: the question; of a path in it the name is left.
    missing: paths that end like pictures but are no files. mentioned: other words that seem to name
    pictures and are not attached.
    """

    sources: tuple[str, ...] = ()
    text: str = ""
    missing: tuple[str, ...] = ()
    mentioned: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Name:
    """Words that name a picture, or seem to; kind "file": something else that is there.

    name: without quotes and escapes, and without punctuation around it.
    """

    start: int
    end: int
    name: str
    kind: Kind = "word"
    words: int = 1


@dataclass
class _Disk:
    """Answers a bounded number of questions about files."""

    looks: int = _LOOKS
    listings: dict[Path, dict[str, Path]] = field(default_factory=dict)

    def file(self, name: str) -> str | None:
        """The file that a path or file: address means."""
        self.looks -= 1
        if self.looks < 0 or len(name) > _PATH_CHARACTERS:
            return None
        path = existing(name, self.listings)
        return str(path) if path else None


def read_line(line: str) -> Found:
    """Find the pictures in a message.

    What names a picture that is there is attached wherever it stands; so is an address that ends
    like a picture, or comes first. A path that ends like a picture and is none is missing; in a
    text of several lines it is only mentioned.
    """
    text = line.strip()
    disk = _Disk()
    if "\n" not in text and _is_file_like(name := plain(text)) and (file := disk.file(name)):
        return Found((file,))
    words = _words(text)
    names = _names(text, words, disk)
    if sum(name.words for name in names) == len(words):
        return Found(_of(names, "source", "file"), "", _of(names, "missing", "mentioned"))
    sources = _of(names, "source")
    question = _question(text, names) if sources else line
    if "\n" in text:
        return Found(sources, question, (), _of(names, "missing", "mentioned"))
    return Found(sources, question, _of(names, "missing"), _of(names, "mentioned"))


def read_argument(argument: str) -> Found:
    r"""Split what follows `\image`: one or more pictures, then a question."""
    text = argument.strip()
    disk = _Disk()
    words = _words(text)
    if not words:
        return Found()
    names = _names(text, words, disk)
    if not (names and names[0].start == words[0].start and names[0].kind == "source"):
        first = words[0]
        if first.name.lower() == CLIPBOARD:
            source = CLIPBOARD
        else:
            source = disk.file(first.name) or (looks_like_picture(first.name) and first.name)
        if not source:
            return Found((), text[first.end :].strip(), (first.name,))
        names = [name for name in names if name.start > first.start]
        names.insert(0, _Name(first.start, first.end, source, "source"))
    missing, mentioned = _of(names, "missing"), _of(names, "mentioned")
    return Found(_of(names, "source"), _question(text, names), missing, mentioned)


def _of(names: list[_Name], *kinds: Kind) -> tuple[str, ...]:
    return tuple(name.name for name in names if name.kind in kinds)


def _question(text: str, names: list[_Name]) -> str:
    """The text without its pictures, if they all stand before it; else with the name of each.

    A sentence that has ended may stand before them, too.
    """
    sources = [name for name in names if name.kind == "source"]
    bounds = [0, *(at for name in sources for at in (name.start, name.end)), len(text)]
    pieces = [text[start:end] for start, end in zip(bounds[::2], bounds[1::2], strict=True)]
    if not any(piece.strip(_BESIDE) for piece in pieces[:-1]):
        return pieces[-1].lstrip(" \t\n,;:\"')]}>")
    before = pieces[0].rstrip(" \t\n\"'([{<")
    if before.endswith(_SENTENCE_ENDS) and not any(piece.strip(_BESIDE) for piece in pieces[1:]):
        return before
    shown = [*(short_name(name.name) for name in sources), ""]
    return "".join(itertools.chain(*zip(pieces, shown, strict=True)))


def _words(text: str) -> list[_Name]:
    """The words; where one begins with a quote, as a shell reads it, if that is a path."""
    words: list[_Name] = []
    at, quotes_from = 0, 0
    while bare := _BARE.search(text, at):
        at = bare.start()
        if at >= quotes_from and text[at] in "\"'" and (shell := _QUOTED.match(text, at)):
            raw = shell[0].rstrip(",;:!?.)")
            name = plain(raw)
            if looks_like_picture(name) or _has_folder(name):
                words.append(_Name(at, at + len(raw), name))
                at = shell.end()
                continue
            quotes_from = shell.end()
        core = bare[0].lstrip(_OPENING)
        at = bare.end()
        start = at - len(core)
        for piece in _listed(core.rstrip(_CLOSING)):
            name = piece if _DRIVE.match(piece) else re.sub(r"\\(.)", r"\1", piece, flags=re.DOTALL)
            words.append(_Name(start, start + len(piece), name))
            start += len(piece) + 1
    return words


def _listed(word: str) -> list[str]:
    """The pictures of `a.jpg,b.jpg`; a word that is no such list is one piece."""
    pieces = re.split("[,;]", word)
    is_list = len(pieces) > 1 and all(map(looks_like_picture, pieces))
    return pieces if is_list and not _is_fetched(word) else [word]


def _names(text: str, words: list[_Name], disk: _Disk) -> list[_Name]:
    """What names pictures, or seems to, in the order of the text."""
    names: list[_Name] = []
    taken = covered = 0  # the first word that no name has; words that names have

    def add(first: int, last: int, name: str, kind: Kind) -> None:
        nonlocal taken, covered
        count = last - first + 1
        names.append(_Name(words[first].start, words[last].end, name, kind, count))
        taken, covered = last + 1, covered + count

    for index, word in enumerate(words):
        if _is_fetched(word.name):
            is_picture = looks_like_picture(word.name) or covered == index
            add(index, index, word.name, "source" if is_picture else "mentioned")
        elif looks_like_picture(word.name):
            starts = range(max(taken, index - _WORDS_IN_NAME), index + 1)
            wholes = [(s, text[words[s].start : word.end]) for s in starts[:-1]]
            wholes.append((index, word.name))
            there = next(((s, f) for s, w in wholes if (f := disk.file(w))), None)
            begun = next(((s, w) for s, w in reversed(wholes) if _has_folder(words[s].name)), None)
            if there:
                add(there[0], index, there[1], "source")
            elif begun:
                add(begun[0], index, begun[1], "missing")
            else:
                add(index, index, word.name, "mentioned")
        elif _has_folder(word.name) and (file := disk.file(word.name)):
            from mmchat.images.sources import holds_picture

            add(index, index, file, "source" if holds_picture(Path(file)) else "file")
    return names


def folder_named(line: str) -> str:
    """What to say of a line that is the path of a folder; empty if it is none.

    A bare word is no path: a question may be the name of a folder.
    """
    name = plain(line.strip())
    if "\n" in name or not (_has_folder(name) or name.endswith("/")):
        return ""
    try:
        path = _local_path(name).expanduser()
        names = [entry.name for entry in itertools.islice(path.iterdir(), _ENTRIES_SEARCHED)]
    except (OSError, ValueError, RuntimeError):
        return ""
    pictures = sorted(filter(looks_like_picture, names))
    if not pictures:
        return f"{quoted(path)} is a folder without pictures"
    shown = ", ".join(map(quoted, pictures[:5])) + (", …" if len(pictures) > 5 else "")
    first = shlex.quote(str(path / pictures[0]))
    return f"{quoted(path)} is a folder; in it: {shown}; \\image {first} attaches the first"


def existing(name: str, listings: dict[Path, dict[str, Path]] | None = None) -> Path | None:
    """The file that a path or file: address means, or None; pages behind its name stay there.

    Spaces and accents may be coded otherwise. listings: what was read of folders before.
    """
    listings = {} if listings is None else listings
    if found := _existing(name, listings):
        return found
    whole = without_pages(name)
    found = _existing(whole, listings) if whole != name else None
    return Path(str(found) + name[len(whole) :]) if found else None


def _existing(name: str, listings: dict[Path, dict[str, Path]]) -> Path | None:
    try:
        path = _local_path(name).expanduser()
        if path.exists():
            return None if path.is_dir() else path
        if path.parent not in listings:
            entries = itertools.islice(path.parent.iterdir(), _ENTRIES_SEARCHED)
            listings[path.parent] = {_folded(entry.name): entry for entry in entries}
        return listings[path.parent].get(_folded(path.name))
    except (OSError, ValueError, RuntimeError):
        return None


def _local_path(name: str) -> Path:
    if name[:7].lower() == "file://":
        return Path(unquote(re.sub(r"(?i)^file://(localhost)?", "", name)))
    if _DRIVE.match(name):  # as the Windows Subsystem for Linux mounts it
        return Path(f"/mnt/{name[0].lower()}", *name[3:].split("\\"))
    return Path(name)


def plain(word: str) -> str:
    """A word as a shell reads it, without quotes and escapes; as it is if it is not one word."""
    pieces: list[str] = []
    end = 0
    for match in _PIECE.finditer(word):
        if match.start() != end:
            return word
        piece, end = match[0], match.end()
        if piece[0] == "'":
            piece = piece[1:-1]
        elif piece[0] == '"':
            piece = re.sub(r'\\(["\\$`])', r"\1", piece[1:-1])
        elif piece[0] == "\\":
            piece = piece[1:]
        pieces.append(piece)
    return "".join(pieces) if end == len(word) else word


def looks_like_picture(name: str) -> bool:
    """True if a path or address ends like the name of a picture, whatever its case."""
    if _DATA.match(name):
        return True
    if _ADDRESS.match(name):
        wholes = re.split(r"[?#]", name, maxsplit=1)[:1]
    else:  # also `paper.pdf#x`, whose pages are not written as such
        wholes = [name, name.rpartition("#")[0]]
    return any(whole.lower().endswith(_ENDINGS) for whole in wholes)


def without_pages(name: str) -> str:
    """`paper.pdf` of `paper.pdf#3-5`."""
    if "#" not in name:
        return name
    from mmchat.images.pages import split_pages

    return split_pages(name)[0]


def short_name(source: str) -> str:
    """The last part of a path or address, to be shown."""
    if _DATA.match(source):
        return "picture"
    path = re.split(r"[?#]", source, maxsplit=1)[0] if _ADDRESS.match(source) else source
    return one_line(path.rstrip("/").rpartition("/")[2][:255] or source[:40])


def _folded(name: str) -> str:
    """Narrow and no-break spaces as spaces, accents in one form."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFKC", name))


def _is_fetched(name: str) -> bool:
    return bool(_DATA.match(name)) or name[:8].lower().startswith(("http://", "https://"))


def _has_folder(name: str) -> bool:
    """Whether this is written as a path, not as a bare name."""
    if name.startswith(("/", "./", "../", "~/")) or _DRIVE.match(name):
        return True
    return name[:7].lower() == "file://" or ("/" in name and looks_like_picture(name))


def _is_file_like(text: str) -> bool:
    return _has_folder(text) or bool(re.search(r"\w\.\w+$", text))
