"""Put a model of ours in the place of the one that a command would find and load."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mmchat.catalog.known import find_spec
from mmchat.catalog.source import ModelSource
from mmchat.catalog.spec import ModelSpec
from mmchat.cli import model_choice
from mmchat.loading.options import LoadOptions


def known_spec(name: str) -> ModelSpec:
    found = find_spec(name)
    assert found is not None
    return found


def install(model: Any, set_attribute: Callable[[object, str, Any], None]) -> list[LoadOptions]:
    """Let every command find and load `model`; returns the options that were loaded with."""
    loaded: list[LoadOptions] = []

    def load(options: LoadOptions, source: ModelSource, stages: Any) -> Any:
        stages.show("loading the fake")
        loaded.append(options)
        return model

    source = ModelSource(model.spec, None, None)
    set_attribute(LoadOptions, "find", lambda _self, checkpoint_required=True: source)
    set_attribute(model_choice, "load", load)
    return loaded
