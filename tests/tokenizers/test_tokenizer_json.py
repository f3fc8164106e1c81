import json
import random
import sys

import pytest
import tokenizers
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from mmchat import limits
from mmchat.errors import CheckpointError, MissingExtra, MmchatError
from mmchat.tokenizers import open_tokenizer
from mmchat.tokenizers.byte_pair import BytePairTokenizer
from mmchat.tokenizers.tokenizer_json import LibraryTokenizer, merges_follow_ranks
from tests.synthetic_tokenizer import CORPUS, LETTERS, all_splits, hub_tokenizer, trained_tokens

GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
TOKENS = trained_tokens()
MERGES = all_splits(TOKENS)
NAMES = ("<|image|>", "<|eot_id|>", "<|begin_of_text|>")


def replacing(old, new):
    return {"type": "Replace", "pattern": {"String": old}, "content": new}


def in_sequence(steps):
    return {"type": "Sequence", "normalizers": steps}


def normalized(step):
    return lambda found: found.update(normalizer=step)


DIGITS = {"type": "Digits", "individual_digits": True}
DOUBLING = replacing("a", "aa")


@pytest.fixture
def opened(tmp_path):
    def open_json(found):
        path = tmp_path / "tokenizer.json"
        path.write_text(found if isinstance(found, str) else json.dumps(found))
        return open_tokenizer(path)

    return open_json


def sample_texts(count, seed=5):
    rng = random.Random(seed)
    words = [
        *CORPUS.split(" "),
        *NAMES,
        " ",
        "  ",
        "\n",
        "\r\n",
        "'S",
        "dogs",
        "犬猫",
        "🐶",
        "123456",
    ]
    chars = [*map(chr, range(9, 127)), *"éßøж犬\u00a0\u2003\u200d\u0301"]
    for _ in range(count):
        parts = [
            rng.choice(rng.choice((words, chars))) * rng.choice((1, 1, 2, 5)) for _ in range(12)
        ]
        yield rng.choice(("", " ")).join(parts)


@pytest.mark.parametrize("pairs", [False, True])
def test_a_converted_vocabulary_runs_in_tiktoken_and_equals_the_library(opened, pairs):
    found = hub_tokenizer(TOKENS, MERGES, pairs)
    tokenizer = opened(found)
    assert isinstance(tokenizer, BytePairTokenizer)
    oracle = Tokenizer.from_str(json.dumps({**found, "added_tokens": []}))
    for text in sample_texts(3_000):
        assert tokenizer.encode(text) == oracle.encode(text, add_special_tokens=False).ids
    assert tokenizer.special_id("<|image|>") == tokenizer.vocab_size == len(TOKENS) + 256
    assert tokenizer.token_bytes(tokenizer.vocab_size) == b"<|image|>"


def test_a_vocabulary_of_the_librarys_own_trainer_gives_its_ids(opened):
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = [LETTERS[byte] for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, show_progress=False)
    trained.train_from_iterator([CORPUS] * 3, trainer)
    model = json.loads(trained.to_str())["model"]
    found = hub_tokenizer(TOKENS, MERGES)
    found["model"] = {**model, "ignore_merges": True}
    found["added_tokens"] = [{"id": len(model["vocab"]), "content": "<|eot_id|>"}]
    tokenizer = opened(found)
    oracle = Tokenizer.from_str(json.dumps({**found, "added_tokens": []}))
    for text in sample_texts(1_000):
        assert tokenizer.encode(text) == oracle.encode(text, add_special_tokens=False).ids


def random_vocabulary(rng):
    """All bytes, random short tokens of few letters, and merges in an order that may not fit."""
    tokens = [bytes([b]) for b in range(256)]
    extra = {bytes(rng.choices(b"abc", k=rng.choice((2, 2, 3, 3, 4, 5)))) for _ in range(14)}
    tokens += rng.sample(sorted(extra), len(extra))
    merges = all_splits(tokens)
    if rng.random() < 0.5:
        merges = [merge for merge in merges if rng.random() < 0.85]
    if rng.random() < 0.3:
        rng.shuffle(merges)
    return tokens, merges


