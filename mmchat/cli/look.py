"""`mmchat look`: where an answer looked, word by word."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmchat.cli import answer, console, model_choice, options, prompt_input
from mmchat.cli.positional import Said
from mmchat.cli.sampling_options import SamplingOptions
from mmchat.errors import INTERRUPTED_EXIT_CODE, UsageError
from mmchat.loading.options import LoadOptions
from mmchat.storage import atomic_file

if TYPE_CHECKING:
    from mmchat.catalog.source import ModelSource
    from mmchat.chat.session import ChatSession
    from mmchat.engine.events import Finished
    from mmchat.explain.look import Look

ENDINGS = (".png", ".html")


def look(
    said: Said,
    prompt: options.Prompt = None,
    images: options.Images = None,
    system: options.System = None,
    *,
    sampling: SamplingOptions,
    model: LoadOptions,
    offline: options.Offline = False,
    word: Annotated[
        str | None,
        options.of_output(
            "--word", metavar="TEXT|N", help="This word alone, or the one of a number."
        ),
    ] = None,
    as_json: options.Json = False,
    output: Annotated[
        Path | None,
        options.to_file(
            "FILE.png|.html",
            "Write a picture, or a page where a word that is pointed at lights up.",
        ),
    ] = None,
    quiet: options.Quiet = False,
) -> None:
    """Show where an answer looked: how strongly each word read each part of the pictures.

    That is where cross-attention reads, not why the model said so.
    """
    images = images or []
    prompt_input.check_output(output, "--output", images, ENDINGS)
    prompt_input.check_pictures(images)
    given = prompt_input.gather(prompt, images, allow_blank=False)
    if not given.sources:
        raise UsageError("there is no picture to look at; give one with -i")
    prompt_input.expect_pictures()
    source = model_choice.find_or_offer(model, looks=True)
    check_source(source, model.ranks)
    model_choice.say_choice(model, source)
    console.note(*said.notes, *given.notes)
    model_choice.begin_loading(model, source)
    pictures = prompt_input.load_pictures(given, model_choice.alpha_rule(model, source))
    from mmchat.repl.answering import interrupts

    with console.Stages() as stages:
        loaded = model_choice.load(model, source, stages)
        session = loaded.chat(system=system)
        events = session.send(given.text, pictures, sampling.for_model(loaded.spec))
        sink = answer.Answer(loaded, pictures, "json" if as_json else "stream", None)
        looked = functools.cache(session.look)
        sink.beside = functools.partial(heat_of, session, looked)
        with interrupts(session.interrupt, KeyboardInterrupt):
            finished = sink.read(events, stages)
        if finished.reason == "interrupted":
            raise typer.Exit(INTERRUPTED_EXIT_CODE)
        stages.show("looking")
        found = looked()
    from mmchat.explain.show import HEADS, look_rows, rendered

    chosen = None if word is None else found.find(word)
    if output is not None:
        content = rendered(output.suffix.lower(), found, chosen, given.text, loaded.spec.name)
        atomic_file.write_bytes(output, content)
    if not as_json:
        console.print_table(HEADS, look_rows(found, chosen), right={2}, grouped=False)


def check_source(source: ModelSource, ranks: int) -> None:
    """Raises UsageError for models that do not tell where they look."""
    from mmchat.explain.look import PROGRAMS, SHARED, check_spec

    if ranks > 1:
        raise UsageError(SHARED)
    check_spec(source.spec)
    prompt_input.check_model(source.spec, has_pictures=True)
    if source.exported and source.exported.record.programs:
        raise UsageError(PROGRAMS)


def heat_of(session: ChatSession, look: Callable[[], Look], finished: Finished) -> dict[str, Any]:
    """What --json says beside the answer. look: of the session."""
    from mmchat.explain.show import look_record

    if not finished.text.strip() or not session.conversation.images:
        return {"heat": None}
    return {"heat": look_record(look())}
