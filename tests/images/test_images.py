import base64
import hashlib
import io
import os
import random
import re
import subprocess
import sys
import threading
import urllib.parse
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as PILImage
from PIL import ImageFile, ImageOps

from mmchat import limits
from mmchat.errors import ImageError, MissingExtra, UsageError
from mmchat.images import from_pil, load_image, worker
from mmchat.images.bounds import RefusedError
from mmchat.images.decode import decode

NOISE = np.random.default_rng(7).integers(0, 256, (23, 37, 4), dtype=np.uint8)
RGB = PILImage.fromarray(NOISE[:, :, :3])
RGBA = PILImage.fromarray(NOISE)
LOSSLESS = {
    "PNG": {},
    "WEBP": {"lossless": True, "exact": True},
    "BMP": {},
    "TIFF": {},
}


def encode(picture: PILImage.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def pixels(picture) -> np.ndarray:
    return np.asarray(picture.pixels if hasattr(picture, "pixels") else picture)


def reject(source, **options) -> str:
    """The message of the ImageError, which must be one line."""
    with pytest.raises(ImageError) as caught:
        load_image(source, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert "Traceback" not in message
    return message


# ---- formats


@pytest.mark.parametrize("kind", LOSSLESS)
def test_lossless_formats_give_the_pixels_that_went_in(kind):
    image = load_image(encode(RGB, kind, **LOSSLESS[kind]))
    assert image.pixels.mode == "RGB"
    assert (image.width, image.height) == (37, 23)
    assert np.array_equal(pixels(image), pixels(RGB))
    assert image.notices == ()


@pytest.mark.parametrize("kind", ["JPEG", "AVIF", "GIF"])
def test_lossy_formats_give_what_pillow_gives(kind):
    data = encode(RGB, kind)
    assert np.array_equal(
        pixels(load_image(data)), pixels(PILImage.open(io.BytesIO(data)).convert("RGB"))
    )


@pytest.mark.parametrize(
    ("kind", "options", "notice"),
    [
        ("GIF", {}, "only the first frame of the animation is used"),
        ("PNG", {}, "only the first of 3 frames is used"),
        ("WEBP", {"lossless": True}, "only the first of 3 frames is used"),
        ("AVIF", {"quality": 100}, "only the first of 3 frames is used"),
        ("TIFF", {}, "only the first of 3 pages is used"),
    ],
)
def test_animations_give_their_first_frame_and_say_so(kind, options, notice):
    frames = [PILImage.new("RGB", (16, 16), colour) for colour in ("red", "lime", "blue")]
    data = encode(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    image = load_image(data)
    assert image.notices == (notice,)
    assert np.abs(pixels(image).astype(int) - [255, 0, 0]).max() < 8


def test_a_phone_jpeg_with_a_second_picture_says_nothing():
    data = encode(RGB, "MPO", save_all=True, append_images=[RGB])
    image = load_image(data)
    assert image.notices == ()
    assert image.width == 37


def test_heic_is_read_with_the_extra():
    pillow_heif = pytest.importorskip("pillow_heif")
    buffer = io.BytesIO()
    pillow_heif.from_pillow(PILImage.new("RGB", (64, 48), (200, 30, 60))).save(buffer, quality=90)
    before = set(PILImage.OPEN)
    image = load_image(buffer.getvalue())
    assert (image.width, image.height) == (64, 48)
    assert np.abs(pixels(image).astype(int) - [200, 30, 60]).max() < 10
    assert set(PILImage.OPEN) == before


def test_heic_without_the_extra_names_it(monkeypatch):
    heic = b"\0\0\0\x1cftypheic\0\0\0\0mif1heicmiaf"
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(RefusedError, match=r"pip install 'mmchat\[heif\]'") as caught:
        decode(heic, "HEIF", limits.IMAGE_PIXELS)
    assert caught.value.missing_extra
    refusal = {"reason": "is a HEIC picture", "missing_extra": True}
    monkeypatch.setattr(worker.Worker, "ask", lambda *_: refusal)
    with pytest.raises(MissingExtra, match=r"'dog\.heic' is a HEIC picture"):
        load_image(heic, name="dog.heic")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "is empty"),
        (b'<?xml version="1.0"?>\n<!-- x --><svg xmlns="http://www.w3.org/2000/svg">', "SVG"),
        (b"<svg/>", "not a picture in a known format"),
        (b"\n <!DOCTYPE html><html></html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "git lfs pull"),
        (b"\0\0\0\x18ftypmp42\0\0\0\0mp42isom", "video"),
        (b"8BPS\0\1", "Photoshop"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "PostScript"),
        (b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG 2000"),
        (b"P6 1 1 255 abc", "not a picture in a known format"),
        (b"hello", "not a picture in a known format"),
    ],
)
def test_what_is_no_picture_is_named(data, words):
    assert words in reject(data, name="thing")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"])
@pytest.mark.parametrize("before", [b"", b"\xef\xbb\xbf", b"\n", b"data:image/x;base64,"])
def test_base64_text_in_place_of_a_picture_is_told_with_the_way_to_decode_it(kind, before):
    data = encode(RGB, kind)
    for text in (base64.encodebytes(data), base64.urlsafe_b64encode(data), data[:3].hex().encode()):
        words = reject(before + text, name="thing")
        what = "what follows its comma" if before.startswith(b"data:") else "it"
        said = f"'thing' is base64 text of a picture ({kind}), not its bytes; decode {what} with"
        assert (f"{said} base64 -d" in words) == (text[:6] != data[:3].hex().encode())


def test_formats_off_the_list_are_not_tried_even_if_pillow_knows_them():
    for kind in ("PPM", "TGA", "ICO", "SGI", "PCX"):
        reject(encode(RGB, kind))


def test_jpeg_inside_tiff_is_refused():
    assert "'jpeg' compression" in reject(encode(RGB, "TIFF", compression="jpeg"))


@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_adobe_deflate", "packbits"])
def test_common_tiff_compressions_are_read(compression):
    assert np.array_equal(
        pixels(load_image(encode(RGB, "TIFF", compression=compression))), pixels(RGB)
    )


# ---- colour modes


def picture_of_each_mode() -> dict[str, PILImage.Image]:
    palette = RGB.quantize(17)
    see_through = palette.copy()
    see_through.info["transparency"] = 3
    translucent = palette.copy()
    translucent.info["transparency"] = bytes(range(0, 255, 15))
    grey_key, rgb_key = RGB.convert("L"), RGB.copy()
    grey_key.info["transparency"] = int(NOISE[0, 0, 0])
    rgb_key.info["transparency"] = tuple(int(v) for v in NOISE[0, 0, :3])
    return {
        "RGB": RGB,
        "L": RGB.convert("L"),
        "1": RGB.convert("1"),
        "P": palette,
        "RGBA": RGBA,
        "LA": RGBA.convert("LA"),
        "PA": RGBA.convert("PA"),
        "CMYK": RGB.convert("CMYK"),
        "YCbCr": RGB.convert("YCbCr"),
        "I of 8 bits": RGB.convert("L").convert("I"),
        "P with one transparent colour": see_through,
        "P with translucent colours": translucent,
        "L with a transparent grey": grey_key,
        "RGB with a transparent colour": rgb_key,
    }


def rgb_of_the_hub(picture: PILImage.Image) -> np.ndarray:
    # takes a second to import, which those who run other tests need not wait for
    from transformers.image_transforms import convert_to_rgb

    return convert_to_rgb(picture, return_numpy=True)


@pytest.mark.parametrize("mode", picture_of_each_mode())
def test_each_mode_becomes_rgb_as_in_the_hub_processor_and_in_metas(mode):
    picture = picture_of_each_mode()[mode]
    white = rgb_of_the_hub(picture.copy())
    assert np.array_equal(pixels(from_pil(picture, alpha="white")), white)
    with warnings.catch_warnings(action="ignore"):
        meta = picture.convert("RGB")
    assert np.array_equal(pixels(from_pil(picture, alpha="drop")), pixels(meta))


def test_the_alpha_rules_differ_where_there_is_alpha():
    data = encode(RGBA, "PNG")
    white, drop = load_image(data), load_image(data, alpha="drop")
    assert white.content_hash != drop.content_hash
    assert np.array_equal(pixels(drop), NOISE[:, :, :3])


def test_alpha_of_a_tall_picture_is_right_across_the_bands():
    tall = PILImage.fromarray(
        np.random.default_rng(3).integers(0, 256, (1300, 1000, 4), dtype=np.uint8)
    )
    assert np.array_equal(pixels(from_pil(tall)), rgb_of_the_hub(tall))


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_grey_keeps_its_high_byte(kind):
    values = np.arange(0, 65536, 257, dtype=np.uint16)[None]
    image = load_image(encode(PILImage.fromarray(values), kind))
    assert np.array_equal(pixels(image)[0], np.repeat(np.arange(256)[:, None], 3, axis=1))
    # What is deviated from: Pillow alone makes nearly all of it white.
    assert (pixels(PILImage.fromarray(values).convert("RGB")) == 255).mean() > 0.99


def test_16_bit_colour_keeps_its_high_byte_too():
    import struct
    import zlib

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    row = struct.pack(">6H", 0x12FF, 0x8000, 0xFFFF, 0x0001, 0x7FFF, 0xA1B2)
    data = (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(b"\0" + row))
        + chunk(b"IEND", b"")
    )
    assert pixels(load_image(data)).tolist() == [[[0x12, 0x80, 0xFF], [0x00, 0x7F, 0xA1]]]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[0, 128, 255]], np.int32), [0, 128, 255]),
        (np.array([[0, 256, 65535]], np.int32), [0, 1, 255]),
        (np.array([[-100, 0, 100]], np.int32), [0, 127, 255]),
        (np.array([[0.0, 0.5, 1.0]], np.float32), [0, 127, 255]),
        (np.array([[0.0, 100.0, 255.0]], np.float32), [0, 100, 255]),
        (np.array([[0.0, 500.0, 1000.0]], np.float32), [0, 127, 255]),
        (np.array([[np.nan, np.inf, 1.0]], np.float32), [0, 0, 255]),
        (np.array([[-3e38, 0, 3e38]], np.float32), [0, 127, 255]),
    ],
)
def test_32_bit_and_real_valued_grey_is_scaled_by_its_range(values, expected):
    image = load_image(encode(PILImage.fromarray(values), "TIFF"))
    assert pixels(image)[0, :, 0].tolist() == expected


