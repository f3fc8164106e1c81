"""What a tokenizer.json may do to text before its vocabulary sees it: known steps, bounded growth.

The file comes from a stranger, and its steps run on every question. A step that writes two letters
for one, or a byte level on top of another, doubles the text each time it is listed; an expression
may go back and forth for hours.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mmchat.errors import quoted
from mmchat.strict_json import Where, as_object
from mmchat.tokenizers.byte_pair import LLAMA3_SPLIT, QWEN_SPLIT

_MOST_STEPS = 16
# None of them makes text longer the second time; NFKC and NFKD make it 11 times as long at most.
_NORMALIZERS = ("NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents", "Strip", "Replace")
_PRE_TOKENIZERS = ("ByteLevel", "Split", "Digits", "Punctuation", "Whitespace", "WhitespaceSplit")
_SPLITS = (
    LLAMA3_SPLIT,
    QWEN_SPLIT,
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",  # GPT-2
)


def check_steps(found: Mapping[str, Any], where: Where) -> None:
    """Raise where's error for a step of a tokenizer.json that is not known or makes text grow."""
    place = where.child("normalizer")
    for step in _steps(found.get("normalizer"), "normalizers", _NORMALIZERS, place):
        if step["type"] == "Replace" and not _shortens(step):
            raise place.fail("a Replace makes text longer, or is an expression; not supported")
    place, byte_levels = where.child("pre_tokenizer"), 0
    for step in _steps(found.get("pre_tokenizer"), "pretokenizers", _PRE_TOKENIZERS, place):
        byte_levels += step["type"] == "ByteLevel"
        if byte_levels > 1:
            raise place.fail("more than one ByteLevel")
        if step["type"] == "Split" and not _is_known_split(step.get("pattern")):
            raise place.fail(
                f"splits text by {quoted(step.get('pattern'))}, which is not supported"
            )
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if found["model"].get(key):
            raise where.child("model").child(key).fail("not supported, only null")


def _steps(
    value: Any, inside: str, known: tuple[str, ...], where: Where
) -> Iterator[dict[str, Any]]:
    """The steps of `value` in order, with those of sequences in it. inside: the key of these."""
    waiting, count = [] if value is None else [value], 0
    while waiting:
        step = as_object(waiting.pop(0), where)
        count += 1
        if count > _MOST_STEPS:
            raise where.fail(f"more than {_MOST_STEPS} steps")
        if step.get("type") == "Sequence" and isinstance(step.get(inside), list):
            waiting = [*step[inside][: _MOST_STEPS + 1], *waiting]
        elif step.get("type") in known:
            yield step
        else:
            listed = ", ".join(known)
            raise where.fail(f"{quoted(step.get('type'))} is not supported, only {listed}")


def _shortens(replace: Mapping[str, Any]) -> bool:
    """Whether a Replace looks for a plain string and writes nothing longer in its place."""
    match replace:
        case {"pattern": {"String": str(old)}, "content": str(new)}:
            return bool(old) and len(new.encode()) <= len(old.encode())
    return False


def _is_known_split(pattern: Any) -> bool:
    match pattern:
        case {"Regex": str(expression)}:
            return expression in _SPLITS
        case {"String": str(text)}:
            return bool(text)
    return False
