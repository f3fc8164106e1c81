"""How probable given tokens are: those that were sampled, and those of a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mmchat.engine.events import TokenLogprob
from mmchat.errors import NumericalError

if TYPE_CHECKING:
    from torch import Tensor

# Positions of a prompt whose logits are in memory at once: 64 rows of 128,256 are 33 MB, and with
# their log-probabilities twice that.
PIECE = 64


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
        return min(end, max(start, self._first - 1) + PIECE)

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