@pytest.mark.slow
def test_what_is_proved_to_follow_the_ranks_gives_the_librarys_ids():
    rng = random.Random(7)
    proved = refused = differing = 0
    for _ in range(300):
        tokens, merges = random_vocabulary(rng)
        found = hub_tokenizer(tokens, merges)
        oracle = Tokenizer.from_str(json.dumps({**found, "added_tokens": []}))
        ours = BytePairTokenizer(tokens, {"<|eot_id|>": len(tokens)})
        texts = ["".join(rng.choices("abc", k=rng.randrange(1, 40))) for _ in range(40)]
        equal = all(ours.encode(t) == oracle.encode(t).ids for t in texts)
        if merges_follow_ranks(tokens, merges):
            proved += 1
            assert equal, (tokens[256:], merges)
        else:
            refused += 1
            differing += not equal
    assert proved > 80
    assert refused > 80
    assert differing > 40  # so the proof is needed


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d["model"]["merges"].reverse(),
        lambda d: d["model"].update(ignore_merges=False),
        lambda d: d.update(normalizer={"type": "NFC"}),
        lambda d: d.update(normalizer={"type": "Sequence", "normalizers": [{"type": "NFKC"}] * 15}),
        lambda d: d.update(normalizer=replacing("犬猫", "ab")),
        lambda d: d["pre_tokenizer"]["pretokenizers"][0].update(pattern={"Regex": GPT2_SPLIT}),
        lambda d: d["pre_tokenizer"]["pretokenizers"][0].update(pattern={"String": " "}),
        lambda d: d["pre_tokenizer"]["pretokenizers"].insert(1, DIGITS),
    ],
)
def test_other_byte_level_tokenizers_run_in_the_library(opened, change):
    found = hub_tokenizer(TOKENS, MERGES)
    change(found)
    tokenizer = opened(found)
    assert isinstance(tokenizer, LibraryTokenizer)
    oracle = Tokenizer.from_str(json.dumps({**found, "added_tokens": []}))
    for text in sample_texts(300):
        ids = tokenizer.encode(text)
        assert ids == oracle.encode(text, add_special_tokens=False).ids
        assert max(ids) < len(TOKENS)
        if found["normalizer"] is None:
            assert tokenizer.decode(ids) == text


def test_without_the_library_the_extra_is_named(opened, monkeypatch):
    found = hub_tokenizer(TOKENS, MERGES[::-1])
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(MissingExtra, match=r"pip install 'mmchat\[tokenizers\]'"):
        opened(found)
    assert tokenizers.__version__
    assert isinstance(opened(hub_tokenizer(TOKENS, MERGES)), BytePairTokenizer)


