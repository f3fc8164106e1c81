"""Keeps chats on disk: a folder with `chat.json` and its pictures, or one file that holds both.

Pictures are stored as PNG under the hash of their pixels, so that what is read back is what the
model saw. A folder or file can be moved to another machine as it is.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from mmchat import limits
from mmchat.conversation import Conversation, Image, Message, Part, Text, Turn
from mmchat.engine.events import FinishReason
from mmchat.engine.sampling import SamplingParams
from mmchat.errors import DiskError, SavedChatError, UsageError, disk_errors, quoted
from mmchat.images.png import png_bytes
from mmchat.storage import atomic_file
from mmchat.storage.safe_files import is_temporary
from mmchat.strict_json import Where, check_keys, parse_dataclass, parse_json, read_bounded

FORMAT, VERSION = "mmchat-chat", 1
DOCUMENT, PICTURES = "chat.json", "images"
PRIVATE_FILE, PRIVATE_FOLDER = 0o600, 0o700
HASH = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class PartRecord:
    """Text, or a picture by the hash of its content and what the user called it."""

    text: str | None = None
    image: str | None = None
    source: str = "picture"


@dataclass(frozen=True)
class TurnRecord:
    question: tuple[PartRecord, ...]
    answer: str
    finish_reason: FinishReason


@dataclass(frozen=True)
class ImageRecord:
    """A picture; data: PNG in base64, or None if it lies in the folder of pictures."""

    content_hash: str
    data: str | None = None


# What is saved of the settings, where it is not as the model's makers recommend.
_UNSAVED = {"logprobs", "speculate", "schema"}
SETTINGS = [f.name for f in fields(SamplingParams) if f.name not in _UNSAVED]


@dataclass(frozen=True)
class ChatRecord:
    """The document. model: the name of the one that answered. settings: some of SETTINGS."""

    format: str
    version: int
    model: str
    system: str | None
    turns: tuple[TurnRecord, ...]
    images: tuple[ImageRecord, ...]
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class SavedChat:
    """settings: those of SETTINGS that were saved."""

    conversation: Conversation
    model: str
    settings: Mapping[str, Any] = field(default_factory=dict)


def to_json(chat: SavedChat, *, pictures_inside: bool) -> str:
    """The document of a chat."""
    conversation = chat.conversation
    turns = tuple(
        TurnRecord(tuple(map(_part_record, turn.question.content)), turn.answer, turn.reason)
        for turn in conversation.turns
    )
    images = tuple(
        ImageRecord(image.content_hash, base64.b64encode(png(image)).decode())
        if pictures_inside
        else ImageRecord(image.content_hash)
        for image in _distinct(conversation.images)
    )
    head = FORMAT, VERSION, chat.model, conversation.system
    document = ChatRecord(*head, turns, images, dict(chat.settings))
    return json.dumps(asdict(document), indent=1) + "\n"


def png(image: Image) -> bytes:
    """The picture without loss."""
    return png_bytes(image.pixels, compress_level=1)


def write(path: Path, chat: SavedChat) -> None:
    """Save to a file if the name ends in .json, else to a folder. Raises DiskError."""
    if path.suffix.lower() == ".json":
        text = to_json(chat, pictures_inside=True)
        atomic_file.write_bytes(path, text.encode(), mode=PRIVATE_FILE)
        return
    if path.is_dir() and not (path / DOCUMENT).exists() and _has_others(path):
        raise DiskError(f"{quoted(path)} is a folder with other files; give a new name")
    write_folder(path, chat)


def write_folder(path: Path, chat: SavedChat) -> None:
    """Save to a folder: pictures first, the document last. Raises DiskError."""
    make_private_folder(path)
    if (path / PICTURES).is_symlink():
        raise DiskError(f"{quoted(path / PICTURES)} is a link; a chat has its pictures in itself")
    for image in _distinct(chat.conversation.images):
        make_private_folder(path / PICTURES)
        target = path / PICTURES / f"{image.content_hash}.png"
        if not target.exists():
            atomic_file.write_bytes(target, png(image), mode=PRIVATE_FILE, follow=False)
    text = to_json(chat, pictures_inside=False)
    atomic_file.write_bytes(path / DOCUMENT, text.encode(), mode=PRIVATE_FILE, follow=False)


def _has_others(path: Path) -> bool:
    """Whether a folder holds more than what a run that was killed left of a chat."""
    return any(p.name != PICTURES and not is_temporary(p.name) for p in path.iterdir())


def make_private_folder(path: Path) -> None:
    """Make a folder, and those above it that are missing, for the user alone. Raises DiskError."""
    with disk_errors(f"cannot make the folder {quoted(path)}"):
        for folder in (*reversed(path.parents), path):
            if not folder.is_dir():
                folder.mkdir(mode=PRIVATE_FOLDER, exist_ok=True)


def read(path: Path, beside: Iterable[Image] = ()) -> SavedChat:
    """Load a folder or file that `write` made. Raises SavedChatError, ImageError, MemoryError_.

    beside: pictures that the chat will hold as well, which count for the bound on all of them.
    """
    document, where = read_document(path)
    images = _read_images(document.images, path, where, beside)
    turns = tuple(_turn(entry, images, where) for entry in document.turns)
    settings = {k: v for k, v in document.settings.items() if v is not None}
    check_keys(settings, (), SETTINGS, where.child("settings"))
    try:
        sampling = SamplingParams(**settings)
    except UsageError as error:
        raise where.child("settings").fail(str(error)) from None
    settings = {name: getattr(sampling, name) for name in settings}
    return SavedChat(Conversation(document.system, turns), document.model, settings)


def read_document(path: Path) -> tuple[ChatRecord, Where]:
    """What a folder or file says of a chat, and the place to name in errors; decodes no picture."""
    inside = not path.is_dir()
    file = path if inside else path / DOCUMENT
    where = Where(str(file), error=SavedChatError)
    limit = limits.CHAT_FILE_BYTES if inside else limits.CHAT_JSON_BYTES
    found = parse_json(read_bounded(file, limit, where), where)
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise where.fail("not a chat saved by mmchat")
    if found.get("version") != VERSION:
        raise where.fail(
            f"version {found.get('version')!r:.20}; this mmchat reads {VERSION}; upgrade mmchat"
        )
    return parse_dataclass(ChatRecord, found, where, {}), where


def _read_images(
    entries: Collection[ImageRecord], folder: Path, where: Where, beside: Iterable[Image]
) -> dict[str, Image]:
    """The pictures by their hashes, if their pixels are those that these promise."""
    from mmchat.images import load_each

    sources = {entry.content_hash: _image_source(entry, folder, where) for entry in entries}
    names = [f"picture {content_hash[:8]}" for content_hash in sources]
    each = load_each(list(sources.values()), names=names, beside=beside)
    images = {}
    for content_hash, name, found in zip(sources, names, each, strict=True):
        if [image.content_hash for image in found] != [content_hash]:
            raise where.fail(f"{name} was changed after it was saved")
        images[content_hash] = found[0]
    return images


def _image_source(entry: ImageRecord, folder: Path, where: Where) -> Path | bytes:
    if not HASH.fullmatch(entry.content_hash):
        raise where.fail(f"{quoted(entry.content_hash)} is no hash of a picture")
    if entry.data is None:
        return folder / PICTURES / f"{entry.content_hash}.png"
    try:
        return base64.b64decode(entry.data, validate=True)
    except ValueError:
        raise where.fail(f"picture {entry.content_hash[:8]} is not valid base64") from None


def _turn(entry: TurnRecord, images: dict[str, Image], where: Where) -> Turn:
    parts: list[Part] = []
    for part in entry.question:
        if (part.text is None) == (part.image is None):
            raise where.fail("a part of a question is text or a picture")
        if part.text is not None:
            parts.append(Text(part.text))
        elif part.image in images:
            image = images[part.image]
            parts.append(Image(image.pixels, part.source, image.content_hash))
        else:
            raise where.fail(f"picture {quoted(part.image)} is not in the chat")
    if not parts:
        raise where.fail("a question has neither text nor a picture")
    return Turn(Message("user", tuple(parts)), entry.answer, entry.finish_reason)


def _part_record(part: Part) -> PartRecord:
    if isinstance(part, Image):
        return PartRecord(image=part.content_hash, source=part.source)
    return PartRecord(text=part.text)


def _distinct(images: list[Image]) -> Iterator[Image]:
    return iter({image.content_hash: image for image in images}.values())
