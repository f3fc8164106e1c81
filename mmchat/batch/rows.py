"""What a batch asks: rows of folders, globs, pictures, JSONL and CSV, each with a `custom_id`."""

from __future__ import annotations

import csv
import glob
import io
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO

from mmchat import limits
from mmchat.chat.foreign import sources_of
from mmchat.errors import ImageError, UsageError, quoted
from mmchat.images.sources import file_of, holds_picture, read_source
from mmchat.input_text import NotTextError, decoded
from mmchat.storage.safe_files import open_regular
from mmchat.strict_json import Where, parse_object
from mmchat.words import PICTURE_ENDINGS

# What others call the pictures of a row; else it would be answered without them.
_PICTURE = re.compile(r"(?i)(images?|img|pictures?|photos?)([_-]?(paths?|urls?|files?))?")
CHAT_URL = "/v1/chat/completions"
_INPUTS = "a folder, a glob, JSONL or CSV"
_JSONL, _CSV = (".jsonl", ".ndjson"), (".csv", ".tsv")


@dataclass(frozen=True, slots=True)
class Asked:
    """images: paths, addresses or `data:` URLs. body: a whole request in OpenAI's form instead."""

    images: tuple[str, ...] = ()
    prompt: str | None = None
    system: str | None = None
    body: Mapping[str, Any] | None = None

    @property
    def sources(self) -> Iterator[str]:
        """Of all its pictures, those in a body too."""
        yield from self.images
        yield from self._in_body

    @property
    def _in_body(self) -> Iterator[str]:
        return sources_of((self.body or {}).get("messages"))

    def digest(self) -> str:
        """Names what is asked: texts, and the bytes of files. Nothing is fetched for it."""
        found = sha256(repr((self.images, self.prompt, self.system, self.body)).encode())
        for image in self.images:
            try:
                found.update(sha256(read_source(image, allow_fetch=False).data).digest())
            except ImageError:  # an address; or whoever answers the row says why
                found.update(b"-")
        for place in self._in_body:  # all but the bytes of files is in the body
            with suppress(ImageError, ValueError, RuntimeError):
                if file_of(place):
                    found.update(sha256(read_source(place).data).digest())
        return found.hexdigest()[:32]


@dataclass(frozen=True, slots=True)
class Row:
    """One request. That of a JSONL is read when it is its turn: it may hold pictures.

    line: its number in `file`, where it begins there and how long it is.
    """

    custom_id: str
    asked: Asked | None = None
    file: Path = Path()
    line: tuple[int, int, int] = (0, 0, 0)

    @property
    def place(self) -> str:
        """Where it is asked, for messages."""
        return f"line {self.line[0]} of {quoted(self.file)}" if self.line[0] else "a picture"

    def read(self) -> Asked:
        """Raises UsageError if the file was changed since."""
        if self.asked is not None:
            return self.asked
        number, begin, size = self.line
        with opened(self.file) as file:
            file.seek(begin)
            custom_id, asked = _parsed(file.read(size), _where(self.file, number))
        if custom_id != self.custom_id:
            raise UsageError(f"line {number} of {quoted(self.file)} was changed meanwhile")
        return asked

    def is_in(self, shard: tuple[int, int]) -> bool:
        """Whether it is of the shard (number from 0, of how many): by its `custom_id` alone."""
        hashed = sha256(self.custom_id.encode("utf-8", "surrogatepass")).digest()
        return int.from_bytes(hashed[:8], "big") % shard[1] == shard[0]


def read_rows(
    inputs: Iterable[str], check: Callable[[Asked], object] = lambda _: None
) -> list[Row]:
    """The rows of all inputs. Raises UsageError if one is none, or two have one `custom_id`.

    What is named twice, a picture in a folder and by itself perhaps, is one row.
    check: is called with what each row asks, also where that is read again when it is its turn.
    """
    rows: dict[str, Row] = {}
    for one in inputs:
        holds_rows = False
        for row, asked in rows_of(one):
            holds_rows = True
            check(asked)
            other = rows.setdefault(row.custom_id, row)
            if other != row:
                places = " and ".join(r.place for r in (other, row))
                raise UsageError(
                    f"two rows have the custom_id {quoted(row.custom_id)}: {places}; give each its"
                    " own"
                )
        if not holds_rows:
            kind = "pictures" if Path(one).is_dir() else "rows"
            raise UsageError(f"{quoted(one)} holds no {kind}; give {_INPUTS}")
    return list(rows.values())


def rows_of(place: str) -> Iterator[tuple[Row, Asked]]:
    """The rows of one input, each with what it asks."""
    path = Path(place)
    ending = path.suffix.lower()
    if ending in _JSONL and path.is_file():
        yield from _of_jsonl(path)
    elif ending in _CSV and path.is_file():
        yield from _of_csv(path, "\t" if ending == ".tsv" else ",")
    else:
        for name in pictures(place, _INPUTS):
            asked = Asked((name,))
            yield Row(name, asked), asked