def test_lab_is_refused_by_name():
    assert "LAB" in reject(encode(PILImage.new("LAB", (4, 4)), "TIFF"))


# ---- orientation and metadata


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_the_orientation_is_applied(kind, orientation):
    exif = PILImage.Exif()
    exif[0x0112] = orientation
    data = encode(RGB, kind, exif=exif)
    expected = ImageOps.exif_transpose(PILImage.open(io.BytesIO(data)))
    image = load_image(data)
    assert (image.width, image.height) == ((37, 23) if orientation < 5 else (23, 37))
    assert np.array_equal(pixels(image), pixels(expected.convert("RGB")))
    notices = () if orientation == 1 else ("turned upright, as its metadata says",)
    assert image.notices == notices


def test_damaged_metadata_does_not_hide_the_picture():
    data = encode(RGB, "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\1\x12\0\3\xff\xff\xff\xff\0")
    assert load_image(data).width == 37


def test_metadata_is_dropped():
    exif = PILImage.Exif()
    exif[0x010E] = "a secret"
    data = encode(RGB, "JPEG", exif=exif, comment=b"more", icc_profile=b"profile")
    image = load_image(data)
    assert image.pixels.info == {}
    assert not image.pixels.getexif()


# ---- content hash


def content_hash(picture):
    return from_pil(picture).content_hash


