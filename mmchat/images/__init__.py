"""Opens pictures, from whatever they are given as.

Every picture becomes RGB with its orientation applied; all metadata is dropped. Files are decoded
in a process of their own (`worker`); what is in memory already is converted here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import NoneType
from typing import TYPE_CHECKING, Any, cast

from mmchat import limits
from mmchat.conversation import Image
from mmchat.errors import ImageError, MemoryError_, MissingExtra, UsageError, check_type, quoted
from mmchat.images import worker
from mmchat.images.bounds import RefusedError, check_size
from mmchat.images.formats import PAGED, explain_foreign, picture_format
from mmchat.images.in_memory import pixel_count, upright_picture
from mmchat.images.pages import page_numbers
from mmchat.images.sources import Encoded, Source, check_paged, read_source

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

    Or take one that is in memory: of Pillow, an array of numpy, a tensor (see `in_memory`). Of a
    document (PDF, TIFF) it is the first page, or the one that is named: `paper.pdf#3`.

    alpha: "white" composites transparent pixels over white, "drop" ignores their transparency.
    name: shown in place of the source. allow_fetch: whether http and https addresses are fetched.
    Raises ImageError if it cannot be read, is over the limits or is no picture; NetworkError if a
    fetch fails; MissingExtra for HEIC without pillow-heif and PDF without pypdfium2; UsageError for
    arguments of other types.
    """
    if not (isinstance(alpha, str) and alpha in ("white", "drop")):
        raise UsageError(f"alpha must be 'white' or 'drop', not {quoted(alpha)}")
    check_type("name", name, (str, NoneType), "a string")
    check_type("allow_fetch", allow_fetch, bool, "True or False")
    held = upright_picture(source)
    if held is not None:
        try:
            return from_pil(held, source=name or "picture", alpha=alpha)
        except Exception as problem:  # Pillow raises almost anything
            kind = type(problem).__name__
            raise ImageError(f"a picture of mode {held.mode} is not read ({kind})") from None
    encoded = read_source(source, name=name, allow_fetch=allow_fetch)  # type: ignore[arg-type]
    if encoded.pages:
        pages = _pages(encoded)
        if len(pages) > 1:
            raise ImageError(
                f"{quoted(encoded.name)} is asked for {len(pages)} pages, and this takes one;"
                f" write '#{pages[0].page}'"
            )
        [encoded] = pages
    return _decode(encoded, alpha)


def load_images(
    sources: Sequence[Source | Held | Image],
    *,
    alpha: Alpha = "white",
    names: Sequence[str | None] | None = None,
    beside: Iterable[Image] = (),
    already: int = 0,
) -> list[Image]:
    """Open the pictures of one prompt or chat, all of them or none.

    Each page of a document (PDF, TIFF) is a picture, or each that is named (`paper.pdf#3-5`).
    Together with those that it has already (`beside`) they have at most limits.IMAGES_PIXELS; their
    sizes are read from their headers before the first of them is decoded. names: shown in place of
    the sources. already: pictures of the prompt that are open. Raises what `load_image` raises, and
    MemoryError_ if they are too large together.
    """
    each = load_each(sources, alpha=alpha, names=names, beside=beside, already=already)
    return [image for images in each for image in images]


def load_each(
    sources: Sequence[Source | Held | Image],
    *,
    alpha: Alpha = "white",
    names: Sequence[str | None] | None = None,
    beside: Iterable[Image] = (),
    already: int = 0,
) -> list[list[Image]]:
    """`load_images`, with the pictures of each source by themselves."""
    have = _pixels([*beside, *(source for source in sources if isinstance(source, Image))])
    _check_together(have)
    opened: list[list[tuple[Any, str | None]]] = []
    size = 0
    for source, name in zip(sources, names or [None] * len(sources), strict=True):
        if isinstance(source, Image) or pixel_count(source) is not None:
            opened.append([(source, name)])
            continue
        encoded = read_source(source, name=name)  # type: ignore[arg-type]
        size += len(encoded.data)
        if size > limits.IMAGES_BYTES:
            most = limits.IMAGES_BYTES // limits.MIB
            raise MemoryError_(f"the files of the pictures have more than {most:,} MiB together")
        opened.append([(page, None) for page in _pages(encoded)])
    count = sum(map(len, opened))
    if (all_of_them := already + count) > max(limits.IMAGES_PER_PROMPT, len(sources)):
        raise ImageError(
            f"the pages and pictures are {all_of_them} together, and one prompt takes at most"
            f" {limits.IMAGES_PER_PROMPT}; name fewer pages, as in 'paper.pdf#1-3'"
        )
    if have + count * limits.IMAGE_PIXELS > limits.IMAGES_PIXELS:
        _check_together(have + sum(_announced(one) for group in opened for one, _ in group))
    each: list[list[Image]] = []
    for group in opened:
        each.append([])
        for source, name in group:
            if isinstance(source, Image):
                each[-1].append(source)
                continue
            is_file = isinstance(source, Encoded)
            image = (
                _decode(source, alpha) if is_file else load_image(source, alpha=alpha, name=name)
            )
            each[-1].append(image)
            have += image.width * image.height
            _check_together(have)  # a file may hold more than its header says
    return each


