"""Where others differ from LLaVA as it was trained, for docs/correctness.md."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from PIL import Image as PILImage
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlavaProcessor, PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from mmchat.models.llava.image_processor import preprocess
from tests.models.llava import original
from tests.models.llava.oracle import CONFIG
from tests.models.llava.test_image_processor import picture

SIDE = CONFIG.vision_config.image_size
HUBS = CLIPImageProcessorPil(  # as preprocessor_config.json of the Hub's conversions has it
    size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}
)


def theirs(image: PILImage.Image) -> np.ndarray:
    return HUBS(image, return_tensors="np")["pixel_values"][0]


def test_the_hubs_conversion_cuts_the_ends_of_a_wide_picture_off():
    wide = picture(30, 90)
    blank = wide.pixels.copy()
    blank.paste((0, 0, 0), (0, 0, 25, 30))  # the left end
    [seen] = preprocess(wide, CONFIG).tensors
    [changed] = preprocess(replace(wide, pixels=blank), CONFIG).tensors
    assert np.array_equal(theirs(wide.pixels), theirs(blank))
    assert float((seen - changed).abs().max()) > 0.5


def test_the_processor_counts_a_picture_one_short_unless_it_is_told_of_the_class_token():
    words = {"<image>": 0, "x": 1}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="x")),
        additional_special_tokens=["<image>"],
    )
    options = {"patch_size": 14, "vision_feature_select_strategy": "default"}
    counts = []
    for more in ({}, {"num_additional_image_tokens": 1}):
        processor = LlavaProcessor(HUBS, tokenizer, image_token="<image>", **options, **more)
        ids = processor(images=picture(SIDE, SIDE).pixels, text="<image>")["input_ids"]
        counts.append(np.array(ids).size)
    patches = CONFIG.positions_per_image
    assert counts == [patches - 1, patches]


def test_transparent_pixels_are_put_on_white_where_the_original_drops_the_transparency():
    clear = PILImage.new("RGBA", (SIDE, SIDE), (200, 0, 0, 0))
    white, red = (PILImage.new("RGB", (SIDE, SIDE), one) for one in ("white", (200, 0, 0)))
    assert np.array_equal(theirs(clear), theirs(white))
    assert np.array_equal(original.golden()["pixels/clear"], theirs(red)[:, 0, 0])