def test_the_hash_covers_mode_size_and_pixels():
    flat = NOISE[:12, :10, :3].tobytes()
    one = PILImage.frombytes("RGB", (10, 12), flat)
    other = PILImage.frombytes("RGB", (12, 10), flat)
    assert content_hash(one) != content_hash(other)
    assert content_hash(one) == hashlib.sha256(b"RGB 10 12\n" + flat).hexdigest()
    assert load_image(encode(one, "PNG")).content_hash == content_hash(one)
    assert load_image(encode(one, "BMP")).content_hash == content_hash(one)


def test_the_hash_of_a_tall_picture_covers_every_band():
    tall = PILImage.new("RGB", (1000, 1200))
    changed = tall.copy()
    changed.putpixel((999, 1199), (0, 0, 1))
    assert content_hash(tall) != content_hash(changed)


# ---- sources


def test_every_kind_of_source_gives_the_same_picture(tmp_path, monkeypatch):
    data = encode(RGB, "PNG")
    path = tmp_path / "a dog.png"
    path.write_bytes(data)
    monkeypatch.setenv("HOME", str(tmp_path))
    text = base64.b64encode(data).decode()
    sources = {
        str(path): str(path),
        "~/a dog.png": "~/a dog.png",
        path.as_uri(): str(path),
        f"file://localhost{urllib.parse.quote(str(path))}": str(path),
        f"data:image/png;base64,{text}": "data: URL",
        f"data:image/png;base64,{urllib.parse.quote(text)}": "data: URL",
        f"data:image/png,{urllib.parse.quote(data)}": "data: URL",
        f"data:;base64,{text}": "data: URL",
    }
    expected = content_hash(RGB)
    for source, name in sources.items():
        image = load_image(source)
        assert (image.content_hash, image.source) == (expected, name)
    for source in (path, data, bytearray(data), memoryview(data), io.BytesIO(data)):
        assert load_image(source).content_hash == expected
    assert load_image(data, name="pasted").source == "pasted"


