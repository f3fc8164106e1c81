"""Pictures of a request: `data:` URLs and base64; addresses and files where that is allowed."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import TYPE_CHECKING

from mmchat.conversation import Image
from mmchat.errors import ImageError, MmchatError
from mmchat.images.formats import picture_format
from mmchat.images.sources import read_source
from mmchat.server.errors import ApiError, api_error
from mmchat.server.options import ServerOptions

if TYPE_CHECKING:
    from mmchat.images.colour import Alpha


@dataclass(frozen=True)
class Picture:
    """A picture as a client gave it. param: the field that it stands in."""

    source: str
    param: str


def open_pictures(
    pictures: Sequence[Picture], options: ServerOptions, alpha: Alpha, owner: str
) -> list[list[Image]]:
    """The pictures of each: a document has several. Raises ApiError with the field.

    What is cached of them is found by their hash, which is another for every owner: else one could
    tell by the time it takes what others have shown.
    """
    from mmchat.images import load_images

    opened: list[list[Image]] = []
    for picture in pictures:
        data = _read(picture, options)
        beside = [image for images in opened for image in images]
        try:
            images = load_images([data], alpha=alpha, names=[picture.param], beside=beside)
        except MmchatError as error:
            raise api_error(error, picture.param) from None
        opened.append([_of_owner(image, owner) for image in images])
    return opened


def _of_owner(image: Image, owner: str) -> Image:
    if not owner:
        return image
    return replace(
        image, content_hash=sha256(f"{owner}\n{image.content_hash}".encode()).hexdigest()
    )


def _read(picture: Picture, options: ServerOptions) -> bytes:
    source = picture.source
    scheme = source[:16].lower().partition(":")[0]
    if scheme == "data":
        try:
            return read_source(source).data
        except ImageError as error:
            raise api_error(error, picture.param) from None
    if (found := _bare_base64(source)) is not None:
        return found
    if scheme in ("http", "https"):
        raise ApiError(
            "image_fetch_refused",
            "pictures by address are off here; send them as data:image/…;base64,… URLs"
            " (the server's --allow-remote-images allows addresses)",
            picture.param,
        )
    raise ApiError(
        "invalid_image",
        "this is no picture: send a data:image/…;base64,… URL"
        " (the server's --media-dir allows paths)",
        picture.param,
    )


def _bare_base64(source: str) -> bytes | None:
    """What it decodes to, if that begins like a picture."""
    try:
        if picture_format(base64.b64decode(source[:64].strip()[:44])) is None:
            return None
        return base64.b64decode("".join(source.split()), validate=True)
    except (binascii.Error, ValueError):
        return None
