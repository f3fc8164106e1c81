"""What `--help` prints: two columns by group, wrapped once, with no name and no value cut."""

from __future__ import annotations

import inspect
import re
import shutil
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from mmchat.cli import console
from mmchat.cli.wrong_values import wanted
from mmchat.terminal import filled

LEFT = 30  # most columns for the names; help of a longer one starts on the next line
WIDEST = 100

Row = tuple[str, str]


class HelpPage:
    """Mixin for Typer's commands and groups."""

    def format_help(self: Any, ctx: Any, formatter: Any) -> None:
        columns = min(shutil.get_terminal_size().columns, WIDEST)
        usage = " ".join(["Usage:", ctx.command_path, *self.collect_usage_pieces(ctx)])
        formatter.write(f"{filled(usage, columns, '  ')}\n\n{_prose(self.help or '', columns)}")
        sections = _sections(self, ctx)
        names = [len(name) for rows in sections.values() for name, _ in rows]
        left = max((length for length in names if length <= LEFT), default=0)
        for title, rows in sections.items():
            formatter.write(f"\n{console.bold(title)}\n")
            formatter.write("".join(_row(*row, left, columns) for row in rows))


class Command(HelpPage, TyperCommand):
    """A command with such a help page."""


class App(typer.Typer):
    """A Typer application whose commands have such help pages."""

    def command(self, name: str | None = None, **settings: Any) -> Any:
        return super().command(name, **{"cls": Command, **settings})


class Group(HelpPage, TyperGroup):
    """A group of commands with such a help page."""


def _prose(text: str, columns: int) -> str:
    paragraphs = inspect.cleandoc(text).split("\n\n")
    return "\n\n".join(filled(" ".join(p.split()), columns) for p in paragraphs) + "\n"


def _sections(command: Any, ctx: Any) -> dict[str, list[Row]]:
    """Rows by title: commands and arguments first, then the options as they are declared."""
    sections: dict[str, list[Row]] = {"Commands": [], "Arguments": []}
    if isinstance(command, TyperGroup):
        found = [(name, command.get_command(ctx, name)) for name in command.list_commands(ctx)]
        sections["Commands"] = [(name, _first_sentence(one)) for name, one in found]
    ungrouped: list[Row] = []
    for parameter in command.get_params(ctx):
        if getattr(parameter, "hidden", False):
            continue
        if parameter.param_type_name == "argument":
            sections["Arguments"].append(_argument(parameter))
        elif panel := getattr(parameter, "rich_help_panel", None):
            sections.setdefault(panel, []).append(_option(parameter, ctx))
        else:
            ungrouped.append(_option(parameter, ctx))
    sections["Other" if len(sections) > 2 else "Options"] = ungrouped
    return {title: rows for title, rows in sections.items() if rows}


def _first_sentence(command: Any) -> str:
    paragraph = " ".join((command.help or "").split("\n\n")[0].split())
    return paragraph.partition(". ")[0].removesuffix(".") + "."


def _argument(parameter: Any) -> Row:
    return parameter.metavar or parameter.name.upper(), parameter.help or ""


def _option(parameter: Any, ctx: Any) -> Row:
    short = [name for name in parameter.opts if not name.startswith("--")]
    long, *others = [name for name in parameter.opts if name.startswith("--")]
    names = ", ".join([*short, long])
    if not parameter.is_flag:
        names += " " + (parameter.display_type_rich(ctx) or "").strip("<>")
    help_text = parameter.help or ""
    if others:
        help_text += f" Also {', '.join(others)}."
    default = _default(parameter)
    facts = [_range(parameter), f"default: {default}" if default else ""]
    if any(facts):
        help_text += f" [{'; '.join(filter(None, facts))}]"
    return (names if short else f"    {names}"), help_text


def _range(parameter: Any) -> str:
    """`1 or more`, `0 to 100`; empty if every number will do, or the value is none."""
    return re.sub(r"^a (whole )?number ?(of |from )?", "", wanted(parameter))


def _default(parameter: Any) -> str:
    if isinstance(parameter.show_default, str):
        return parameter.show_default
    value = parameter.default
    is_shown = parameter.show_default and value not in (None, False, "", []) and value is not ...
    return str(value) if is_shown and not callable(value) else ""


def _row(names: str, text: str, left: int, columns: int) -> str:
    indent = " " * (left + 4)
    lines = filled(" ".join(text.split()), max(columns - len(indent), 24)).split("\n")
    body = f"\n{indent}".join(lines)
    start = f"  {names}\n{indent}" if len(names) > left else f"  {names:<{left + 2}}"
    return f"{start}{body}\n"
