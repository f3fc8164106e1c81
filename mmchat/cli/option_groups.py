"""Lets commands take several options as one dataclass, so that each list of options stands once."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from dataclasses import fields, is_dataclass
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer
from typer.models import ArgumentInfo

from mmchat.cli.defaults import one_model, with_defaults
from mmchat.cli.options import LOADING, Color, Debug, ModelName, Words
from mmchat.cli.positional import Said, sort_words
from mmchat.cli.ranks import of_launcher
from mmchat.errors import UsageError
from mmchat.loading.options import LoadOptions

Parameter = inspect.Parameter
_KEYWORD = Parameter.KEYWORD_ONLY


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

    Typer sees one option for each field that is annotated for it; the command gets the dataclass,
    filled with what was given; LoadOptions also with the defaults of what was not. It also sees
    --color and --debug, which act by their callbacks, and --model beside an argument MODEL, which
    then may be given in either way. In place of Said it sees the words that are sorted into it.
    """
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, tuple[Any, list[str]]] = {}
    parameters: list[Parameter] = []
    said = ""
    for parameter in inspect.signature(command).parameters.values():
        hint = hints[parameter.name]
        group, *marks = get_args(hint) if get_origin(hint) is Annotated else (hint,)
        if group is Said:
            said = parameter.name
            parameters.append(parameter.replace(annotation=Words, kind=_KEYWORD, default=None))
        elif is_dataclass(group):
            options = _options(group, *(mark for mark in marks if type(mark) in (Only, Without)))
            if group is LoadOptions and any(map(_argument_settings, parameters)):
                # another argument stands in its place
                model = Parameter("name", _KEYWORD, default=None, annotation=ModelName)
                options = [model if option.name == "name" else option for option in options]
            groups[parameter.name] = group, [option.name for option in options]
            parameters += options
        else:
            parameters.append(parameter.replace(annotation=hint, kind=_KEYWORD))
    argument, is_required = _model_argument(parameters)
    if argument:
        parameters.append(Parameter("named", _KEYWORD, default=None, annotation=ModelName))
    for name, default, hint in (("color", "auto", Color), ("debug", False, Debug)):
        parameters.append(Parameter(name, _KEYWORD, default=default, annotation=hint))
    parameters.append(Parameter("ctx", _KEYWORD, annotation=typer.Context))

    @functools.wraps(command)
    def run(ctx: typer.Context, color: str, debug: bool, **given: Any) -> None:
        if argument:
            given[argument] = one_model(given[argument], given.pop("named"))
            if is_required and given[argument] is None:
                raise UsageError("no MODEL is given; 'mmchat list' shows those that are known")
        if said:
            has_prompt = given.get("prompt") is not None
            given[said] = sort_words(given[said] or [], has_prompt=has_prompt)
            given["name"] = one_model(given[said].model, given["name"])
        for name, (group, options) in groups.items():
            values = {option: given.pop(option) for option in options}
            if group is LoadOptions and "name" in values:
                values = with_defaults(values, ctx)
            if "parallel" in values:
                values = of_launcher(values, command.__name__)
            given[name] = group(**{k: v for k, v in values.items() if v is not None})
        command(**given)

    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def _argument_settings(parameter: Parameter) -> ArgumentInfo | None:
    """None for an option."""
    settings = get_args(parameter.annotation)[1:]
    return next((s for s in settings if isinstance(s, ArgumentInfo)), None)


def _model_argument(parameters: list[Parameter]) -> tuple[str, bool]:
    """The argument MODEL and whether it must be given, which Typer then leaves to us; or ""."""
    for index, parameter in enumerate(parameters):
        found = _argument_settings(parameter)
        if found and found.metavar in ("MODEL", "MODEL|PATH", "MODEL|REPO"):
            is_required = parameter.default is Parameter.empty
            if is_required:
                parameters[index] = parameter.replace(
                    default=None,
                    annotation=Annotated[get_args(parameter.annotation)[0] | None, found],
                )
            return parameter.name, is_required
    return "", False


def _options(group: Any, mark: Only = Without()) -> list[Parameter]:  # noqa: B008
    hints = LOADING if group is LoadOptions else get_type_hints(group, include_extras=True)
    offered = [f for f in fields(group) if get_origin(hints.get(f.name)) is Annotated]
    names = [field.name for field in offered]
    if unknown := mark.names.difference(names):
        raise TypeError(f"{group.__name__} has no option {', '.join(unknown)}")
    chosen = mark.chosen(names)
    return [
        Parameter(
            field.name,
            _KEYWORD,
            default=None if field.default == () else field.default,
            annotation=hints[field.name],
        )
        for field in offered
        if field.name in chosen
    ]
