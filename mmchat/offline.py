"""Whether this run may use the network at all."""

from __future__ import annotations

import os


def go_offline() -> None:
    """Forbid the network for the rest of the run, to huggingface_hub as well."""
    os.environ["MMCHAT_OFFLINE"] = os.environ["HF_HUB_OFFLINE"] = "1"


def is_offline(variable: str = "MMCHAT_OFFLINE") -> bool:
    """Whether the environment variable forbids the network."""
    return os.environ.get(variable, "").upper() in ("1", "ON", "YES", "TRUE")


def is_hub_offline() -> bool:
    """Whether this run may not ask the Hub (HF_HUB_OFFLINE or MMCHAT_OFFLINE)."""
    return is_offline() or is_offline("HF_HUB_OFFLINE")