@pytest.mark.parametrize(
    "spell",
    [
        lambda text: "\n".join(text[i : i + 76] for i in range(0, len(text), 76)) + "\n",
        lambda text: " \r\n" + text + "\t",
        lambda text: text.rstrip("="),
        lambda text: text.replace("+", "-").replace("/", "_"),
        lambda text: urllib.parse.quote(text.rstrip("=") + " \n"),
    ],
)
def test_base64_is_read_as_people_have_it(spell):
    data = encode(PILImage.fromarray(NOISE), "PNG") + b"\0"
    data += bytes(-(len(data) + 1) % 3)  # so that it is padded
    text = base64.b64encode(data).decode()
    assert text.endswith("=")
    assert set("+/") <= set(text)
    image = load_image("data:image/png;base64," + spell(text))
    assert image.content_hash == load_image(data).content_hash


def test_a_pipe_is_read_as_a_stream():
    data = encode(PILImage.fromarray(np.tile(NOISE[:, :, :3], (8, 8, 1))), "PNG")
    reader, writer = os.pipe()
    thread = threading.Thread(target=lambda: (os.write(writer, data), os.close(writer)))
    thread.start()
    with os.fdopen(reader, "rb", buffering=0) as stream:
        assert load_image(stream, name="-").height == 184
    thread.join()


def test_a_missing_file_names_the_nearest(tmp_path):
    (tmp_path / "dog.png").touch()
    (tmp_path / "cat.png").touch()
    message = reject(tmp_path / "dgo.png")
    assert "does not exist; is it " in message
    assert "dog.png" in message
    assert "is it" not in reject(tmp_path / "zebra.webp")
    assert "there is no folder" in reject(tmp_path / "no" / "dog.png")
    assert "a part of the path is no folder" in reject(tmp_path / "dog.png" / "x.png")


def test_a_link_that_leads_nowhere_is_said(tmp_path):
    (tmp_path / "dog.png").symlink_to(tmp_path / "gone.png")
    assert reject(tmp_path / "dog.png").endswith("does not exist: it is a link that leads nowhere")


def test_a_macos_screenshot_name_is_suggested(tmp_path):
    (tmp_path / "Screenshot 2026-01-02 at 3.04.05\u202fPM.png").touch()
    message = reject(tmp_path / "Screenshot 2026-01-02 at 3.04.05 PM.png")
    assert "\\u202f" in message


def test_what_is_no_file_is_refused_at_once(tmp_path):
    assert "is a folder" in reject(tmp_path)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    assert "is empty" in reject(pipe)  # nobody writes to it
    assert "is a device" in reject("/dev/zero")
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    assert "circle" in reject(loop)
    assert "cannot be opened" in reject("a\0b.png")
    assert "too long" in reject("x" * 5000)
    assert "is empty" in reject("")
    assert "cannot be opened" in reject("~no-such-user-here/x.png")


def test_a_pipe_is_read_to_its_end():
    reading, writing = os.pipe()
    with os.fdopen(writing, "wb") as pipe:
        pipe.write(encode(RGB, "PNG"))  # fits the pipe's buffer
    assert load_image(f"/dev/fd/{reading}").pixels.tobytes() == RGB.tobytes()
    os.close(reading)


def test_an_unreadable_file_is_named(tmp_path, monkeypatch):
    path = tmp_path / "locked.png"
    path.write_bytes(encode(RGB, "PNG"))

    def refuse(*_):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "open", refuse)
    assert "locked.png' may not be read: permission denied" in reject(path)


