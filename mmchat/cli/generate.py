"""`mmchat generate`: one question, one answer on stdout, everything else on stderr."""

from __future__ import annotations

import functools
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import typer

from mmchat.cli import answer, console, model_choice, options
from mmchat.cli.model_choice import alpha_rule, say_choice
from mmchat.cli.offer import find_or_offer
from mmchat.cli.positional import Said
from mmchat.cli.prompt_input import (
    PromptInput,
    check_output,
    check_pictures,
    expect_pictures,
    gather,
    load_pictures,
    refuse_overwriting,
    refuse_text_only,
)
from mmchat.cli.sampling_options import SamplingOptions
from mmchat.conversation import question
from mmchat.errors import INTERRUPTED_EXIT_CODE, UsageError, quoted
from mmchat.loading.options import LoadOptions
from mmchat.storage import atomic_file

if TYPE_CHECKING:
    from mmchat.api import Model
    from mmchat.catalog.source import ModelSource
    from mmchat.chat.session import ChatSession
    from mmchat.conversation import Box, Image, Message
    from mmchat.engine.events import Event
    from mmchat.models.prompt import Processor

SEARCHED_CHARACTERS = 4_096  # of the prompt, for names of pictures
MOST_SAID = 3


@dataclass(frozen=True)
class Shown:
    """How the answer is shown, where it is written, and what beside it."""

    as_json: options.Json = False
    logprobs: options.Logprobs = 0
    heat: options.Heat = False
    stream_json: options.StreamJson = False
    no_stream: options.NoStream = False
    output: options.OutputFile = None
    draw_boxes: options.DrawBoxes = None

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
        """Raises UsageError for what contradicts itself and what would replace a picture."""
        _refuse_pair("--json", self.as_json, "--stream-json", self.stream_json)
        _refuse_pair("--no-stream", self.no_stream, "--stream-json", self.stream_json)
        if self.form not in ("json", "json-lines"):
            if self.logprobs:
                raise UsageError("--logprobs needs --json or --stream-json to be shown in")
            if self.heat:
                raise UsageError("--heat needs --json or --stream-json; mmchat look draws it")
        if self.file is not None:
            atomic_file.check_writable(self.file)
            refuse_overwriting(self.file, images, "--output")
        if self.draw_boxes is not None:
            check_output(self.draw_boxes, "--draw-boxes", images, [".png"])


