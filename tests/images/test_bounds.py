import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image as PILImage

from mmchat import limits
from mmchat.errors import ImageError
from mmchat.images import load_image
from mmchat.images.bounds import RefusedError, check_parts, tiff_pages
from mmchat.images.decode import announced_size, decode

SMALL = PILImage.fromarray(np.random.default_rng(7).integers(0, 256, (23, 37, 3), dtype=np.uint8))


def encode(kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    SMALL.save(buffer, kind, **options)
    return buffer.getvalue()


def segment(marker: int, body: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body


def jpeg_of_scans(count: int) -> bytes:
    """A progressive JPEG whose last scan is repeated until there are `count`."""
    data = encode("JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    scans = data.count(b"\xff\xda")
    return data[:-2] + data[last:-2] * (count - scans) + data[-2:]


def jpeg_of_segments(marker: int, body: bytes, count: int) -> bytes:
    data = encode("JPEG")
    return data[:2] + segment(marker, body) * count + data[2:]


def jpeg_behind(junk: bytes) -> bytes:
    """A JPEG with bytes that are no segment ahead of its first one."""
    data = encode("JPEG")
    return data[:2] + junk + data[2:]


def png_of_chunks(count: int) -> bytes:
    data = encode("PNG")
    body = b"tEXt" + b"a\0b"
    text = struct.pack(">I", 3) + body + struct.pack(">I", zlib.crc32(body))
    return data[:33] + text * count + data[33:]


def gif_of_blocks(label: int, count: int, *, per_extension: int) -> bytes:
    data = encode("GIF")
    first = 13 + (3 << (data[10] & 7) + 1)
    extension = bytes((0x21, label)) + b"\x01a" * per_extension + b"\0"
    return data[:first] + extension * (count // per_extension) + data[first:]


EXIF = b"Exif\0\0MM\0*\0\0\0\x08\0\0\0\0\0\0"
MANY = {
    "scans": (jpeg_of_scans, limits.JPEG_SCANS),
    "segments": (lambda n: jpeg_of_segments(0xE5, b"x", n - 9), limits.JPEG_SEGMENTS),
    "pieces of Exif": (lambda n: jpeg_of_segments(0xE1, EXIF, n), limits.JPEG_EXIF_SEGMENTS),
    "KiB between": (lambda n: jpeg_behind(b"\xff" * n * 1024), limits.JPEG_GAP_KIB),
    "KiB between its segments": (
        lambda n: jpeg_behind(segment(0xE5, b"x") + b"\0" * n * 1024),
        limits.JPEG_GAP_KIB,
    ),
    "chunks": (lambda n: png_of_chunks(n - 3), limits.PNG_CHUNKS),
    "pieces of comments": (
        lambda n: gif_of_blocks(0xFE, n, per_extension=4),
        limits.GIF_COMMENT_BLOCKS,
    ),
    "blocks of metadata": (
        lambda n: gif_of_blocks(0x01, n, per_extension=1),
        limits.GIF_BLOCKS,
    ),
}


@pytest.mark.parametrize("part", MANY)
def test_as_many_parts_as_allowed_are_read_and_more_are_refused(part):
    make, limit = MANY[part]
    assert load_image(make(limit)).width == 37
    with pytest.raises(ImageError, match=f"has more than {limit:,} {part}"):
        load_image(make(limit + 4))


def test_the_parts_of_a_hidden_second_picture_do_not_count():
    first = jpeg_of_scans(limits.JPEG_SCANS)
    check_parts(first + first, "JPEG")


def test_counting_goes_over_the_file_once():
    """Each byte is looked at a bounded number of times: lengths that lead back end the count."""

    class Watched(bytes):
        read = 0

        def __getitem__(self, where):
            Watched.read += 1
            return super().__getitem__(where)

    data = Watched(b"II*\0\x08\0\0\0" + struct.pack("<HI", 0, 8))  # a page that follows itself
    assert tiff_pages(data) == [0]
    assert Watched.read < 30
    for kind, start in (("PNG", b"\x89PNG\r\n\x1a\n"), ("GIF", b"GIF89a\1\0\1\0\0\0\0")):
        Watched.read = 0
        check_parts(Watched(start + b"\xff\xff\xff\xff" * 1000), kind)
        assert Watched.read < 20


@pytest.mark.parametrize(("order", "big"), [("<", False), (">", False), ("<", True), (">", True)])
@pytest.mark.parametrize("count", [1, 2, 7])
def test_the_pages_of_a_tiff_are_counted(order, big, count):
    byte_order = b"II" if order == "<" else b"MM"
    head = struct.pack(f"{order}HHHQ", 43, 8, 0, 16) if big else struct.pack(f"{order}HI", 42, 8)
    page = (
        (lambda n: struct.pack(f"{order}Q20xQ", 1, n))
        if big
        else (lambda n: struct.pack(f"{order}H12xI", 1, n))
    )
    data = byte_order + head
    for index in range(count):
        data += page(len(data) + len(page(0)) if index + 1 < count else 0)
    assert tiff_pages(data) == list(range(count))
    frames = [SMALL] * (count - 1)
    assert tiff_pages(encode("TIFF", save_all=True, append_images=frames)) == list(range(count))


def test_a_tiff_of_very_many_pages_is_read_and_said():
    page = encode("TIFF")
    at = struct.unpack_from("<I", page, 4)[0]
    entries = page[at : at + 2 + 12 * struct.unpack_from("<H", page, at)[0]]
    data = bytearray(page)
    struct.pack_into("<I", data, at + len(entries), len(data))
    for _ in range(limits.TIFF_PAGES):
        data += entries + struct.pack("<I", len(data) + len(entries) + 4)
    image = load_image(bytes(data))
    assert image.notices == ("only the first of more than 10,000 pages is used",)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "TIFF", "WEBP", "AVIF"])
def test_counting_survives_any_cut(kind):
    data = encode(kind)
    for length in range(len(data)):
        try:
            check_parts(data[:length], kind)
            tiff_pages(data[:length])
        except RefusedError:
            raise AssertionError(f"cut at {length}") from None


def test_a_file_of_fill_bytes_alone_is_refused_at_once():
    with pytest.raises(RefusedError, match="more than 64 KiB between its segments"):
        check_parts(b"\xff\xd8" + b"\xff" * 2**20, "JPEG")


def test_metadata_behind_an_early_end_marker_counts():
    """Pillow reads on there, until the first scan."""
    pieces = segment(0xE1, EXIF) * (limits.JPEG_EXIF_SEGMENTS + 1)
    with pytest.raises(RefusedError, match="more than 16 pieces of Exif"):
        check_parts(jpeg_behind(b"\xff\xd9" + pieces), "JPEG")


def test_a_webp_has_no_more_pixels_than_its_decoder_has_memory_for(monkeypatch):
    monkeypatch.setattr(limits, "WEBP_PIXELS", 23 * 37)
    assert decode(encode("WEBP"), "WEBP", 10**6)[0].width == 37
    monkeypatch.setattr(limits, "WEBP_PIXELS", 23 * 37 - 1)
    for read in (decode, announced_size):
        with pytest.raises(RefusedError, match="has 37 x 23 pixels; at most 850"):
            read(encode("WEBP"), "WEBP", 10**6)
    assert decode(encode("PNG"), "PNG", 10**6)[0].width == 37
