"""What the rest of the program may ask of a model family, before and without loading its math."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from mmchat.strict_json import Where


@dataclass(frozen=True)
class FamilyParams:
    """The parts of a params file that belong to the family; opaque to everyone else.

    config: sizes of the model. image_processor: has `image_mean`, `image_std` and
    `alpha_for(checkpoint_format)`.
    """

    config: Any
    image_processor: Any


@dataclass(frozen=True)
class Family:
    """One model family: how its configuration is read, and where its math lives.

    sections: keys of a params file that `parse` reads. The functions take parsed JSON objects and a
    Where for messages, and raise ParamsError. parameter_count: parameters in the Hub's format.
    tile_size: side of one tile in pixels; with_tile_size: the same config but for it. model,
    processor, weights, prompt, documents (the config in other formats), export (programs to be
    compiled ahead of time, which write into their caches), export_portable (programs without side
    effects) and footprint (sizes in memory) are "module:attribute" or "module",
    imported only by `resolve`.
    """

    model_type: str
    sections: tuple[str, ...]
    parse: Callable[[Mapping[str, Any], Where], FamilyParams]
    from_hf_config: Callable[
        [Mapping[str, Any], Mapping[str, Any] | None, Where, Where], FamilyParams
    ]
    from_meta_params: Callable[[Mapping[str, Any], Where], FamilyParams]
    parameter_count: Callable[[Any], int]
    tile_size: Callable[[Any], int]
    with_tile_size: Callable[[Any, int], Any]
    model: str
    processor: str
    weights: str
    prompt: str
    documents: str
    export: str
    export_portable: str
    footprint: str

    def resolve(self, part: str) -> Any:
        """Import `part` ("model", "processor", "weights", …)."""
        module, _, attribute = getattr(self, part).partition(":")
        found = import_module(module)
        return getattr(found, attribute) if attribute else found
