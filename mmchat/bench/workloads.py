"""What is timed: text or a picture is read, and a few tokens are written after it."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mmchat.bench.pictures import picture_of
from mmchat.conversation import Message, Text
from mmchat.engine.driver import run
from mmchat.engine.engine import Engine
from mmchat.engine.events import Timings
from mmchat.engine.request import Request
from mmchat.engine.sampling import SamplingParams
from mmchat.images import load_image
from mmchat.words import plural

if TYPE_CHECKING:
    from mmchat.loading.loader import LoadedModel

DECODED = 8  # tokens that are written after the first
QUESTION = "What's in this image?"


@dataclass(frozen=True)
class Workload:
    """A prompt of `tokens` tokens or, with `cells`, a question about a picture cut into so many."""

    tokens: int = 0
    cells: int = 0

    @property
    def title(self) -> str:
        return plural(self.cells, "tile") if self.cells else plural(self.tokens, "token")

    def fits(self, loaded: LoadedModel) -> bool:
        """Whether the model cuts pictures so, and has the positions; an exported one may not."""
        positions = self.tokens
        if self.cells:
            if not loaded.spec.family.picture_size(loaded.spec.config, self.cells):
                return False
            positions = len(self._prompt(loaded, self._given(loaded, 0)).token_ids)
        return positions + 1 + DECODED <= loaded.max_seq_len

    def time(self, loaded: LoadedModel, index: int) -> dict[str, float]:
        """Seconds of each stage; every `index` has a prompt of its own.

        Text: "read" and "token", one of those written. A picture, from the bytes of its file on:
        "first token", of which "preprocessing", "vision" and "prefill"; then "token". Raises
        NumericalError.
        """
        given = self._given(loaded, index)
        timings = Timings(started=time.perf_counter())
        prompt = self._prompt(loaded, given)
        timings.preprocessing_seconds = time.perf_counter() - timings.started
        # 1 + DECODED tokens, whatever they are
        params = SamplingParams(temperature=0, max_new_tokens=1 + DECODED, speculate="off")
        room = len(prompt.token_ids) + params.max_new_tokens
        engine = Engine(loaded, positions=room)  # which holds nothing of the prompt
        request = Request(prompt, params, ignore_stop=True, timings=timings)
        for _ in run(engine, [engine.submit(request)]):
            pass
        token = {"token": timings.decode_seconds / DECODED}
        if not self.cells:
            return {"read": timings.prefill_seconds, **token}
        return {
            "first token": timings.time_to_first_token,
            "preprocessing": timings.preprocessing_seconds,
            "vision": timings.vision_seconds,
            "prefill": timings.prefill_seconds,
            **token,
        }

    def _given(self, loaded: LoadedModel, index: int) -> str | bytes:
        """A text of at least as many tokens, or the file of a picture."""
        if self.cells:
            return picture_of(loaded.spec, self.cells, seed=index)
        draw = random.Random(index)  # noqa: S311
        return " ".join(str(draw.randrange(10**6)) for _ in range(self.tokens))

    def _prompt(self, loaded: LoadedModel, given: str | bytes) -> Any:
        """The family's prompt of it, cut to `tokens`."""
        if isinstance(given, bytes):
            question = Message("user", (load_image(given), Text(QUESTION)))
            return loaded.processor.chat([question])
        prompt = loaded.processor.raw(Message("user", (Text(given),)))
        return loaded.processor.of_ids(prompt.token_ids[: self.tokens])
