"""Lets commands take several options as one dataclass, so that each list of options stands once."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer

from mmchat.cli.options import ADDED

Parameter = inspect.Parameter


class Only:
    """Annotated[Group, Only("device")]: of the group's options, the command has these alone."""

    def __init__(self, *names: str) -> None:
        self.names = frozenset(names)

    def chosen(self, names: Iterable[str]) -> frozenset[str]:
        return self.names & frozenset(names)


class Without(Only):
    """Annotated[Group, Without("alpha")]: the command has all options of the group but these."""

    def chosen(self, names: Iterable[str]) -> frozenset[str]:
        return frozenset(names) - self.names


def with_option_groups(command: Callable[..., None]) -> Callable[..., None]:
    """`command` with each parameter that is a dataclass replaced by the fields of that dataclass.

    Typer sees one option for each field that is annotated for it or says its `help` in its
    metadata; the command gets the dataclass, filled with what was given.
    """
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, tuple[Any, list[str]]] = {}
    parameters: list[Parameter] = []
    for parameter in inspect.signature(command).parameters.values():
        hint = hints[parameter.name]
        group, *marks = get_args(hint) if get_origin(hint) is Annotated else (hint,)
        if is_dataclass(group):
            options = _options(group, *(mark for mark in marks if isinstance(mark, Only)))
            groups[parameter.name] = group, [option.name for option in options]
            parameters += options
        else:
            parameters.append(parameter.replace(annotation=hint, kind=Parameter.KEYWORD_ONLY))

    @functools.wraps(command)
    def run(**given: Any) -> None:
        for name, (group, options) in groups.items():
            values = {option: given.pop(option) for option in options}
            given[name] = group(**{k: v for k, v in values.items() if v is not None})
        command(**given)

    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def _options(group: Any, mark: Only = Without()) -> list[Parameter]:  # noqa: B008
    hints = get_type_hints(group, include_extras=True)
    offered = {
        field.name: field
        for field in fields(group)
        if get_origin(hints[field.name]) is Annotated or "help" in field.metadata
    }
    if unknown := mark.names - offered.keys():
        raise TypeError(f"{group.__name__} has no option {', '.join(unknown)}")
    chosen = mark.chosen(offered)
    return [_option(field, hints[name]) for name, field in offered.items() if name in chosen]


def _option(field: Field[Any], hint: Any) -> Parameter:
    default = Parameter.empty if field.default is MISSING else field.default
    if told := dict(field.metadata):
        kind, default = told.pop("takes", hint), None if default == () else default
        panel = told.pop("panel")
        told |= ADDED.get(field.name, {})
        if told.pop("is_argument", False):
            hint = Annotated[kind, typer.Argument(**told)]
        else:
            name = f"--{field.name.replace('_', '-')}"
            hint = Annotated[kind, typer.Option(name, rich_help_panel=panel, **told)]
    return Parameter(field.name, Parameter.KEYWORD_ONLY, default=default, annotation=hint)
