"""The commands about pictures: attached, exchanged, and shown with what the model made of them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import TYPE_CHECKING

from mmchat.errors import UsageError
from mmchat.images.png import png_bytes
from mmchat.repl import facts, paths
from mmchat.repl.registry import command, new_file, number_of, write

if TYPE_CHECKING:
    from mmchat.repl.chat import Chat


@command("image", "PATH|URL [QUESTION]", complete="paths", aliases=("i",))
def _image(chat: Chat, argument: str) -> None:
    """Attach a picture; a question after it is asked."""
    found = paths.read_argument(argument)
    if not found.sources:
        if not argument:
            raise UsageError("\\image needs a file, an address or the word clipboard")
        folder = paths.folder_named(argument if "/" in argument else f"./{argument}")
        raise UsageError(folder or facts.no_such(found.missing))
    chat.take(found)


@command("images")
def _images(chat: Chat, argument: str) -> None:
    """List the pictures with their numbers."""
    asked = len(chat.session.conversation.images)
    rows: list[tuple[str, str]] = []
    for number, image in enumerate(chat.pictures(), start=1):
        coming = "  (for the next question)" if number > asked else ""
        rows.append((str(number), facts.picture_line(image, chat.spec) + coming))
    if rows:
        chat.screen.table(rows)
    else:
        chat.screen.say("no pictures")


def _picture_numbers(chat: Chat, argument: str) -> Iterable[str]:
    return (str(n) for n in range(1, len(chat.pictures()) + 1))


@command("drop", "[N]", complete=_picture_numbers)
def _drop(chat: Chat, argument: str) -> None:
    """Take picture N (the last) out of the chat."""
    pictures = chat.pictures()
    if not argument and not pictures:
        raise UsageError("there are no pictures to drop")
    chat.exchange(number_of(argument, "the picture", default=len(pictures)), None)


@command("replace", "N PATH|URL", complete="paths")
def _replace(chat: Chat, argument: str) -> None:
    """Put another picture in the place of picture N."""
    number, _, source = argument.partition(" ")
    found = paths.read_argument(source)
    if found.missing and not found.sources and not found.text:
        raise UsageError(facts.no_such(found.missing))
    if len(found.sources) != 1 or found.text:
        raise UsageError("write \\replace N PATH, as in: \\replace 1 dog.png")
    others = chat.pictures()
    at = number_of(number, "the picture")
    del others[at - 1 : at]
    images = chat.load(found.sources, others)
    if len(images) > 1:
        raise UsageError(f"these are {len(images)} pages; name one, as in: \\replace 1 paper.pdf#2")
    [image] = images
    chat.exchange(at, image)


@command("tiles", "[N] [FILE.png]", complete=_picture_numbers)
def _tiles(chat: Chat, argument: str) -> None:
    """Show how picture N (the last) is cut into tiles."""
    words = argument.split(None, 1)
    number = number_of(words.pop(0), "the picture") if words and words[0].isdigit() else None
    pictures = chat.pictures()
    number = number or len(pictures)
    if not 1 <= number <= len(pictures):
        raise UsageError(f"there is no picture {number}" if pictures else "there are no pictures")
    image = pictures[number - 1]
    drawing = chat.spec.family.draw(chat.spec.config, image)
    if words:
        file = new_file(chat, words[0], "png")
        write(chat, file, png_bytes(drawing))
    chat.screen.drawing(drawing)
    line = "picture", facts.picture_line(image, chat.spec)
    chat.screen.table([line, *chat.spec.facts(image).lines])


@command("look", "[WORD] [FILE]")
def _look(chat: Chat, argument: str) -> None:
    """Show where the last answer, or one word, looked.

    FILE ends in .png or .html.
    """
    from mmchat.explain.draw import draw_look, draw_row
    from mmchat.explain.show import HEADS, look_rows, rendered

    words = argument.split()
    kind = Path(words[-1]).suffix.lower() if words else ""
    name = words.pop() if kind in (".png", ".html") else ""
    question = chat.session.last_turn().question.text
    _ = chat.session.loaded  # waited for here, under its own name
    found = chat.screen.wait("looking", chat.session.look)
    word = found.find(" ".join(words)) if words else None
    if name or chat.screen.draws == "off":
        if name:
            file = new_file(chat, name, kind[1:])
        else:  # of its own, for what the terminal cannot show
            with NamedTemporaryFile(prefix="mmchat-look-", suffix=".png", delete=False) as opened:
                file = Path(opened.name)
        write(chat, file, rendered(kind or ".png", found, word, question, chat.spec.name))
    # A sheet of all words as half blocks is a blur.
    draw = draw_row if chat.screen.draws == "blocks" else draw_look
    chat.screen.drawing(draw(found, word))
    rows = [HEADS, *look_rows(found, word)]
    width = max(len(place) for _, place, _ in rows)
    chat.screen.table([(text, f"{place:{width}}  {share}") for text, place, share in rows])


@command("boxes", "[FILE.png]")
def _boxes(chat: Chat, argument: str) -> None:
    """Show the boxes of the last answer on its picture."""
    from mmchat.images.boxes import box_records, draw_boxes

    found = chat.session.loaded.processor.boxes(chat.session.last_turn().answer)
    if found is None:
        raise UsageError(f"answers of {chat.spec.name} have no boxes")
    if not found or not chat.session.conversation.images:
        raise UsageError("the last answer has no boxes, or there is no picture")
    image = chat.session.conversation.images[-1]
    drawing = draw_boxes(found, image)
    if argument:
        file = new_file(chat, argument, "png")
        write(chat, file, png_bytes(drawing))
    chat.screen.drawing(drawing)
    records = box_records(found, image)
    chat.screen.table([(r["ref"] or "", str(r.get("box") or r.get("quad"))) for r in records])