def generate(
    said: Said,
    prompt: options.Prompt = None,
    images: options.Images = None,
    system: options.System = None,
    raw: options.Raw = False,
    image_tags: options.ImageTags = False,
    *,
    sampling: SamplingOptions,
    model: LoadOptions,
    offline: options.Offline = False,
    shown: Shown,
    dry_run: options.DryRun = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Answer a question about pictures, or about none.

    The answer alone goes to stdout. Try: mmchat generate "What's in this image?" dog.jpg
    """
    prompt = said.question if prompt is None else prompt
    images = [*said.pictures, *(images or [])]
    _refuse_pair("--quiet", quiet, "--verbose", verbose)
    _refuse_pair("--raw", raw, "--system", system is not None)
    _refuse_pair("--raw", raw, "--heat", shown.heat)
    _refuse_pair("--text-only", model.text_only, "--image-prompt", bool(images))
    _refuse_pair("--text-only", model.text_only, "--image-tags", image_tags)
    _refuse_pair("--dry-run", dry_run, "--draw-boxes", shown.draw_boxes is not None)
    if images:
        expect_pictures()
    shown.check(images)
    check_pictures(images)
    given = gather(prompt, images, allow_blank=raw)
    has_pictures = bool(given.sources) or image_tags
    if shown.heat and not has_pictures:
        raise UsageError("--heat needs a picture to look at; give one with -i")
    source = _find(model, dry_run=dry_run, heat=shown.heat)
    if not quiet:
        _say_before(model, source, [*said.notes, *given.notes], given, raw=raw)
    _check_model(source, system, has_pictures=has_pictures, heat=shown.heat, ranks=model.ranks)
    if not dry_run:
        model_choice.begin_loading(model, source)
    pictures = _read_pictures(given, alpha_rule(model, source), quiet)
    opens = given.typed if image_tags else ""
    request = Request(
        given.text, pictures, system, raw, model, source, sampling, shown, quiet, verbose, opens
    )
    if dry_run:
        from mmchat.cli.dry_run import show_dry_run

        show_dry_run(request, as_json=shown.as_json, output=shown.file)
    else:
        run(request)


def _find(model: LoadOptions, *, dry_run: bool, heat: bool) -> ModelSource:
    if dry_run:
        return model.find(checkpoint_required=False)
    if not heat:
        return find_or_offer(model)
    from mmchat.explain.look import check_spec

    return find_or_offer(model, check_spec)


def _say_before(
    model: LoadOptions, source: ModelSource, notes: Sequence[str], given: PromptInput, *, raw: bool
) -> None:
    say_choice(model, source)
    if not raw:
        _say_base(source)
    console.note(*notes)
    _say_not_sent(given)


def _check_model(
    source: ModelSource, system: str | None, *, has_pictures: bool, heat: bool, ranks: int
) -> None:
    """Raises UsageError for what this model does not do, before it is loaded."""
    if has_pictures:
        refuse_text_only(source.spec)
    if system is not None and source.spec.chat_format == "base":
        raise UsageError(f"--system does not fit {source.spec.name}: a base model has no roles")
    if heat:
        from mmchat.cli.look import check_source

        check_source(source, ranks)


@dataclass(frozen=True)
class Request:
    """One checked question, with its pictures decoded.

    opens: the text whose tags may open pictures.
    """

    text: str
    images: list[Image]
    system: str | None
    raw: bool
    model: LoadOptions
    source: ModelSource
    sampling: SamplingOptions
    shown: Shown
    quiet: bool
    verbose: bool
    opens: str = ""

    def message(self, processor: Processor) -> Message:
        """The question as the model is asked it. Raises PromptError, ImageError, NetworkError."""
        from mmchat.chat.session import open_named

        opened = open_named(processor, self.opens, self.images) if self.opens else {}
        tag, names = processor.image_tag, processor.name_tags
        return question(self.text, self.images, tag=tag, names=names, opened=opened)


def run(request: Request) -> None:
    """Load the model, write the answer, leave with 130 if Ctrl-C cut it short."""
    from mmchat.repl.answering import interrupts

    shown = request.shown
    form, draw_boxes = shown.form, shown.draw_boxes
    with console.Stages(quiet=request.quiet) as stages:
        model = model_choice.load(request.model, request.source, stages)
        session = model.chat(system=request.system)
        message = request.message(model.processor)
        if draw_boxes is not None and model.processor.boxes("") is None:
            raise UsageError(f"--draw-boxes does not fit {model.spec.name}: it names no places")
        events = _events(model, session, message, request)
        is_chat = not request.raw and model.spec.chat_format == "instruct"
        markdown = is_chat and request.sampling.schema is None
        sink = answer.Answer(model, message.images, form, shown.file, markdown=markdown)
        if shown.heat:
            from mmchat.cli.look import heat_of

            sink.beside = functools.partial(heat_of, session, session.look)
        with interrupts(session.interrupt, KeyboardInterrupt):
            finished = sink.read(events, stages)
    cut = answer.cut_note(finished, model, request.sampling.for_model(model.spec))
    if draw_boxes is not None:
        _draw(draw_boxes, model.processor.boxes(finished.text) or (), message.images)
    if cut and not request.quiet and form in ("stream", "whole"):
        console.note(cut)
    if request.verbose:
        console.note(*answer.verbose_lines(model, finished), *model.remarks)
    if finished.reason == "interrupted":
        raise typer.Exit(INTERRUPTED_EXIT_CODE)


def _draw(file: Path, boxes: Sequence[Box], images: Sequence[Image]) -> None:
    """On the last picture, of which the answer speaks."""
    from mmchat.images.boxes import draw_boxes
    from mmchat.images.png import png_bytes

    if not boxes or not images:
        console.note(f"the answer has no boxes; {str(file)!r} is not written")
        return
    atomic_file.write_bytes(file, png_bytes(draw_boxes(boxes, images[-1])))


def _events(
    model: Model, session: ChatSession, message: Message, request: Request
) -> Iterator[Event]:
    """The chat format for instruct models; the prompt as it is for base models and --raw."""
    spec = model.spec
    sampling = request.sampling.for_model(spec, logprobs=request.shown.logprobs)
    if request.raw or spec.chat_format == "base":
        return session.complete(message, sampling=sampling)
    return session.ask(message, sampling)


def _read_pictures(given: PromptInput, alpha: Literal["white", "drop"], quiet: bool) -> list[Image]:
    with console.Stages(quiet=quiet) as stages:
        if given.sources:
            stages.show("reading the picture" + "s" * (len(given.sources) > 1))
        images = load_pictures(given, alpha)
    if not quiet:
        for image in images:
            for notice in image.notices:
                console.note(f"{image.source}: {notice}")
    return images


def _say_base(source: ModelSource) -> None:
    """That no answer is to be expected, where one is from a model of nearly the same name."""
    from mmchat.catalog.known import answering_sibling

    if sibling := answering_sibling(source.spec):
        name = source.spec.name
        console.note(f"{name} is a base model, which continues the text; {sibling} answers")


def _say_not_sent(given: PromptInput) -> None:
    """Name what reads like a picture in the prompt and is not given as one."""
    from mmchat.repl.paths import looks_like_picture, read_line, short_name, without_pages

    found = read_line(given.text[:SEARCHED_CHARACTERS])
    named = [*found.sources, *filter(looks_like_picture, (*found.missing, *found.mentioned))]
    sent = {without_pages(short_name(source)) for source in given.sources}
    left = [name for name in named if without_pages(short_name(name)) not in sent]
    for name in left[:MOST_SAID]:
        shown = quoted(name)
        typed = shown if "…" in shown else shlex.quote(name)
        console.note(f"{shown} in the prompt is not attached; -i {typed} does that")


def _refuse_pair(first: str, has_first: bool, second: str, has_second: bool) -> None:
    if has_first and has_second:
        raise UsageError(f"{first} and {second} contradict each other; give one of them")
