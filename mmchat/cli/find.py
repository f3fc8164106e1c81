"""`mmchat find`: pictures in the order of how likely the model finds something in them."""

from __future__ import annotations

import html
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mmchat.cli import console, model_choice, options
from mmchat.cli.batch import FAILED_EXIT_CODE
from mmchat.cli.prompt_input import check_model, check_output
from mmchat.errors import MmchatError, UsageError, quoted
from mmchat.input_text import checked
from mmchat.loading.options import LoadOptions
from mmchat.storage import atomic_file

if TYPE_CHECKING:
    from mmchat.api import Model

THUMBNAIL = 320, 320


def find(
    text: Annotated[str, typer.Argument(metavar="TEXT", help="What to find: 'a brown dog'.")],
    places: Annotated[
        list[str], typer.Argument(metavar="FOLDER", help="A folder, a glob, or pictures.")
    ],
    top: Annotated[int, options.of_output(min=1, help="Show the N likeliest.")] = 10,
    page: Annotated[
        Path | None,
        options.of_output("--html", metavar="FILE", help="Write them as an HTML page as well."),
    ] = None,
    rows: options.Rows = None,
    *,
    model: LoadOptions,
    offline: options.Offline = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Rank pictures by how likely the model finds something in them.

    It is asked about each picture whether TEXT is in it, and the probability of Yes counts. Exit
    code 8: some pictures cannot be read.
    """
    from mmchat.batch.rows import pictures

    if not checked(text, "TEXT").strip():
        raise UsageError("TEXT is empty; say what to find, as in: mmchat find 'a dog' photos")
    names = dict.fromkeys(name for place in places for name in pictures(place))
    if not names:
        where = ", ".join(map(quoted, places))
        raise UsageError(f"there are no pictures in {where}; give a folder, a glob, or pictures")
    check_output(page, "--html", list(names))
    source = model_choice.find_or_offer(model)
    check_model(source.spec, has_pictures=True, chats=True)
    loaded = model_choice.load_with_notes(model, source)
    found = _likelihoods(loaded, text, list(names), rows)
    best = sorted(found, key=lambda name: (-found[name], name))[:top]
    if as_json:
        console.print_json([{"image": name, "likelihood": found[name]} for name in best])
    else:
        cells = [(f"{100 * found[name]:.1f} %", name) for name in best]
        console.print_table(("LIKELIHOOD", "PICTURE"), cells, right={0}, grouped=False)
    if len(best) < len(found):
        console.note(f"the {len(best):,} likeliest of {len(found):,} pictures; --top N shows more")
    if page is not None:
        title = f"{text}: the likeliest of {len(found):,} pictures"
        atomic_file.write_text(page, _page(title, best, found))
    if len(found) < len(names):
        raise typer.Exit(FAILED_EXIT_CODE)


def _likelihoods(
    loaded: Model, text: str, names: Sequence[str], rows: int | None
) -> dict[str, float]:
    """Of each picture that can be read; of the others notes say why not."""
    from mmchat.batch.ranking import likelihood, prepare_score
    from mmchat.batch.rows import Asked, Row
    from mmchat.batch.run import answer_rows
    from mmchat.engine.events import Finished
    from mmchat.engine.room import usual_rows

    found: dict[str, float] = {}
    errors: list[str] = []
    asked = [Row(name, Asked((name,))) for name in names]
    engine = loaded.engine_of(rows or usual_rows(loaded, loaded.memory))
    try:
        with console.progress_bar("pictures", len(asked)) as advance:
            for one in answer_rows(engine, asked, partial(prepare_score, loaded, text)):
                advance()
                if isinstance(one.end, Finished):
                    found[one.row.custom_id] = likelihood(one.end)
                else:
                    errors.append(str(one.end))
    finally:  # what came before Ctrl-C too
        console.note_failures(errors)
    return found


def _page(title: str, best: list[str], found: dict[str, float]) -> str:
    from mmchat.images import load_images
    from mmchat.images.contact_sheet import contact_sheet

    figures = []
    for name in best:
        try:
            picture = load_images([name])[0].pixels.copy()
        except MmchatError as error:  # it was there when it was asked about
            console.say(f"left out of the page: {error}")
            continue
        picture.thumbnail(THUMBNAIL)
        link = html.escape(Path(name).resolve().as_uri() if Path(name).exists() else name)
        caption = f'<a href="{link}">{html.escape(name)}</a><br>{100 * found[name]:.1f} %'
        figures.append(([picture], caption))
    return contact_sheet(title, figures)
