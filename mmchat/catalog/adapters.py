"""Find adapters: what `--adapter` names, and the base that an adapter's own config names."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mmchat.checkpoints.adapter_config import CONFIG_NAME, is_adapter, read_adapter_config
from mmchat.checkpoints.hub_cache import cached_snapshot, is_repo_id, weight_files
from mmchat.errors import CheckpointError, UsageError, quoted

NONE = "none"  # as --adapter: those that lie beside the weights are left out
_MOST = 16  # at once
_SCALES = (-10.0, 10.0)
# What makers of smaller files put behind the name of the model that they made them of.
_ROUNDED = re.compile(
    r"([-_.](unsloth|bnb|nf4|fp4|fp8|dynamic|[48]-?bits?|int[48]|quantized|w\d+a\d+|gptq|awq|hf))+$"
)


@dataclass(frozen=True)
class AdapterSource:
    """An adapter on this machine, and what its change is multiplied with."""

    folder: Path
    scale: float = 1.0

    @property
    def name(self) -> str:
        """Of its repository or folder, with its scale; by it a server's clients ask for it."""
        folder = self.folder.resolve()
        in_cache = folder.parent.name == "snapshots"
        name = folder.parents[1].name.rpartition("--")[2] if in_cache else folder.name
        return name + (f":{self.scale:g}" if self.scale != 1 else "")

    def __str__(self) -> str:
        """As --adapter takes it."""
        return f"{self.folder.resolve()}" + (f":{self.scale!r}" if self.scale != 1 else "")


def find_adapters(given: str | Path | Sequence[str | Path]) -> tuple[AdapterSource, ...]:
    """Adapters by folder or Hub repository, each perhaps with `:SCALE` behind it.

    Raises UsageError for a scale that is none, CheckpointError for what is not here or no adapter.
    """
    each = [given] if isinstance(given, str | Path) else list(given)
    if each == [NONE]:
        return ()
    if len(each) > _MOST:
        raise UsageError(f"{len(each)} adapters, at most {_MOST} are merged")
    return tuple(_find(str(one)) for one in each)


def _find(text: str) -> AdapterSource:
    if folder := _folder(text):
        return AdapterSource(_checked(folder))
    name, colon, number = text.rpartition(":")
    if colon and (folder := _folder(name)):
        try:
            scale = float(number)
        except ValueError:
            scale = math.nan
        if not _SCALES[0] <= scale <= _SCALES[1]:
            least, most = _SCALES
            raise UsageError(
                f"--adapter {quoted(text, 200)}: behind the colon stands a number from {least:g} to"
                f" {most:g}"
            )
        return AdapterSource(_checked(folder), scale)
    name = name if colon else text
    fetch = f"; 'mmchat download {name}' fetches it" if is_repo_id(name) else ""
    raise CheckpointError(f"--adapter {quoted(text, 200)}: no such folder or repository{fetch}")


def existing(name: str | Path) -> Path | None:
    """The file or folder of that name, `~` expanded; None also where no path can be called so."""
    try:
        path = Path(name).expanduser()
        return path if path.exists() else None
    except (OSError, RuntimeError, ValueError):  # too long, no such user, a NUL
        return None


def _folder(name: str) -> Path | None:
    """The folder that is meant; a file of an adapter stands for its folder."""
    if name and (path := existing(name)):
        return path if path.is_dir() else path.parent
    return cached_snapshot(name) if is_repo_id(name) else None


def _checked(folder: Path) -> Path:
    if not is_adapter(folder):
        raise CheckpointError(
            f"--adapter {quoted(str(folder), 300)}: no {CONFIG_NAME} is there, so it is no adapter"
        )
    return folder


def is_alone(place: Path) -> bool:
    """Whether an adapter lies there, or is this file, without the weights of its base."""
    if place.is_dir():
        own = [path for path in weight_files(place) if not path.name.startswith("adapter_model")]
        return is_adapter(place) and not own
    return place.name.startswith("adapter_model") and is_adapter(place.parent)


def alone_at(name: str) -> Path | None:
    """The folder of an adapter that is named as a model; None if it names something else."""
    folder = _folder(name)
    return folder if folder and is_alone(folder) else None


def base_names(folder: Path) -> tuple[str, str]:
    """The name of the base that an adapter's config gives, and the same without its rounding.

    Both only to be looked up: a path there is one of another machine. Raises CheckpointError.
    """
    name = read_adapter_config(folder).base
    return name, plain_name(re.split(r"[/\\]", name.rstrip("/\\"))[-1])


def plain_name(name: str) -> str:
    """A model's name in lower case, without what says how its weights are rounded."""
    return _ROUNDED.sub("", name.casefold())


def refuse_beside(folder: Path) -> None:
    """Raises CheckpointError where an adapter lies beside a model's weights, and none is chosen."""
    if is_adapter(folder):
        shown = quoted(str(folder), 300)
        raise CheckpointError(
            f"{shown} holds a model and an adapter ({CONFIG_NAME}), and does not say whether it is"
            f" merged already; --adapter {shown} merges it, --adapter {NONE} leaves it out"
        )
