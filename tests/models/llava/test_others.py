"""Where others differ from LLaVA as it was trained, for docs/correctness.md."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image as PILImage
from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer
from tokenizers.models import BPE, WordLevel
from tokenizers.normalizers import Prepend, Replace, Sequence
from transformers import LlamaTokenizer, LlavaProcessor, PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from mmchat.models.llava.image_processor import mean_colour, preprocess
from mmchat.models.llava.processor import ids_of
from mmchat.models.messages import Token
from mmchat.models.prepared import normalised
from mmchat.strict_json import Where
from mmchat.tokenizers.sentencepiece_file import SentencePieceTokenizer, parse_sentencepiece
from tests.models.llava import original
from tests.models.llava.oracle import CONFIG
from tests.models.llava.test_image_processor import picture
from tests.sentencepiece_model import trained

BYTES = range(3, 259)  # ids of the pieces that are a byte
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


def huggings(**more: int) -> LlavaProcessor:
    words = {"<image>": 0, "x": 1}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="x")),
        additional_special_tokens=["<image>"],
    )
    options = {"patch_size": 14, "vision_feature_select_strategy": "default"}
    return LlavaProcessor(HUBS, tokenizer, image_token="<image>", **options, **more)


def marks(processor: LlavaProcessor, text: str) -> int:
    return np.array(processor(images=picture(SIDE, SIDE).pixels, text=text)["input_ids"]).size


def test_the_processor_counts_a_picture_one_short_unless_it_is_told_of_the_class_token():
    patches = CONFIG.positions_per_image
    assert marks(huggings(), "<image>") == patches - 1
    assert marks(huggings(num_additional_image_tokens=1), "<image>") == patches


def test_transparent_pixels_are_put_on_white_where_the_original_drops_the_transparency():
    clear = PILImage.new("RGBA", (SIDE, SIDE), (200, 0, 0, 0))
    white, red = (PILImage.new("RGB", (SIDE, SIDE), one) for one in ("white", (200, 0, 0)))
    assert np.array_equal(theirs(clear), theirs(white))
    assert np.array_equal(original.golden()["pixels/clear"], theirs(red)[:, 0, 0])


@pytest.fixture(scope="module")
def pieces() -> SentencePieceProcessor:
    return SentencePieceProcessor(model_proto=trained())


@pytest.fixture(scope="module")
def merged(pieces) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """The pieces of a tokenizer.model as transformers takes them: with their merges by rank."""
    ids = {pieces.id_to_piece(number): number for number in range(pieces.vocab_size())}
    merges = [
        (piece[:cut], piece[cut:])
        for piece, number in ids.items()
        for cut in range(1, len(piece))
        if number > BYTES[-1] and piece[:cut] in ids and piece[cut:] in ids
    ]
    return ids, merges


def test_the_llama_tokenizer_loses_spaces_where_text_begins_and_behind_a_picture(pieces, merged):
    theirs = LlamaTokenizer(*merged)
    theirs.add_tokens(["<image>"], special_tokens=True)
    space, line = pieces.piece_to_id("▁"), BYTES[ord("\n")]
    assert pieces.encode("\nthe") == [space, line, pieces.piece_to_id("the")]
    assert theirs.encode("<image>\nthe")[1:] == [line, pieces.piece_to_id("the")]
    assert pieces.encode(" the") == [space, *theirs.encode(" the")]


def test_the_hubs_tokenizer_file_puts_a_space_behind_the_end_of_an_answer(pieces, merged):
    theirs = Tokenizer(BPE(*merged, byte_fallback=True, fuse_unk=True))
    theirs.normalizer = Sequence([Prepend("▁"), Replace(" ", "▁")])  # as in the Hub's conversions
    theirs.add_special_tokens(["</s>"])
    assert theirs.encode("dog</s>USER: the").tokens == ["▁dog", "</s>", "▁USER", ":", "▁the"]
    model = SentencePieceTokenizer(trained(), *parse_sentencepiece(trained(), Where("a file")))
    ours = ids_of(["dog", Token("</s>"), "USER: the"], model, -1, 1).input_ids
    assert [pieces.id_to_piece(number) for number in ours[1:]] == [
        "▁dog", "</s>", "US", "ER", ":", "▁the"
    ]  # fmt: skip


def test_the_program_of_the_original_ends_old_answers_twice():
    [*_, kept] = original.golden()["kept"].tolist().partition("ASSISTANT: ")
    assert kept.startswith("A dog.</s></s>USER: ")
    assert original.golden()["prompts"][3].item().count("</s>") == 1


def test_a_picture_that_is_resized_bilinearly_is_another():
    seen = picture(200, 90)
    square = PILImage.new("RGB", (200, 200), mean_colour(CONFIG.image_processor))
    square.paste(seen.pixels, ((200 - 90) // 2, 0))
    bicubic, bilinear = (
        normalised(square.resize((SIDE, SIDE), way), CONFIG.image_processor)
        for way in (PILImage.Resampling.BICUBIC, PILImage.Resampling.BILINEAR)
    )
    [ours] = preprocess(seen, CONFIG).tensors
    assert torch.equal(ours, bicubic)
    assert float((ours - bilinear).abs().max()) > 0.1


def test_the_processor_refuses_marks_that_are_expanded_already():
    with pytest.raises(ValueError, match="Found total 25 <image> tokens and 1 images"):
        marks(huggings(num_additional_image_tokens=1), "<image>" * CONFIG.positions_per_image)
