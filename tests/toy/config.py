"""The toy family's sizes, and what follows from them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mmchat.models.prompt import MediaFacts


@dataclass(frozen=True)
class ToyConfig:
    """Sizes of a toy. rope_period: prompts that are so much longer double the rotary base."""

    vocab_size: int
    max_position_embeddings: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    rms_norm_eps: float
    rope_theta: float
    rope_period: int
    image_size: int
    patch_size: int
    alpha: Literal["white", "drop"]

    @property
    def readable_tokens(self) -> int:
        return self.vocab_size

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def image_token_id(self) -> int:
        """Marks a picture's positions; the embedding has no row for it."""
        return self.vocab_size

    @property
    def grid(self) -> int:
        """Patches of a picture in each direction."""
        return self.image_size // self.patch_size

    @property
    def positions_per_image(self) -> int:
        return self.grid**2

    def rotary_base(self, prompt_length: int) -> float:
        """Angles of all positions follow from it, so it stays while the prompt is answered."""
        return self.rope_theta * 2.0 ** (prompt_length // self.rope_period)

    def facts(self, height: int, width: int) -> MediaFacts:
        """What people are told about a picture of `height` x `width` pixels."""
        cut = f"{self.grid} x {self.grid} patches of {self.patch_size} px"
        return MediaFacts(
            size=(height, width),
            resized=(self.image_size, self.image_size),
            grid=(self.grid, self.grid),
            tokens=self.positions_per_image,
            positions=self.positions_per_image,
            cut=cut,
            lines=(("patches", cut),),
            details={"patch_size": self.patch_size},
        )


CONFIG = ToyConfig(
    vocab_size=512,  # 256 bytes and Llama 3's 256 special tokens
    max_position_embeddings=512,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    rms_norm_eps=1e-5,
    rope_theta=100.0,
    rope_period=64,
    image_size=24,
    patch_size=8,
    alpha="white",
)
