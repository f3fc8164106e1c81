"""The model families, by the `model_type` of their params files."""

from __future__ import annotations

from importlib import import_module

from mmchat.errors import quoted
from mmchat.models.family import Family
from mmchat.strict_json import Where, nearest

_HOMES = {
    "mllama": "mmchat.models.mllama.family",
}

MODEL_TYPES = tuple(_HOMES)


def get_family(model_type: object, where: Where) -> Family:
    """The family named by a params file or config; `where`'s error if there is none."""
    if not isinstance(model_type, str) or model_type not in _HOMES:
        near = nearest(model_type, MODEL_TYPES) if isinstance(model_type, str) else ""
        known = ", ".join(map(quoted, MODEL_TYPES))
        raise where.child("model_type").fail(
            f"unknown model type {quoted(model_type)}{near}; mmchat runs {known}"
        )
    return import_module(_HOMES[model_type]).FAMILY
