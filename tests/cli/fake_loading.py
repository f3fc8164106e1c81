"""Put a model of ours in the place of the one that a command would find and load."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mmchat.catalog.find import ModelParams, ModelSource, find_params
from mmchat.cli.model_choice import ModelChoice


def known_params(name: str) -> ModelParams:
    found = find_params(name)
    assert found is not None
    return found


def install(model: Any, set_attribute: Callable[[object, str, Any], None]) -> list[ModelChoice]:
    """Let every command find and load `model`; returns the choices that were loaded."""
    loaded: list[ModelChoice] = []

    def load(choice: ModelChoice, stages: Any) -> Any:
        stages.show("loading the fake")
        loaded.append(choice)
        return model

    source = ModelSource(model.params, None, None)
    set_attribute(ModelChoice, "find", lambda _self, checkpoint_required=True: source)
    set_attribute(ModelChoice, "load", load)
    return loaded
