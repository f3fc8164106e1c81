import random
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmchat import limits
from mmchat.errors import CheckpointError, PromptError
from mmchat.strict_json import Where
from mmchat.tokenizers import open_tokenizer
from mmchat.tokenizers.base import StreamDecoder
from mmchat.tokenizers.byte_pair import BytePairTokenizer, pieces
from mmchat.tokenizers.tiktoken_file import (
    llama3_special_tokens,
    open_tiktoken_file,
    parse_tiktoken,
)
from tests.synthetic_tokenizer import tiktoken_lines, trained_tokens

TOKENS = trained_tokens()
SPECIALS = llama3_special_tokens()
TOKENIZER = BytePairTokenizer(TOKENS, {n: len(TOKENS) + i for i, n in enumerate(SPECIALS)})
WHERE = Where("tokenizer.model", error=CheckpointError)

# Text that tries to be special: names, halves of names, confusables, surrogates, controls, runs.
FRAGMENTS = [
    *SPECIALS,
    "<|",
    "|>",
    "<|image",
    "<｜image｜>",
    "<|image|>" * 3,
    "\ufeff",
    "\x00",
    "　",
]
hostile_text = st.lists(
    st.one_of(
        st.sampled_from(FRAGMENTS),
        st.text(max_size=12),
        st.text(st.characters(categories=["Cs", "Cf", "Zs", "Mn", "So"]), max_size=6),
        st.sampled_from([" ", "\n", "a", "é", "🐶", "."]).map(lambda c: c * 40),
    ),
    max_size=12,
).map("".join)


def without_surrogates(text):
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


@pytest.mark.slow
@settings(max_examples=800, deadline=None)
@given(hostile_text)
def test_text_never_becomes_a_special_token_and_comes_back_unchanged(text):
    ids = TOKENIZER.encode(text)
    assert all(0 <= i < len(TOKENS) for i in ids)
    assert TOKENIZER.decode(ids, skip_special=False) == without_surrogates(text)


@settings(max_examples=300, deadline=None)
@given(hostile_text)
def test_a_stream_of_tokens_gives_the_decoded_text(text):
    decoder = StreamDecoder(TOKENIZER)
    parts = [decoder.push(i) for i in TOKENIZER.encode(text)]
    assert "".join(parts) == without_surrogates(text)
    assert decoder.flush() == ""


def test_the_names_of_all_special_tokens_are_text():
    text = "".join(SPECIALS)
    ids = TOKENIZER.encode(text)
    assert max(ids) < len(TOKENS)
    assert len(ids) > 256
    assert TOKENIZER.decode(ids) == text


def test_a_special_id_out_of_the_encoder_is_an_error(monkeypatch):
    tokenizer = BytePairTokenizer(TOKENS, TOKENIZER.special_tokens)
    broken = SimpleNamespace(encode=lambda text, **_: [len(TOKENS)])
    monkeypatch.setattr(tokenizer, "_encoding", broken)
    with pytest.raises(PromptError, match="special token"):
        tokenizer.encode("x")


def test_special_tokens_follow_the_ranks_by_metas_names():
    n = len(TOKENS)
    expected = {
        "<|begin_of_text|>": 0,
        "<|end_of_text|>": 1,
        "<|reserved_special_token_0|>": 2,
        "<|finetune_right_pad_id|>": 4,
        "<|start_header_id|>": 6,
        "<|end_header_id|>": 7,
        "<|eom_id|>": 8,
        "<|eot_id|>": 9,
        "<|python_tag|>": 10,
        "<|image|>": 11,
        "<|reserved_special_token_2|>": 12,
        "<|reserved_special_token_245|>": 255,
    }
    assert {name: TOKENIZER.special_id(name) - n for name in expected} == expected
    assert len(SPECIALS) == len(set(SPECIALS)) == 256
    assert TOKENIZER.vocab_size == n + 256
    with pytest.raises(CheckpointError, match="no special token '<im_start>'"):
        TOKENIZER.special_id("<im_start>")


def test_both_image_ids_decode_to_the_name_of_the_image_token():
    for image_id in (TOKENIZER.special_id("<|image|>"), TOKENIZER.vocab_size):
        assert TOKENIZER.token_bytes(image_id) == b"<|image|>"
        assert TOKENIZER.decode([image_id]) == ""
        assert TOKENIZER.decode([image_id], skip_special=False) == "<|image|>"


@pytest.mark.parametrize("unknown", [-1, -(2**70), TOKENIZER.vocab_size + 1, 2**31, 2**70])
def test_unknown_ids_are_replacement_characters(unknown):
    assert TOKENIZER.decode([unknown]) == "�"
    assert StreamDecoder(TOKENIZER).push(unknown) == "�"


def test_a_stream_never_shows_half_a_character():
    decoder = StreamDecoder(TOKENIZER)
    by_byte = {token: rank for rank, token in enumerate(TOKENS)}
    dog = [by_byte[bytes([b])] for b in "🐶".encode()]
    assert [decoder.push(i) for i in dog] == ["", "", "", "🐶"]
    assert [decoder.push(i) for i in dog[:2]] == ["", ""]
    assert decoder.push(by_byte[b"a"]) == "�a"
    assert decoder.push(dog[0]) == ""
    assert decoder.flush() == "�"
    assert decoder.push(by_byte[b"b"]) == "b"
    assert decoder.push(TOKENIZER.special_id("<|eot_id|>")) == ""
    shown = StreamDecoder(TOKENIZER, skip_special=False)
    assert shown.push(TOKENIZER.special_id("<|eot_id|>")) == "<|eot_id|>"


