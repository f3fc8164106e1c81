"""A model with scripted logits, to test the engine and its readers without any weights."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from mmchat.conversation import Message
from mmchat.engine.engine import Engine
from mmchat.engine.grammar import Grammars
from mmchat.engine.sampling import SamplingParams
from mmchat.loading.loader import LoadedModel
from mmchat.loading.options import LoadOptions
from mmchat.models.base import Batch
from mmchat.models.prompt import Prompt

EOT = 256
VOCAB_SIZE = 260
CONFUSED = 259


class ByteTokenizer:
    """Ids 0..255 are bytes; 256 ends a turn."""

    vocab_size = VOCAB_SIZE

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def encode_rest(self, text: str) -> list[int]:
        return self.encode(text)

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        return b"".join(self.token_bytes(i) for i in ids).decode(errors="replace")

    def is_special(self, token_id: int) -> bool:
        return token_id >= 256

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id]) if token_id < 256 else b"<eot>"


class FakeProcessor:
    """Each message becomes its bytes and an end-of-turn token."""

    stop_ids = frozenset({EOT})
    alpha = "white"
    image_tag = ""
    name_tags = None

    def chat(self, messages: Sequence[Message]) -> Prompt:
        ids = [i for m in messages for i in (*m.text.encode(), EOT)]
        return Prompt(tuple(ids))

    def boxes(self, text: str) -> None:
        return None

    def of_ids(self, token_ids: Sequence[int]) -> Prompt:
        return Prompt(tuple(token_ids))

    def raw(self, message: Message) -> Prompt:
        return Prompt(tuple(message.text.encode()))


class FakeCache:
    """rows: what was read, by slot. begun: slots whose prompt has not been read at all."""

    fixed = False

    def __init__(self, slots: int = 1) -> None:
        self.rows: list[list[int]] = [[] for _ in range(slots)]
        self.begun: set[int] = set()

    @property
    def ids(self) -> list[int]:
        """Of the first slot."""
        return self.rows[0]

    @property
    def lengths(self) -> list[int]:
        return list(map(len, self.rows))

    def begin(self, slot: int, prompt: Prompt) -> None:
        self.begun.add(slot)

    def has_media(self, content_hash: str) -> bool:
        return True

    def truncate(self, slot: int, length: int) -> None:
        del self.rows[slot][length:]

    def copy(self, source: int, target: int, length: int) -> None:
        self.rows[target] = self.rows[source][:length]

    def free(self, slot: int) -> None:
        self.rows[slot].clear()

    def release(self) -> None:
        pass


class ScriptedRuntime:
    """Wants to say each of `answers` in turn, then an end of turn.

    What it says next depends on all that was read of the answer: after a token that is not in the
    script it says `CONFUSED`. prefills: what each prompt fed it. reads: how many tokens each later
    step read. fail_at: fails when so many tokens of the script are left.
    """

    def __init__(self, answers: Sequence[bytes]) -> None:
        self.device = torch.device("cpu")
        self.notices: list[str] = []
        self.compile_seconds: float | None = None
        self.answers = list(answers)
        self.prefills: list[list[int]] = []
        self.reads: list[int] = []
        self.fail_at: int | None = None
        self.logits_hook: Any = lambda logits: logits
        self._script: list[int] = []
        self._begin = 0

    def new_cache(self, slots: int, positions: int) -> FakeCache:
        return FakeCache(slots)

    def forward(self, batch: Batch, cache: FakeCache) -> Tensor:
        ids = batch.token_ids.tolist()
        [slot] = batch.slots
        if slot in cache.begun:
            cache.begun.remove(slot)
            self.prefills.append(ids)
            cache.rows[slot] += ids
            self._script = [*self.answers.pop(0), EOT]
            self._begin = len(cache.rows[slot])
            return self._logits([])
        self.reads.append(len(ids))
        rows = []
        for token_id in ids:
            cache.rows[slot].append(token_id)
            rows.append(self._logits(cache.rows[slot][self._begin :]))
        return torch.cat(rows)

    def _logits(self, said: list[int]) -> Tensor:
        if self.fail_at is not None and len(self._script) - len(said) == self.fail_at:
            raise RuntimeError("scripted failure")
        on_script = said == self._script[: len(said)] and len(said) < len(self._script)
        logits = torch.zeros(1, VOCAB_SIZE)
        logits[0, self._script[len(said)] if on_script else CONFUSED] = 20.0
        return self.logits_hook(logits)


def fake_model(*answers: bytes, max_seq_len: int = 1000, text_only: bool = False) -> Any:
    """What the session needs of a LoadedModel; greedy unless told otherwise."""
    model = SimpleNamespace(
        runtime=ScriptedRuntime(answers),
        processor=FakeProcessor(),
        tokenizer=ByteTokenizer(),
        max_seq_len=max_seq_len,
        vocab_size=VOCAB_SIZE,
        options=LoadOptions(text_only=text_only),
        spec=SimpleNamespace(text_only=False),
        load_seconds=0.5,
        sampling_defaults=SamplingParams(temperature=0.0),
        remarks=(),
        most_rows=1,
        peak_memory=lambda: 1,
    )
    model.engine = Engine(model)  # type: ignore[arg-type]
    model.engine_of = lambda rows: model.engine
    model.grammars = Grammars(model.tokenizer, model.processor.stop_ids, VOCAB_SIZE)
    model.request = lambda *given: LoadedModel.request(model, *given)
    return model
