"""Mllama's math, weights and programs, as loading and export take them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from mmchat.models.mllama.model import MllamaForConditionalGeneration
from mmchat.models.mllama.processor import MllamaProcessor
from mmchat.models.mllama.weights import check_weights, hub_entries, iter_weights

if TYPE_CHECKING:
    pass


class MllamaBuild:
    """See mmchat.models.build.Build."""

    check_weights = staticmethod(check_weights)
    iter_weights = staticmethod(iter_weights)
    hub_entries = staticmethod(hub_entries)
    model = MllamaForConditionalGeneration
    processor = MllamaProcessor

    def programs(self, format: Literal["aoti", "executorch"]) -> MllamaPrograms:
        return MllamaPrograms(format)


class MllamaPrograms:
    """See mmchat.models.build.Programs. aoti writes into its caches, executorch gives new ones."""

    def __init__(self, format: Literal["aoti", "executorch"]) -> None:
        if format == "aoti":
            from mmchat.models.mllama import export as programs
        else:
            from mmchat.models.mllama import export_portable as programs
        self.export_programs, self.model = programs.export_programs, programs.ExportedModel
