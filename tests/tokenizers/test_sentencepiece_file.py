"""Llama 2's tokenizer.model, with models trained here; the library itself is the oracle."""

from __future__ import annotations

import io
import random

import pytest
from sentencepiece import SentencePieceProcessor

from mmchat import limits
from mmchat.errors import CheckpointError
from mmchat.strict_json import Where
from mmchat.tokenizers import open_tokenizer
from mmchat.tokenizers.base import StreamDecoder
from mmchat.tokenizers.sentencepiece_file import (
    SentencePieceTokenizer,
    open_sentencepiece_file,
    parse_sentencepiece,
)
from tests.sentencepiece_model import SYLLABLES, trained

WHERE = Where("tokenizer.model", error=CheckpointError)
ALPHABET = [
    *SYLLABLES, *" \n\t  aeé犬🙂€0129<>/:.▁", "\r\n", "</s>", "<s>", "<unk>", "<image>", "<0x41>",
    "\0", "USER: ", "\u0301", "\u200b", "\ufeff",
]  # fmt: skip


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizers") / "tokenizer.model"
    path.write_bytes(trained())
    return path


@pytest.fixture(scope="module")
def tokenizer(path) -> SentencePieceTokenizer:
    return open_sentencepiece_file(path)


@pytest.fixture(scope="module")
def library() -> SentencePieceProcessor:
    return SentencePieceProcessor(model_proto=trained())


def texts(count: int) -> list[str]:
    chosen = random.Random(7)
    return ["".join(chosen.choices(ALPHABET, k=chosen.randint(0, 14))) for _ in range(count)]


def test_the_first_byte_tells_it_from_a_tiktoken_file(path, tmp_path):
    assert isinstance(open_tokenizer(path), SentencePieceTokenizer)
    linked = tmp_path / "tokenizer.model"
    linked.symlink_to(path)  # as in the Hub's cache
    assert isinstance(open_tokenizer(tmp_path), SentencePieceTokenizer)


def test_ids_are_those_of_the_library_on_ten_thousand_strings(tokenizer, library):
    for text in texts(10_000):
        assert tokenizer.encode(text) == library.encode(text), text


def test_the_rest_of_a_text_is_encoded_without_the_space_in_front(tokenizer, library):
    """Known by two other ways: a space that is given, and a line end that merges with nothing."""
    newline = library.encode("\n")
    for text in texts(10_000):
        rest = tokenizer.encode_rest(text)
        assert tokenizer.encode_rest("▁" + text) == library.encode(text) or not text
        assert [*newline, *rest] == library.encode("\n" + text), text
    assert tokenizer.encode("US") != tokenizer.encode_rest("US")


def test_decoding_is_that_of_the_library_but_for_the_space_in_front(tokenizer, library):
    for text in texts(5_000):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids).removeprefix(" ") == library.decode(ids), text
        decoder = StreamDecoder(tokenizer)
        assert decoder.extend(ids) + decoder.flush() == tokenizer.decode(ids)


def test_text_never_becomes_a_special_token(tokenizer):
    ids = tokenizer.encode("<s>a</s><unk>")
    assert not any(map(tokenizer.is_special, ids))
    assert tokenizer.decode(ids) == " <s>a</s><unk>"
    assert [tokenizer.special_id(name) for name in ("<unk>", "<s>", "</s>")] == [0, 1, 2]
    assert tokenizer.decode([1, *ids, 2]) == " <s>a</s><unk>"
    assert tokenizer.decode([2], skip_special=False) == "</s>"
    with pytest.raises(CheckpointError, match="no special token '<image>'"):
        tokenizer.special_id("<image>")


def test_unknown_ids_and_lone_surrogates_are_replaced(tokenizer):
    assert tokenizer.decode([tokenizer.vocab_size, -1]) == "\ufffd\ufffd"
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == " a\ufffdb"
    assert tokenizer.encode("") == tokenizer.encode_rest("") == []


def test_bytes_follow_the_specials(tokenizer):
    assert [tokenizer.token_bytes(3 + value) for value in range(256)] == [
        bytes([value]) for value in range(256)
    ]
    assert tokenizer.encode("\n")[-1] == 3 + 10


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model_type": "unigram"}, "not byte pair encoding"),
        ({"byte_fallback": False}, "not byte pair encoding"),
        ({"normalization_rule_name": "nfkc"}, "rewrites text"),
        ({"remove_extra_whitespaces": True}, "treats spaces otherwise"),
        ({"add_dummy_prefix": False}, "treats spaces otherwise"),
        ({"bos_id": 2, "eos_id": 1}, "expected <unk>, <s> and </s>"),
        ({"pad_id": 0, "unk_id": 3}, "expected <unk>, <s> and </s>"),
    ],
)
def test_other_kinds_of_model_are_refused(changed, message):
    with pytest.raises(CheckpointError, match=f"tokenizer.model: .*{message}"):
        parse_sentencepiece(trained(**changed), WHERE)


def test_cut_and_damaged_files_are_refused(tmp_path):
    """Whatever is done to the file, it is opened whole or refused in words."""
    data, chosen = trained(), random.Random(3)
    path = tmp_path / "tokenizer.model"
    broken = [data[: chosen.randrange(len(data))] for _ in range(60)]
    for _ in range(200):
        changed = bytearray(data)
        for _ in range(chosen.randint(1, 4)):
            changed[chosen.randrange(1, len(changed))] = chosen.randrange(256)
        broken.append(bytes(changed))
    refused = 0
    for content in broken:
        path.write_bytes(content)
        try:
            open_tokenizer(path).encode("co di 12\n犬")
        except CheckpointError:
            refused += 1
    assert refused > 100


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b"\n" * 40, "download it again"),
        (b"\n\x0e\n\x05<unk>\x15\x00\x00", "cut off"),
        (b"\n\x02\n\x00", "not byte pair encoding"),
        (b"\n\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", "more than 64 bits"),
        (b"\n" + b"x" * limits.TOKENIZER_MODEL_BYTES, "at most 16,777,216"),
    ],
)
def test_other_files_are_named(tmp_path, content, message):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        open_tokenizer(path)


def test_a_long_text_takes_time_in_proportion(tokenizer):
    text = "the犬 dog12 " * 50_000
    assert len(tokenizer.encode(text)) > 100_000


def test_the_library_says_nothing(path, capfd):
    open_sentencepiece_file(path)
    assert capfd.readouterr() == ("", "")
    with pytest.raises(CheckpointError):
        parse_sentencepiece(io.BytesIO(trained()).read()[:-3], WHERE)


def test_a_real_tokenizer_of_that_kind_is_read():
    """Of Mistral, which has Llama 2's structure and other pieces."""
    common = pytest.importorskip("mistral_common")
    from pathlib import Path

    path = Path(common.__file__).parent / "data" / "tokenizer.model.v1"
    tokenizer = open_sentencepiece_file(path)
    assert tokenizer.vocab_size == 32_000
    assert tokenizer.encode("USER: hi") == [2223, 725, 28747, 12014]
    assert tokenizer.encode_rest("USER: hi") == [11123, 28747, 12014]
