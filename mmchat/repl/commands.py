r"""The commands of the chat, each a registered function; the docstring's first line is its help."""

from __future__ import annotations

import shlex
from dataclasses import replace
from typing import TYPE_CHECKING

from mmchat.conversation import Conversation
from mmchat.errors import UsageError, quoted
from mmchat.repl import (
    chats,
    export,
    facts,
    paths,
    picture_commands,  # noqa: F401 - registers its commands
    saving,
    settings,
)
from mmchat.repl.chat import Leave
from mmchat.repl.registry import COMMANDS, command, find, names, new_file, number_of, write
from mmchat.words import held, timings

if TYPE_CHECKING:
    from mmchat.repl.chat import Chat

__all__ = ["COMMANDS", "find", "names"]  # the registry, with everything in it


@command("adapter", "on|off", complete=lambda chat, argument: ("on", "off"))
def _adapter(chat: Chat, argument: str) -> None:
    """Answer with the adapter or without it, to compare."""
    if argument not in ("", "on", "off"):
        raise UsageError(f"\\adapter takes on or off, not {quoted(argument)}")
    chat.screen.note(chat.use_adapter(None if not argument else argument == "on"))


@command("system", "[TEXT|none]")
def _system(chat: Chat, argument: str) -> None:
    """Show or change the system prompt."""
    if not argument:
        chat.screen.say(chat.session.conversation.system or "no system prompt")
        return
    text = None if argument == "none" else argument
    chat.change(replace(chat.session.conversation, system=text))
    chat.screen.note("the system prompt is changed")


@command("set", "[NAME VALUE]", complete=settings.candidates)
def _set(chat: Chat, argument: str) -> None:
    """Show or change how to answer: temperature 0.8."""
    if not argument:
        chat.screen.table(facts.settings(chat.sampling))
        return
    if argument.split(None, 1)[0] == settings.IMAGE_TAGS:
        _set_image_tags(chat, argument.split()[1:])
        return
    chat.sampling = settings.changed(chat.sampling, argument)
    chat.keeper.save(chat.session.conversation)
    name = argument.split(None, 1)[0]
    chat.screen.note(f"{name} is {facts.shown(getattr(chat.sampling, name))}")


def _set_image_tags(chat: Chat, words: list[str]) -> None:
    """Never by a pipe, whose text could then open files and addresses by itself."""
    if words not in (["on"], ["off"]):
        raise UsageError(f"\\set {settings.IMAGE_TAGS} takes on or off")
    if words == ["on"]:
        if not chat.screen.interactive:
            raise UsageError(
                f"{settings.IMAGE_TAGS} is for a terminal: text of a pipe opens no pictures"
            )
        if chat.session.loaded.processor.name_tags is None:
            raise UsageError(
                f"{settings.IMAGE_TAGS} does not fit {chat.spec.name}: it knows no such tags"
            )
    chat.image_tags = words == ["on"]
    chat.screen.note(f"{settings.IMAGE_TAGS} is {words[0]}")


@command("show")
def _show(chat: Chat, argument: str) -> None:
    """Show model, settings and system prompt."""
    loaded = chat.session.loaded
    dtype = str(loaded.dtype).removeprefix("torch.")
    how = held(loaded.options.quantize, loaded.options.kv)
    folder = chat.keeper.folder
    rows = [
        ("model", f"{chat.spec.name} on {loaded.device}, {dtype}{how}"),
        ("system", chat.session.conversation.system or "none"),
        ("saved in", str(folder.path) if folder else "nowhere so far"),
    ]
    chat.screen.table([*rows, *facts.settings(chat.sampling)])


@command("undo", aliases=("u",))
def _undo(chat: Chat, argument: str) -> None:
    """Take back the last question and its answer."""
    turn = chat.session.undo()
    chat.keeper.save(chat.session.conversation)
    chat.screen.note(facts.taken_back(turn.question))


@command("retry", "[NAME VALUE]", complete=settings.candidates, aliases=("r",))
def _retry(chat: Chat, argument: str) -> None:
    """Answer again; NAME VALUE counts for this once."""
    sampling = chat.sampling
    if argument:
        sampling = settings.changed(sampling, argument, "retry")
    chat.retry(sampling)


@command("edit", "[TEXT]", aliases=("e",))
def _edit(chat: Chat, argument: str) -> None:
    """Change the last question and ask it again."""
    text = argument or chat.screen.edit(chat.session.last_turn().question.text)
    if text is None and not chat.screen.interactive:
        raise UsageError("write the new question behind \\edit")
    if not text or not text.strip():
        chat.screen.note("nothing is changed")
        return
    chat.edit(text)


@command("say", "TEXT")
def _say(chat: Chat, argument: str) -> None:
    """Send TEXT exactly as it is."""
    if argument:
        chat.ask(argument)


