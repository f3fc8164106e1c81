"""Where pictures stand in a text that a user wrote: at its tags, if it has any."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mmchat.conversation import Image
from mmchat.errors import PromptError
from mmchat.words import plural


def place(text: str, images: Sequence[Image], tag: str) -> Iterator[str | Image] | None:
    """The text, cut at its tags, with a picture in place of each; None if it has no tag.

    Raises PromptError unless there are as many tags as pictures.
    """
    pieces = text.split(tag)
    tags = len(pieces) - 1
    if not tags:
        return None
    if tags != len(images):
        have = "are" if len(images) != 1 else "is"
        raise PromptError(
            f"the text has {plural(tags, f'{tag} tag')}, and there {have}"
            f" {plural(len(images), 'picture')}; give one for each, or leave the tags out to put"
            " pictures first"
        )
    return _merged(pieces, images)


def _merged(pieces: Sequence[str], images: Sequence[Image]) -> Iterator[str | Image]:
    yield pieces[0]
    for image, piece in zip(images, pieces[1:], strict=True):
        yield image
        yield piece
