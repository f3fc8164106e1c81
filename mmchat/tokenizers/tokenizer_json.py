"""The Hub's tokenizer.json: run by tiktoken where that gives the same ids, else by its own library.

GGUF files hold the parts of the tokenizer.json that they were made from.

tokenizer.json lists merges in order; tiktoken merges the pair whose result has the lowest rank. For
a vocabulary that was converted from tiktoken, as Llama 3's, the two agree; `merges_follow_ranks`
proves it for the file at hand.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from typing import Any

from mmchat import limits
from mmchat.checkpoints.gguf_file import is_gguf, read_header
from mmchat.checkpoints.mapped_file import MappedFile
from mmchat.errors import CheckpointError, MissingExtra, quoted
from mmchat.strict_json import Where, as_object, read_json
from mmchat.tokenizers.base import Tokenizer, refusals
from mmchat.tokenizers.byte_pair import LLAMA3_SPLIT, BytePairTokenizer
from mmchat.tokenizers.text_steps import check_steps
from mmchat.tokenizers.tiktoken_file import check_vocabulary

Pair = tuple[bytes, bytes]

_KEYS = "tokenizer.ggml."  # of GGUF's metadata
_PLAIN, _SPECIAL = 1, (3, 4)  # control tokens, and those that a user defined


def open_tokenizer_json(path: Path) -> Tokenizer:
    """Read a tokenizer.json, or the tokenizer of a GGUF file, with byte-level BPE.

    Raises CheckpointError for a damaged file or another kind of tokenizer, MissingExtra if only the
    `tokenizers` library gives its ids and it is not installed.
    """
    where = Where(str(path), error=CheckpointError)
    if is_gguf(path):
        found = tokenizer_document(path)
    else:
        found = as_object(read_json(path, where, limits.TOKENIZER_JSON_BYTES), where)
    model_where = where.child("model")
    model = as_object(found.get("model"), model_where)
    # bytes must stand as letters, so that text comes back from the tokens' letters
    if model.get("type") != "BPE" or not _says(found.get("decoder"), {"type": "ByteLevel"}):
        raise model_where.fail("not a byte-level BPE tokenizer; Llama 3.2's is needed")
    specials = _special_tokens(found.get("added_tokens", []), where.child("added_tokens"))
    vocabulary = as_object(model.get("vocab"), model_where.child("vocab"))
    tokens = _tokens(vocabulary, specials, model_where.child("vocab"))
    for name, token_id in specials.items():
        if not len(tokens) <= token_id < len(tokens) + limits.VOCABULARY_ENTRIES:
            raise where.child("added_tokens").fail(
                f"{quoted(name)} has id {token_id}; special tokens follow the {len(tokens):,} plain"
            )
    names = {name: tokens[i] for name, i in vocabulary.items() if name not in specials}
    merges = list(_merges(model.get("merges"), names, model_where.child("merges")))
    if _is_llama3(found, model) and merges_follow_ranks(tokens, merges):
        return BytePairTokenizer(tokens, specials)
    check_steps(found, where)
    return LibraryTokenizer(found, tokens, specials, where)


def tokenizer_document(path: Path) -> dict[str, Any]:
    """The content of a tokenizer.json that says what a GGUF file does.

    Raises CheckpointError for another kind of tokenizer than Llama 3's, or a damaged one.
    """
    where = Where(str(path), error=CheckpointError)
    with closing(MappedFile(path)) as file:
        found = read_header(file).metadata
    kinds = tuple(found.get(_KEYS + key) for key in ("model", "pre"))
    if kinds != ("gpt2", "llama-bpe"):
        raise where.fail(f"its tokenizer is {quoted(kinds)}, not that of Llama 3")
    for key in ("tokens", "merges"):
        if not isinstance(found.get(_KEYS + key), list):  # of which the header's are of texts alone
            raise where.child(_KEYS + key).fail("expected a list of texts")
    names, merges = found[f"{_KEYS}tokens"], found[f"{_KEYS}merges"]
    types = found.get(f"{_KEYS}token_type")
    if not isinstance(types, tuple) or len(types) != len(names):
        raise where.child(f"{_KEYS}token_type").fail("expected a number for each token")
    numbered = list(enumerate(zip(names, types, strict=True)))
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [
        {"id": i, "content": name, **plain, "special": True}
        for i, (name, kind) in numbered
        if kind in _SPECIAL
    ]
    split = {"pattern": {"Regex": LLAMA3_SPLIT}, "behavior": "Isolated", "invert": False}
    bytes_ = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    return {
        "version": "1.0",
        "added_tokens": added,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{"type": "Split", **split}, {**bytes_, "use_regex": False}],
        },
        "decoder": bytes_,
        "model": {
            "type": "BPE",
            "ignore_merges": True,
            "vocab": {name: i for i, (name, kind) in numbered if kind == _PLAIN},
            "merges": merges,
        },
    }


def _says(value: Any, entries: Mapping[str, Any]) -> bool:
    """Whether `value` is an object with these entries, among others."""
    return isinstance(value, dict) and {**value, **entries} == value


def _is_llama3(found: Mapping[str, Any], model: Mapping[str, Any]) -> bool:
    """Whether text is split as Llama 3 splits it, and nothing else is done to it."""
    split = {"type": "Split", "pattern": {"Regex": LLAMA3_SPLIT}, "behavior": "Isolated"}
    levels = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    plain = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
    match found.get("pre_tokenizer"):
        case {"pretokenizers": [first, second]}:
            return (
                found.get("normalizer") is None
                and _says(first, split)
                and not first.get("invert")
                and _says(second, levels)
                and model.get("ignore_merges") is True
                and not any(model.get(key) for key in plain)
            )
    return False


def _special_tokens(added: Any, where: Where) -> dict[str, int]:
    if not isinstance(added, list):
        raise where.fail("expected a list")
    names: dict[str, int] = {}
    ids: set[int] = set()
    for index, item in enumerate(added):
        entry = as_object(item, where.child(index))
        name, token_id = entry.get("content"), entry.get("id")
        if not isinstance(name, str) or not name or type(token_id) is not int or token_id < 0:
            raise where.child(index).fail("expected a token with content and id")
        if name in names or token_id in ids:
            raise where.child(index).fail(f"{quoted(name)} or its id {token_id} is there twice")
        names[name] = token_id
        ids.add(token_id)
    return names


def _tokens(
    vocabulary: Mapping[str, Any], specials: Mapping[str, int], where: Where
) -> list[bytes]:
    """Bytes of the ordinary tokens; their ids must run from 0 without gaps."""
    ordinary = {name: i for name, i in vocabulary.items() if name not in specials}
    if len(ordinary) > limits.VOCABULARY_ENTRIES:
        raise where.fail(f"{len(ordinary):,} tokens, over {limits.VOCABULARY_ENTRIES:,}")
    tokens: list[bytes | None] = [None] * len(ordinary)
    letters = _byte_letters()
    for name, token_id in ordinary.items():
        if type(token_id) is not int or not 0 <= token_id < len(tokens) or tokens[token_id]:
            raise where.child(name).fail(
                f"id {quoted(token_id)}; ids run from 0 to {len(tokens) - 1}, each once"
            )
        tokens[token_id] = _bytes_of(name, letters, where)
    found = [token for token in tokens if token is not None]
    check_vocabulary(found, where)
    return found


def _bytes_of(name: str, letters: Mapping[str, int], where: Where) -> bytes:
    try:
        token = bytes(letters[char] for char in name)
    except KeyError:
        raise where.child(name).fail("holds a letter that stands for no byte") from None
    if not 1 <= len(token) <= limits.BYTES_PER_TOKEN:
        raise where.child(name).fail(f"{len(token)} bytes; at most {limits.BYTES_PER_TOKEN}")
    return token


def _byte_letters() -> dict[str, int]:
    """The letter of each byte in byte-level BPE (GPT-2): itself if it is printable and no space."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(b): b for b in shown} | {chr(256 + i): b for i, b in enumerate(hidden)}


