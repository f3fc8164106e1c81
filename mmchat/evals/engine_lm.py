"""A model of ours as lm_eval's `LM`: its requests become prompts, all given to the engine at once.

Requests that share a context, as the choices of one question do, are scored one after another in
one row, so that the context and its pictures are read once.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from lm_eval.api.model import LM  # type: ignore[import-not-found]
from lm_eval.models.utils import normalize_gen_kwargs  # type: ignore[import-not-found]
from lm_eval.utils import (  # type: ignore[import-not-found]
    get_rolling_token_windows,
    make_disjoint_window,
)

from mmchat.conversation import Image, Message, Part, Text, arranged
from mmchat.engine.driver import Talk, hold
from mmchat.engine.sampling import SamplingParams
from mmchat.errors import UsageError, quoted
from mmchat.images import load_image
from mmchat.models.prompt import Prompt, followed
from mmchat.words import plural

if TYPE_CHECKING:
    from mmchat.loading.loader import LoadedModel

MARK = "<image>"  # where lm_eval's tasks have a picture in their text
Score = tuple[float, bool]  # sum of natural log-probabilities; whether all tokens are the likeliest
Bar = Callable[[int], AbstractContextManager[Callable[[], Any]]]
T = TypeVar("T")
_SCORING = SamplingParams(temperature=0, max_new_tokens=1, logprobs=1, speculate="off")
_SETTINGS = ("top_p", "top_k", "min_p", "repetition_penalty")  # named as ours


class EngineLM(LM):
    """rows: requests at once. is_chat: prompts in the chat format. bar: shows so many requests.

    notices: one line each, what was done to requests that the user should know.
    """

    MULTIMODAL = True  # otherwise tasks with pictures are refused

    def __init__(self, model: LoadedModel, rows: int, *, is_chat: bool, bar: Bar) -> None:
        super().__init__()
        self._model, self._engine = model, model.engine_of(rows)
        self._is_chat, self._bar = is_chat, bar
        self._advance: Callable[[], Any] = int
        self._notices: dict[str, int] = {}

    @property
    def notices(self) -> list[str]:
        return [f"{text} ({plural(count, 'request')})" for text, count in self._notices.items()]

    # What lm_eval asks of a chat format. It is text there and ids here: what comes back to us as
    # the context of a request is JSON of the messages.

    def apply_chat_template(
        self,
        chat_history: list[dict[str, str]],
        add_generation_prompt: bool = True,  # noqa: ARG002 - the last role says it
    ) -> str:
        turns = [{"role": turn["role"], "content": turn["content"]} for turn in chat_history]
        return json.dumps(turns, ensure_ascii=False)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return "of the model, as token ids" if chat_template else None

    @property
    def tokenizer_name(self) -> str:
        return self._model.spec.name

    # What is asked

    def loglikelihood(self, requests: list[Any]) -> list[Score]:
        def scored(group: list[Any]) -> Talk[list[Score]]:
            content, found = self._content(group[0].args), []
            for request in group:
                prompt, begin = self._pair(content, *request.args[:2])
                found.append((yield from self._score(prompt, begin)))
                self._told("loglikelihood", request, found[-1])
            return found

        groups = itertools.groupby(requests, lambda r: (r.task_name, r.doc_id, r.args[0]))
        talks = (scored(list(group)) for _, group in groups)
        return [score for found in self._hold(talks, requests) for score in found]

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        most = self._model.max_seq_len - 2  # of a window, whose last token is read as well

        def scored(request: Any) -> Talk[float]:
            ids = self._model.tokenizer.encode(request.args[0])
            parts = []
            for window in get_rolling_token_windows(ids, self._first_ids[-1], most, 1):
                context, rest = make_disjoint_window(window)
                prompt = self._model.processor.of_ids([*context, *rest])
                parts.append((yield from self._score(prompt, len(context)))[0])
            self._told("loglikelihood_rolling", request, math.fsum(parts))
            return math.fsum(parts)

        return self._hold(map(scored, requests), requests)

    def generate_until(self, requests: list[Any]) -> list[str]:
        def answered(number: int, request: Any) -> Talk[str]:
            sampling = self._sampling(request.args[1], number)
            prompt = self._prompt(self._content(request.args))
            prompt = self._within(prompt, sampling.max_new_tokens)
            finished = yield self._model.request(prompt, sampling)
            self._told("generate_until", request, finished.text)
            return finished.text

        return self._hold(itertools.starmap(answered, enumerate(requests)), requests)

    def _hold(self, talks: Iterable[Talk[T]], requests: list[Any]) -> list[T]:
        with self._bar(len(requests)) as self._advance:
            return list(hold(self._engine, talks))

    def _told(self, kind: str, request: Any, answer: Any) -> None:
        self.cache_hook.add_partial(kind, request.args, answer)
        self._advance()

    # Prompts

    @property
    def _first_ids(self) -> tuple[int, ...]:
        """What begins a text: where the model has no token for that, one that ends answers."""
        processor = self._model.processor
        return processor.raw(Message("user", ())).token_ids or (min(processor.stop_ids),)

    def _content(self, args: Sequence[Any]) -> list[Message]:
        """The messages of a request; without the chat format it is one. Raises UsageError."""
        context, visual = args[0], (args[2] if len(args) > 2 else {}).get("visual")
        turns = json.loads(context) if self._is_chat and context else []
        if not turns:
            turns = [{"role": "user", "content": context}]
        alpha = self._model.processor.alpha
        images = [load_image(one, alpha=alpha, allow_fetch=False) for one in _listed(visual)]
        asked = max((n for n, turn in enumerate(turns) if turn["role"] == "user"), default=0)
        return [
            Message(turn["role"], _parts(turn["content"], images if n == asked else []))
            for n, turn in enumerate(turns)
        ]

    def _prompt(self, content: list[Message]) -> Prompt:
        processor = self._model.processor
        if not self._is_chat:
            return processor.raw(content[0])
        if content[-1].role != "assistant":
            return processor.chat(content)
        begun = self._model.tokenizer.encode(content[-1].text)
        return followed(processor, processor.chat(content[:-1]), begun)

    def _pair(self, content: list[Message], context: str, continuation: str) -> tuple[Prompt, int]:
        """The prompt with the continuation behind it, and where that begins.

        In the chat format it is a part of its own; otherwise tokens may merge where it begins, and
        spaces before that are its own, as lm_eval has it.
        """
        if self._is_chat and context:
            prompt = self._prompt(content)
            ids = self._model.tokenizer.encode(continuation)
        else:
            *parts, last = content[-1].content or (Text(""),)
            if isinstance(last, Image):
                parts, last = [*parts, last], Text("")
            kept = last.text.rstrip()
            whole = Text(last.text + continuation)
            raw = self._model.processor.raw
            prompt = raw(Message("user", [*parts, *([Text(kept)] if kept else [])]))
            ids = raw(Message("user", [*parts, whole])).token_ids[len(prompt.token_ids) :]
            if not prompt.token_ids:
                prompt = self._model.processor.of_ids(self._first_ids)
        whole_prompt = followed(self._model.processor, prompt, ids)
        fitting = self._within(whole_prompt, 1)
        cut = len(whole_prompt.token_ids) - len(fitting.token_ids)
        return fitting, max(1, len(prompt.token_ids) - cut)

    def _within(self, prompt: Prompt, room: int) -> Prompt:
        """Cut on the left to leave room in the context, as lm_eval does; with pictures as it is."""
        most = max(1, self._model.max_seq_len - room)
        if len(prompt.token_ids) <= most or prompt.media:
            return prompt
        self._note(f"cut on the left, to the context of {self._model.max_seq_len}")
        return replace(self._model.processor.of_ids(prompt.token_ids[-most:]), lead=prompt.lead)

    def _score(self, prompt: Prompt, begin: int) -> Talk[Score]:
        request = replace(self._model.request(prompt, _SCORING), score_from=begin)
        tokens = (yield request).prompt_logprobs
        is_greedy = all(token.top[0][0] == token.token_id for token in tokens)
        return math.fsum(token.logprob for token in tokens), is_greedy

    def _sampling(self, settings: dict[str, Any], number: int) -> SamplingParams:
        """number: of the request; its seed, where the task samples at all."""
        known: dict[str, Any] = dict(normalize_gen_kwargs(settings))
        read = {"until", "max_gen_toks", "do_sample", "temperature", *_SETTINGS}
        for name in sorted(known.keys() - read):
            self._note(f"{quoted(name)} of a task's generation_kwargs is not known here")
        chosen = {name: known[name] for name in _SETTINGS if known.get(name) is not None}
        return SamplingParams(
            temperature=known["temperature"] if known["do_sample"] else 0.0,
            max_new_tokens=known["max_gen_toks"],
            stop=tuple(dict.fromkeys(text for text in known["until"] if text)),
            seed=number,
            speculate="off",
            **{"top_p": 1.0, **chosen},
        )

    def _note(self, text: str) -> None:
        self._notices[text] = self._notices.get(text, 0) + 1


def _listed(visual: Any) -> list[Any]:
    """The pictures of a request: a task may give none, one, or lists of them."""
    if isinstance(visual, list | tuple):
        return [picture for one in visual for picture in _listed(one)]
    return [] if visual is None else [visual]


def _parts(text: str, images: Sequence[Image]) -> tuple[Part, ...]:
    """Pictures stand at their marks, or before a text without any. Raises UsageError."""
    marks = text.count(MARK)
    if images and marks not in (0, len(images)):
        raise UsageError(
            f"a prompt of the task has {plural(marks, f'{MARK} mark')} for"
            f" {plural(len(images), 'picture')}; examples bring no pictures: try --num-fewshot 0"
        )
    return arranged([*([image] for image in images), text], [MARK])
