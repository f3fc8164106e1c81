"""The prompts of LLaVA as ids, against the original's rule: cut at the pictures, encode each part
anew, and at </s> without a space in front."""

from __future__ import annotations

import pytest
from sentencepiece import SentencePieceProcessor

from mmchat.conversation import Image, Message, Text, question
from mmchat.errors import CheckpointError, PromptError
from mmchat.models.llava.processor import SYSTEM, TAG, LlavaProcessor, chat_parts, raw_parts
from mmchat.models.prompt import Prompt
from mmchat.strict_json import Where
from mmchat.tokenizers.sentencepiece_file import SentencePieceTokenizer, parse_sentencepiece
from tests.models.llava.folders import with_vocabulary
from tests.models.llava.test_image_processor import picture
from tests.sentencepiece_model import trained

CONFIG = with_vocabulary(8)
ONE, OTHER = picture(20, 30), picture(31, 20)
LIBRARY = SentencePieceProcessor(model_proto=trained())


@pytest.fixture(scope="module")
def processor() -> LlavaProcessor:
    tokens = parse_sentencepiece(trained(), Where("tokenizer.model"))
    return LlavaProcessor(CONFIG, SentencePieceTokenizer(trained(), *tokens), "drop")


def originals(text: str) -> list[int]:
    """Ids of a whole prompt by the original's rule; <image> and </s> are cut out of the string."""
    ids = [1]
    for number, chunk in enumerate(text.split("<image>")):
        ids += [CONFIG.image_token_id] * 25 if number else []
        first, *rest = chunk.split("</s>")
        ids += LIBRARY.encode(first)
        for part in rest:  # a line end merges with nothing, and keeps the space away
            ids += [2, *LIBRARY.encode("\n" + part)[2:]]
    return ids


def users(text: str, *images: Image) -> Message:
    """As a prompt is asked whose pictures are given apart from it."""
    return question(text, images, tag=TAG)


def answers(text: str) -> Message:
    return Message("assistant", (Text(text),))


CONVERSATIONS = {
    "text": ([users("the dog")], f"{SYSTEM} USER: the dog ASSISTANT:"),
    "picture": ([users("the dog", ONE)], f"{SYSTEM} USER: <image>\nthe dog ASSISTANT:"),
    "two pictures": (
        [users("in", ONE, OTHER)],
        f"{SYSTEM} USER: <image>\n<image>\nin ASSISTANT:",
    ),
    "second turn": (
        [users("the dog", ONE), answers(" A dog. \n"), users("in?")],
        f"{SYSTEM} USER: <image>\nthe dog ASSISTANT: A dog.</s>USER: in? ASSISTANT:",
    ),
    "picture in the second turn": (
        [users("the"), answers("dog"), users("in?", OTHER)],
        f"{SYSTEM} USER: the ASSISTANT: dog</s>USER: <image>\nin? ASSISTANT:",
    ),
    "system": (
        [Message("system", (Text("Be brief."),)), users("the dog")],
        "Be brief. USER: the dog ASSISTANT:",
    ),
    "no system": ([Message("system", (Text(""),)), users("dog")], "USER: dog ASSISTANT:"),
    "tag": ([users("a <image> b", ONE)], f"{SYSTEM} USER: a <image> b ASSISTANT:"),
    "parts in order": (
        [Message("user", (Text("a "), ONE, Text(" b "), OTHER, Text(" dog")))],
        f"{SYSTEM} USER: a <image> b <image> dog ASSISTANT:",
    ),
    "picture behind": (
        [Message("user", (Text("the dog"), ONE))],
        f"{SYSTEM} USER: the dog<image> ASSISTANT:",
    ),
    "pictures in front and behind": (
        [Message("user", (ONE, Text("dog "), OTHER))],
        f"{SYSTEM} USER: <image>\ndog <image> ASSISTANT:",
    ),
    "tags together": (
        [users("<image><image> x", ONE, OTHER)],
        f"{SYSTEM} USER: <image><image> x ASSISTANT:",
    ),
}


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_ids_are_those_of_the_original(name, processor):
    messages, text = CONVERSATIONS[name]
    prompt = processor.chat(messages)
    assert list(prompt.token_ids) == originals(text)
    assert prompt.lead == " "
    images = [image for message in messages for image in message.images]
    assert [placed.media.content_hash for placed in prompt.media] == [
        image.content_hash for image in images
    ]
    for placed in prompt.media:
        assert placed.count == 25
        assert set(prompt.token_ids[placed.position : placed.end]) == {CONFIG.image_token_id}


def test_a_base_prompt_is_the_text_with_its_pictures(processor):
    assert list(processor.raw(users("dog in", ONE)).token_ids) == originals("<image>\ndog in")
    assert list(processor.raw(users("a <image>", ONE)).token_ids) == originals("a <image>")
    assert processor.raw(users("", ONE)).token_ids == tuple(originals("<image>\n"))
    assert processor.raw(users("x")).lead == ""


def test_a_prompt_may_end_in_a_picture(processor):
    prompt: Prompt = processor.raw(users("dog <image>", ONE))
    assert prompt.media[0].end == len(prompt.token_ids)


def test_the_system_sentence_is_that_of_the_training():
    assert SYSTEM == (
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions."
    )


def test_special_text_stays_text(processor):
    prompt = processor.chat([users("</s><s> dog")])
    assert prompt.token_ids.count(2) == 0
    assert prompt.token_ids.count(1) == 1
    said = processor.chat([users("x"), answers("an <image> tag"), users("y")])
    assert not said.media


def test_a_tag_in_a_message_is_text(processor):
    for parts in ((Text("What does <image> mean?"),), (ONE, Text("<image> and <image>"))):
        prompt = processor.chat([Message("user", parts)])
        images = sum(part is ONE for part in parts)
        assert len(prompt.media) == images
        assert prompt.token_ids.count(CONFIG.image_token_id) == 25 * images
        assert "<image>" in processor.tokenizer.decode(prompt.token_ids)


@pytest.mark.parametrize(
    ("text", "images", "message"),
    [
        (
            "<image> and <image>",
            [ONE],
            r"2 <image> tags, and there is 1 picture;.*\(found at character 1, 13\)",
        ),
        ("<image>", [], "1 <image> tag, and there are 0 pictures;"),
        ("<image>", [ONE, OTHER], "1 <image> tag, and there are 2 pictures;"),
    ],
)
def test_a_prompt_has_as_many_tags_as_pictures_apart(text, images, message, processor):
    with pytest.raises(PromptError, match=message):
        question(text, images, tag=processor.image_tag)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "the conversation is empty"),
        ([Message("assistant", (ONE,))], "an? assistant message holds a picture"),
        ([users("a"), Message("system", (Text("b"),))], "can only be the first"),
        ([users("a", *[ONE] * 17)], "17 pictures; at most 16"),
    ],
)
def test_other_conversations_are_refused(messages, message):
    with pytest.raises(PromptError, match=message):
        list(chat_parts(messages))


def test_too_long_a_text_is_refused():
    with pytest.raises(PromptError, match="at most 4,194,304"):
        list(raw_parts(users("a" * 2**22 + "a")))


def test_a_tokenizer_of_another_kind_is_refused():
    from mmchat.tokenizers.byte_pair import BytePairTokenizer

    with pytest.raises(CheckpointError, match=r"needs Llama 2's tokenizer\.model"):
        LlavaProcessor(CONFIG, BytePairTokenizer([b"a"], {}), "drop")
