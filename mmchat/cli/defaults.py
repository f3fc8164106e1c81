"""Defaults of options: an MMCHAT_ variable, else config.toml, else what is built in."""

from __future__ import annotations

import json
import os
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmchat import limits
from mmchat.cli.model_choice import BUILT_IN
from mmchat.errors import MmchatError, UsageError, disk_errors, quoted
from mmchat.hardware.placement import check_device_name
from mmchat.quant.schemes import AUTO, find_scheme
from mmchat.spelling import closest
from mmchat.storage import atomic_file
from mmchat.strict_json import Where, escaped, read_bounded

if TYPE_CHECKING:
    import typer

    from mmchat.checkpoints.exported_folder import ExportedFolder

# name, which is also the option's -> what is built in
BUILT_IN_VALUES = {"model": BUILT_IN, "quantize": AUTO, "device": "auto"}
EXAMPLES = {"model": '"llama3.2-11B"', "quantize": '"int4"', "device": '"cpu"'}
NOWHERE = "built in"


@dataclass(frozen=True)
class Default:
    """origin: the variable or file that says so, or NOWHERE."""

    value: str
    origin: str


def config_path() -> Path:
    """Where the file would be; it need not be there."""
    import platformdirs

    return platformdirs.user_config_path("mmchat", appauthor=False) / "config.toml"


def variable(name: str) -> str:
    """The environment variable of a setting: MMCHAT_MODEL."""
    return f"MMCHAT_{name.upper()}"


def defaults() -> dict[str, Default]:
    """Each setting by name. Raises UsageError for what no setting may be, with its place."""
    path = config_path()
    filed, shown = _settings(_text(path), path), escaped(str(path))
    found = {}
    for name, built_in in BUILT_IN_VALUES.items():
        if value := os.environ.get(variable(name)):
            found[name] = Default(value, variable(name))
            _check(name, value, variable(name))
        else:
            is_filed = name in filed
            found[name] = Default(filed.get(name, built_in), shown if is_filed else NOWHERE)
    return found


def set_default(name: str, value: str) -> Path:
    """Write a setting into the file, whose other lines stay. Raises UsageError, DiskError, …"""
    path = config_path()
    _check(name, value, name)
    if name == "model":
        _check_model(Default(value, "not written"))
    text = _text(path)
    _settings(text, path)  # nothing is written into a broken file
    line = f"{name} = {json.dumps(value, ensure_ascii=False)}\n"
    changed, count = re.subn(rf"(?m)^[ \t]*{name}[ \t]*=.*\n?", lambda _: line, text)
    changed = changed if count else text + "\n" * (text[-1:] not in ("", "\n")) + line
    try:
        is_set = tomllib.loads(changed)[name] == value
    except tomllib.TOMLDecodeError:
        is_set = False
    if not is_set:
        form = f"is written in another form; change it by hand: {line.strip()}"
        raise UsageError(f"{quoted(path, 300)} {form}")
    with disk_errors(f"cannot make the folder {quoted(path.parent, 300)}"):
        path.parent.mkdir(parents=True, exist_ok=True)
    atomic_file.write_text(path, changed)
    return path


def with_defaults(values: dict[str, Any], context: typer.Context) -> dict[str, Any]:
    """Fields of LoadOptions, what the command line left open taken from `defaults`.

    values: all that the command offers, with the name. What is exported in some scheme, or for one
    device, stays so. Raises what finding the model of a default raises, with its place.
    """
    chosen = {name: default for name, default in defaults().items() if default.origin != NOWHERE}
    taken = dict(values)
    has_paths = values.get("checkpoint_path") or values.get("params_path")
    if values["name"] is None and not has_paths and "model" in chosen:
        taken["name"] = chosen["model"].value
        _check_model(chosen["model"])
    offered = {"quantize", "device"} & chosen.keys() & values.keys()
    sources = {name: context.get_parameter_source(name) for name in offered}
    is_open = [name for name, source in sources.items() if source and source.name == "DEFAULT"]
    exported = _exported(values.get("checkpoint_path") or taken["name"]) if is_open else None
    has_device = exported is not None and exported.record.programs  # which are made for one
    stays = {"quantize": exported is not None, "device": has_device}
    taken |= {name: chosen[name].value for name in is_open if not stays[name]}
    return taken


def one_model(argument: Any, option: Any) -> Any:
    """The model of MODEL or of --model. Raises UsageError if both are given and differ."""
    if argument is not None and option is not None and argument != option:
        raise UsageError(
            f"MODEL {quoted(argument)} and --model {quoted(option)} are two models; give one"
        )
    return option if argument is None else argument


def _exported(name: Any) -> ExportedFolder | None:
    from mmchat.checkpoints.exported_folder import exported_folder

    try:
        return None if name is None else exported_folder(Path(name).expanduser())
    except (MmchatError, OSError, ValueError, RuntimeError):  # finding it says what is wrong
        return None


def _check_model(default: Default) -> None:
    from mmchat.catalog.find import find_model

    try:
        find_model(default.value, adapter="none", checkpoint_required=False)
    except MmchatError as error:
        raise type(error)(f"{default.origin}, model = {quoted(default.value)}: {error}") from None


def _text(path: Path) -> str:
    """What is in the file; empty if it is not there. Raises UsageError."""
    where = Where(str(path), error=UsageError)
    try:
        if path.stat().st_size == 0:
            return ""
    except (FileNotFoundError, NotADirectoryError):
        return ""
    except OSError as error:
        raise where.fail(f"cannot be read ({error.strerror})") from None
    data = read_bounded(path, limits.CONFIG_TOML_BYTES, where)
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise where.fail("not UTF-8 text; save it as UTF-8") from None


def _settings(text: str, path: Path) -> dict[str, str]:
    """The settings by name. Raises UsageError."""
    where = Where(str(path), error=UsageError)
    try:
        table = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise where.fail(f'not TOML: {error}; a line is written model = "tiny"') from None
    for name, value in table.items():
        _check(
            name, value, f"{escaped(str(path))}: {name if name.isidentifier() else quoted(name)}"
        )
    return table


def _check(name: str, value: object, place: str) -> None:
    """place: where the setting stands, for the message. Raises UsageError."""
    given = f"{place} = {quoted(value)}"
    known = ", ".join(BUILT_IN_VALUES)
    if name not in BUILT_IN_VALUES:
        near = closest(name, BUILT_IN_VALUES, cutoff=0.6)
        hint = f"did you mean {near[0]}?" if near else f"there are {known}"
        raise UsageError(f"{given}: there is no such setting; {hint}")
    if not isinstance(value, str) or not value.strip():
        raise UsageError(f"{given}: {name} is a text in quotes, such as {EXAMPLES[name]}")
    try:
        if name == "quantize" and value != AUTO:
            find_scheme(value)
        elif name == "device":
            check_device_name(value)
    except MmchatError as error:
        raise UsageError(f"{given}: {error}") from None
