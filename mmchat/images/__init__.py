"""Opens pictures, from whatever they are given as.

Every picture becomes RGB with its orientation applied; all metadata is dropped. Files are decoded
in a process of their own (`worker`); what is in memory already is converted here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from mmchat import limits
from mmchat.errors import ImageError, MissingExtra, quoted
from mmchat.images import worker
from mmchat.images.bounds import RefusedError, check_size
from mmchat.images.formats import explain_foreign, picture_format
from mmchat.images.in_memory import upright_picture
from mmchat.images.sources import Source, read_source
from mmchat.messages import Image

if TYPE_CHECKING:
    import numpy as np
    import torch
    from PIL import Image as PILImage

    from mmchat.images.colour import Alpha

    Held = PILImage.Image | np.ndarray | torch.Tensor  # what a program holds in memory


def load_image(
    source: Source | Held,
    *,
    alpha: Alpha = "white",
    name: str | None = None,
    allow_fetch: bool = True,
) -> Image:
    """Open a picture from a path, an address, a `data:` URL, bytes or a binary stream.

    Or take one that is in memory: of Pillow, an array of numpy, a tensor (see `in_memory`).

    alpha: "white" composites transparent pixels over white, "drop" ignores their transparency.
    name: shown in place of the source. allow_fetch: whether http and https addresses are fetched.
    Raises ImageError if it cannot be read, is over the limits or is no picture; NetworkError if a
    fetch fails; MissingExtra for HEIC without pillow-heif.
    """
    held = upright_picture(source)
    if held is not None:
        return _of_held(held, name or "picture", alpha)
    encoded = read_source(source, name=name, allow_fetch=allow_fetch)  # type: ignore[arg-type]
    shown = quoted(encoded.name)
    kind = picture_format(encoded.data)
    if kind is None:
        raise ImageError(f"{shown} {explain_foreign(encoded.data)}")
    try:
        picture, content_hash, notices = _decode(encoded.data, kind, alpha)
    except worker.WorkerError as reason:
        raise ImageError(f"{shown} {reason}") from None
    except RefusedError as reason:
        error = MissingExtra if reason.missing_extra else ImageError
        raise error(f"{shown} {reason}") from None
    return Image(picture, encoded.name, content_hash, notices)


def _decode(data: bytes, kind: str, alpha: Alpha) -> tuple[PILImage.Image, str, tuple[str, ...]]:
    """Have the worker decode a file: the picture, its hash and the notices.

    Raises RefusedError if it is not read, WorkerError if the worker did not outlive it.
    """
    request = {
        "kind": kind,
        "alpha": alpha,
        "max_pixels": limits.IMAGE_PIXELS,
        "cpu_seconds": limits.DECODE_CPU_SECONDS,
        "memory": limits.DECODE_MEMORY_BYTES,
    }
    with worker.pool.worker() as decoder:
        answer = decoder.ask(request, data)
        if "reason" not in answer:
            return *_receive(decoder, tuple(answer["size"])), tuple(answer["notices"])
    raise RefusedError(answer["reason"], missing_extra=answer["missing_extra"])


def _receive(decoder: worker.Worker, size: tuple[int, int]) -> tuple[PILImage.Image, str]:
    """Put the picture together from the pixels that the worker sends; its hash as well."""
    from PIL import Image as PILImage

    from mmchat.images.colour import new_hash, strips

    check_size(size, limits.IMAGE_PIXELS)
    picture = None
    digest = new_hash("RGB", *size)
    for box in strips(*size):
        strip_size = size[0], box[3] - box[1]
        pixels = decoder.read(3 * strip_size[0] * strip_size[1])
        digest.update(pixels)
        strip = PILImage.frombytes("RGB", strip_size, pixels)
        if strip_size == size:
            picture = strip
        else:
            picture = picture or PILImage.new("RGB", size)
            picture.paste(strip, box)
    return cast("PILImage.Image", picture), digest.hexdigest()


def content_hash(picture: PILImage.Image) -> str:
    """sha256 over mode, width, height and pixels, so that equal bytes of another shape differ."""
    from mmchat.images.colour import new_hash, strips

    digest = new_hash(picture.mode, picture.width, picture.height)
    for box in strips(*picture.size):
        digest.update(picture.crop(box).tobytes())
    return digest.hexdigest()


def _of_held(picture: PILImage.Image, name: str, alpha: Alpha) -> Image:
    try:
        return from_pil(picture, source=name, alpha=alpha)
    except Exception as problem:  # Pillow raises almost anything
        kind = type(problem).__name__
        raise ImageError(f"a picture of mode {picture.mode} is not read ({kind})") from None


def from_pil(picture: PILImage.Image, *, source: str = "picture", alpha: Alpha = "white") -> Image:
    """Make an Image of a Pillow picture in memory; no orientation is applied."""
    from PIL import Image as PILImage

    from mmchat.images.colour import eight_bits, quiet_pillow, rgb_strips

    with quiet_pillow():
        picture, notices = eight_bits(picture)
        rgb = PILImage.new("RGB", picture.size)
        for box, strip in rgb_strips(picture, alpha):
            rgb.paste(strip, box)
    return Image(rgb, source, content_hash(rgb), tuple(notices))


def load_clipboard(*, alpha: Alpha = "white") -> Image:
    """The picture on the system's clipboard, or the file that was copied there.

    Raises ImageError if there is none.
    """
    from mmchat.images.clipboard import clipboard

    found = clipboard()
    if isinstance(found, str):
        return load_image(found, alpha=alpha)
    if isinstance(found, bytes):
        return load_image(found, alpha=alpha, name="clipboard")
    try:
        check_size(found.size, limits.IMAGE_PIXELS)
    except RefusedError as reason:
        raise ImageError(f"the picture on the clipboard {reason}") from None
    return from_pil(found, source="clipboard", alpha=alpha)
