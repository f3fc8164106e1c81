"""A small byte-level BPE vocabulary, trained here, and the files that hold it."""

import base64
import json
from collections import Counter
from itertools import pairwise

import regex

from mmchat.tokenizers.byte_pair import LLAMA3_SPLIT
from mmchat.tokenizers.tiktoken_file import llama3_special_tokens
from mmchat.tokenizers.tokenizer_json import _byte_letters

CORPUS = """user assistant system Describe this image in two sentences. What's in this image? How
many dogs are there? There are two dogs and a cat; the cat is black, they're 12345 years old. Look:
nice both \n\n The picture shows a house, a tree and 3 cars.   Wide    spaces and ..... dots .....
ahahaha aaaaaaaaaa Grüße, où, naïve, 犬と猫, привет мир 🐶🐶🐱"""
LETTERS = {byte: letter for letter, byte in _byte_letters().items()}


def trained_tokens(corpus: str = CORPUS, merges: int = 200) -> list[bytes]:
    """256 bytes in a scrambled order, then the most frequent pairs."""
    tokens = [bytes([(37 * i) % 256]) for i in range(256)]
    words = [[bytes([b]) for b in word.encode()] for word in regex.findall(LLAMA3_SPLIT, corpus)]
    for _ in range(merges):
        pairs = Counter(pair for word in words for pair in pairwise(word))
        if not pairs:
            break
        (left, right), _ = max(pairs.items(), key=lambda item: (item[1], item[0]))
        if left + right not in tokens:
            tokens.append(left + right)
        words = [_merged(word, left, right) for word in words]
    return tokens


def _merged(word: list[bytes], left: bytes, right: bytes) -> list[bytes]:
    out: list[bytes] = []
    for part in word:
        if out and out[-1] == left and part == right:
            out[-1] += part
        else:
            out.append(part)
    return out


def tiktoken_lines(tokens: list[bytes], end: bytes = b"\n") -> bytes:
    lines = (base64.b64encode(token) + b" %d" % rank for rank, token in enumerate(tokens))
    return b"".join(line + end for line in lines)


def all_splits(tokens: list[bytes]) -> list[tuple[bytes, bytes]]:
    """Every pair of tokens that makes a token, in the order in which converters list them."""
    ranks = {token: rank for rank, token in enumerate(tokens)}
    pairs = [
        (token[:i], token[i:])
        for token in tokens
        for i in range(1, len(token))
        if token[:i] in ranks and token[i:] in ranks
    ]
    return sorted(pairs, key=lambda p: (ranks[p[0] + p[1]], ranks[p[0]], ranks[p[1]]))


def letters(token: bytes) -> str:
    return "".join(LETTERS[byte] for byte in token)


def hub_tokenizer(
    tokens: list[bytes], merges: list[tuple[bytes, bytes]], pairs: bool = False
) -> dict:
    """A tokenizer.json as the Hub's Llama 3.2 repositories have it; merges as pairs or strings."""
    names = [
        n.replace("<|image|>", "<|reserved_special_token_x|>") for n in llama3_special_tokens()
    ]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = [
        {"id": len(tokens) + i, "content": name, "special": True, **flags}
        for i, name in enumerate([*names, "<|image|>"])
    ]
    split = {
        "type": "Split",
        "pattern": {"Regex": LLAMA3_SPLIT},
        "behavior": "Isolated",
        "invert": False,
    }
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    spelled = [[letters(a), letters(b)] for a, b in merges]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [split, {**level, "use_regex": False}],
        },
        "post_processor": None,
        "decoder": {**level, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,
            "vocab": {letters(token): rank for rank, token in enumerate(tokens)},
            "merges": spelled if pairs else [" ".join(pair) for pair in spelled],
        },
    }


def hub_bytes(tokens: list[bytes], merges: list[tuple[bytes, bytes]], pairs: bool = False) -> bytes:
    return json.dumps(hub_tokenizer(tokens, merges, pairs)).encode()