def _pages(encoded: Encoded) -> list[Encoded]:
    """The pages of a document that are meant, each by itself; what is none, as it is.

    Raises ImageError, also if they are not there or are too many.
    """
    kind = picture_format(encoded.data)
    if kind is not None:
        check_paged(encoded, kind)
    if kind not in PAGED:
        return [encoded]
    encoded = replace(encoded, document=object())
    with _asked(encoded, only_pages=True) as (_, answer):
        count = answer["pages"]
    if count == 1 and not encoded.pages:
        return [encoded]
    try:
        numbers = page_numbers(encoded.pages, count)
    except RefusedError as reason:
        raise ImageError(f"{quoted(encoded.name)} {reason}") from None
    return [replace(encoded, name=f"{encoded.name} page {n}", page=n) for n in numbers]


def _pixels(images: Iterable[Image]) -> int:
    """What they have together; one that stands in several places is there once."""
    return sum(p.width * p.height for p in {id(i.pixels): i.pixels for i in images}.values())


def _announced(source: Encoded | Held | Image) -> int:
    """The pixels that a picture will take more than it does now, by its header."""
    if isinstance(source, Image):
        return 0
    if not isinstance(source, Encoded):
        return pixel_count(source) or 0
    with _asked(source, only_size=True) as (_, answer):
        width, height = answer["size"]
    return width * height


def _check_together(pixels: int) -> None:
    most = limits.IMAGES_PIXELS
    if pixels > most:
        raise MemoryError_(
            f"the pictures have {pixels:,} pixels together; at most {most:,} fit into one prompt or"
            " chat; make them smaller, or take fewer"
        )


def _decode(encoded: Encoded, alpha: Alpha) -> Image:
    with _asked(encoded, alpha=alpha) as (decoder, answer):
        picture, content_hash = _receive(decoder, tuple(answer["size"]))
        return Image(picture, encoded.name, content_hash, tuple(answer["notices"]))


@contextmanager
def _asked(encoded: Encoded, **request: Any) -> Iterator[tuple[worker.Worker, dict[str, Any]]]:
    """What the worker answers about a file, and the worker, which then sends the pixels.

    Raises ImageError and MissingExtra, with the picture's name.
    """
    shown = quoted(encoded.name)
    kind = picture_format(encoded.data)
    if kind is None:
        raise ImageError(f"{shown} {explain_foreign(encoded.data)}")
    request |= {
        "kind": kind,
        "page": encoded.page,
        "max_pixels": limits.IMAGE_PIXELS,
        "cpu_seconds": limits.DECODE_CPU_SECONDS,
        "memory": limits.DECODE_MEMORY_BYTES,
    }
    try:
        with worker.pool.worker() as decoder:
            answer = decoder.ask(request, encoded.data, encoded.document)
            if "reason" not in answer:
                yield decoder, answer
                return
    except (worker.WorkerError, RefusedError) as reason:
        raise ImageError(f"{shown} {reason}") from None
    error = MissingExtra if answer["missing_extra"] else ImageError
    raise error(f"{shown} {answer['reason']}")


def _receive(decoder: worker.Worker, size: tuple[int, int]) -> tuple[PILImage.Image, str]:
    """Put the picture together from the pixels that the worker sends; its hash as well."""
    from PIL import Image as PILImage

    from mmchat.images.colour import new_hash, strips

    check_size(size, limits.IMAGE_PIXELS)
    picture = None
    digest = new_hash(*size)
    for box in strips(*size):
        strip_size = size[0], box[3] - box[1]
        pixels = decoder.read(3 * strip_size[0] * strip_size[1])
        digest.update(pixels)
        strip = PILImage.frombytes("RGB", strip_size, pixels)
        if strip_size == size:
            picture = strip
        else:
            picture = picture or PILImage.new("RGB", size, None)  # None: not filled
            picture.paste(strip, box)
    return cast("PILImage.Image", picture), digest.hexdigest()


def from_pil(picture: PILImage.Image, *, source: str = "picture", alpha: Alpha = "white") -> Image:
    """Make an Image of a Pillow picture in memory; no orientation is applied."""
    from PIL import Image as PILImage

    from mmchat.images.colour import eight_bits, new_hash, quiet_pillow, rgb_strips

    digest = new_hash(*picture.size)
    with quiet_pillow():
        picture, notices = eight_bits(picture)
        rgb = PILImage.new("RGB", picture.size)
        for box, strip in rgb_strips(picture, alpha):
            digest.update(strip.tobytes())
            rgb.paste(strip, box)
    return Image(rgb, source, digest.hexdigest(), tuple(notices))
