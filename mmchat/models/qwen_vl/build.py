"""Qwen-VL's math and weights, as loading and export take them."""

from __future__ import annotations

from mmchat.checkpoints.checkpoint import Checkpoint
from mmchat.checkpoints.mapped_file import TensorEntry
from mmchat.models.family import Alpha
from mmchat.models.hub_weights import HubWeights, entries_by_name
from mmchat.models.qwen_vl.config import QwenVLConfig
from mmchat.models.qwen_vl.model import QwenVLForConditionalGeneration
from mmchat.models.qwen_vl.processor import QwenVLProcessor
from mmchat.models.qwen_vl.tensor_names import hub_name, hub_shapes
from mmchat.models.square_family import WithoutPrograms
from mmchat.tokenizers.base import Tokenizer


class QwenVLBuild(WithoutPrograms, HubWeights[QwenVLConfig]):
    """See mmchat.models.build.Build."""

    label = "Qwen-VL"

    def shapes(self, config: QwenVLConfig) -> dict[str, tuple[int, ...]]:
        return hub_shapes(config)

    def entries(self, checkpoint: Checkpoint) -> dict[str, TensorEntry]:
        return entries_by_name(checkpoint, hub_name)

    def model(self, config: QwenVLConfig) -> QwenVLForConditionalGeneration:
        return QwenVLForConditionalGeneration(config)

    def processor(
        self, config: QwenVLConfig, tokenizer: Tokenizer, alpha: Alpha
    ) -> QwenVLProcessor:
        return QwenVLProcessor(config, tokenizer, alpha)
