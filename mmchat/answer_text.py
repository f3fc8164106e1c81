"""From tokens to the text of an answer, as far as it is certain at each of them."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, field

from mmchat.events import Event, FinishReason, TextDelta, TokenLogprob
from mmchat.generation import GeneratedToken
from mmchat.tokenizers.base import StreamDecoder, Tokenizer


class AnswerText:
    """Token ids in, text out: never half a character, never part of a stop string."""

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...]) -> None:
        self._decoder = StreamDecoder(tokenizer)
        self._stop = stop
        self._held = ""
        self.stopped = False

    def push(self, token_id: int) -> str:
        """Text that is certain after this token; may be empty."""
        return self._release(self._decoder.push(token_id))

    def flush(self) -> str:
        """What was held back, once no more tokens follow."""
        text = self._release(self._decoder.flush())
        held, self._held = self._held, ""
        return text + held

    def _release(self, text: str) -> str:
        if self.stopped:
            return ""
        self._held += text
        found = [at for at in (self._held.find(s) for s in self._stop) if at >= 0]
        if found:
            self.stopped = True
            text, self._held = self._held[: min(found)], ""
            return text
        keep = max((_overlap(self._held, s) for s in self._stop), default=0)
        cut = len(self._held) - keep
        text, self._held = self._held[:cut], self._held[cut:]
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` with which `stop` begins."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


@dataclass
class Answer:
    """What has been generated in one turn."""

    pieces: list[str] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    reason: FinishReason = "length"


def stream_text(
    tokens: Generator[GeneratedToken, None, FinishReason], text: AnswerText
) -> Generator[Event, None, Answer]:
    """Turn tokens into text deltas, up to the end of `tokens` or to a stop string."""
    answer = Answer()
    while True:
        try:
            token = next(tokens)
        except StopIteration as end:
            answer.reason = end.value
            break
        answer.ids.append(token.token_id)
        if token.logprob:
            answer.logprobs.append(token.logprob)
        piece = "" if token.is_stop else text.push(token.token_id)
        answer.pieces.append(piece)
        yield TextDelta(piece, token.token_id, token.logprob)
        if text.stopped:
            answer.reason = "stop_string"
            break
    tail = text.flush()
    if tail:
        answer.pieces.append(tail)
        yield TextDelta(tail, None)
    return answer
