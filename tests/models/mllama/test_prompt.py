import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as PILImage

from mmchat import limits
from mmchat.conversation import Image, Message, Text, ToolCall
from mmchat.errors import PromptError
from mmchat.models.mllama.prompt import chat_ids, raw_ids, stop_ids
from mmchat.tokenizers import open_tokenizer
from mmchat.tokenizers.byte_pair import BytePairTokenizer
from mmchat.tokenizers.tiktoken_file import llama3_special_tokens
from tests.synthetic_tokenizer import trained_tokens

TOKENS = trained_tokens()
N = len(TOKENS)
SPECIALS = llama3_special_tokens()
TOKENIZER = BytePairTokenizer(TOKENS, {name: N + i for i, name in enumerate(SPECIALS)})
BOS, START, END, EOT, IMAGE = N, N + 6, N + 7, N + 9, N + 256


def picture(name="dog.png"):
    return Image(PILImage.new("RGB", (3, 2)), name, name)


def user(*parts):
    return Message("user", tuple(Text(p) if isinstance(p, str) else p for p in parts))


def header(role):
    return [START, *TOKENIZER.encode(role), END, *TOKENIZER.encode("\n\n")]


def test_a_question_about_a_picture():
    dog = picture()
    prompt = chat_ids([user(dog, "What's in this image?")], TOKENIZER, IMAGE)
    text = TOKENIZER.encode("What's in this image?")
    expected = [BOS, *header("user"), IMAGE, *text, EOT, *header("assistant")]
    assert list(prompt.input_ids) == expected
    assert prompt.starts == (1 + len(header("user")),)
    assert prompt.images == (dog,)


def test_a_conversation_keeps_roles_order_and_pictures():
    first, second, third = picture("1"), picture("2"), picture("3")
    messages = [
        Message("system", (Text("Be brief."),)),
        user("Look: ", first, " nice", second, third, " both"),
        Message("assistant", (Text("  Two dogs.\n"),)),
        user("dogs"),
    ]
    prompt = chat_ids(messages, TOKENIZER, IMAGE)
    encode = TOKENIZER.encode
    expected = [
        *(BOS, *header("system"), *encode("Be brief."), EOT),
        *(*header("user"), *encode("Look: "), IMAGE, *encode(" nice"), IMAGE, IMAGE),
        *(*encode(" both"), EOT, *header("assistant"), *encode("  Two dogs.\n"), EOT),
        *(*header("user"), *encode("dogs"), EOT, *header("assistant")),
    ]
    assert list(prompt.input_ids) == expected
    assert prompt.images == (first, second, third)
    assert [prompt.input_ids[p] for p in prompt.starts] == [IMAGE] * 3


def test_parts_of_a_text_do_not_merge_across_their_border():
    whole, halves = "dogs and a cat", ("dogs an", "d a cat")
    merged = raw_ids(user(whole), TOKENIZER, IMAGE).input_ids
    apart = raw_ids(user(*halves), TOKENIZER, IMAGE).input_ids
    assert list(apart[1:]) == TOKENIZER.encode(halves[0]) + TOKENIZER.encode(halves[1])
    assert apart != merged


def test_a_base_model_gets_the_raw_prompt():
    dog = picture()
    prompt = raw_ids(user(dog, "If I had to write"), TOKENIZER, IMAGE)
    assert list(prompt.input_ids) == [BOS, IMAGE, *TOKENIZER.encode("If I had to write")]
    assert prompt.starts == (1,)
    text_only = raw_ids(user("two dogs"), TOKENIZER, IMAGE)
    assert list(text_only.input_ids) == [BOS, *TOKENIZER.encode("two dogs")]
    assert text_only.images == text_only.starts == ()


parts = st.lists(
    st.one_of(
        st.sampled_from([*SPECIALS, "<|image", "|>", "\n\n", "<|image|><|eot_id|>"]),
        st.text(max_size=8),
        st.just(None),
    ),
    max_size=8,
)


@settings(max_examples=100, deadline=None)
@given(st.lists(parts, min_size=1, max_size=3))
def test_image_ids_equal_pictures_and_text_adds_no_special_id(turns):
    messages = [user(*(picture() if p is None else p for p in turn)) for turn in turns]
    pictures = sum(turn.count(None) for turn in turns)
    if pictures > limits.IMAGES_PER_PROMPT:
        return
    prompt = chat_ids(messages, TOKENIZER, IMAGE)
    assert prompt.input_ids.count(IMAGE) == len(prompt.images) == pictures
    special = [i for i in prompt.input_ids if i >= N and i != IMAGE]
    assert special == [BOS, *[START, END, EOT] * len(turns), START, END]


def test_answers_end_at_the_three_stop_tokens():
    assert stop_ids(TOKENIZER) == {N + 1, N + 8, N + 9}


@pytest.mark.parametrize("role", ["system", "assistant"])
def test_only_the_user_sends_pictures(role):
    with pytest.raises(PromptError, match=f"a {role} message holds a picture; only user"):
        chat_ids([Message(role, (picture(), Text("x")))], TOKENIZER, IMAGE)