def _merges(merges: Any, names: Mapping[str, bytes], where: Where) -> Iterator[Pair]:
    """The pairs, from both spellings: "a b" and ["a", "b"]. names: tokens by their letters."""
    if not isinstance(merges, list):
        raise where.fail("expected a list")
    for index, merge in enumerate(merges):
        halves = merge.split(" ") if isinstance(merge, str) else merge
        try:
            left, right = halves
            yield names[left], names[right]
        except (KeyError, TypeError, ValueError):
            raise where.child(index).fail(f"{quoted(merge)} is no pair of tokens") from None


def merges_follow_ranks(tokens: list[bytes], merges: Iterable[Pair]) -> bool:
    """Whether merging by the list gives the same tokens as merging by the rank of the result.

    True means proved. Borders between tokens never move, so whatever stands inside a token or a
    pair was merged in the order in which its bytes alone are merged. A token's bytes pass through
    one state of two parts at most: of all pairs with the same result, only that one ever arises. So
    if (1) the list is sorted by the rank of the result and (2) holds the pair of each token that
    arises, both methods choose the same pair, the leftmost of its kind, at every step.
    """
    ranks = {token: rank for rank, token in enumerate(tokens)}
    listed: set[Pair] = set()
    last = 0
    for left, right in merges:
        rank = ranks.get(left + right, -1)
        if left not in ranks or right not in ranks or rank < last:  # (1)
            return False
        last = rank
        listed.add((left, right))
    for token in tokens:  # (2)
        halves = ((token[:i], token[i:]) for i in range(1, len(token)))
        splits = [pair for pair in halves if pair[0] in ranks and pair[1] in ranks]
        if not listed.issuperset(splits):
            pair = _last_pair(token, ranks)
            if pair is not None and pair not in listed:
                return False
    return True


def _last_pair(token: bytes, ranks: Mapping[bytes, int]) -> Pair | None:
    """The last two parts of a token's bytes as they merge by rank, leftmost first."""
    state = [bytes([byte]) for byte in token]
    never = len(ranks)
    while len(state) > 2:
        found = [ranks.get(a + b, never) for a, b in pairwise(state)]
        at = found.index(min(found))
        if found[at] == never:
            return None
        state[at : at + 2] = [state[at] + state[at + 1]]
    return (state[0], state[1]) if len(state) == 2 else None


class LibraryTokenizer(Tokenizer):
    """A tokenizer.json run by the `tokenizers` library, which is told of no special token."""

    def __init__(
        self,
        found: Mapping[str, Any],
        tokens: list[bytes],
        special_tokens: Mapping[str, int],
        where: Where,
    ) -> None:
        super().__init__(tokens, special_tokens)
        try:
            import tokenizers
        except ImportError:
            raise MissingExtra(
                f"{where.file} needs the tokenizers library: pip install 'mmchat[tokenizers]'"
            ) from None
        # Without these parts, text can neither turn into a special token nor get one added.
        plain = dict.fromkeys(("post_processor", "truncation", "padding"))
        vocabulary = {k: i for k, i in found["model"]["vocab"].items() if k not in special_tokens}
        model = {**found["model"], "vocab": vocabulary}
        plain = {**found, **plain, "added_tokens": [], "model": model}
        with refusals(lambda reason: where.fail(f"the tokenizers library refuses it: {reason}")):
            self._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(plain))

    def _ids(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids
