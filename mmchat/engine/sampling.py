"""From logits to the next token, on the device that holds them, and how probable tokens were."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

from mmchat.engine.drafts import LONGEST_DRAFT, Speculate
from mmchat.engine.events import TokenLogprob
from mmchat.engine.schema import as_text
from mmchat.errors import NumericalError, UsageError, quoted
from mmchat.leads import OF_SAMPLING, with_leads
from mmchat.limits import SAMPLING, STOP_CHARACTERS

if TYPE_CHECKING:
    import torch
    from torch import Tensor

NOT_FINITE = -1  # the token id that stands for logits with NaN or infinity
LEAST_TEMPERATURE = 1e-5  # below it a token 0.0005 behind has no chance: greedy
_WHOLE = ("top_k", "seed", "max_new_tokens", "logprobs")
# Positions of a prompt whose logits are in memory at once: 64 rows of 128,256 are 33 MB, and with
# their log-probabilities twice that.
SCORED_AT_ONCE = 64


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen and when to stop; limits.SAMPLING has the range of each number.

    Raises UsageError for a value out of range or of another type.
    temperature: 0 takes the most probable token. top_k: keep the k most probable, 0 keeps all.
    top_p: drop tokens once those before them hold more than this probability (Meta's rule); 0
    keeps the most probable one.
    min_p: drop tokens below this share of the most probable one's probability.
    repetition_penalty: divides positive logits (multiplies negative ones) of tokens in the prompt
    or answer. frequency_penalty, presence_penalty: subtracted per occurrence, or once, of tokens
    in the answer. seed: None draws one. stop: strings that end the answer and are not part of it,
    or one such string.
    logprobs: how many alternatives to report for each token. speculate: how many tokens to guess
    from the text so far and check at once; "auto": as many as pay. The answer stays the same.
    schema: the answer is JSON that obeys this JSON schema: a dictionary, a class with
    model_json_schema, or JSON text, which is what is kept.
    """

    temperature: float = 0.6
    top_k: int = 0
    top_p: float = 0.9
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    seed: int | None = None
    max_new_tokens: int = 1024
    stop: str | Sequence[str] = ()
    logprobs: int = 0
    speculate: Speculate = "auto"
    schema: Any = None

    def __post_init__(self) -> None:
        for name in SAMPLING:
            if name != "seed" or self.seed is not None:
                object.__setattr__(self, name, checked(name, getattr(self, name)))
        object.__setattr__(self, "stop", _stop_strings(self.stop))
        if self.schema is not None:
            object.__setattr__(self, "schema", as_text(self.schema))
        value, most = self.speculate, LONGEST_DRAFT
        is_word = isinstance(value, str) and value in ("auto", "off")
        if not (is_word or (type(value) is int and 0 <= value <= most)):
            raise UsageError(
                f"speculate must be auto, off or a number from 0 to {most}, not {quoted(value)}"
            )

    @property
    def is_greedy(self) -> bool:
        """Whether the most probable token is taken every time."""
        return self.temperature < LEAST_TEMPERATURE


SamplingParams.__init__ = with_leads(OF_SAMPLING)(SamplingParams.__init__)


def checked(name: str, value: Any) -> float:
    """`value` as a setting of SAMPLING takes it: an int or a float. Raises UsageError."""
    is_whole = name in _WHOLE
    if not _is_number(value):
        raise UsageError(f"{name} must be a number, not {type(value).__name__} {quoted(value)}")
    try:
        is_fraction = not isinstance(value, Integral) and not float(value).is_integer()
        number = int(value) if is_whole and not is_fraction else float(value)
    except OverflowError:  # infinity, as a whole number, too
        raise UsageError(f"{name} is too large a number: {quoted(value)}") from None
    if is_whole and is_fraction:
        raise UsageError(f"{name} must be a whole number, not {value}")
    low, high = SAMPLING[name]
    if not low <= number <= high:  # NaN neither
        bounds = f"at least {low}" if high == float("inf") else f"between {low} and {high}"
        raise UsageError(f"{name} must be {bounds}, not {value}")
    return number


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _stop_strings(stop: object) -> tuple[str, ...]:
    found = (stop,) if isinstance(stop, str) else stop
    if not isinstance(found, Iterable) or isinstance(found, bytes):
        raise UsageError(f"stop must be strings, not {type(stop).__name__} {quoted(stop)}")
    strings = tuple(found)
    for item in strings:
        if not isinstance(item, str):
            raise UsageError(f"a stop string must be text, not {type(item).__name__}")
        if not item:
            raise UsageError("a stop string must not be empty")
        if len(item) > STOP_CHARACTERS:
            raise UsageError(
                f"a stop string must have at most {STOP_CHARACTERS:,} characters, not {len(item):,}"
            )
    return strings


