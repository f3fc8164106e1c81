import io

import numpy as np
import pytest
from PIL import Image as PILImage

from mmchat.errors import ImageError
from mmchat.images import load_image

NOISE = PILImage.fromarray(np.random.default_rng(7).integers(0, 256, (40, 56, 3), dtype=np.uint8))
FLAT = PILImage.new("RGB", (50, 50), (200, 10, 10))
JPEGS = {
    "baseline": {},
    "progressive": {"progressive": True},
    "full colour": {"quality": 95, "subsampling": 0},
    "restart markers": {"restart_marker_blocks": 4},
}
NOTICE = "its end marker is missing; the picture is whole"


def encode(picture: PILImage.Image, **options) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", **options)
    return buffer.getvalue()


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("name", JPEGS)
def test_a_jpeg_that_lacks_its_end_marker_alone_is_read(name, mode):
    for picture in (NOISE, FLAT):
        data = encode(picture.convert(mode), **JPEGS[name])
        whole = load_image(data)
        assert whole.notices == ()
        for missing in (1, 2):
            image = load_image(data[:-missing])
            assert image.content_hash == whole.content_hash
            assert image.notices in ((NOTICE,), ())  # libjpeg does not miss it in each of them


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("name", JPEGS)
def test_a_jpeg_that_lacks_more_is_never_taken_for_whole(name, mode):
    """The picture that is read, if any, is the one that the whole file holds."""
    refused = 0
    for picture in (NOISE, FLAT):
        data = encode(picture.convert(mode), **JPEGS[name])
        expected = load_image(data).content_hash
        for missing in (*range(3, 40), *range(40, len(data) // 2, 41)):
            try:
                image = load_image(data[:-missing])
            except ImageError:
                refused += 1
            else:
                assert image.content_hash == expected
    assert refused > 60


def test_a_progressive_jpeg_cut_between_two_scans_is_cut_short():
    data = encode(NOISE, progressive=True)
    for scan in range(2, data.count(b"\xff\xda")):
        at = -1
        for _ in range(scan):
            at = data.index(b"\xff\xda", at + 1)
        with pytest.raises(ImageError, match="is cut short"):
            load_image(data[:at])