@command("forget", "[N]")
def _forget(chat: Chat, argument: str) -> None:
    """Drop the N oldest turns to make room."""
    count = number_of(argument, "the count of turns", default=1)
    turns = chat.session.conversation.turns
    if not 1 <= count <= len(turns):
        held = "1 turn" if len(turns) == 1 else f"{len(turns)} turns"
        raise UsageError(f"the chat has {held}, so {count} cannot be dropped")
    chat.change(chat.session.conversation.without_first(count))
    dropped = f"dropped {count} of {len(turns)} turns{facts.with_pictures(turns[:count])}"
    chat.screen.note(f"{dropped}; context {_context(chat)}")


@command("save", "[NAME|PATH.json]", complete="paths")
def _save(chat: Chat, argument: str) -> None:
    """Name the chat; a path gets a copy."""
    chat.session.last_turn()
    held = chat.keeper.folder
    name = paths.plain(argument) or _name(chat)
    shown = quoted(name, 300)
    back = f"\\load {shlex.quote(name)} brings it back"
    if not chats.is_name(name):
        saving.write(new_file(chat, argument, "chat"), chat.as_saved(chat.session.conversation))
        said = f"a copy as it is now is in {shown}; {back}"
    else:
        chat.keeper.save_as(name, chat.session.conversation)
        said = f"saved as {shown}; {back}"
        if not chat.keeper.saves:
            said += "; what follows is saved by the next \\save"
        elif held and held.is_named and held.path.name != name:
            said = f"goes on as {shown}; {quoted(held.path.name)} stays as it was"
    chat.screen.note(said)
    chat.say_unasked()


@command("load", "NAME|PATH.json", complete="paths", aliases=("open",))
def _load(chat: Chat, argument: str) -> None:
    """Go on with a chat that was saved."""
    if not argument:
        raise UsageError("\\load needs the name of a saved chat")
    path = chats.find_chat(paths.plain(argument), chat.keeper.chats)
    chat.resume(saving.read(path, chat.attached), path)


@command("export", "md|json|html [FILE]", complete=lambda chat, argument: export.KINDS)
def _export(chat: Chat, argument: str) -> None:
    """Write the chat as a document to read."""
    kind, _, name = argument.partition(" ")
    if kind not in export.KINDS:
        raise UsageError(f"write \\export md, json or html, not {quoted(kind)}")
    file = new_file(chat, name.strip() or f"{_name(chat)}.{kind}", kind)
    text = export.document(kind, chat.session.conversation, chat.spec.name)
    write(chat, file, text.encode())


@command("copy")
def _copy(chat: Chat, argument: str) -> None:
    """Copy the last answer."""
    answer = chat.session.last_turn().answer
    chat.screen.note(f"copied {len(answer)} characters {chat.screen.copy(answer)}")


@command("clear", aliases=("new",))
def _clear(chat: Chat, argument: str) -> None:
    """Start again; system prompt and settings stay."""
    chat.attached = []
    chat.written.clear()
    chat.keeper.start_new()
    chat.session.conversation = Conversation(chat.session.conversation.system)
    chat.screen.note("a new chat")


def _context(chat: Chat) -> str:
    budget = chat.budget()
    return f"{budget.used:,} of {budget.limit:,} tokens"


@command("tokens")
def _tokens(chat: Chat, argument: str) -> None:
    """Show how much of the context is used."""
    chat.screen.say(f"context {_context(chat)}")


@command("stats")
def _stats(chat: Chat, argument: str) -> None:
    """Show the timings of the last answer."""
    if chat.last is None:
        raise UsageError("there is no answer to time yet")
    chat.screen.table(timings(chat.last))


@command("help", "[COMMAND]", complete=lambda chat, argument: COMMANDS, aliases=("h", "?"))
def _help(chat: Chat, argument: str) -> None:
    """Show the commands, or one of them."""
    word = argument.lstrip("\\/")
    if word and word not in names():
        raise UsageError(f"there is no command {quoted(argument)}; \\help lists them")
    shown = [names()[word]] if word else list(COMMANDS.values())
    rows = [(f"\\{found.name} {found.usage}".rstrip(), found.help) for found in shown]
    has_keys = chat.screen.interactive and not word
    chat.screen.table([*rows, ("", ""), *KEYS] if has_keys else rows)


KEYS = [  # of the line editor
    ("Alt-Enter", "Start a new line"),
    ("Tab", "Complete a command, a value or a path"),
    ("Ctrl-R", "Search earlier lines"),
    ("Ctrl-X Ctrl-E", "Open your editor"),
    ("Ctrl-C", "Stop an answer"),
    ("Ctrl-D", "Leave"),
]


@command("quit", aliases=("q", "exit", "bye"))
def _quit(chat: Chat, argument: str) -> None:
    """Leave."""
    raise Leave


def _name(chat: Chat) -> str:
    """That of the chat, if it is kept, else the time."""
    held = chat.keeper.folder
    return held.path.name if held else chats.new_name()
