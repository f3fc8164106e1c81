"""`mmchat chats`: the chats that are kept, to read and to remove."""

from __future__ import annotations

import contextlib
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmchat.cli import console, options
from mmchat.errors import SavedChatError, UsageError, quoted
from mmchat.terminal import cells
from mmchat.words import plural, table

if TYPE_CHECKING:
    from mmchat.repl.chats import ChatFacts


def chats(
    removed: Annotated[
        list[str] | None,
        typer.Option("--remove", metavar="NAME", help="Take a chat off the disk; repeatable."),
    ] = None,
    yes: Annotated[bool, typer.Option("-y", "--yes", help="Do not ask.")] = False,
    as_json: options.Json = False,
) -> None:
    """List the chats that are kept, newest first, or remove some."""
    from mmchat.repl.chats import list_chats

    folder = chats_folder()
    if removed:
        _remove(removed, folder, yes=yes)
        return
    found = list_chats(folder)
    if as_json:
        console.print_json([_record(chat) for chat in found])
    elif found:
        width = console.columns(sys.stdout)
        console.write_safely("".join(f"{line}\n" for line in _lines(found, width)))
    else:
        console.note(f"there are no chats in {quoted(folder, 300)}")


def chats_folder() -> Path:
    """Where chats are kept."""
    import platformdirs

    return platformdirs.user_state_path("mmchat", appauthor=False) / "chats"


def choose_chat(folder: Path) -> Path:
    """Let the person choose. Raises SavedChatError if there is nothing, or nobody, to ask."""
    from mmchat.repl.chats import find_chat, latest_chat, list_chats

    if not console.is_terminal(sys.stdin) or not console.is_terminal(sys.stderr):
        raise UsageError("--resume without a terminal needs a NAME; mmchat chats lists them")
    found = list_chats(folder)
    if not found:
        return latest_chat(folder)  # which says that there is none
    rows = _lines(found, console.columns(sys.stderr) - 5)
    lines = (f"{number:>3}  {row}\n" for number, row in enumerate(rows, start=1))
    console.write_safely("".join(lines), sys.stderr)
    answer = console.ask("Go on with which one, by number or name? [1] ") or "1"
    if answer.isdecimal() and 1 <= int(answer[:9]) <= len(found):
        return found[int(answer) - 1].path
    return find_chat(answer, folder)


def _lines(found: list[ChatFacts], columns: int) -> list[str]:
    """One line for each chat, names in one column; what is too wide is cut."""
    names = (chat.path.name for chat in found)
    shown = [name if name.isprintable() else quoted(name) for name in names]
    lines = table([*zip(shown, map(_description, found), strict=True)]).split("\n")
    return [_cut(line, columns - 1) for line in lines]


def _cut(line: str, columns: int) -> str:
    if cells(line) <= columns:
        return line
    while cells(line) >= columns:
        line = line[:-1]
    return line + "…"


def _description(chat: ChatFacts) -> str:
    changed = time.strftime("%Y-%m-%d %H:%M", time.localtime(chat.changed))
    if chat.problem:
        return f"{changed}  {chat.problem}"
    turns, pictures = plural(chat.turns, "turn"), plural(chat.pictures, "picture")
    held = f"{turns}, {pictures}" if chat.pictures else turns
    return f"{changed}  {held}  {' '.join(chat.question[:400].split())}"


def _record(chat: ChatFacts) -> dict[str, Any]:
    changed = time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(chat.changed))
    record: dict[str, Any] = {"name": chat.path.name, "path": str(chat.path), "changed": changed}
    if chat.problem:
        return {**record, "problem": chat.problem}
    counts = {"turns": chat.turns, "pictures": chat.pictures}
    return {**record, "model": chat.model, **counts, "first_question": chat.question}


def _remove(names: list[str], folder: Path, *, yes: bool) -> None:
    """Remove all of them, or none if one cannot be."""
    from mmchat.repl import chats as places

    paths = [*dict.fromkeys(places.find_chat(name, folder) for name in names)]
    outside = [path for path in paths if path.parent != folder]
    if outside:
        raise UsageError(f"{quoted(outside[0], 300)} is not in {quoted(folder, 300)}; delete it")
    shown = ", ".join(quoted(path.name) for path in paths)
    with contextlib.ExitStack() as stack:
        held = []
        for path in paths:
            chat = places.hold(path)
            if chat is None:
                raise SavedChatError(f"{quoted(path.name)} is open in another window")
            held.append(chat)
            stack.callback(chat.close)
        whose = "its" if len(paths) == 1 else "their"
        if not yes:
            console.agree(f"remove {shown} with {whose} pictures?", "--remove")
        for chat in held:
            chat.remove()
    console.note(f"removed {shown}")
