"""What the cache of a conversation is compared by."""

from __future__ import annotations

import torch
from PIL import Image as PILImage

from mmchat.conversation import Image, Message, Text
from mmchat.images import from_pil
from mmchat.models.mllama.processor import MllamaProcessor
from mmchat.tokenizers.byte_pair import BytePairTokenizer
from mmchat.tokenizers.tiktoken_file import llama3_special_tokens
from tests.models.mllama.oracle import CONFIG
from tests.synthetic_tokenizer import trained_tokens

TOKENS = trained_tokens()
SPECIALS = {name: len(TOKENS) + i for i, name in enumerate(llama3_special_tokens())}


def picture(grey: int) -> Image:
    pixels = PILImage.new("RGB", (30, 20), (grey, grey, grey))
    return from_pil(pixels, source="picture.png")


def prompt_about(*pictures: Image):
    processor = MllamaProcessor(CONFIG, BytePairTokenizer(TOKENS, SPECIALS), "white")
    return processor.chat([Message("user", (*pictures, Text("What is it?")))])


def test_a_picture_replaced_at_the_same_place_changes_the_fingerprint_there():
    first = prompt_about(picture(10), picture(20), picture(30))
    second = prompt_about(picture(10), picture(21), picture(30))
    assert first.token_ids == second.token_ids
    pairs = zip(first.fingerprint, second.fingerprint, strict=True)
    different = [at for at, (one, other) in enumerate(pairs) if one != other]
    assert different == [first.media[1].position]
    assert first.fingerprint == prompt_about(picture(10), picture(20), picture(30)).fingerprint
    tiles = [prompt.media[1].media.tensors[0] for prompt in (first, second)]
    assert not torch.equal(*tiles)
