"""Pictures of a request: `data:` URLs and base64; addresses and files where that is allowed."""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import TYPE_CHECKING

from mmchat import limits
from mmchat.conversation import Image
from mmchat.errors import MemoryError_, MmchatError
from mmchat.images.formats import picture_format
from mmchat.images.sources import read_source
from mmchat.server.errors import ApiError, api_error
from mmchat.server.media import read_media
from mmchat.server.options import ServerOptions

if TYPE_CHECKING:
    from mmchat.images.colour import Alpha

_NO_PICTURE = (
    "this is no picture: send it as a data:image/…;base64,… URL"
    " (the server's --media-dir allows paths)"
)
_NO_ADDRESSES = (
    "pictures by address are off here: send them as data:image/…;base64,… URLs"
    " (the server's --allow-remote-images allows addresses)"
)
_NOT_FETCHED = (
    "the picture cannot be fetched: it must be at an https address of a public and allowed host,"
    f" answer within {limits.SERVER_FETCH_SECONDS:g} s and have at most"
    f" {limits.SERVER_FETCH_BYTES // limits.MIB} MiB"
)


@dataclass(frozen=True)
class Picture:
    """A picture as a client gave it. param: the field that it stands in."""

    source: str
    param: str


def open_pictures(
    pictures: Sequence[Picture],
    options: ServerOptions,
    alpha: Alpha,
    owner: str,
    is_wanted: Callable[[], bool] = lambda: True,
) -> list[list[Image]]:
    """The pictures of each: a document has several. Raises ApiError with the field.

    is_wanted: whether anybody still waits for them; it is asked before each.
    What is cached of them is found by their hash, which is another for every owner: else one could
    tell by the time it takes what others have shown.
    """
    from mmchat.images import load_images

    opened: list[list[Image]] = []
    for picture in pictures:
        if not is_wanted():
            raise ApiError("overloaded")
        beside = [image for images in opened for image in images]
        known = {"names": [picture.param], "beside": beside, "already": len(beside)}
        try:
            if len(beside) >= (most := limits.IMAGES_PER_PROMPT):
                text = f"there are more than {most} pictures and pages together; send fewer pages"
                raise ApiError("invalid_image", text)
            images = load_images([_read(picture.source, options)], alpha=alpha, **known)
        except MemoryError_ as error:  # too large together: no use to try again
            raise ApiError("invalid_image", str(error), picture.param) from None
        except (ApiError, MmchatError) as error:
            raise api_error(error, picture.param) from None
        opened.append([_of_owner(image, owner) for image in images])
    return opened


def _of_owner(image: Image, owner: str) -> Image:
    if not owner:
        return image
    mark = f"{owner}\n{image.content_hash}".encode()
    return replace(image, content_hash=sha256(mark).hexdigest())


def _read(source: str, options: ServerOptions) -> bytes:
    """Raises ApiError, ImageError."""
    scheme = source[:16].lower().partition(":")[0]
    if scheme == "data":
        return read_source(source).data
    if scheme in ("http", "https"):
        return _fetched(source, options)
    with suppress(ValueError):  # bare base64, if it begins like a picture
        if picture_format(base64.b64decode(source[:64].strip()[:44])) is not None:
            return base64.b64decode("".join(source.split()), validate=True)
    if options.media_dir is None:
        raise ApiError("invalid_image", _NO_PICTURE)
    found = read_media(options.media_dir, source)
    if found is None:  # whatever lies outside, or does not: the same words
        raise ApiError("invalid_image", "there is no such picture here")
    return found


def _fetched(source: str, options: ServerOptions) -> bytes:
    if options.remote_images is None:
        raise ApiError("image_fetch_refused", _NO_ADDRESSES)
    from mmchat.images.web import fetch

    with suppress(MmchatError):  # one answer for all, so that nobody can look around by it
        if source[:6].lower() == "https:":
            return fetch(
                source,
                max_bytes=limits.SERVER_FETCH_BYTES,
                allow_private=False,
                hosts=options.remote_images,
                seconds=limits.SERVER_FETCH_SECONDS,
            )
    raise ApiError("image_fetch_refused", _NOT_FETCHED)