def pictures(place: str, takes: str = "a folder, a glob, or pictures") -> list[str]:
    """The paths of a folder, a glob or a picture.

    Raises UsageError, which says what the command `takes`, if nothing is there, or rows are.
    """
    if Path(place).suffix.lower() in _JSONL + _CSV and Path(place).is_file():
        raise UsageError(f"{quoted(place)} holds rows, for mmchat batch; give {takes}")
    if Path(place).is_dir():
        return list(_below(place))
    if os.path.lexists(place) or place.startswith(("http://", "https://")):
        return [place]
    if found := [n for n in sorted(glob.glob(place, recursive=True)) if not Path(n).is_dir()]:  # noqa: PTH207
        return found
    problem = "matches no file" if glob.has_magic(place) else "does not exist"
    raise UsageError(f"{quoted(place)} {problem}; give {takes}")


def _below(folder: str) -> Iterator[str]:
    """Files that are named or begin like pictures, sorted; no hidden ones. Links are followed.

    Raises UsageError for a folder that cannot be read: its pictures would be missed by nobody.
    """
    seen: set[tuple[int, int]] = set()
    for place, folders, names in os.walk(folder, onerror=_refuse, followlinks=True):
        try:
            status = Path(place).stat()
        except OSError:  # gone meanwhile, with all that was in it
            folders.clear()
            continue
        if (status.st_dev, status.st_ino) in seen:  # by a link that leads back
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(name for name in names if not name.startswith(".")):
            path = os.path.join(place, name)  # noqa: PTH118
            is_named = name.rpartition(".")[2].lower() in PICTURE_ENDINGS
            if is_named or holds_picture(Path(path)):
                yield path


def _refuse(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):  # gone meanwhile
        raise UsageError(
            f"the folder {quoted(error.filename)} cannot be read: {error.strerror}; let it be read,"
            " or name the folders beside it"
        )


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """A file of rows to read. Raises UsageError where it cannot be opened, or read in the block."""
    try:
        with io.BufferedReader(open_regular(path.resolve())) as file:
            yield file
    except OSError as error:
        raise UsageError(f"{quoted(path)} cannot be read: {error.strerror or error}") from None


def _where(path: Path, number: int) -> Where:
    return Where(str(path), f"line {number}", UsageError)


def _of_jsonl(path: Path) -> Iterator[tuple[Row, Asked]]:
    most, begin, number = limits.REQUEST_BYTES, 0, 0
    with opened(path) as file:
        while line := file.readline(most + 1):
            number += 1
            where = _where(path, number)
            if len(line) > most:
                raise where.fail(f"longer than {most // limits.MIB} MiB")
            if line.strip():
                custom_id, asked = _parsed(line, where)
                yield Row(custom_id, file=path, line=(number, begin, len(line))), asked
            begin += len(line)


def _parsed(line: bytes, where: Where) -> tuple[str, Asked]:
    try:
        found = parse_object(line)
    except ValueError as error:
        raise where.fail(str(error).replace(" at line 1 ", " at ")) from None
    if "body" not in found:
        return _asked(found, where)
    custom_id, body, url = found.get("custom_id"), found["body"], found.get("url", CHAT_URL)
    if not (custom_id and isinstance(custom_id, str) and isinstance(body, dict)):
        raise where.fail("needs a custom_id (a text) beside its body (an object)")
    if url != CHAT_URL:
        raise where.fail(f"url is {quoted(url)}; there is {CHAT_URL} alone")
    return custom_id, Asked(body=body)


def _asked(found: Mapping[str, Any], where: Where) -> tuple[str, Asked]:
    """Of `image` (one or a list), `prompt`, `system` and `custom_id`; other keys are not ours."""
    image, texts = found.get("image"), [found.get(k) for k in ("prompt", "system", "custom_id")]
    images = image if isinstance(image, list) else [image] if image else []
    if not all(isinstance(one, str) and one for one in (*images, *filter(None, texts))):
        raise where.fail("image (or each of a list), prompt, system and custom_id must be texts")
    prompt, system, custom_id = (text or None for text in texts)
    if "image" not in found and (other := next(filter(_PICTURE.fullmatch, found), None)):
        raise where.fail(f"has {quoted(other)} and no image; name it image, of one or of a list")
    if not images and not prompt:
        raise where.fail("has neither image nor prompt, nor a body as OpenAI's batches")
    usual = images[0] if images and not images[0].startswith("data:") else where.path
    return custom_id or usual, Asked(tuple(images), prompt, system)


def _of_csv(path: Path, delimiter: str) -> Iterator[tuple[Row, Asked]]:
    with opened(path) as file:
        try:
            text = decoded(file.read(), str(path))
        except NotTextError as error:
            raise UsageError(str(error)) from None
    number = 1
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        if "image" not in (names := reader.fieldnames or ()):
            shown = ", ".join(map(quoted, names)) or "none"
            raise UsageError(f"{quoted(path)} has no column image; its columns are {shown}")
        number = reader.line_num + 1
        for found in reader:
            custom_id, asked = _asked(found, _where(path, number))
            yield Row(custom_id, asked, path, (number, 0, 0)), asked
            number = reader.line_num + 1
    except csv.Error as error:
        raise _where(path, number).fail(str(error)) from None
