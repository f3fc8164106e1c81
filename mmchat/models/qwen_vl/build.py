"""Qwen-VL's math and weights, as loading and export take them."""

from __future__ import annotations

from mmchat.models.build import Build
from mmchat.models.qwen_vl.config import QwenVLConfig
from mmchat.models.qwen_vl.model import QwenVLForConditionalGeneration
from mmchat.models.qwen_vl.processor import QwenVLProcessor
from mmchat.models.qwen_vl.tensor_names import hub_name, hub_shapes


class QwenVLBuild(Build[QwenVLConfig, QwenVLForConditionalGeneration]):
    """See mmchat.models.build.Build."""

    label = "Qwen-VL"
    shapes = staticmethod(hub_shapes)
    hub_name = staticmethod(hub_name)
    model = QwenVLForConditionalGeneration
    processor = QwenVLProcessor
