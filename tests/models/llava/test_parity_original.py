"""Logits, pixels and token ids are those of the original code, llava-torch (tests/golden)."""

from __future__ import annotations

import re
from dataclasses import replace
from hashlib import sha256

import numpy as np
import pytest
import torch
from PIL import Image as PILImage

from mmchat.conversation import Image, Message, question
from mmchat.models.llava.image_processor import preprocess
from mmchat.models.llava.processor import TAG, LlavaProcessor, ids_of
from mmchat.models.messages import Token
from mmchat.strict_json import Where
from mmchat.tokenizers.sentencepiece_file import SentencePieceTokenizer, parse_sentencepiece
from tests.models.llava import oracle, original
from tests.models.llava.folders import with_vocabulary
from tests.models.llava.oracle import CASES, CONFIG, TOLERANCE
from tests.models.llava.original import MODELS, golden
from tests.sentencepiece_model import trained

PICTURE = -200  # as the original marks one
SEEN = Image(PILImage.new("RGB", (9, 9)), "x.png", "x")


@pytest.fixture(scope="module")
def tokenizer() -> SentencePieceTokenizer:
    data = trained()
    return SentencePieceTokenizer(data, *parse_sentencepiece(data, Where("tokenizer.model")))


@pytest.mark.parametrize(("name", "case"), [(n, case) for n in MODELS for case in MODELS[n][2]])
def test_logits_of_a_prompt_and_of_steps_after_it(name, case):
    config, small, _ = MODELS[name]
    model = oracle.build(oracle.random_weights(config, small=small), config)
    said = golden()[f"{name}/{case}/said"].tolist()
    expected = torch.from_numpy(golden()[f"{name}/{case}/logits"])
    assert 0.2 < float(expected.std()) < 5
    assert oracle.distance(oracle.logits(model, CASES[case], said), expected) < TOLERANCE


@pytest.mark.parametrize("square", ["pad", "crop"])
def test_pixels_bit_for_bit(square):
    config = replace(CONFIG, image_processor=replace(CONFIG.image_processor, square=square))
    hashes = golden()[f"pixels/{square}"].tolist()
    for size, expected in zip(original.SEEN_SIZES, hashes, strict=True):
        seen = Image(PILImage.fromarray(original.noise(*size)), "x.png", str(size))
        [found] = preprocess(seen, config).tensors
        assert sha256(found.numpy().astype("<f4").tobytes()).hexdigest() == expected, size


def test_ids_of_eight_thousand_prompts(tokenizer):
    """Texts, pictures and ends of answers in any order."""
    ends = golden()["ends"].tolist()
    expected = np.split(golden()["ids"], ends[:-1])
    parts_of = {TAG: SEEN, "</s>": Token("</s>")}
    for text, ids in zip(original.marked_texts(), expected, strict=True):
        parts = [parts_of.get(part, part) for part in re.split("(<image>|</s>)", text) if part]
        assert list(ids_of(parts, tokenizer, PICTURE, 1).input_ids) == ids.tolist(), text


def test_conversations_are_written_as_the_original_writes_them(tokenizer):
    processor = LlavaProcessor(with_vocabulary(0), tokenizer, "drop")
    image_id = processor.config.image_token_id
    for turns, text in zip(original.TURNS, golden()["prompts"].tolist(), strict=True):
        messages = []
        for number, turn in enumerate(turns):
            plain = turn.replace("<image>\n", "")
            images = [SEEN] * turn.count(TAG)
            asked = question(plain, images, tag=TAG)
            messages.append(Message("assistant", plain) if number % 2 else asked)
        ids = list(processor.chat(messages).token_ids)
        parts = [
            {TAG: SEEN, "</s>": Token("</s>")}.get(p, p) for p in re.split("(<image>|</s>)", text)
        ]
        expected = ids_of(filter(None, parts), tokenizer, image_id, 25).input_ids
        assert ids == list(expected), turns
