"""Pictures that a program holds are those that it would have saved, pixel for pixel."""

import io
import sys
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image as PILImage

from mmchat import limits, load_image
from mmchat.errors import ImageError

RGBA = np.random.default_rng(7).integers(0, 256, (23, 37, 4), dtype=np.uint8)
RGB, GREY = RGBA[..., :3], RGBA[..., 0]


def saved(picture: PILImage.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


SAME = {
    "array [H, W, 3]": (RGB, RGB),
    "array [H, W, 4]": (RGBA, RGBA),
    "array [H, W]": (GREY, GREY),
    "array [H, W, 1]": (GREY[..., None], GREY),
    "array [3, H, W]": (RGB.transpose(2, 0, 1), RGB),
    "array of steps": (RGB[::-1, ::-1], RGB[::-1, ::-1].copy()),
    "array of 3 rows": (RGB[:3], RGB[:3]),
    "int64": (RGB.astype(np.int64), RGB),
    "bool": (GREY > 99, (GREY > 99).astype(np.uint8) * 255),
    "uint16": (RGB.astype(np.uint16) * 256 + 99, RGB),
    "float32": (RGB.astype(np.float32) / 255, RGB),
    "float64 of a resize": (np.where(RGB > 128, 1.0004, -0.0004), (RGB > 128) * np.uint8(255)),
    "tensor [3, H, W]": (torch.tensor(RGB).permute(2, 0, 1), RGB),
    "tensor [H, W, 3]": (torch.tensor(RGB), RGB),
    "tensor [1, H, W]": (torch.tensor(GREY)[None], GREY),
    "tensor [3, H, 3]": (torch.tensor(RGB[:, :3]).permute(2, 0, 1), RGB[:, :3]),
    "tensor of floats": ((torch.tensor(RGB).permute(2, 0, 1) / 255).requires_grad_(), RGB),
    "tensor of bfloat16": ((torch.tensor(GREY // 128)).bfloat16(), GREY // 128 * np.uint8(255)),
}


@pytest.mark.parametrize(("held", "shown"), SAME.values(), ids=SAME)
def test_arrays_and_tensors_are_the_picture_that_they_hold(held, shown):
    expected = load_image(saved(PILImage.fromarray(np.ascontiguousarray(shown))))
    image = load_image(held)
    assert image.content_hash == expected.content_hash
    assert (image.source, image.pixels.mode) == ("picture", "RGB")


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I;16"])
def test_pictures_of_pillow_are_those_of_their_file(mode):
    picture = PILImage.fromarray(RGBA)
    grey = PILImage.fromarray(GREY.astype(np.uint16) * 256) if mode == "I;16" else None
    picture = grey or picture.convert("RGB").convert(mode)
    kind = "TIFF" if mode in ("CMYK", "YCbCr") else "PNG"
    expected = load_image(saved(picture, kind))
    assert load_image(picture, name="mine").content_hash == expected.content_hash
    assert load_image(PILImage.open(io.BytesIO(saved(picture, kind)))).source == "picture"


def test_the_rule_for_transparency_and_the_name_hold_for_them_too():
    clear = PILImage.new("RGBA", (4, 4), (10, 20, 30, 0))
    assert load_image(clear).pixels.getpixel((0, 0)) == (255, 255, 255)
    assert load_image(np.asarray(clear), alpha="drop").pixels.getpixel((0, 0)) == (10, 20, 30)
    assert load_image(clear, name="mine").source == "mine"


def test_an_opened_photo_is_turned_upright_once():
    exif = PILImage.Exif()
    exif[0x0112] = 6
    data = saved(PILImage.fromarray(RGB), "JPEG", exif=exif, quality=95)
    expected = load_image(data)
    opened = PILImage.open(io.BytesIO(data))
    assert (opened.width, expected.width) == (37, 23)
    assert load_image(opened).content_hash == expected.content_hash


REFUSED = {
    "a batch": (np.zeros((2, 3, 4, 4), np.uint8), "shape [2, 3, 4, 4] is no picture"),
    "one axis": (np.zeros(4, np.uint8), "shape [4] is no picture"),
    "two channels": (np.zeros((9, 9, 2), np.uint8), "shape [9, 9, 2] is no picture"),
    "nothing": (np.zeros((0, 9, 3), np.uint8), "shows nothing: its size is 9 x 0"),
    "normalised": (np.full((9, 9, 3), -2.1), "values from -2.1 to -2.1 is no picture"),
    "0 to 255 as floats": (RGB.astype(float), "go from 0 to 1; divide by 255 or give uint8"),
    "beyond 255": (RGB.astype(float) + 1, "go from 0 to 1; was it normalised?"),
    "NaN": (np.where(np.eye(9), np.nan, 0.5), "an array of float64 with NaN in it is no picture"),
    "infinite": (np.where(np.eye(9), -np.inf, np.inf), "with infinite values in it"),
    "large whole numbers": (np.full((9, 9), 256), "values from 256 to 256 is no picture"),
    "complex": (np.zeros((9, 9), complex), "an array of complex128 is no picture"),
    "objects": (np.zeros((9, 9), object), "an array of object is no picture"),
    "text": (np.array([["a"]]), "an array of <U1 is no picture"),
    "complex tensor": (torch.zeros(9, 9, dtype=torch.complex64), "complex64 is no picture"),
    "sparse tensor": (torch.eye(9).to_sparse(), "torch.sparse_coo on cpu is no picture"),
    "meta tensor": (torch.empty(9, 9, device="meta"), "on meta is no picture"),
    "too wide": (np.zeros((1, 70_000), np.uint8), "70000 x 1 pixels; at most"),
    "LAB": (PILImage.new("LAB", (4, 4)), "mode LAB"),
}


@pytest.mark.parametrize(("held", "message"), REFUSED.values(), ids=REFUSED)
def test_what_shows_no_picture_is_refused_with_the_reason(held, message):
    with pytest.raises(ImageError) as caught:
        load_image(held)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_sizes_are_checked_before_a_picture_of_pillow_is_decoded(monkeypatch):
    opened = PILImage.open(io.BytesIO(saved(PILImage.fromarray(RGB))))
    monkeypatch.setattr(limits, "IMAGE_PIXELS", 100)
    monkeypatch.setattr(opened, "load", lambda: pytest.fail("decoded"))
    with pytest.raises(ImageError, match="37 x 23 pixels; at most 100"):
        load_image(opened)


def test_a_picture_whose_file_is_closed_or_cut_short_is_named():
    data = saved(PILImage.fromarray(RGB))
    closed = PILImage.open(io.BytesIO(data))
    closed.close()
    for broken in (closed, PILImage.open(io.BytesIO(data[:-900]))):
        with pytest.raises(ImageError, match="is its file closed or cut short"):
            load_image(broken)


def test_a_file_is_read_while_another_thread_imports_torch(monkeypatch):
    for name in ("torch", "numpy"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))  # nothing in it so far
    assert load_image(saved(PILImage.fromarray(RGB))).width == 37
