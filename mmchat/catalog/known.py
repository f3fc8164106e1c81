"""The models that have a params file here: their names, and which of them are on this machine."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

from mmchat import words
from mmchat.catalog import adapters
from mmchat.catalog.spec import ModelSpec, load_spec
from mmchat.checkpoints.hub_cache import cached_snapshot, is_repo_id, weight_files
from mmchat.errors import ParamsError, UsageError, quoted
from mmchat.models.family import Config
from mmchat.offline import is_hub_offline
from mmchat.spelling import closest
from mmchat.strict_json import escaped

# x:latest, x:11b, x:11b-instruct, x:11b-instruct-q4_K_M
_TAG = re.compile(r"([\w.-]+)(?::latest|(:[\d.]+b))(?:-instruct(?:-\w+)?)?", re.ASCII)


def data_path(*parts: str) -> Path:
    """A file of ours: inside the wheel, or in the checkout that an editable install points to."""
    package = Path(__file__).parents[1]
    packaged = package / "_data"
    return (packaged if packaged.is_dir() else package.parent).joinpath(*parts)


@cache
def known_specs() -> tuple[ModelSpec, ...]:
    """The models with a params file, the built-in one first."""
    found = [load_spec(path) for path in sorted(data_path("model_params").glob("*.json"))]
    return tuple(sorted(found, key=lambda spec: (spec.packaged is None, spec.name)))


def find_spec(name: str) -> ModelSpec | None:
    """The known model with this name, alias or Hub repository, in any case, or None.

    Tags of Ollama are read as far as they name a model: `x:11b-instruct-q4_K_M` is `x:11b`.
    """
    wanted = name.casefold()
    if tag := _TAG.fullmatch(wanted):
        wanted = tag[1] + (tag[2] or "")
    for spec in known_specs():
        names = (spec.name, spec.repo or "", *spec.aliases)
        if wanted in map(str.casefold, names):
            return spec
    return None


def answering_sibling(base: ModelSpec) -> str:
    """What is typed for the model that answers questions where `base` continues text; "" if none.

    Meta calls the base models by the shorter names, which are typed by mistake.
    """
    if base.chat_format != "base":
        return ""
    sibling = find_spec(f"{base.name}-Instruct") or find_spec(f"{base.name}-Chat")
    return sibling.aliases[0] if sibling else ""


def base_spec(name: str | Path) -> ModelSpec | None:
    """The known model that an adapter was made of; None for what is no adapter, or not known."""
    place = adapters.alone_at(str(name))
    if place is None:
        return None
    full, plain = adapters.base_names(place)
    if not plain:
        return None
    if known := find_spec(full):
        return known
    for spec in known_specs():
        names = (spec.name, (spec.repo or "").rpartition("/")[2], *spec.aliases)
        if plain in {adapters.plain_name(name) for name in names}:
            return spec
    return None


def params_file_for(config: Config, like: ModelSpec) -> str | None:
    """The params file of the known model that has this config, a chat model if `like` is one."""
    fitting = [spec for spec in known_specs() if spec.config == config]
    fitting.sort(key=lambda spec: spec.chat_format != like.chat_format)
    return fitting[0].source.name if fitting else None


def repo_of(name: str) -> str:
    """The Hub repository that a name, alias or repository means.

    Raises UsageError for the built-in model, ParamsError for an unknown name.
    """
    known = find_spec(name)
    if known is None:
        if is_repo_id(name):
            return name
        raise unknown(name)
    if known.repo is None:
        raise UsageError(f"{known.name} is built in: there is nothing to download or remove")
    return known.repo


def nearest_names(name: str) -> list[str]:
    """Names and aliases of known models that are spelt nearly so, the nearest first."""
    names = (n for spec in known_specs() for n in (spec.name, *spec.aliases))
    return closest(name, names, cutoff=0.5, count=3)


def unknown(name: str) -> ParamsError:
    close = nearest_names(name)
    hint = "nearest: " + ", ".join(map(quoted, close)) + "; " if close else ""
    if is_repo_id(name):
        hint = f"to fetch it from the Hub: 'mmchat download {name}'; {hint}"
    return ParamsError(f"no model {quoted(name)} ({hint}'mmchat list' shows all, or give a path)")


def folder_on_disk(spec: ModelSpec) -> Path | None:
    if spec.packaged:
        folder = data_path(spec.packaged)
    else:
        folder = cached_snapshot(spec.repo) if spec.repo else None
    return folder if folder and weight_files(folder) else None


def how_to_get(spec: ModelSpec) -> str:
    if spec.packaged:
        return f"the built-in model's weights are not in {escaped(str(data_path(spec.packaged)))}"
    if not spec.repo:
        return f"no weights given for {spec.name}; use --checkpoint-path"
    if is_hub_offline():
        return (
            f"{spec.name} is not on this machine, and this run is offline; "
            "copy its files here and give their folder as the model"
        )
    return (
        f"{spec.name} is not on this machine; accept its licence at "
        f"https://huggingface.co/{spec.repo}, then 'mmchat download {spec.name}' "
        f"(about {words.size(2 * spec.parameters)}), or give the folder that it is in"
    )
