"""Make tokenizer.model: byte-level BPE in tiktoken's format, trained on the scenes' sentences.

    python assets/tiny/make_tokenizer.py [--ranks 1072] [--scenes 4000]

The same arguments give the same file. Merges stop when the ranks are used up; the 256 special
tokens of Llama 3 follow after the last rank and are not part of the file.
"""

from __future__ import annotations

import argparse
import base64
from collections import Counter
from itertools import pairwise
from pathlib import Path

import regex

from mmchat.evals.scenes import make_scene
from mmchat.evals.scenes.questions import CANNOT_TELL, NO_PICTURE, OUTSIDE, TALK, plural
from mmchat.evals.scenes.world import COLOURS, KINDS, NUMBERS, WORDS

# The split of Llama 3's tokenizer.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GENERAL = """
The quick brown fox jumps over the lazy dog. It was a bright cold day in April, and the clocks were
striking thirteen. She sells sea shells by the sea shore. We are going to the market to buy bread,
milk, apples and cheese. He said that he would come home before the rain. They have been working on
this for a long time, but nothing has been found yet. When you have finished, please let me know.
There were many people in the street, and some of them were singing. I would like to know which one
of these you want. Could you tell me more about this? What should I do with the other one? It does
not matter how long it takes. First we look, then we think, and after that we write. This image
shows a small table with a large white bowl, some fruit and a glass of water. Above the door there
is a sign. Under the window stands a chair. Behind the trees you can see a river and a bridge. The
child holds a balloon in her left hand. Pictures, images, photos, drawings and words. Because it is
late, we should go. Explain the difference between them. Write a short list. Yes. No. Maybe. Please.
user assistant system
"""


def corpus(scenes: int) -> Counter[bytes]:
    """Pieces of the split and how often each occurs; every word of the world is there."""
    texts: list[str] = []
    for seed in range(scenes):
        questions = make_scene(seed, wording="rich").questions
        for question in (*questions[:8], *sum((q.earlier for q in questions), ())[:1]):
            text = question.text if seed % 4 else question.text.lower()
            texts += [text, question.answer]
    kinds = [f" {name}" for kind in KINDS for name in (kind, plural(kind))]
    texts += [*kinds, *(f" {colour} {colour.title()}" for colour in COLOURS)] * 8
    texts += [f" {word}" for word in WORDS] * 20
    texts += [CANNOT_TELL, NO_PICTURE, OUTSIDE, *TALK.values()] * 20
    texts += [
        *NUMBERS,
        *(f" {number}" for number in NUMBERS),
        *("user", "assistant", "system") * 500,
    ]
    texts += [GENERAL.replace("\n", " ")] * 3
    pieces = (piece for text in texts for piece in regex.findall(PATTERN, text))
    return Counter(piece.encode() for piece in pieces if not piece.isdigit())


def train(pieces: Counter[bytes], ranks: int) -> list[bytes]:
    """The tokens in order of rank: 256 bytes, then merges of the most frequent pair."""
    tokens = [bytes([value]) for value in range(256)]
    tokens.append(b"\n\n")
    known = set(tokens)
    words = {piece: [bytes([value]) for value in piece] for piece in pieces}
    while len(tokens) < ranks:
        pairs: Counter[tuple[bytes, bytes]] = Counter()
        for piece, parts in words.items():
            for pair in pairwise(parts):
                pairs[pair] += pieces[piece]
        if not pairs:
            break
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merged = best[0] + best[1]
        if merged not in known:
            known.add(merged)
            tokens.append(merged)
        for piece, parts in words.items():
            words[piece] = _merge(parts, best)
    return tokens


def _merge(parts: list[bytes], pair: tuple[bytes, bytes]) -> list[bytes]:
    merged: list[bytes] = []
    for part in parts:
        if merged and (merged[-1], part) == pair:
            merged[-1] += part
        else:
            merged.append(part)
    return merged


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the built-in model's tokenizer.model.")
    parser.add_argument("--ranks", type=int, default=1072)
    parser.add_argument("--scenes", type=int, default=4000)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("tokenizer.model"))
    args = parser.parse_args()
    tokens = train(corpus(args.scenes), args.ranks)
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens)]
    args.out.write_text("".join(lines), encoding="ascii")


if __name__ == "__main__":
    main()
