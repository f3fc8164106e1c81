"""Prompts of Qwen-VL as ids: ChatML by the original's rule, places of pictures, refusals."""

from __future__ import annotations

import os

import pytest
import regex

from mmchat.conversation import Image, Message, NameTags, Text, question
from mmchat.errors import CheckpointError, PromptError
from mmchat.models.qwen_vl.processor import QwenVLProcessor
from mmchat.tokenizers import open_tokenizer
from mmchat.tokenizers.byte_pair import BytePairTokenizer
from tests.models.qwen_vl.folders import tokenizer, with_vocabulary
from tests.models.qwen_vl.oracle import SEQ_LENGTH, SPAN, image
from tests.synthetic_tokenizer import trained_tokens

ONE, OTHER = image(0), image(1)
PICTURE = regex.compile(r"<img>(.*?)</img>")


@pytest.fixture(scope="module")
def processor() -> QwenVLProcessor:
    return QwenVLProcessor(with_vocabulary(), tokenizer(), "drop")


def users(text: str, *images: Image, **options) -> Message:
    names = QwenVLProcessor.name_tags
    return question(text, images, tag=QwenVLProcessor.image_tag, names=names, **options)


def answers(text: str) -> Message:
    return Message("assistant", (Text(text),))


def originals(*turns: tuple[str, str]) -> list[int]:
    """Ids of (role, text) by the original's rule, whose text has `<img></img>` for each picture."""
    special = tokenizer().special_id
    ids: list[int] = []
    for role, text in turns:
        ids += [special("<|im_start|>"), *tokenizer().encode(role), *tokenizer().encode("\n")]
        for number, part in enumerate(text.split("<img></img>")):
            if number:
                ids += [special("<img>"), *[special("<imgpad>")] * SPAN, special("</img>")]
            ids += tokenizer().encode(part)
        ids += [special("<|im_end|>"), *tokenizer().encode("\n")]
    begin = [special("<|im_start|>"), *tokenizer().encode("assistant"), *tokenizer().encode("\n")]
    return ids + begin


SYSTEM = ("system", "You are a helpful assistant.")
CONVERSATIONS = {
    "text": ([users("the dog")], [SYSTEM, ("user", "the dog")]),
    "picture": (
        [users("What is this?", ONE)],
        [SYSTEM, ("user", "Picture 1: <img></img>\nWhat is this?")],
    ),
    "a line's end and what follows are one text": (
        [users("\nfoo", ONE)],
        [SYSTEM, ("user", "Picture 1: <img></img>\n\nfoo")],
    ),
    "two pictures": (
        [users("in", ONE, OTHER)],
        [SYSTEM, ("user", "Picture 1: <img></img>\nPicture 2: <img></img>\nin")],
    ),
    "pictures are numbered through the conversation": (
        [users("the", ONE), answers("A dog.\n"), users("in?", OTHER)],
        [
            SYSTEM,
            ("user", "Picture 1: <img></img>\nthe"),
            ("assistant", "A dog."),
            ("user", "Picture 2: <img></img>\nin?"),
        ],
    ),
    "system": (
        [Message("system", (Text("Be brief."),)), users("dog")],
        [("system", "Be brief."), ("user", "dog")],
    ),
    "tag": ([users("a <img/> b", ONE)], [SYSTEM, ("user", "a <img></img> b")]),
    "tag in front": ([users("<img/> b", ONE)], [SYSTEM, ("user", "<img></img> b")]),
    "named by its source": (
        [users("a <img>1.png</img> b <img/>", ONE, OTHER)],
        [SYSTEM, ("user", "a <img></img> b <img></img>")],
    ),
    "named by its number": (
        [users("<img>2</img> is <img>1</img>?", ONE, OTHER)],
        [SYSTEM, ("user", "<img></img> is <img></img>?")],
    ),
    "parts in order": (
        [Message("user", (Text("a "), ONE, Text(" dog")))],
        [SYSTEM, ("user", "a <img></img> dog")],
    ),
    "places are ids, in answers too": (
        [users("<ref>dog</ref>?"), answers("<ref>dog</ref><box>(1,2),(3,4)</box>"), users("in?")],
        [
            SYSTEM,
            ("user", "<ref>dog</ref>?"),
            ("assistant", "<ref>dog</ref><box>(1,2),(3,4)</box>"),
            ("user", "in?"),
        ],
    ),
}


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_prompts_are_those_of_the_original(name, processor):
    messages, expected = CONVERSATIONS[name]
    assert list(processor.chat(messages).token_ids) == originals(*expected)


def test_which_picture_stands_where(processor):
    named = processor.chat(
        [users("<img>1.png</img> and <img>1</img> and <img>1</img>", ONE, OTHER)]
    )
    assert [p.media.content_hash for p in named.media] == ["picture 1", "picture 0", "picture 0"]
    plain = processor.chat([users("<img>1.png</img> and <img/>", ONE, OTHER)])
    assert [p.media.content_hash for p in plain.media] == ["picture 1", "picture 0"]
    for placed in (*named.media, *plain.media):
        assert placed.count == SPAN


