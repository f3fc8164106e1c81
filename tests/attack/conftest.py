"""How much is attacked: a seeded tenth with `-m slow`, all of it by full.sh (MMCHAT_ATTACK=1)."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

SHARE = float(os.environ.get("MMCHAT_ATTACK", "0.1"))
FIGURES = os.environ.get("MMCHAT_ATTACK_FIGURES")

Figures = Callable[..., None]


@pytest.fixture
def figures(request: pytest.FixtureRequest) -> Figures:
    """Takes what was counted; full.sh shows it at the end."""

    def take(**counted: float) -> None:
        if FIGURES:
            with Path(FIGURES).open("a") as file:
                file.write(json.dumps({"test": request.node.name, **counted}) + "\n")

    return take


def rounds(whole: int) -> int:
    """Of `whole` rounds, those of this run."""
    return max(1, round(whole * SHARE))
