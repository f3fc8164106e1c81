"""Typer's plain help page, with the options in the groups that they name.

Typer's other page draws boxes, in pipes too, and folds names that are long; the plain one has no
groups, which is all that is added here.
"""

from __future__ import annotations

import functools
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

WIDEST = 100  # columns
# Options that may be given without their value, and whether the next word is never their value
BARE = {"--resume": False, "--allow-remote-images": True}


class Command(TyperCommand):
    """A command with such a help page."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if ctx.resilient_parsing:  # to complete a line; Typer's validator is loaded in 0.2 s
            for parameter in self.get_params(ctx):
                parameter.process_value = lambda ctx, value: value  # noqa: ARG005
        for arg in args:
            if arg.endswith("=") and (name := arg[:-1]) in BARE:
                ctx.fail(f"{name}= is empty; leave out the '=', or give what it takes")
        pairs = zip(args, [*args[1:], "-"], strict=False)
        is_bare = (arg in BARE and (BARE[arg] or behind[:1] == "-") for arg, behind in pairs)
        args = [f"{arg}=" if bare else arg for arg, bare in zip(args, is_bare, strict=True)]
        return super().parse_args(ctx, args)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        _by_group(self, ctx, formatter)


class Group(TyperGroup):
    """A group of commands with such a help page, which `help` shows, too."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, [*args[1:], "--help"] if args[:1] == ["help"] else args)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        self.format_commands(ctx, formatter)
        _by_group(self, ctx, formatter)


# For an application whose groups have such help pages; its commands say cls=Command.
plain_app = functools.partial(typer.Typer, cls=Group, rich_markup_mode=None, add_completion=False)


def _by_group(command: Any, ctx: Any, formatter: Any) -> None:
    sections: dict[str, list[tuple[str, str]]] = {"Arguments": []}
    for parameter in command.get_params(ctx):
        title = parameter.rich_help_panel or f"{parameter.param_type_name.title()}s"
        if row := parameter.get_help_record(ctx):
            name, help = row
            sections.setdefault(title, []).append((name.removesuffix(" <list[str]>"), help))
    sections["Options"] = sections.pop("Options")  # --help comes last
    for title, rows in filter(lambda section: section[1], sections.items()):
        with formatter.section(title):
            formatter.write_dl(rows)
