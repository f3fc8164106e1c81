"""What families share who read configurations of others."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from mmchat.errors import quoted
from mmchat.strict_json import Where

# Of the pictures that CLIP was trained with, and most vision encoders after it.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


RESCALE = 1 / 255


def value_or(found: Mapping[str, Any], key: str, default: Any) -> Any:
    """The value, where a missing key and null mean the default."""
    value = found.get(key)
    return default if value is None else value


def with_defaults(found: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The values of these keys; a missing one and null mean the default."""
    return {key: value_or(found, key, default) for key, default in defaults.items()}


def refuse_other(found: Mapping[str, Any], expected: Mapping[str, Any], where: Where) -> None:
    """Raises where's error for the first key that is there with another value than expected."""
    for key, value in expected.items():
        if found.get(key) is not None and found[key] != value:
            raise where.child(key).fail(
                f"{quoted(found[key])} is not supported here, only {quoted(value)}"
            )


def levels_of(preprocessor: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """image_mean and image_std of a preprocessor_config.json, or CLIP's."""
    usual = {"image_mean": list(CLIP_MEAN), "image_std": list(CLIP_STD)}
    return with_defaults(preprocessor or {}, usual)


def check_preprocessor(found: Mapping[str, Any], expected: Mapping[str, Any], where: Where) -> None:
    """Refuse another way of preparing pictures than that which the model has."""
    scale = found.get("rescale_factor")
    if type(scale) is float and math.isclose(scale, RESCALE, rel_tol=1e-6):  # fewer digits
        found = {**found, "rescale_factor": RESCALE}
    steps = ("do_convert_rgb", "do_resize", "do_rescale", "do_normalize")
    usual = {**dict.fromkeys(steps, True), "rescale_factor": RESCALE}
    refuse_other(found, {**usual, **expected}, where)


def folder_documents(
    model: dict[str, Any],
    generation: Mapping[str, float],
    tokens: Mapping[str, Any],
    pictures: dict[str, Any] | None = None,
) -> dict[str, dict[str, Any]]:
    """The JSON files of a folder of the Hub. tokens: ids, as generation_config.json has them."""
    answers = {**generation, "do_sample": generation["temperature"] > 0, **tokens}
    found = {"config.json": model, "generation_config.json": answers}
    return found | ({"preprocessor_config.json": pictures} if pictures else {})


def preprocessor_document(kind: str, pictures: Any, **own: Any) -> dict[str, Any]:
    """preprocessor_config.json. pictures: the config's image_processor."""
    steps = ("do_convert_rgb", "do_resize", "do_rescale", "do_normalize", "do_pad")
    return {
        "image_processor_type": kind,
        **dict.fromkeys(steps, True),
        "image_mean": pictures.image_mean,
        "image_std": pictures.image_std,
        "rescale_factor": RESCALE,
        **own,
    }
