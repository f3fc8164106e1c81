"""Questions as people type them: polite, with a word too many, in small letters, with a slip."""

from __future__ import annotations

import re
from random import Random

_OPENINGS = (
    "Please tell me: ", "Hey, ", "Hi, ", "Hello! ", "So, ", "Now, ", "Okay, ", "Tell me, ", "And ",
    "Well, ", "Excuse me, ", "Sorry, ", "One question: ", "I wonder, ", "Please, ", "But ",
    "Quick question: ", "Good morning! ", "Look: ", "Let me ask you something. ", "I am curious: ",
    "My son asks: ", "She wants to know: ", "We would like to know: ", "Dear model, ",
    "Be honest: ", "Here is a picture. ", "I drew this. ", "Take a look. ", "Next question: ",
    "Can you help? ",
    "I am not sure. ", "Think about it: ", "Um, ", "Hm, ", "Listen: ", "Dear friend, ",
    "I am blind. ", "I forgot my glasses. ", "My mother asks: ", "A question: ", "Ok, ", "Pls, ",
    "Be so kind: ", "Good evening! ", "Hi there! ", "Let's see: ", "If you can: ", "Just asking: ",
    "Help me: ", "Sorry to ask, ", "For my homework: ", "Oh, ", "By the way, ",
)  # fmt: skip
_CLOSINGS = (" Thanks!", " Thank you.", " please?", ", please?", ", please.", " Please.",
             " Please!", " Tell me.", " Be brief.", " Answer in one sentence.",
             " I can't see it well.", " in this picture?", " in the image?", " Thx.", " pls?",
             " I am curious.", " Just wondering.", " It is for my son.", " I need to know.",
             " My eyes are bad.", " Thanks a lot.", " That would help.", " Keep it short.",
             " I am in a hurry.", " Many thanks!", " if you can?", " Take your time.",
             " I can't tell.", " What do you think?", ", thanks.")  # fmt: skip
_SMALL_WORDS = ("the", "this", "there", "you", "is", "are", "do", "does", "me", "it", "in", "of",
                "on", "can", "to", "for", "that")  # fmt: skip
_FILLERS = ("really", "just", "exactly", "now", "then", "actually", "maybe", "here", "all", "also",
            "there", "please", "again", "so", "only", "even", "well")  # fmt: skip


def loosen(rng: Random, text: str) -> str:
    """Now and then the words as people type them: polite, in small letters, with a slip."""
    if rng.random() < 0.15:
        text = rng.choice(_OPENINGS) + text[0].lower() + text[1:]
    if rng.random() < 0.1:
        closing = rng.choice(_CLOSINGS)
        text = text if closing.startswith(" ") and closing[1].isupper() else text.rstrip("?.!")
        text += closing
    if rng.random() < 0.2:
        text = _stirred(rng, text)
    if rng.random() < 0.12:
        text = _slip(rng, text)
    style = rng.random()
    if style < 0.14:
        text = text.lower()
    elif style < 0.17:
        text = text.upper()
    elif style < 0.22:
        text = text[0].lower() + text[1:]
    end = rng.random()
    if end < 0.14:
        text = text.rstrip("?.!")
    elif end < 0.17:
        text = text.rstrip("?.!") + rng.choice(("??", " ?", "!", "?!", "...", "."))
    return text


def _stirred(rng: Random, text: str) -> str:
    """One small word left out, or one put in."""
    words = text.split(" ")
    small = [at for at, word in enumerate(words) if word in _SMALL_WORDS]
    if small and rng.random() < 0.5:
        del words[rng.choice(small)]
    else:
        words.insert(rng.randint(1, len(words)), rng.choice(_FILLERS))
    return " ".join(words)


def _slip(rng: Random, text: str) -> str:
    """One wrong letter in one longer word."""
    places = [m.span() for m in re.finditer(r"[a-z]{4,}", text)]
    if not places:
        return text
    start, end = rng.choice(places)
    at = rng.randrange(start + 1, end - 1)
    slip = rng.choice(("swap", "swap", "drop", "double", "wrong"))
    if slip == "swap":
        return text[:at] + text[at + 1] + text[at] + text[at + 2 :]
    if slip == "wrong":
        return text[:at] + rng.choice("aeiortnsl") + text[at + 1 :]
    return text[:at] + ("" if slip == "drop" else text[at] * 2) + text[at + 1 :]
