"""From tokens to the text of an answer, as far as it is certain at each of them."""

from __future__ import annotations

from collections.abc import Sequence

from mmchat.tokenizers.base import StreamDecoder, Tokenizer


class AnswerText:
    """Token ids in, text out: never half a character, never part of a stop string.

    lead: what is left out if the text begins with it.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str], lead: str = "") -> None:
        self._decoder = StreamDecoder(tokenizer)
        self._stops = [StopString(text) for text in stop]
        self._lead = lead
        self.stopped = False

    def push(self, token_id: int) -> str:
        """Text that is certain after this token; may be empty."""
        return self._release(self._without_lead(self._decoder.push(token_id)))

    def flush(self) -> str:
        """What was held back, once no more tokens follow."""
        text = self._release(self._without_lead(self._decoder.flush()))
        return text if self.stopped else text + self._held()

    def _without_lead(self, text: str) -> str:
        if text and self._lead:
            text, self._lead = text.removeprefix(self._lead), ""
        return text

    def _held(self) -> str:
        """The end of what came that may be the start of a stop string."""
        longest = max(self._stops, key=lambda stop: stop.matched, default=None)
        return longest.text[: longest.matched] if longest else ""

    def _release(self, text: str) -> str:
        if self.stopped or not self._stops:
            return "" if self.stopped else text
        longest = max(self._stops, key=lambda stop: stop.matched)
        held = longest.matched
        ends = [(stop.feed(text), len(stop.text)) for stop in self._stops]
        starts = [held + end - length for end, length in ends if end is not None]
        self.stopped = bool(starts)
        certain = min(starts, default=held + len(text) - max(s.matched for s in self._stops))
        return longest.text[: min(certain, held)] + text[: max(certain - held, 0)]


class StopString:
    """Looks for a text in a stream, each character once (Knuth, Morris and Pratt, 1977).

    matched: how much of it the stream ends with.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self.matched = 0
        self._shorter = [0]  # by length of a start: the longest start that it ends with
        for char in text[1:]:
            self._shorter.append(self._after(self._shorter[-1], char))

    def feed(self, text: str) -> int | None:
        """The length of what of `text` completes it; None if nothing does."""
        for end, char in enumerate(text, start=1):
            self.matched = self._after(self.matched, char)
            if self.matched == len(self.text):
                return end
        return None

    def _after(self, matched: int, char: str) -> int:
        while matched and self.text[matched] != char:
            matched = self._shorter[matched - 1]
        return matched + (self.text[matched] == char)
