"""The model families, by the `model_type` of their params files."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

from mmchat.errors import quoted
from mmchat.models.build import FamilyModel
from mmchat.models.family import Config, Family
from mmchat.strict_json import Where, nearest

# A family is only given configs and models that it made itself, so that others need not know what
# these are: the one place where its own types are forgotten.
AnyFamily = Family[Config, FamilyModel]
LoadFamily = Callable[[], Family[Any, Any]]


@cache
def _mllama() -> Family[Any, Any]:
    from mmchat.models.mllama.family import MllamaFamily

    return MllamaFamily()


FAMILIES: dict[str, LoadFamily] = {"mllama": _mllama}


def register(model_type: str, load: LoadFamily) -> None:
    """Add a family from elsewhere. load: imports it, when it is asked for the first time.

    Raises ValueError for a name that is taken.
    """
    if model_type in FAMILIES:
        raise ValueError(f"a family named {quoted(model_type)} is registered already")
    FAMILIES[model_type] = cache(load)


def families() -> Iterator[AnyFamily]:
    """All of them; each is imported when it is its turn."""
    for load in FAMILIES.values():
        yield load()


def get_family(model_type: object, where: Where) -> AnyFamily:
    """The family named by a params file or config; `where`'s error if there is none."""
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        near = nearest(model_type, list(FAMILIES)) if isinstance(model_type, str) else ""
        known = ", ".join(map(quoted, FAMILIES))
        raise where.child("model_type").fail(
            f"unknown model type {quoted(model_type)}{near}; mmchat runs {known}"
        )
    return FAMILIES[model_type]()
