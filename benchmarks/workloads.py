"""What is measured: decoding, reading text, reading a picture; each compared, then timed in rounds.

In every workload all contestants run once first. Their logits are compared with the first one's,
and that run is the warm-up. Only then are rounds timed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from benchmarks import agreement
from benchmarks.agreement import Agreement
from benchmarks.clock import Elapsed, Rounds, Stopwatch
from benchmarks.contestants import Contestant, Context, Mmchat, PicturePrompt, tiled
from benchmarks.random_mllama import config_of, random_context
from mmchat.bench.pictures import picture_of
from mmchat.bench.rounds import interleave
from mmchat.images import load_image

if TYPE_CHECKING:
    from torch import Tensor

# One run of a contestant in a round: time of each stage.
Run = Callable[[int], Mapping[str, Elapsed]]

DECODE_STEPS = 4  # tokens in one round
QUESTION_TOKENS = 32  # after the picture
ONE = "one row"  # a stage of those that decode several


@dataclass(frozen=True)
class Workload:
    """kind: "decode" (`tokens` of context), "prefill" (of `tokens`) or "picture" (and a question).

    tiles: of the picture, 0 without one. rows: that decode at once; beside several, one alone is
    timed in the same rounds.
    """

    kind: str
    tokens: int
    tiles: int = 0
    rows: int = 1

    @property
    def title(self) -> str:
        tiles = f"{self.tiles} tile{'s' * (self.tiles != 1)}"
        if self.kind == "picture":
            return f"read a picture of {tiles}"
        if self.kind == "prefill":
            return f"read {self.tokens:,} tokens"
        picture = f" and {tiles}" if self.tiles else ""
        rows = f", of {self.rows} rows at once" if self.rows > 1 else ""
        return f"a token after {self.tokens:,}{picture}{rows}"


@dataclass(frozen=True)
class Measured:
    """One workload: how far each contestant's logits are from the first one's, and the times."""

    workload: Workload
    agreements: Mapping[str, Agreement]
    rounds: Rounds


@dataclass(frozen=True)
class Field:
    """The contestants; the first is what the others are compared with.

    limits: relative error of logits allowed to each of the others.
    """

    contestants: Sequence[Contestant]
    limits: Mapping[str, float]
    ours: Mmchat  # gives prompts, sizes and the device
    rounds: int
    seconds: float

    def measure(self, workload: Workload) -> Measured:
        """Compare, then time. Raises DisagreementError."""
        prepare = {"decode": self._decode, "prefill": self._prefill, "picture": self._picture}
        first, runs = prepare[workload.kind](workload)
        agreements = self._compare(workload, first)
        rounds = interleave(runs, rounds=self.rounds, seconds=self.seconds)
        return Measured(workload, agreements, Rounds(rounds))

    def _compare(
        self, workload: Workload, first: Mapping[str, Callable[[], Tensor]]
    ) -> dict[str, Agreement]:
        reference, *others = self.contestants
        expected = first[reference.name]()
        if not bool(torch.isfinite(expected).all()):
            raise agreement.DisagreementError(
                f"{workload.title}: the logits of {reference.name} are not finite"
            )
        found = {}
        for other in others:
            found[other.name] = agreement.compare(first[other.name](), expected)
            agreement.check(
                found[other.name],
                self.limits[other.name],
                name=other.name,
                against=reference.name,
                workload=workload.title,
            )
        return found

    def _decode(self, workload: Workload) -> tuple[dict[str, Callable[[], Tensor]], dict[str, Run]]:
        loaded, context = self.ours.loaded, self._context(workload)
        stages = (
            {workload.rows: "total"} if workload.rows == 1 else {workload.rows: "total", 1: ONE}
        )
        caches = {(c.name, n): c.begin(context, n) for c in self.contestants for n in stages}
        clock = Stopwatch(loaded.device)

        def step(contestant: Contestant, rows: int, index: int) -> Tensor:
            ids = tuple((31 * index + 7 * row) % loaded.vocab_size for row in range(rows))
            return contestant.decode(ids, caches[contestant.name, rows])

        def run(contestant: Contestant, index: int) -> dict[str, Elapsed]:
            def tokens(rows: int) -> None:
                for offset in range(DECODE_STEPS):
                    step(contestant, rows, DECODE_STEPS * index + offset).argmax(-1).tolist()

            return {
                stage: clock.time(lambda rows=rows: tokens(rows))[1] / DECODE_STEPS
                for rows, stage in stages.items()
            }

        for contestant in self.contestants if ONE in stages.values() else ():
            step(contestant, 1, 0)  # its warm-up
        first = {c.name: lambda c=c: step(c, workload.rows, 0) for c in self.contestants}
        return first, {c.name: lambda i, c=c: run(c, i) for c in self.contestants}

    def _context(self, workload: Workload) -> Context:
        loaded = self.ours.loaded
        if any(c.reads_context for c in self.contestants):
            return self._text(workload.tokens, 0)
        return random_context(
            config_of(loaded.spec), workload.tokens, workload.tiles, loaded.dtype, loaded.device
        )

    def _prefill(
        self, workload: Workload
    ) -> tuple[dict[str, Callable[[], Tensor]], dict[str, Run]]:
        clock = Stopwatch(self.ours.loaded.device)

        def run(contestant: Contestant, index: int) -> dict[str, Elapsed]:
            ids = self._text(workload.tokens, index + 1)
            return {"total": clock.time(lambda: int(contestant.prefill(ids).argmax()))[1]}

        ids = self._text(workload.tokens, 0)
        first = {c.name: lambda c=c: c.prefill(ids) for c in self.contestants}
        return first, {c.name: lambda i, c=c: run(c, i) for c in self.contestants}

    def _picture(
        self, workload: Workload
    ) -> tuple[dict[str, Callable[[], Tensor]], dict[str, Run]]:
        states = self._random_states(workload.tiles)

        def run(contestant: Contestant, index: int) -> Mapping[str, Elapsed]:
            prompt = self._picture_prompt(workload.tiles, index + 1)
            times = dict(contestant.prefill_picture(prompt)[1])
            projected = (
                contestant.project_pictures(states) if isinstance(contestant, Mmchat) else None
            )
            if projected is not None:  # encode_images does this; transformers in its prefill
                times["vision"] -= projected
                times["cross_key_values"] = projected
            return times

        prompt = self._picture_prompt(workload.tiles, 0)
        first = {c.name: lambda c=c: c.prefill_picture(prompt)[0] for c in self.contestants}
        return first, {c.name: lambda i, c=c: run(c, i) for c in self.contestants}

    def _text(self, length: int, index: int) -> tuple[int, ...]:
        size = self.ours.loaded.vocab_size
        return tuple((7919 * i + 104729 * index + 11) % size for i in range(length))

    def _picture_prompt(self, tiles: int, index: int) -> PicturePrompt:
        loaded = self.ours.loaded
        image = tiled(loaded.processor, load_image(picture_of(loaded.spec, tiles, seed=index)))
        ids = (config_of(loaded.spec).image_token_id, *self._text(QUESTION_TOKENS, index))
        return PicturePrompt(ids, image)

    def _random_states(self, tiles: int) -> Tensor:
        loaded = self.ours.loaded
        config = config_of(loaded.spec)
        shape = 1, tiles * config.vision_config.tokens_per_tile, config.text_config.hidden_size
        return torch.randn(shape, device=loaded.device).to(loaded.dtype)
