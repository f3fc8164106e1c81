"""What families share who read configurations of others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmchat.errors import quoted
from mmchat.strict_json import Where

# Of the pictures that CLIP was trained with, and most vision encoders after it.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def value_or(found: Mapping[str, Any], key: str, default: Any) -> Any:
    """The value, where a missing key and null mean the default."""
    value = found.get(key)
    return default if value is None else value


def refuse_other(found: Mapping[str, Any], expected: Mapping[str, Any], where: Where) -> None:
    """Raises where's error for the first key that is there with another value than expected."""
    for key, value in expected.items():
        if found.get(key) is not None and found[key] != value:
            raise where.child(key).fail(
                f"{quoted(found[key])} is not supported here, only {quoted(value)}"
            )