def test_long_text_is_cut_as_meta_cuts_it():
    """Against Meta's rule written out character by character."""

    def reference(text):
        for start in range(0, len(text), 400_000):
            part, begin, run = text[start : start + 400_000], 0, 0
            for i, char in enumerate(part):
                same = i > 0 and char.isspace() == part[i - 1].isspace()
                run = run + 1 if same else 1
                if run > 25_000:
                    yield part[begin:i]
                    begin, run = i, 1
            yield part[begin:]

    rng = random.Random(3)
    runs = [
        (rng.choice("a \n犬\u2003"), rng.choice([1, 24_999, 25_000, 25_001, 60_000]))
        for _ in range(30)
    ]
    text = "".join(char * length for char, length in runs)
    assert len(text) > 400_000
    assert list(pieces(text)) == list(reference(text))
    assert list(pieces("")) == []


@pytest.mark.slow
@pytest.mark.parametrize("char", [" ", "a", "\n", "^", "\t", "é", "1", "\x00"])
def test_a_million_equal_characters_encode(char):
    text = char * 1_000_000
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


@pytest.mark.slow
def test_text_over_the_limit_is_refused():
    TOKENIZER.encode(" word" * (limits.PROMPT_BYTES // 5))
    with pytest.raises(PromptError, match="4,194,306 bytes; at most 4,194,304"):
        TOKENIZER.encode("é" * (limits.PROMPT_BYTES // 2 + 1))


@pytest.mark.parametrize("name", ["ValueError", "PanicException"])
def test_a_failing_encoder_is_a_prompt_error(monkeypatch, name):
    panic = type(name, (BaseException,), {}) if name == "PanicException" else ValueError

    class Failing:
        def encode(self, *args, **kwargs):
            raise panic("regex gave up")

    tokenizer = BytePairTokenizer(TOKENS, TOKENIZER.special_tokens)
    tokenizer.__dict__["_encoding"] = Failing()
    with pytest.raises(PromptError, match="cannot be encoded"):
        tokenizer.encode("x")


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_lines_may_end_with_lf_or_crlf(end):
    data = tiktoken_lines(TOKENS, end)
    assert parse_tiktoken(data, WHERE) == TOKENS
    assert parse_tiktoken(data.removesuffix(end), WHERE) == TOKENS


LINES = tiktoken_lines(TOKENS).splitlines(keepends=True)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([*LINES[:5], *LINES[6:]], "line 6: expected a token in base64 and rank 5"),
        ([*LINES[:3], LINES[4], LINES[3], *LINES[5:]], "line 4: .* rank 3"),
        ([*LINES, LINES[0]], f"rank {len(LINES)}"),
        ([*LINES, LINES[0].replace(b" 0", b" %d" % len(LINES))], "is there twice"),
        ([b"AA== 0\n", *LINES[1:10]], "single bytes are no tokens, the first is"),
        ([b"A 0\n", *LINES[1:]], "line 1: not base64"),
        ([b"AA==\t0\n", *LINES[1:]], "line 1"),
        ([b" 0\n", *LINES[1:]], "line 1: a token of 0 bytes"),
        ([b"QUFB" * 100 + b" 0\n", *LINES[1:]], "line 1: a token of 300 bytes"),
        ([LINES[0].replace(b" 0", b" +0"), *LINES[1:]], "line 1"),
        ([LINES[0].replace(b" 0", b" 00"), *LINES[1:]], "line 1"),
        ([*LINES[:2], b"\n", *LINES[2:]], "line 3"),
    ],
)
def test_damaged_lines_are_named(lines, message):
    with pytest.raises(CheckpointError, match=f"tokenizer.model: .*{message}"):
        parse_tiktoken(b"".join(lines), WHERE)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b"<!DOCTYPE html><html>Log in</html>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "Git LFS pointer"),
        (b"x" * (limits.TOKENIZER_MODEL_BYTES + 1), "at most 16,777,216"),
    ],
)
def test_other_files_are_recognised(tmp_path, content, message):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        open_tiktoken_file(path)


def test_a_folder_is_searched_for_its_tokenizer(tmp_path):
    with pytest.raises(
        CheckpointError, match=r"no tokenizer.model, tokenizer.json or qwen\.tiktoken there"
    ):
        open_tokenizer(tmp_path)
    (tmp_path / "original").mkdir()
    (tmp_path / "original" / "tokenizer.model").write_bytes(tiktoken_lines(TOKENS))
    assert open_tokenizer(tmp_path).vocab_size == TOKENIZER.vocab_size
    with pytest.raises(CheckpointError, match="no such file"):
        open_tokenizer(tmp_path / "other.model")


def test_mutated_files_raise_nothing_but_checkpoint_errors(tmp_path):
    rng = random.Random(11)
    data = tiktoken_lines(TOKENS)
    opened, messages = 0, set()
    for _ in range(2_000):
        changed = bytearray(data)
        for _ in range(rng.choice([1, 1, 1, 4])):
            at = rng.randrange(len(changed))
            match rng.randrange(4):
                case 0:
                    changed[at] ^= 1 << rng.randrange(8)
                case 1:
                    del changed[at : at + rng.choice([1, 9, 500])]
                case 2:
                    changed[at:at] = rng.choice([b"\n", b" ", b"\x00", b"A", b"=", b"9" * 5000])
                case 3:
                    changed = changed[:at] or bytearray(b"x")
        try:
            tokens = parse_tiktoken(bytes(changed), WHERE)
        except CheckpointError as error:
            messages.add(str(error))
        else:
            opened += 1
            assert len(set(tokens)) == len(tokens) >= 256
    assert 0 < opened < 1_900
    assert all(map(str.isprintable, messages))