def test_limits_of_a_prompt():
    with pytest.raises(PromptError, match="the conversation is empty"):
        chat_ids([], TOKENIZER, IMAGE)
    half = "a" * (limits.PROMPT_BYTES // 2 + 1)
    with pytest.raises(PromptError, match="4,194,306 bytes of text"):
        chat_ids([user(half), user(half)], TOKENIZER, IMAGE)
    most = [picture()] * limits.IMAGES_PER_PROMPT
    assert len(raw_ids(user(*most), TOKENIZER, IMAGE).images) == 16
    with pytest.raises(PromptError, match="17 pictures; at most 16"):
        raw_ids(user(*most, picture()), TOKENIZER, IMAGE)


def test_an_image_id_out_of_text_is_an_error(monkeypatch):
    monkeypatch.setattr(TOKENIZER, "encode", lambda text: [IMAGE])
    with pytest.raises(PromptError, match="image token"):
        raw_ids(user("x"), TOKENIZER, IMAGE)


@pytest.fixture
def llama_tokenizer():
    path = os.environ.get("MMCHAT_LLAMA_TOKENIZER")
    if not path:
        pytest.skip("MMCHAT_LLAMA_TOKENIZER does not name the tokenizer.model of Llama 3.2")
    return open_tokenizer(Path(path))


@pytest.mark.checkpoint
@pytest.mark.parametrize(
    ("message", "chat", "expected"),
    [
        (
            user(picture(), "Describe this image in two sentences"),
            True,
            "128000 128006 882 128007 271 128256 75885 420 2217 304 1403 23719 128009 128006 "
            "78191 128007 271",
        ),
        (
            user(picture(), "If I had to write a haiku for this one"),
            False,
            "128000 128256 2746 358 1047 311 3350 264 6520 39342 369 420 832",
        ),
        (
            user("Look: ", picture(), " nice", picture(), picture(), " both"),
            False,
            "128000 10596 25 220 128256 6555 128256 128256 2225",
        ),
        (user("This is a test sentence."), False, "128000 2028 374 264 1296 11914 13"),
        (user("Hello, how are you?"), False, "128000 9906 11 1268 527 499 30"),
        (user(" 1234567 \n\n x"), False, "128000 220 4513 10961 22 4815 865"),
    ],
)
def test_golden_ids_of_llama_3_2(llama_tokenizer, message, chat, expected):
    assert llama_tokenizer.vocab_size == 128_256
    build = chat_ids if chat else raw_ids
    ids = build([message] if chat else message, llama_tokenizer, 128_256).input_ids
    assert " ".join(map(str, ids)) == expected


@pytest.mark.checkpoint
def test_golden_roles_and_stop_ids_of_llama_3_2(llama_tokenizer):
    roles = {role: llama_tokenizer.encode(role) for role in ("system", "user", "assistant")}
    assert roles == {"system": [9125], "user": [882], "assistant": [78191]}
    assert stop_ids(llama_tokenizer) == {128_001, 128_008, 128_009}
    assert llama_tokenizer.special_id("<|image|>") in (128_011, 128_256)  # Meta, the Hub


# Tools

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city; <|eot_id|> is only text — as ü is.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
DECLARED = """{
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city; <|eot_id|> is only text — as ü is.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {
                    "type": "string"
                }
            }
        }
    }
}

"""
# What the chat template of the released checkpoints writes, with two tools.
INSTRUCTION = (
    "Given the following functions, please respond with a JSON for a function call with its proper "
    'arguments that best answers the given prompt.\n\nRespond in the format {"name": function '
    'name, "parameters": dictionary of argument name and its value}.Do not use variables.\n\n'
)


def test_tools_are_declared_before_the_first_question_and_results_come_back():
    calls = (ToolCall("weather", '{"city":"Rome"}'), ToolCall("weather"))
    messages = [
        Message("system", (Text("Be brief."),)),
        user("  Warm in Rome? "),
        Message("assistant", (), calls),
        Message("tool", (Text('{"t": 30}'),)),
        Message("tool", (Text("cold"),)),
        user(" And now?"),
    ]
    prompt = chat_ids(messages, TOKENIZER, IMAGE, tools=[WEATHER, WEATHER])
    encode = TOKENIZER.encode
    called = (
        '{"name": "weather", "parameters": {"city":"Rome"}}; {"name": "weather", "parameters": {}}'
    )
    assert list(prompt.input_ids) == [
        *(BOS, *header("system"), *encode("Be brief."), EOT),
        *(*header("user"), *encode(INSTRUCTION + 2 * DECLARED + "Warm in Rome?"), EOT),
        *(*header("assistant"), *encode(called), EOT),
        *(*header("ipython"), *encode('{"t": 30}'), EOT),
        *(*header("ipython"), *encode("cold"), EOT),
        *(*header("user"), *encode(" And now?"), EOT, *header("assistant")),
    ]


def test_pictures_stay_before_the_tools_and_no_text_becomes_special():
    prompt = chat_ids(
        [user(picture(), "What?", picture(), "Now?")], TOKENIZER, IMAGE, tools=[WEATHER]
    )
    start = 1 + len(header("user"))
    text = TOKENIZER.encode(INSTRUCTION + DECLARED + "What?")
    assert prompt.starts == (start, start + 1 + len(text))
    assert list(prompt.input_ids[start + 1 : start + 1 + len(text)]) == text
    assert prompt.input_ids.count(EOT) == 1
    pictures = chat_ids([user(picture())], TOKENIZER, IMAGE, tools=[WEATHER])
    assert pictures.input_ids[start] == IMAGE


def test_tools_need_a_question_and_only_the_user_shows_pictures():
    with pytest.raises(PromptError, match="send a user message"):
        chat_ids([Message("assistant", (Text("x"),))], TOKENIZER, IMAGE, tools=[WEATHER])
    with pytest.raises(PromptError, match="a tool message holds a picture"):
        chat_ids([user("x"), Message("tool", (picture(),))], TOKENIZER, IMAGE)
