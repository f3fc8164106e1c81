"""`mmchat generate`: one question, one answer on stdout, everything else on stderr."""

from __future__ import annotations

import functools
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mmchat import limits
from mmchat.catalog.known import answering_sibling
from mmchat.cli import answer, console, model_choice, options, prompt_input
from mmchat.cli.look import check_source, heat_of
from mmchat.cli.positional import Said
from mmchat.cli.sampling_options import SamplingOptions
from mmchat.conversation import question
from mmchat.errors import INTERRUPTED_EXIT_CODE, UsageError, quoted
from mmchat.loading.options import LoadOptions
from mmchat.storage import atomic_file

if TYPE_CHECKING:
    from mmchat.catalog.source import ModelSource
    from mmchat.conversation import Box, Image, Message
    from mmchat.models.prompt import Processor

SEARCHED_CHARACTERS = 4_096  # of the prompt, for names of pictures
MOST_SAID = 3


@dataclass(frozen=True)
class Shown:
    """How the answer is shown, where it is written, and what beside it."""

    as_json: options.Json = False
    logprobs: Annotated[
        int,
        options.of_output(
            min=int(limits.SAMPLING["logprobs"][0]),
            max=int(limits.SAMPLING["logprobs"][1]),
            help="With --json: the N likeliest at every token.",
        ),
    ] = 0
    heat: Annotated[
        bool,
        options.of_output(help="With --json: where each word looked; see mmchat look."),
    ] = False
    stream_json: Annotated[bool, options.of_output(help="One JSON line per token.")] = False
    no_stream: Annotated[bool, options.of_output(help="Print the answer when it is whole.")] = False
    output: Annotated[Path | None, options.to_file("FILE", "Write to FILE, not stdout.")] = None
    draw_boxes: Annotated[
        Path | None,
        options.of_output(
            "--draw-boxes", metavar="FILE.png", help="Draw the boxes of the answer on the picture."
        ),
    ] = None

    @property
    def form(self) -> answer.Form:
        if self.as_json or self.stream_json:
            return "json" if self.as_json else "json-lines"
        return "whole" if self.no_stream else "stream"

    @property
    def file(self) -> Path | None:
        """None for stdout."""
        return None if self.output == Path("-") else self.output

    def check(self, images: Sequence[str]) -> None:
        """Raises UsageError for what nothing shows and what would replace a picture."""
        if self.form not in ("json", "json-lines"):
            if self.logprobs:
                raise UsageError("--logprobs needs --json or --stream-json to be shown in")
            if self.heat:
                raise UsageError("--heat needs --json or --stream-json; mmchat look draws it")
        prompt_input.check_output(self.file, "--output", images)
        prompt_input.check_output(self.draw_boxes, "--draw-boxes", images, [".png"])
        prompt_input.refuse_one_file("--output", self.file, "--draw-boxes", self.draw_boxes)


def generate(
    said: Said,
    prompt: options.Prompt = None,
    images: options.Images = None,
    system: options.System = None,
    raw: options.Raw = False,
    image_tags: Annotated[
        bool,
        options.of_input(help="Open what --prompt names in tags: <img>dog.png</img>."),
    ] = False,
    *,
    sampling: SamplingOptions,
    model: LoadOptions,
    offline: options.Offline = False,
    shown: Shown,
    dry_run: Annotated[
        bool,
        options.of_output(help="Show prompt tokens, tile grids and memory; load no weights."),
    ] = False,
    quiet: options.Quiet = False,
    verbose: Annotated[
        bool, options.of_output("-v", "--verbose", help="Timings per stage on stderr.")
    ] = False,
) -> None:
    """Answer a question about pictures, or about none.

    The answer alone goes to stdout. Try: mmchat generate "What's in this image?" dog.jpg
    """
    images = images or []
    for first, has_first, second, has_second in (
        ("--quiet", quiet, "--verbose", verbose),
        ("--raw", raw, "--system", system is not None),
        ("--raw", raw, "--heat", shown.heat),
        ("--text-only", model.text_only, "--image-prompt", images),
        ("--text-only", model.text_only, "--image-tags", image_tags),
        ("--dry-run", dry_run, "--draw-boxes", shown.draw_boxes),
        ("--json", shown.as_json, "--stream-json", shown.stream_json),
        ("--no-stream", shown.no_stream, "--stream-json", shown.stream_json),
    ):
        if has_first and has_second:
            raise UsageError(f"{first} and {second} contradict each other; give one of them")
    if images:
        prompt_input.expect_pictures()
    shown.check(images)
    prompt_input.keep_own_files(shown.file, "--output", model, sampling.schema)
    prompt_input.check_pictures(images)
    given = prompt_input.gather(prompt, images, allow_blank=raw)
    has_pictures = bool(given.sources) or image_tags
    if shown.heat and not has_pictures:
        raise UsageError("--heat needs a picture to look at; give one with -i")
    if dry_run:
        source = model.find(checkpoint_required=False)
    else:
        source = model_choice.find_or_offer(model, looks=shown.heat)
    model_choice.say_choice(model, source)
    if not raw and (sibling := answering_sibling(source.spec)):
        name = source.spec.name
        console.note(f"{name} is a base model, which continues the text; {sibling} answers")
    console.note(*said.notes, *given.notes, *_not_sent(given))
    prompt_input.check_model(source.spec, has_pictures=has_pictures, system=system)
    if shown.heat:
        check_source(source, model.ranks)
    if not dry_run:
        model_choice.begin_loading(model, source)
    pictures = prompt_input.load_pictures(given, model_choice.alpha_rule(model, source))
    asked = Asked(given.text, pictures, system, raw, given.typed if image_tags else "")
    if dry_run:
        from mmchat.cli.dry_run import show_dry_run

        new_tokens = sampling.for_model(source.spec).max_new_tokens
        show_dry_run(asked, model, source, new_tokens, as_json=shown.as_json, output=shown.file)
    else:
        run(asked, model, source, sampling, shown, verbose)