def test_a_special_name_in_the_vocabulary_is_still_text(opened):
    found = hub_tokenizer(TOKENS, MERGES)
    found["model"]["vocab"]["<|image|>"] = len(TOKENS) + 256
    for merges in (MERGES, MERGES[::-1]):
        found["model"]["merges"] = hub_tokenizer(TOKENS, merges)["model"]["merges"]
        tokenizer = opened(found)
        assert max(tokenizer.encode("<|image|> a<|eot_id|>")) < len(TOKENS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["model"].update(type="Unigram"), "model: not a byte-level BPE"),
        (lambda d: d.update(decoder=None), "not a byte-level BPE"),
        (lambda d: d["model"]["vocab"].pop(LETTERS[65]), "model.vocab"),
        (lambda d: d["model"]["vocab"].update({LETTERS[65]: 3}), "each once"),
        (lambda d: d["model"]["vocab"].update({LETTERS[65]: True}), "id True"),
        (lambda d: d["model"]["vocab"].update({"犬": len(TOKENS)}), "stands for no byte"),
        (lambda d: d["model"]["vocab"].update({"a" * 300: len(TOKENS)}), "300 bytes; at most 256"),
        (lambda d: d["model"]["merges"].append("犬 a"), "is no pair of tokens"),
        (lambda d: d["model"]["merges"].append("a b c"), "is no pair of tokens"),
        (lambda d: d["model"]["merges"].append([1, 2]), "is no pair of tokens"),
        (lambda d: d["model"]["merges"].append(None), "is no pair of tokens"),
        (lambda d: d["model"].update(merges=None), "model.merges: expected a list"),
        (lambda d: d["added_tokens"][3].update(id=5), "special tokens follow"),
        (lambda d: d["added_tokens"][3].update(id=2**40), "special tokens follow"),
        (lambda d: d["added_tokens"][3].update(id=None), "content and id"),
        (lambda d: d["added_tokens"][3].update(content="<|eot_id|>"), "is there twice"),
        (lambda d: d.update(added_tokens={}), "added_tokens: expected a list"),
        (normalized(DOUBLING), "normalizer: a Replace makes text longer"),
        (normalized(in_sequence([DOUBLING] * 40)), "normalizer: a Replace makes text longer"),
        (normalized(in_sequence([{"type": "NFC"}] * 40)), "normalizer: more than 16 steps"),
        (normalized(replacing("", "a")), "normalizer: a Replace makes text longer"),
        (normalized({**DOUBLING, "pattern": {"Regex": "a"}}), "or is an expression"),
        (normalized({"type": "Prepend", "prepend": "a" * 1000}), "'Prepend' is not supported"),
        (normalized({"type": "ByteLevel"}), "'ByteLevel' is not supported, only NFC, NFD"),
        (normalized({"type": ["NFC"]}), "is not supported, only NFC, NFD"),
        (normalized([]), "normalizer: expected an object"),
        (lambda d: d["pre_tokenizer"].update(pretokenizers=[{"type": "ByteLevel"}] * 12),
         "pre_tokenizer: more than one ByteLevel"),
        (lambda d: d["pre_tokenizer"].update(pretokenizers=[{"type": "Metaspace"}]),
         "pre_tokenizer: 'Metaspace' is not supported"),
        (lambda d: d["pre_tokenizer"]["pretokenizers"][0].update(pattern={"Regex": "(a+)+$"}),
         "pre_tokenizer: splits text by "),
        (lambda d: d["pre_tokenizer"]["pretokenizers"][0].update(pattern={"String": ""}),
         "pre_tokenizer: splits text by "),
        (lambda d: d["model"].update(merges=hub_tokenizer(TOKENS, MERGES[::-1])["model"]["merges"],
         continuing_subword_prefix="x" * 10**6), "model.continuing_subword_prefix: not supported"),
        (lambda d: d["model"].update(dropout=0.5), "model.dropout: not supported, only null"),
    ],
)  # fmt: skip
def test_damage_is_named(opened, change, message):
    found = hub_tokenizer(TOKENS, MERGES)
    change(found)
    with pytest.raises(CheckpointError, match=f"tokenizer.json: .*{message}"):
        opened(found)


def test_a_duplicate_token_and_a_file_too_big_are_refused(opened):
    text = json.dumps(hub_tokenizer(TOKENS, MERGES))
    with pytest.raises(CheckpointError, match="appears twice"):
        opened(text.replace('"vocab": {', '"vocab": {"a": 1, "a": 2, '))
    with pytest.raises(CheckpointError, match="at most 33,554,432"):
        opened(text + " " * limits.TOKENIZER_JSON_BYTES)


@pytest.mark.slow
def test_mutated_files_raise_nothing_but_our_errors(opened):
    rng = random.Random(2)
    data = json.dumps(hub_tokenizer(TOKENS[:280], all_splits(TOKENS[:280])))
    pieces = ["null", "-1", "1e999", "[]", "{}", '"', ",", "NaN", "true", "9" * 30, "[" * 40, "\\u"]
    failed = 0
    for _ in range(500):
        at = rng.randrange(len(data))
        cut = rng.choice([0, 0, 1, 3, 200])
        try:
            tokenizer = opened(data[:at] + rng.choice(["", *pieces]) + data[at + cut :])
        except MmchatError as error:
            failed += 1
            assert "\n" not in str(error)  # noqa: PT017
        else:
            assert tokenizer.decode(tokenizer.encode("a dog <|image|>")) == "a dog <|image|>"
    assert failed > 150
