"""Qwen-VL's math and weights, as loading and export take them."""

from __future__ import annotations

from mmchat.checkpoints.checkpoint import Checkpoint
from mmchat.checkpoints.mapped_file import TensorEntry
from mmchat.models.build import Build, entries_by_name
from mmchat.models.qwen_vl.config import QwenVLConfig
from mmchat.models.qwen_vl.model import QwenVLForConditionalGeneration
from mmchat.models.qwen_vl.processor import QwenVLProcessor
from mmchat.models.qwen_vl.tensor_names import hub_name, hub_shapes


class QwenVLBuild(Build[QwenVLConfig, QwenVLForConditionalGeneration]):
    """See mmchat.models.build.Build."""

    label = "Qwen-VL"
    shapes = staticmethod(hub_shapes)
    model = QwenVLForConditionalGeneration
    processor = QwenVLProcessor

    def entries(self, checkpoint: Checkpoint) -> dict[str, TensorEntry]:
        return entries_by_name(checkpoint, hub_name)