class Sampler:
    """Chooses one token after another for a single row, without waiting for the device.

    `prompt_ids` count for the repetition penalty. `seed` is the one in use.
    """

    def __init__(
        self, params: SamplingParams, prompt_ids: list[int], vocab_size: int, device: torch.device
    ) -> None:
        import torch

        self.params = params
        self.seed = secrets.randbits(32) if params.seed is None else params.seed
        # its own, so that what a row draws does not depend on the rows beside it
        self._generator = torch.Generator(device).manual_seed(self.seed)
        self._counts = torch.zeros(vocab_size, device=device)
        self._seen = torch.zeros(vocab_size, dtype=torch.bool, device=device)
        known = [i for i in prompt_ids if i < vocab_size]  # the image token has no logit
        self._seen[torch.tensor(known, dtype=torch.long, device=device)] = True
        self._one = torch.ones(1, device=device)

    def sample(self, logits: Tensor, allowed: Tensor | None = None) -> Tensor:
        """logits: float32 [1, V] -> token id [1, 1], or NOT_FINITE in its place.

        allowed: bool [V], the tokens that may come; None: all.
        """
        import torch

        scores = self._penalize(logits[0])
        finite = torch.isfinite(scores).all()  # on the device: whoever reads the token finds out
        if allowed is not None:  # before anything is dropped: one of these must be left
            scores = scores.masked_fill(~allowed.to(scores.device), -torch.inf)
        if self.params.is_greedy:
            token = scores.argmax()
        else:
            scaled = (scores - scores.max()) / self.params.temperature  # does not overflow
            probabilities = filter_logits(scaled, self.params).softmax(-1)
            # argmax of p/Exp(1) draws from p, and needs no host round trip as multinomial does
            noise = torch.empty_like(probabilities).exponential_(generator=self._generator)
            token = (probabilities / noise).argmax()
        self._counts.index_add_(0, token[None], self._one)
        self._seen[token[None]] = True
        return torch.where(finite, token, NOT_FINITE)[None, None]

    def _penalize(self, logits: Tensor) -> Tensor:
        import torch

        p = self.params
        if p.repetition_penalty != 1:
            r = p.repetition_penalty
            penalized = torch.where(logits > 0, logits / r, logits * r)
            logits = torch.where(self._seen, penalized, logits)
        if p.frequency_penalty or p.presence_penalty:
            present = (self._counts > 0).to(logits.dtype)
            logits = logits - p.frequency_penalty * self._counts - p.presence_penalty * present
        return logits


def filter_logits(logits: Tensor, params: SamplingParams) -> Tensor:
    """Set to -inf what top-k, top-p and min-p drop. logits: [V] -> [V]. At least one token stays.

    Each filter looks at the distribution that the one before it left.
    Sources: nucleus sampling, Holtzman et al. 2020; min-p, Nguyen et al. 2024.
    """
    import torch

    if 0 < params.top_k < logits.shape[-1]:
        threshold = logits.topk(params.top_k).values[-1]
        logits = logits.masked_fill(logits < threshold, -torch.inf)
    if params.top_p < 1:
        probabilities, order = logits.softmax(-1).sort(descending=True)
        before = probabilities.cumsum(-1) - probabilities
        dropped = torch.zeros_like(before, dtype=torch.bool)
        dropped[order] = before > params.top_p
        logits = logits.masked_fill(dropped, -torch.inf)
    if params.min_p > 0:
        probabilities = logits.softmax(-1)
        logits = logits.masked_fill(probabilities < params.min_p * probabilities.max(), -torch.inf)
    return logits


def token_logprobs(logits: Tensor, token_ids: Sequence[int], top: int) -> list[TokenLogprob]:
    """Of each token after the position before it, and of the `top` most probable ones there.

    logits: float32 [N, V] of these positions.
    """
    import torch

    scores = logits.log_softmax(-1)
    ids = torch.tensor(token_ids, device=scores.device)
    chosen = scores.gather(-1, ids[:, None])[:, 0]
    best = scores.topk(top)
    rows = zip(token_ids, chosen.tolist(), best.indices.tolist(), best.values.tolist(), strict=True)
    return [
        TokenLogprob(token_id, value, tuple(zip(tokens, values, strict=True)))
        for token_id, value, tokens, values in rows
    ]


class PromptScores:
    """Log-probabilities of a prompt's tokens from `first` on, while it is read piece by piece.

    first: at least 1, and behind all pictures; None scores nothing. top: alternatives of each.
    """

    def __init__(self, token_ids: Sequence[int], first: int | None, top: int) -> None:
        self.entries: list[TokenLogprob] = []
        self._ids, self._top = token_ids, top
        self._first = len(token_ids) if first is None else first

    def end(self, start: int, end: int) -> int:
        """Where a piece that begins at `start`, and may go on to `end`, ends."""
        return min(end, max(start, self._first - 1) + SCORED_AT_ONCE)

    def wanted(self, start: int, end: int) -> tuple[int, ...]:
        """Which positions of the piece give logits, from its start: those before a scored token,
        and the last."""
        before = range(max(start, self._first - 1), end - 1)
        return (*(at - start for at in before), end - 1 - start)

    def read(self, logits: Tensor, end: int) -> None:
        """logits: [W, V] of what was wanted of a piece up to `end`. Raises NumericalError."""
        import torch

        tokens = self._ids[max(end - len(logits) + 1, self._first) : end + 1]
        if not tokens:
            return
        if not torch.isfinite(logits).all():
            raise NumericalError(
                "the model produced NaN or infinite logits in the prompt; try --dtype float32, or"
                " check the weights"
            )
        self.entries += token_logprobs(logits[: len(tokens)], tokens, self._top)