@dataclass(frozen=True)
class Asked:
    """One checked question, with its pictures decoded.

    opens: the text whose tags may open pictures.
    """

    text: str
    images: list[Image]
    system: str | None
    raw: bool
    opens: str

    def message(self, processor: Processor) -> Message:
        """The question as the model is asked it. Raises PromptError, ImageError, NetworkError."""
        from mmchat.chat.session import open_named

        opened = open_named(processor, self.opens, self.images) if self.opens else {}
        tag, names = processor.image_tag, processor.name_tags
        return question(self.text, self.images, tag=tag, names=names, opened=opened)


def run(
    asked: Asked,
    options: LoadOptions,
    source: ModelSource,
    sampling: SamplingOptions,
    shown: Shown,
    verbose: bool,
) -> None:
    """Load the model, write the answer, leave with 130 if Ctrl-C cut it short."""
    from mmchat.repl.answering import interrupts

    form, draw_boxes = shown.form, shown.draw_boxes
    with console.Stages() as stages:
        model = model_choice.load(options, source, stages)
        spec, session = model.spec, model.chat(system=asked.system)
        message = asked.message(model.processor)
        if draw_boxes is not None and model.processor.boxes("") is None:
            raise UsageError(f"--draw-boxes does not fit {spec.name}: it names no places")
        params = sampling.for_model(spec, logprobs=shown.logprobs)
        if asked.raw or spec.chat_format == "base":
            events = session.complete(message, sampling=params)
        else:
            events = session.ask(message, params)
        is_chat = not asked.raw and spec.chat_format == "instruct"
        markdown = is_chat and sampling.schema is None
        sink = answer.Answer(model, message.images, form, shown.file, markdown=markdown)
        if shown.heat:
            sink.beside = functools.partial(heat_of, session, session.look)
        with interrupts(session.interrupt, KeyboardInterrupt):
            finished = sink.read(events, stages)
    if draw_boxes is not None:
        _draw(draw_boxes, model.processor.boxes(finished.text) or (), message.images)
    cut = answer.cut_note(finished, model, params)
    if cut and form in ("stream", "whole"):
        console.note(cut)
    if verbose:
        console.note(*answer.verbose_lines(model, finished), *model.remarks)
    if finished.reason == "interrupted":
        raise typer.Exit(INTERRUPTED_EXIT_CODE)


def _draw(file: Path, boxes: Sequence[Box], images: Sequence[Image]) -> None:
    """On the last picture, of which the answer speaks."""
    from mmchat.images.boxes import draw_boxes
    from mmchat.images.png import png_bytes

    if not boxes or not images:
        console.say(f"the answer has no boxes; {str(file)!r} is not written")
        return
    atomic_file.write_bytes(file, png_bytes(draw_boxes(boxes, images[-1])))


def _not_sent(given: prompt_input.PromptInput) -> Iterator[str]:
    """A note of each thing that reads like a picture in the prompt and is not given as one."""
    from mmchat.repl.paths import looks_like_picture, read_line, short_name, without_pages

    found = read_line(given.text[:SEARCHED_CHARACTERS])
    named = [*found.sources, *filter(looks_like_picture, (*found.missing, *found.mentioned))]
    sent = {without_pages(short_name(source)) for source in given.sources}
    left = [name for name in named if without_pages(short_name(name)) not in sent]
    for name in left[:MOST_SAID]:
        shown = quoted(name)
        typed = shown if "…" in shown else shlex.quote(name)
        yield f"{shown} in the prompt is not attached; -i {typed} does that"