def test_names_are_escaped_in_messages(tmp_path):
    assert "\x1b" not in reject(tmp_path / "\x1b]52;c;aaaa\x07.png")
    assert "\u202e" not in reject("evil\u202egnp.exe")
    assert len(reject("y" * 4000)) < 400


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("data:image/png;base64", "no comma"),
        ("data:image/png;base64,AAAAA", "not valid base64"),
        ("data:image/png;base64,AAA!", "not valid base64"),
        ("data:image/png;base64,AA=A", "not valid base64"),
        ("data:image/png;base64,AA=", "not valid base64"),
        ("data:image/png;base64,AAAA==", "not valid base64"),
        ("data:image/png;base64,A\xe9AA", "not valid base64"),
        ("data:text/html,<html>", "'text/html'"),
        ("data:image/svg+xml,%3Csvg%20xmlns='x'%3E%3C/svg%3E", "SVG"),
        ("data:image/png;base64,", "is empty"),
        ("ftp://example.com/dog.png", "http: or https:"),
        ("s3://bucket/dog.png", "http: or https:"),
        ("file://server/share/dog.png", "another computer"),
        ("file:dog.png", "names no file"),
    ],
)
def test_addresses_that_cannot_work_say_why(source, words):
    assert words in reject(source)


def test_fetching_can_be_switched_off():
    assert "switched off" in reject("http://127.0.0.1:1/x.png", allow_fetch=False)


def test_encoded_sizes_are_capped(tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "IMAGE_BYTES", 1000)
    data = encode(RGB, "PNG") + bytes(1000)
    (tmp_path / "big.png").write_bytes(data)

    class Endless:
        def read(self, size):
            return bytes(size)

    for source in (data, tmp_path / "big.png", io.BytesIO(data), Endless()):
        assert "larger than" in reject(source)

    def decode(*_, **__):
        raise AssertionError("decoded before its size was checked")

    monkeypatch.setattr(base64, "b64decode", decode)
    assert "larger than" in reject("data:image/png;base64," + "A" * 2000)
    assert "larger than" in reject("data:image/png," + "A" * 2000)


@pytest.mark.parametrize("source", [3, None, [b"x"], {"url": "x"}, object(), 2.5])
def test_other_types_are_named(source):
    with pytest.raises(UsageError, match=f"not from {type(source).__name__} "):
        load_image(source)


def test_files_that_give_no_bytes_are_named(tmp_path):
    path = tmp_path / "dog.png"
    path.write_bytes(encode(RGB, "PNG"))
    with path.open(encoding="utf-8") as text, pytest.raises(UsageError, match="with mode 'rb'"):
        load_image(text)
    with pytest.raises(UsageError, match="gives text, not bytes; open it with mode 'rb'"):
        load_image(io.StringIO("dog"))
    with path.open("rb") as file:
        assert load_image(file).width
    with pytest.raises(ImageError, match="it is closed"):
        load_image(file)
    with (tmp_path / "new").open("wb") as file, pytest.raises(ImageError, match="for reading"):
        load_image(file)


# ---- limits


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds next to nothing."""
    import struct
    import zlib

    body = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    crc = struct.pack(">I", zlib.crc32(b"IHDR" + body))
    return b"\x89PNG\r\n\x1a\n" + b"\0\0\0\rIHDR" + body + crc


@pytest.mark.parametrize(
    "size", [(9000, 9000), (13000, 13000), (60000, 60000), (1, 70000), (2**31 - 1, 1)]
)
def test_bombs_are_refused_from_the_header(size, monkeypatch):
    def load(*_):
        raise AssertionError("decoded before its size was checked")

    bomb = png_header(*size) + encode(RGB, "PNG")[33:]
    assert "pixels; at most 67,108,864" in reject(bomb)
    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    with (
        pytest.raises(RefusedError, match="pixels; at most 67,108,864"),
        warnings.catch_warnings(action="ignore"),
    ):
        decode(bomb, "PNG", limits.IMAGE_PIXELS)


@pytest.mark.process
def test_a_bomb_costs_no_memory():
    code = """
import io, resource, sys
from PIL import Image
from mmchat.errors import ImageError
from mmchat.images import load_image, worker
data = open(sys.argv[1], "rb").read()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for _ in range(3):
    try:
        load_image(data)
    except ImageError as error:
        print(error)
assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 30_000
worker.pool.close()
assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < 100_000
"""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "bomb.png"
        PILImage.new("1", (9000, 9000)).save(path)
        done = subprocess.run(
            [sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False
        )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("9000 x 9000 pixels") == 3
    assert done.stderr == ""


def test_a_large_baseline_jpeg_is_decoded_at_half_size(monkeypatch):
    monkeypatch.setattr(limits, "IMAGE_PIXELS", 5000)
    big = RGB.resize((101, 81))
    image = load_image(encode(big, "JPEG"))
    assert (image.width, image.height) == (51, 41)
    assert image.notices == ("decoded at half its size, because it is larger than the limit",)
    assert "101 x 81 pixels" in reject(encode(big, "JPEG", progressive=True))
    assert "101 x 81 pixels" in reject(encode(big, "PNG"))


@pytest.mark.parametrize("size", [(1, 1), (1, 65535), (65535, 1), (2, 3)])
def test_odd_sizes_are_read(size):
    image = load_image(encode(PILImage.new("L", size, 77), "PNG"))
    assert (image.width, image.height) == size
    assert (pixels(image) == 77).all()


# ---- damage


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"])
def test_a_file_cut_short_is_an_error(kind):
    data = encode(RGB, kind)
    for length in range(1, len(data) - len(data) // 4, max(1, len(data) // 40)):
        reject(data[:length])


def test_a_cut_file_says_so():
    assert "is cut short" in reject(encode(RGB, "JPEG", quality=95)[:-400])


def test_pillow_state_is_left_alone():
    filters = list(warnings.filters)
    state = (
        PILImage.MAX_IMAGE_PIXELS,
        ImageFile.LOAD_TRUNCATED_IMAGES,
        PILImage.WARN_POSSIBLE_FORMATS,
    )
    load_image(encode(RGB, "PNG"))
    reject(png_header(13000, 13000))
    assert list(warnings.filters) == filters
    assert state == (
        PILImage.MAX_IMAGE_PIXELS,
        ImageFile.LOAD_TRUNCATED_IMAGES,
        PILImage.WARN_POSSIBLE_FORMATS,
    )
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


def seeds() -> list[bytes]:
    small = RGB.resize((24, 16))
    frames = [small, small.rotate(180)]
    exif = PILImage.Exif()
    exif[0x0112] = 6
    return [
        encode(small, "JPEG", exif=exif),
        encode(small.convert("P"), "PNG", transparency=3),
        encode(small, "PNG", save_all=True, append_images=frames[1:]),
        encode(RGBA.resize((24, 16)), "WEBP", lossless=True),
        encode(small, "WEBP", save_all=True, append_images=frames[1:]),
        encode(small, "GIF", save_all=True, append_images=frames[1:]),
        encode(small, "BMP"),
        encode(small, "TIFF", compression="tiff_lzw"),
        encode(small.convert("L").convert("I"), "TIFF"),
        encode(small, "AVIF"),
    ]


def mutate(data: bytes, rng: random.Random) -> bytes:
    """Change, drop, repeat or insert a few bytes; half of the time near the header."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 6)):
        at = rng.randrange(min(len(changed), 80) if rng.random() < 0.5 else len(changed))
        match rng.randrange(5):
            case 0 | 1:
                changed[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
            case 2:
                changed[at] ^= 1 << rng.randrange(8)
            case 3:
                del changed[at : at + rng.randint(1, 8)]
            case 4:
                changed[at:at] = changed[at : at + rng.randint(1, 8)]
        if not changed:
            return b""
    return bytes(changed)


def read_hostile(count: int, seed: int) -> tuple[int, int]:
    rng = random.Random(seed)
    originals, read, refused = seeds(), 0, 0
    for index in range(count):
        data = mutate(originals[index % len(originals)], rng)
        try:
            image = load_image(data)
        except ImageError as error:
            message = str(error)
            assert not re.search(r"0x[0-9a-f]{4,}|Traceback|\n|site-packages|object at", message)
            refused += 1
        else:
            assert image.pixels.mode == "RGB"
            read += 1
    return read, refused


@pytest.mark.slow
def test_damaged_files_give_a_picture_or_an_image_error(monkeypatch):
    monkeypatch.setattr(limits, "IMAGE_PIXELS", 1_000_000)
    read, refused = read_hostile(3_000, seed=1)
    assert min(read, refused) > 300


@pytest.mark.slow
def test_many_damaged_files_give_a_picture_or_an_image_error(monkeypatch):
    monkeypatch.setattr(limits, "IMAGE_PIXELS", 1_000_000)
    read, refused = read_hostile(60_000, seed=2)
    assert min(read, refused) > 6_000
