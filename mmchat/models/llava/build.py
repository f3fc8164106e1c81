"""LLaVA's math and weights, as loading and export take them."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from mmchat.checkpoints.checkpoint import Checkpoint
from mmchat.checkpoints.mapped_file import TensorEntry
from mmchat.models.build import Build, check_picture_size, entries_by_name
from mmchat.models.family import COMPANION
from mmchat.models.llava.config import LlavaConfig
from mmchat.models.llava.model import LlavaForConditionalGeneration
from mmchat.models.llava.processor import LlavaProcessor
from mmchat.models.llava.tensor_names import VISION, hub_name, hub_shapes

_POSITIONS = f"{VISION}embeddings.position_embedding.weight"


class LlavaBuild(Build[LlavaConfig, LlavaForConditionalGeneration]):
    """See mmchat.models.build.Build."""

    label = "LLaVA"
    shapes = staticmethod(hub_shapes)
    hub_name = staticmethod(hub_name)
    model = LlavaForConditionalGeneration
    processor = LlavaProcessor

    def entries(self, checkpoint: Checkpoint) -> dict[str, TensorEntry]:
        """A vision encoder of its own repository stands for one that was left in the checkpoint."""
        if not any(name.startswith(COMPANION) for name in checkpoint.entries):
            return super().entries(checkpoint)
        return entries_by_name(checkpoint, _hub_name_beside_companion)

    def check_weights(
        self, checkpoint: Checkpoint, config: LlavaConfig, wanted: Collection[str] | None = None
    ) -> Mapping[str, TensorEntry]:
        vision, positions = config.vision_config, self.entries(checkpoint).get(_POSITIONS)
        complaint = (
            "the vision encoder takes pictures of {} px, and the model gives it those of"
            f" {vision.image_size} px; use the encoder of the same model"
        )
        check_picture_size(positions, config, vision.num_patches + 1, complaint)
        return super().check_weights(checkpoint, config, wanted)


def _hub_name_beside_companion(name: str) -> str | None:
    own = hub_name(name)
    is_left = own is not None and own.startswith(VISION) and not name.startswith(COMPANION)
    return None if is_left else own