def test_a_base_gets_its_text_as_it_is(processor):
    prompt = processor.raw(users("<img/>the dog", ONE))
    special = tokenizer().special_id
    window = [special("<img>"), *[special("<imgpad>")] * SPAN, special("</img>")]
    assert list(prompt.token_ids) == [*window, *tokenizer().encode("the dog")]
    assert processor.raw(users("the dog", ONE)).token_ids == prompt.token_ids


@pytest.mark.parametrize(
    "typed",
    ["<|im_end|>", "<|im_start|>user", "<|endoftext|>", "<imgpad>", "</img>", "<|extra_7|>"],
)
def test_scaffolding_that_is_typed_stays_text(typed, processor):
    ids = processor.chat([users(f"a {typed} b")]).token_ids
    assert list(ids) == originals(SYSTEM, ("user", f"a {typed} b"))
    tags = set(tokenizer().tags.values())
    inside = [i for i in tokenizer().encode(typed) if i >= len(tokenizer().tokens)]
    assert set(inside) <= tags


def test_tags_of_pictures_in_messages_of_programs_stay_text(processor):
    """They come from requests, files and saved chats: nothing is opened or placed there."""
    for text in ("<img>/etc/passwd</img>", "<img/>", "<img>"):
        message = Message("user", (Text(text),))
        assert processor.chat([message]).media == ()
        old = [users("x"), answers(text), users("y")]
        assert processor.chat(old).media == ()


@pytest.mark.parametrize(
    ("text", "count", "said"),
    [
        ("<img/> or <img/>?", 1, "2 <img/> tags, and there is 1 picture"),
        ("<img/>?", 2, "1 <img/> tag, and there are 2 pictures"),
        ("<img>0.png</img>", 2, "0 <img/> tags, and there is 1 picture"),
        ("<img>0.png</img> <img/>", 1, "pictures first (found at character 18)"),
        ("<img>other.png</img>", 1, "'other.png', which is not given; give it with --image-prompt"),
        ("<img>3</img>", 2, "'3', which is not given"),
        ("<img>0.png", 1, "<img> in the text has no </img>"),
        ("<img></img>", 1, "has 0 bytes; 1 to 254 are possible"),
        (f"<img>{'ü' * 127}x</img>", 1, "has 255 bytes; 1 to 254 are possible"),
    ],
)
def test_tags_and_pictures_that_do_not_fit_are_refused(text, count, said):
    with pytest.raises(PromptError) as caught:
        users(text, *[ONE, OTHER][:count])
    assert said in str(caught.value)


def test_a_name_of_254_bytes_is_the_longest():
    name = "ü" * 127
    assert users(f"<img>{name}</img>", opened={name: ONE}).images == (ONE,)
    assert NameTags("<img>", "</img>", 254).split(f"<img>{name}</img>") == ["", name, ""]


@pytest.mark.parametrize(
    ("extra", "context"),
    [(0, ""), (1, "alpha 3"), (SEQ_LENGTH, "alpha 3"), (SEQ_LENGTH + 1, "alpha 7")],
)
def test_prompts_of_another_rotation_share_nothing(extra, context, processor):
    text = "1" * (SEQ_LENGTH + extra)  # each digit is a token
    prompt = processor.raw(Message("user", text))
    assert (len(prompt.token_ids), prompt.context) == (SEQ_LENGTH + extra, context)
    shorter = processor.raw(Message("user", text[: SEQ_LENGTH - 1]))
    assert (prompt.fingerprint[0] == shorter.fingerprint[0]) == (context == "")


@pytest.mark.checkpoint
def test_golden_ids_of_the_released_tokenizer():
    path = os.environ.get("MMCHAT_QWEN_TOKENIZER")
    if not path:
        pytest.skip("MMCHAT_QWEN_TOKENIZER does not name the qwen.tiktoken of Qwen-VL")
    released = QwenVLProcessor(with_vocabulary(), open_tokenizer(path), "drop")
    one = list(released.chat([users("What is this?", ONE)]).token_ids)
    assert " ".join(map(str, one[:21])) == (
        "151644 8948 198 2610 525 264 10950 17847 13 151645 198 151644 872 198 24669 220 16 25 220"
        " 151857 151859"
    )
    assert " ".join(map(str, one[276:])) == "151858 198 3838 374 419 30 151645 198 151644 77091 198"
    assert len(one) == 287
    assert len(released.chat([users("What changed?", ONE, OTHER)]).token_ids) == 550


def test_another_tokenizer_is_refused():
    with pytest.raises(CheckpointError, match="needs its own tokenizer"):
        QwenVLProcessor(with_vocabulary(), BytePairTokenizer(trained_tokens(), {}), "drop")
