"""The model families, by the `model_type` of their params files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any

from mmchat.checkpoints.packed import Packing, packed_key, packing_of
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


@cache
def _llava() -> Family[Any, Any]:
    from mmchat.models.llava.family import LlavaFamily

    return LlavaFamily()


@cache
def _qwen_vl() -> Family[Any, Any]:
    from mmchat.models.qwen_vl.family import QwenVLFamily

    return QwenVLFamily()


FAMILIES: dict[str, LoadFamily] = {"mllama": _mllama, "llava": _llava, "qwen_vl": _qwen_vl}
# Other model types of config.json files -> the family that reads them.
_ALSO = {"llava_llama": "llava", "mllama_text_model": "mllama", "qwen": "qwen_vl"}
# Model types of relatives that are not run -> what they are.
_NOT_RUN = {
    "llama": "a Llama that sees no pictures",
    "llama4": "Llama 4",
    "llava_next": "LLaVA-NeXT (1.6), which cuts pictures into tiles",
    "llava_mistral": "LLaVA with Mistral as its text model",
    "llava_onevision": "LLaVA-OneVision, with another vision encoder and text model",
    "llava_qwen": "LLaVA with Qwen as its text model",
    "llava_mpt": "LLaVA with MPT as its text model",
    "qwen2_vl": "Qwen2-VL, another architecture than Qwen-VL",
    "qwen2_5_vl": "Qwen2.5-VL, another architecture than Qwen-VL",
    "qwen3_vl": "Qwen3-VL, another architecture than Qwen-VL",
}


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


def packing_for(found: Mapping[str, Any], where: Where) -> Packing | None:
    """`packing_of` a config.json; where's error too where its family reads no packed weights."""
    named, key = _family_of(found.get("model_type")), packed_key(found)
    if key and named in FAMILIES and not FAMILIES[named]().takes_packed:
        raise where.child(key).fail(
            f"a {quoted(named)} quantised by another program, which mmchat does not read; take"
            " the original weights, and round them with --quantize int4"
        )
    return packing_of(found, where)


def get_family(model_type: object, where: Where) -> AnyFamily:
    """The family named by a params file or config; `where`'s error if there is none."""
    known = ", ".join(map(quoted, FAMILIES))
    named = _family_of(model_type)
    if named in _NOT_RUN:
        raise where.child("model_type").fail(
            f"{quoted(model_type)} is not supported: it is {_NOT_RUN[named]}; mmchat runs {known}"
        )
    if named not in FAMILIES:
        near = nearest(named, list(FAMILIES)) if named else ""
        raise where.child("model_type").fail(
            f"unknown model type {quoted(model_type)}{near}; mmchat runs {known}"
        )
    return FAMILIES[named]()


def _family_of(model_type: object) -> str:
    return _ALSO.get(model_type, model_type) if isinstance(model_type, str) else ""
