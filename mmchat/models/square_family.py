"""What families have in common that see a picture as one square, at positions of its own."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from mmchat.models.family import Alpha, Description, Family
from mmchat.words import pixels, size

if TYPE_CHECKING:
    from PIL.Image import Image as Drawing

    from mmchat.conversation import Image

C = TypeVar("C", bound=Any)  # the family's config: vision_config, text_config, image_processor


class SquareFamily(Family[C, Any], Generic[C]):
    """Part of models.family.Family. The family adds what is abstract, and what is not here."""

    @abstractmethod
    def drawn(self, config: C, image: Image) -> Drawing:
        """The square that the model sees, of preview.SQUARE pixels to a side."""

    def draw(self, config: C, image: Image) -> Drawing:
        from mmchat.models.preview import on_sheet

        told = self.facts(config, image.height, image.width)
        lines = f"{pixels(told.size)}, {told.placed}", f"{told.tokens:,} vision tokens"
        return on_sheet(image.source, lines, self.drawn(config, image))

    @abstractmethod
    def vision_words(self, config: C) -> str:
        """Its encoder in a few words, such as "24 layers of 1,024"."""

    def text_words(self, config: C) -> str:
        text = config.text_config
        return (
            f"{text.num_hidden_layers} layers of {text.hidden_size:,}; {text.vocab_size:,} tokens,"
            f" context {text.max_position_embeddings:,}"
        )

    def details(self, config: C, positions: int) -> dict[str, Any]:
        """The description in JSON. positions: those of a picture."""
        vision = {**asdict(config.vision_config), "positions_per_image": positions}
        return {"vision": vision, "text": asdict(config.text_config)}

    def describe(self, config: C) -> Description:
        sizes = self.sizes(config)
        side = config.vision_config.image_size
        told = self.facts(config, side, side)
        kept = 2 * sizes.picture_numbers(told)
        positions = 2 * sizes.cache_per_token * told.positions
        return Description(
            image_size=side,
            pictures=f"squares of {side} px",
            lines=(
                (
                    "vision",
                    f"{self.vision_words(config)}; squares of {side} px,"
                    f" {told.positions:,} positions each",
                ),
                ("text", self.text_words(config)),
            ),
            details=self.details(config, told.positions),
            cache_lines=(
                ("pictures", f"{size(positions)} each in bfloat16, {size(kept)} more until read"),
            ),
            cache_details={"cache_bytes_per_picture": positions, "bytes_per_picture": kept},
        )

    @staticmethod
    def picture_size(config: C, cells: int) -> tuple[int, int] | None:
        side = config.vision_config.image_size
        return (side, side) if cells == 1 else None

    def alpha(self, config: C, checkpoint_format: str) -> Alpha:
        return config.image_processor.alpha
