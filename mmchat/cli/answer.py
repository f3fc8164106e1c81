"""Turn the engine's events into what the user asked to see: text, JSON, JSON lines or a file."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mmchat import words
from mmchat.cli import console
from mmchat.engine.events import Event, Finished, TextDelta, TokenLogprob, read_events
from mmchat.storage import atomic_file
from mmchat.terminal import AnswerStream

if TYPE_CHECKING:
    from mmchat.conversation import Image
    from mmchat.engine.sampling import SamplingParams
    from mmchat.loading.loader import LoadedModel
    from mmchat.models.prompt import MediaFacts
    from mmchat.repl.render import MarkdownStream
    from mmchat.tokenizers.base import Tokenizer

Form = Literal["stream", "whole", "json", "json-lines"]


class Answer:
    """Receives the events of one answer and writes them in `form` to stdout or to `output`.

    markdown: the text is Markdown, shown as such on a terminal. beside: what else JSON says of it.
    """

    def __init__(
        self,
        model: LoadedModel,
        images: Sequence[Image],
        form: Form,
        output: Path | None,
        *,
        markdown: bool = False,
    ) -> None:
        self._model = model
        self.beside: Callable[[Finished], dict[str, Any]] = lambda _: {}
        self._images = images
        self._form: Form = form
        self._output = output
        self._stream: MarkdownStream | AnswerStream
        if markdown and console.draws(sys.stdout):
            from mmchat.repl.render import MarkdownStream

            self._stream = MarkdownStream(
                console.write_out, console.buffer_console, console.terminal_size
            )
        else:
            safe = console.is_terminal(sys.stdout)
            self._stream = AnswerStream(console.write_out, sanitizes=safe)
        self._began = False  # to write text
        self._lines: list[str] = []  # of JSON, for the file

    def read(self, events: Iterable[Event], stages: console.Stages) -> Finished:
        """Write while the events come; returns the last one."""

        def on_text(delta: TextDelta) -> None:
            stages.stop()
            if self._form == "stream" and self._output is None:
                self._began = self._began or bool(delta.text)
                self._stream.feed(delta.text)
            elif self._form == "json-lines":
                line: dict[str, Any] = {"text": delta.text, "token_id": delta.token_id}
                if delta.logprob is not None:
                    line["logprob"] = logprob_record(delta.logprob, self._model.tokenizer)
                self._json_line({"type": "text", **line})

        try:
            finished = read_events(
                events, on_text, lambda step: stages.show(words.STAGES.get(step.stage, step.stage))
            )
            stages.stop()
            self._finish(finished)
            return finished
        except BaseException:
            if console.is_terminal(sys.stdout) and self._began:
                self._stream.finish()  # so that the error starts on its own line
            raise

    def _finish(self, finished: Finished) -> None:
        if self._form in ("json", "json-lines"):
            kind = {"type": "finished"} if self._form == "json-lines" else {}
            self._json_line({**kind, **self.record(finished)})
            if self._output is not None:
                atomic_file.write_text(self._output, "".join(self._lines))
        elif self._output is not None:
            ending = "" if finished.text.endswith("\n") else "\n"
            atomic_file.write_text(self._output, finished.text + ending)
        else:
            if self._form == "whole":
                self._stream.feed(finished.text)
            self._stream.finish()

    def _json_line(self, value: dict[str, Any]) -> None:
        if self._output is None:
            console.print_json(value)
        else:
            self._lines.append(console.to_json(value) + "\n")

    def record(self, finished: Finished) -> dict[str, Any]:
        """The object of --json; None stands for what was not measured."""
        timings = dataclasses.asdict(finished.timings)
        timings.pop("started", None)  # a clock reading without meaning outside
        pictures = zip(self._images, finished.pictures, strict=True)
        record: dict[str, Any] = {
            "text": finished.text,
            "finish_reason": finished.reason,
            "model": self._model.spec.name,
            "device": str(self._model.device),
            "dtype": str(self._model.dtype).removeprefix("torch."),
            "kv": self._model.options.kv,
            "seed": finished.seed,
            "usage": dataclasses.asdict(finished.usage),
            "timings": timings,
            "images": [image_facts(image.source, facts) for image, facts in pictures],
            "prompt_ids": list(finished.prompt_ids),
            "output_ids": list(finished.output_ids),
        }
        boxes = self._model.processor.boxes(finished.text)
        if boxes is not None:
            from mmchat.images.boxes import box_records

            record["boxes"] = box_records(boxes, self._images[-1]) if self._images else []
        if finished.logprobs:
            tokenizer = self._model.tokenizer
            record["logprobs"] = [logprob_record(entry, tokenizer) for entry in finished.logprobs]
        return record | self.beside(finished)


def image_facts(source: str, facts: MediaFacts) -> dict[str, Any]:
    """What --json says of a picture. Sizes are (height, width) in pixels."""
    return {
        "source": source,
        "size": list(facts.size),
        "resized": list(facts.resized),
        **facts.details,
        "tokens": facts.tokens,
    }


def cut_note(finished: Finished, model: LoadedModel, sampling: SamplingParams) -> str:
    """That an answer was cut, and what makes it longer; empty if it came to its end."""
    is_less = model.max_seq_len < model.spec.config.max_position_embeddings
    roomier = "--max-seq-len N allows more" if is_less else "a shorter prompt leaves more room"
    longer = "-n N (--max-new-tokens)"
    return words.cut(finished, sampling.max_new_tokens, model.max_seq_len, longer, roomier)


def verbose_lines(model: LoadedModel, finished: Finished) -> list[str]:
    """Where the model runs and why, and the timings of an answer, for --verbose."""
    dtype = str(model.dtype).removeprefix("torch.")
    seconds = model.runtime.compile_seconds
    compiled = "" if seconds is None else f", compiled in {seconds:.1f} s"
    held = words.held(model.options.quantize, model.options.kv)
    where = f"{model.device}, {dtype} ({model.placement.reason}){held}{compiled}"
    return words.table([("device", where), *words.timings(finished)]).split("\n")


def logprob_record(entry: TokenLogprob, tokenizer: Tokenizer) -> dict[str, Any]:
    """The chosen token, its natural-log probability and those of the likeliest ones.

    A token may be half a character: its `bytes` are exact, and `token` has U+FFFD for them.
    """

    def one(token_id: int, logprob: float) -> dict[str, Any]:
        data = tokenizer.token_bytes(token_id)
        text, known = data.decode(errors="replace"), logprob if math.isfinite(logprob) else None
        return {"token": text, "token_id": token_id, "logprob": known, "bytes": list(data)}

    return {**one(entry.token_id, entry.logprob), "top": [one(*pair) for pair in entry.top]}
