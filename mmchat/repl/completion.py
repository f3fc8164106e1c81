"""What Tab offers: commands, their values, files and addresses."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from prompt_toolkit.completion import CompleteEvent, Completer, Completion
from prompt_toolkit.document import Document

from mmchat.repl import commands, paths, settings
from mmchat.repl.registry import Command
from mmchat.terminal import sanitize

if TYPE_CHECKING:
    from mmchat.repl.chat import Chat

MOST = 200


class ChatCompleter(Completer):
    """Commands at the start of a line, then what the command takes; paths anywhere on Tab."""

    def __init__(self, chat: Chat) -> None:
        self._chat = chat

    def get_completions(
        self, document: Document, complete_event: CompleteEvent
    ) -> Iterable[Completion]:
        text = document.text_before_cursor
        if re.fullmatch(r"[\\/][A-Za-z]*", text):
            yield from self._commands(text)
            if text[0] == "\\":
                return
        match = re.match(r"[\\/]([A-Za-z?]+) +", text)
        found = commands.names().get(match[1]) if match else None
        if match and found:
            yield from self._arguments(found, text[match.end() :])
        elif complete_event.completion_requested:
            word = re.search(r"(?:\\.|\S)*$", text)
            if word and "/" in word[0]:
                yield from path_completions(word[0])

    def _commands(self, text: str) -> Iterable[Completion]:
        for name, found in commands.COMMANDS.items():
            if name.startswith(text[1:]):
                meta = f"{found.usage}  {found.help}".strip()
                yield Completion(text[0] + name, -len(text), display_meta=meta)

    def _arguments(self, found: Command, argument: str) -> Iterable[Completion]:
        word = re.search(r"(?:\\.|\S)*$", argument)
        begun = word[0] if word else ""
        if found.complete == "paths":
            if found.name == "image":
                for address in [*self._chat.addresses, paths.CLIPBOARD]:
                    if begun and address.startswith(begun):
                        yield Completion(address, -len(begun))
            yield from path_completions(begun)
        elif callable(found.complete):
            for candidate in found.complete(self._chat, argument):
                if candidate.startswith(argument):
                    yield Completion(candidate, -len(argument))
            if found.complete is settings.candidates and argument.startswith("schema "):
                yield from path_completions(begun)


def path_completions(begun: str) -> Iterable[Completion]:
    """Files and folders that a path begun may mean, with spaces escaped; folders end in `/`."""
    plain = begun.replace("\\ ", " ")
    folder, slash, start = plain.rpartition("/")
    try:
        place = Path(folder + slash or ".").expanduser()
        entries = sorted(place.iterdir(), key=lambda e: (not e.is_dir(), e.name.lower()))
    except (OSError, RuntimeError, ValueError):
        return

    def fits(entry: Path) -> bool:
        name = entry.name
        hidden = name.startswith(".") and not start.startswith(".")
        begins = name.lower().startswith(start.lower())
        return begins and not hidden and sanitize(name) == name

    for entry in itertools.islice(filter(fits, entries), MOST):
        end = "/" if entry.is_dir() else ""
        full = (folder + slash + entry.name).replace(" ", "\\ ")
        yield Completion(full + end, -len(begun), display=entry.name + end)
