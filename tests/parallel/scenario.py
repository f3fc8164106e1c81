"""What a model is asked for logits: turns, pictures, pieces, copies, drafts, rows together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image as PILImage
from torch import Tensor

from mmchat.conversation import Image, Message, question
from mmchat.engine.engine import INITIAL_POSITIONS
from mmchat.models.base import Batch, common_prefix
from mmchat.models.prompt import Prompt

DRAFT = 4


def picture(height: int, width: int, seed: int) -> Image:
    draw = torch.Generator().manual_seed(seed)
    noise = torch.randint(0, 256, (height // 8, width // 8, 3), generator=draw).byte().numpy()
    whole = PILImage.fromarray(noise).resize((width, height), PILImage.Resampling.NEAREST)
    return Image(whole, f"{seed}.png", f"picture {seed}")


WIDE, TALL, SMALL = picture(112, 224, 1), picture(336, 112, 2), picture(96, 96, 3)


class Reading:
    """Reads prompts in slots of one cache, and keeps the logits [V] of all that was wanted."""

    def __init__(self, model: Any, slots: int) -> None:
        self.model, self.runtime = model, model.runtime
        self.cache = self.runtime.new_cache(slots, INITIAL_POSITIONS)
        self.logits: list[Tensor] = []

    def prompt(self, *turns: tuple[str, Sequence[Image]], said: str = "Yes, I see.") -> Prompt:
        messages: list[Message] = []
        processor = self.model.processor
        for text, images in turns:
            if messages:
                messages.append(Message("assistant", said))
            tag, names = processor.image_tag, processor.name_tags
            messages.append(question(text, images, tag=tag, names=names))
        return processor.chat(messages)

    def begin(self, slot: int, prompt: Prompt, *, pieces: int = 1) -> None:
        """Read what the slot does not hold of a prompt, its pictures encoded together."""
        self.cache.begin(slot, prompt)
        lacking = {m.content_hash: m for m in prompt.unread(self.cache.lengths[slot])}
        media = [m for m in lacking.values() if not self.cache.has_media(m.content_hash)]
        while media:
            for _ in self.runtime.encode(media, self.cache):
                pass
            media = [m for m in media if not self.cache.has_media(m.content_hash)]
        ids = torch.tensor(prompt.token_ids[self.cache.lengths[slot] :])
        for piece in ids.chunk(pieces):
            start = self.cache.lengths[slot]
            self._read(Batch.last_of(piece, start, slot))

    def step(self, *slots: int, count: int = 1) -> None:
        """The next `count` tokens of these slots together, the same in every run."""
        starts = tuple(self.cache.lengths[slot] for slot in slots)
        ids = torch.tensor([5 + (start + n) % 90 for start in starts for n in range(count)])
        counts = (count,) * len(slots)
        self._read(Batch(ids, slots, starts, counts, tuple(range(len(ids)))))

    def _read(self, batch: Batch) -> None:
        found = self.runtime.forward(batch, self.cache)[:, : self.model.vocab_size]
        self.logits += found.unbind(0)


def logits(model: Any) -> Tensor:
    """Of all that is asked here, [N, V]."""
    it = Reading(model, 3)
    seen = ("What is here?", [WIDE])
    it.begin(0, it.prompt(("How many are there?", [])), pieces=2)
    for _ in range(3):
        it.step(0)
    it.begin(1, it.prompt(seen))
    it.step(1, count=DRAFT)  # of a draft all but the first are wrong
    it.cache.truncate(1, it.cache.lengths[1] - DRAFT + 1)
    it.step(1)
    longer = it.prompt(seen, ("And in these?", [TALL, SMALL]))
    shared = common_prefix(it.prompt(seen).fingerprint, longer.fingerprint)
    it.cache.copy(1, 2, shared)
    it.begin(2, longer)
    for _ in range(2):
        it.step(0, 1, 2)
    it.cache.free(0)
    it.cache.release()
    it.begin(0, it.prompt(("And here?", [SMALL]), ("Again?", [WIDE])), pieces=3)
    it.step(2, 0)
    return torch.stack(it.logits)
