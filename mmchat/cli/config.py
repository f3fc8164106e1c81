"""`mmchat config`: where the defaults of options come from."""

from __future__ import annotations

import os
from dataclasses import asdict
from typing import Annotated

import typer

from mmchat.cli import console, options
from mmchat.cli.defaults import config_path, defaults, set_default, variable
from mmchat.cli.help_page import Command, plain_app
from mmchat.cli.option_groups import with_option_groups
from mmchat.errors import quoted

config_app = plain_app(help="Show the defaults of model, quantize and device, and their file.")


@config_app.callback(invoke_without_command=True)
def _config(ctx: typer.Context) -> None:
    if ctx.invoked_subcommand is None:
        _show()


@config_app.command(cls=Command, short_help="Print where config.toml is, or would be.")
@with_option_groups
def path() -> None:
    """Print where config.toml is, or would be.

    It may hold lines such as: model = "llama3.2-11B", quantize = "int4", device = "cuda".
    """
    console.print_path(config_path())


@config_app.command(cls=Command, short_help="Show each default and where it comes from.")
@with_option_groups
def show(as_json: options.Json = False) -> None:
    """Show each default and where it comes from.

    An option comes before its variable (MMCHAT_MODEL, MMCHAT_QUANTIZE, MMCHAT_DEVICE), this before
    config.toml, and this before what is built in.
    """
    _show(as_json)


@config_app.command("set", cls=Command, short_help="Write a default into config.toml.")
@with_option_groups
def set_(
    name: Annotated[str, typer.Argument(metavar="model|quantize|device")],
    value: Annotated[str, typer.Argument(metavar="VALUE")],
    quiet: options.Quiet = False,
) -> None:
    """Write a default into config.toml; its other lines stay. Try: mmchat config set quantize int4

    A variable that is set still comes before it.
    """
    path = set_default(name, value)
    console.note(f"{name} is {quoted(value)} in {quoted(path, 300)}")
    if os.environ.get(variable(name)):
        console.note(f"{variable(name)} is set, and comes before it")


def _show(as_json: bool = False) -> None:
    found, file = defaults(), config_path()
    if as_json:
        settings = {name: asdict(default) for name, default in found.items()}
        console.print_json({**settings, "file": str(file) if file.exists() else None})
        return
    width = max(len(default.value) for default in found.values())
    rows = [(name, f"{one.value:<{width}}  {one.origin}") for name, one in found.items()]
    console.print_facts([*rows, ("file", f"{file}{'' if file.exists() else ' (not there)'}")])
