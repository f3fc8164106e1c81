import struct
import zlib

import numpy as np
import pytest
from PIL import Image as PILImage

from mmchat.images import from_pil, load_image

RANDOM = np.random.default_rng(5)


def pixels(image) -> np.ndarray:
    return np.asarray(image.pixels)


# ---- PNG, against the specification


def chunk(kind: bytes, body: bytes) -> bytes:
    check = zlib.crc32(kind + body)
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", check)


def png(samples: np.ndarray, depth: int, colour: int, **chunks: bytes) -> bytes:
    """Encode samples [height, width, channels] of `depth` bits; `chunks` stand before the data."""
    height, width, _ = samples.shape
    rows = b""
    for row in samples.reshape(height, -1):
        bits = "".join(format(value, f"0{depth}b") for value in row)
        bits += "0" * (-len(bits) % 8)
        rows += b"\0" + int(bits, 2).to_bytes(len(bits) // 8, "big")
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + b"".join(chunk(name.encode(), body) for name, body in chunks.items())
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def eight_bits(samples: np.ndarray, depth: int) -> np.ndarray:
    return samples >> 8 if depth == 16 else samples * (255 // ((1 << depth) - 1))


@pytest.mark.parametrize(
    ("colour", "depth"), [(0, 1), (0, 2), (0, 4), (0, 8), (0, 16), (2, 8), (2, 16)]
)
def test_the_one_transparent_colour_of_a_png_becomes_white(colour, depth):
    channels = 3 if colour else 1
    samples = RANDOM.integers(0, 1 << depth, (6, 9, channels))
    key = samples[1, 1] = (1 << depth - 1) - 1
    samples[4, 4] = key
    if (colour, depth) == (0, 16):
        samples[1, 2] = key - 1  # equal in its high byte
    data = png(samples, depth, colour, tRNS=struct.pack(">H", key) * channels)
    rgb = np.repeat(eight_bits(samples, depth), 3 // channels, axis=2)
    white = np.where((samples == key).all(axis=2, keepdims=True), 255, rgb)
    assert not np.array_equal(white, rgb)
    assert np.array_equal(pixels(load_image(data)), white)
    assert np.array_equal(pixels(load_image(data, alpha="drop")), rgb)


@pytest.mark.parametrize("depth", [1, 2, 4, 8])
@pytest.mark.parametrize("alphas", [[0], [255, 0], [0, 90], [10, 128, 200]])
def test_the_alphas_of_a_palette_are_blended_with_white(depth, alphas):
    size = min(1 << depth, 16)
    alphas = alphas[:size]
    palette = RANDOM.integers(0, 256, (size, 3), dtype=np.uint8)
    samples = RANDOM.integers(0, size, (6, 9, 1))
    data = png(samples, depth, 3, PLTE=palette.tobytes(), tRNS=bytes(alphas))
    rgb = palette[samples[..., 0]].astype(float)
    alpha = np.array(alphas + [255] * (size - len(alphas)))[samples] / 255
    assert np.abs(pixels(load_image(data)) - (rgb * alpha + 255 * (1 - alpha))).max() <= 1
    assert np.array_equal(pixels(load_image(data, alpha="drop")), rgb)


@pytest.mark.parametrize(("colour", "channels"), [(4, 2), (6, 4)])
@pytest.mark.parametrize("depth", [8, 16])
def test_the_alpha_channel_of_a_png_is_blended_with_white(colour, channels, depth):
    samples = RANDOM.integers(0, 1 << depth, (6, 9, channels))
    data = png(samples, depth, colour)
    values = eight_bits(samples, depth)
    rgb = np.repeat(values[..., :-1], 3 // (channels - 1), axis=2)
    alpha = values[..., -1:] / 255
    assert np.abs(pixels(load_image(data)) - (rgb * alpha + 255 * (1 - alpha))).max() <= 1
    assert np.array_equal(pixels(load_image(data, alpha="drop")), rgb)


# ---- pictures in memory


@pytest.mark.parametrize("mode", ["RGBa", "La"])
def test_premultiplied_alpha_is_blended_with_white(mode):
    straight = "RGBA" if mode == "RGBa" else "LA"
    values = RANDOM.integers(0, 256, (5, 7, len(straight)), dtype=np.uint8)
    picture = PILImage.fromarray(values).convert(mode).convert(straight)
    blended = pixels(from_pil(picture)).astype(int)
    assert np.abs(pixels(from_pil(picture.convert(mode))) - blended).max() <= 1


def test_a_palette_with_alpha_is_blended_with_white():
    picture = PILImage.new("P", (2, 1))
    picture.putpalette(bytes([10, 20, 30, 0, 40, 50, 60, 255]), "RGBA")
    picture.putpixel((1, 0), 1)
    assert pixels(from_pil(picture)).tolist() == [[[255, 255, 255], [40, 50, 60]]]
    assert pixels(from_pil(picture, alpha="drop")).tolist() == [[[10, 20, 30], [40, 50, 60]]]


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
def test_a_transparent_deep_grey_is_compared_before_it_is_scaled(dtype):
    picture = PILImage.fromarray(np.array([[0x1234, 0x1235, 0xFFFF]], dtype))
    picture.info["transparency"] = 0x1234
    high = pixels(from_pil(picture, alpha="drop"))[0, :, 0]
    assert pixels(from_pil(picture))[0, :, 0].tolist() == [255, high[1], high[2]]


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
@pytest.mark.parametrize("bits", [10, 12, 14])
def test_grey_that_uses_few_of_16_bits_is_said_to_be_dark(dtype, bits):
    values = np.array([[0, 1 << bits - 1, (1 << bits) - 1]], dtype)
    image = from_pil(PILImage.fromarray(values))
    reach = f"its grey values reach only {(1 << bits) - 1:,} of 65,535"
    assert image.notices == (f"{reach}, so it is dark; brighten it first",)
    assert pixels(image)[0, :, 0].tolist() == (values[0] >> 8).tolist()


@pytest.mark.parametrize(
    "values",
    [
        np.array([[0, 40_000]], np.uint16),
        np.array([[0, 0]], np.uint16),
        np.array([[0, 200]], np.int32),
        np.array([[-4000, 4000]], np.int32),
        np.array([[0, 4000]], np.float32),
    ],
)
def test_grey_that_is_not_dark_is_not_said_to_be(values):
    assert from_pil(PILImage.fromarray(values)).notices == ()


def test_deep_grey_of_many_strips_is_scaled_by_its_whole_range():
    values = np.zeros((1100, 1500), np.float32)
    values[0], values[1099] = -10, 30
    grey = pixels(from_pil(PILImage.fromarray(values)))[:, 0, 0]
    assert (grey[0], grey[1], grey[1099]) == (0, 63, 255)
