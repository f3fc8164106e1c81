"""Lets commands take several options as one dataclass, so that each list of options stands once."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer
from typer.models import ArgumentInfo

from mmchat.cli.defaults import one_model, with_defaults
from mmchat.cli.options import LOADING, Color, Debug, ModelName, Words
from mmchat.cli.positional import Said, sort_words
from mmchat.errors import UsageError
from mmchat.loading.options import LoadOptions
from mmchat.parallel import launch

Parameter = inspect.Parameter
_KEYWORD = Parameter.KEYWORD_ONLY


class Only:
    """Annotated[Group, Only("device")]: of the group's options, the command has these alone."""

    def __init__(self, *names: str) -> None:
        self.names = frozenset(names)


class Without(Only):
    """Annotated[Group, Without("alpha")]: the command has all options of the group but these."""


def with_option_groups(command: Callable[..., None]) -> Callable[..., None]:
    """`command` with each parameter that is a dataclass replaced by the fields of that dataclass.

    Typer sees one option for each field that is annotated for it; the command gets the dataclass,
    filled with what was given; LoadOptions also with the defaults of what was not. It also sees
    --color and --debug, which act by their callbacks, and --model beside an argument MODEL, which
    then may be given in either way. In place of Said it sees the words that are sorted into it;
    their question is the prompt too, if none is given, and their pictures come first.
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
            options = _options(group, *(mark for mark in marks if isinstance(mark, Only)))
            if group is LoadOptions and any(map(_argument_settings, parameters)):
                # another argument stands in its place
                named = Parameter("name", _KEYWORD, default=None, annotation=ModelName)
                options = [named if option.name == "name" else option for option in options]
            groups[parameter.name] = group, [option.name for option in options]
            parameters += options
        else:
            parameters.append(parameter.replace(annotation=hint, kind=_KEYWORD))
    argument = next(filter(_is_model, parameters), None)
    if argument:  # which Typer leaves to us, also where it must be given
        parameters[parameters.index(argument)] = argument.replace(default=None)
        parameters.append(Parameter("named", _KEYWORD, default=None, annotation=ModelName))
    for name, default, hint in (("color", "auto", Color), ("debug", False, Debug)):
        parameters.append(Parameter(name, _KEYWORD, default=default, annotation=hint))
    for parameter in parameters:
        if get_origin(parameter.annotation) is Annotated:
            _complete(parameter)
    parameters.append(Parameter("ctx", _KEYWORD, annotation=typer.Context))

    @functools.wraps(command)
    def run(ctx: typer.Context, color: str, debug: bool, **given: Any) -> None:
        if argument:
            model = given[argument.name] = one_model(given[argument.name], given.pop("named"))
            if model is None and argument.default is Parameter.empty:
                raise UsageError("no MODEL is given; 'mmchat list' shows those that are known")
        if said:
            has_prompt = given.get("prompt") is not None
            words = given[said] = sort_words(given[said] or [], has_prompt=has_prompt)
            given["name"] = one_model(words.model, given["name"])
            given["images"] = [*words.pictures, *(given["images"] or [])]
            if "prompt" in given and not has_prompt:
                given["prompt"] = words.question
        for name, (group, options) in groups.items():
            values = {option: given.pop(option) for option in options}
            if group is LoadOptions and "name" in values:
                values = with_defaults(values, ctx)
            if "parallel" in values:
                values = _of_launcher(values, command.__name__)
            given[name] = group(**{k: v for k, v in values.items() if v is not None})
        command(**given)

    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def _of_launcher(values: dict[str, Any], command: str) -> dict[str, Any]:
    """Fields of LoadOptions, with as many ranks as torchrun or srun has started, if one has.

    Only rank 0 returns; the others follow it until it ends. Raises UsageError and RankError.
    """
    ranks = launch.launched_ranks()
    if ranks == 1:
        return values
    if command == "chat":
        raise UsageError(
            "chat has no terminal of its own under a launcher; use generate, batch or serve there,"
            " or mmchat chat --parallel N on one machine"
        )
    asked = values.get("parallel")
    if asked not in (None, ranks):
        raise UsageError(
            f"--parallel {asked}, but the launcher has started {ranks} ranks (WORLD_SIZE); leave"
            " out --parallel"
        )
    timeout = values["parallel_timeout"]
    if launch.launched_rank():
        from mmchat.loading.follower import follow

        launch.end_with_parent()
        follow(timeout, timeout)
    launch.adopt(group := launch.join(timeout, timeout))
    from mmchat.runtime.mirrored import driver_of

    driver_of(group).show_life()
    return {**values, "parallel": ranks}


def _complete(parameter: Parameter) -> None:
    """An option that is on or off has one name, numbers are shown as N and X, paths have a name."""
    kind, settings = get_args(parameter.annotation)[:2]
    if kind in (Path, Path | None):
        settings.parser = _path
    if kind is bool and settings.default is ...:  # where its first name would stand
        settings.param_decls = (f"--{parameter.name.replace('_', '-')}",)
    for number, metavar in ((int, "N"), (float, "X")):
        if kind in (number, number | None) and settings.metavar is None:
            settings.metavar = metavar


def _path(text: str) -> Path:
    """Raises BadParameter: `Path("")` would be the current folder."""
    if not text:
        raise typer.BadParameter("it is empty; give a name, or leave it out")
    return Path(text)


def _argument_settings(parameter: Parameter) -> ArgumentInfo | None:
    """None for an option."""
    settings = get_args(parameter.annotation)[1:]
    return next((s for s in settings if isinstance(s, ArgumentInfo)), None)


def _is_model(parameter: Parameter) -> bool:
    found = _argument_settings(parameter)
    return found is not None and found.metavar in ("MODEL", "MODEL|PATH", "MODEL|REPO")


def _options(group: Any, mark: Only = Without()) -> list[Parameter]:  # noqa: B008
    hints = LOADING if group is LoadOptions else get_type_hints(group, include_extras=True)
    offered = [f for f in fields(group) if get_origin(hints.get(f.name)) is Annotated]
    names = frozenset(field.name for field in offered)
    if unknown := mark.names.difference(names):
        raise TypeError(f"{group.__name__} has no option {', '.join(unknown)}")
    chosen = names - mark.names if isinstance(mark, Without) else mark.names
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
