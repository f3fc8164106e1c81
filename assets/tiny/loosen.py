"""Questions as people type them: polite, with a word too many, in small letters, with a slip."""

from __future__ import annotations

import re
from functools import cache
from random import Random

from mmchat.evals.scenes.phrasings import phrasings
from mmchat.evals.scenes.world import COLOURS, KINDS

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
# What else people say for a word. One word is put for one, so that a sentence stays one.
_SYNONYMS = {
    "picture image photo drawing": ("picture", "image", "photo", "drawing", "pic", "sketch",
        "illustration", "photograph", "snapshot", "scene", "artwork", "graphic", "painting",
        "screenshot", "file", "shot", "page"),
    "see find spot notice": ("see", "find", "spot", "notice", "recognise", "recognize", "detect",
        "perceive", "discover", "identify", "observe", "view", "make out", "locate"),
    "tell": ("tell", "inform", "advise", "remind"),
    "say": ("say", "state", "mention", "report", "reveal", "respond", "confirm"),
    "show": ("show", "depict", "display", "present", "illustrate", "portray", "feature",
        "contain", "include", "hold"),
    "shown drawn": ("shown", "drawn", "depicted", "displayed", "presented", "pictured",
        "portrayed", "illustrated", "sketched", "visible", "featured"),
    "things objects items": ("things", "objects", "items", "elements", "pieces", "drawings"),
    "describe explain": ("describe", "explain", "summarise", "summarize", "depict", "recount",
        "outline", "present", "detail", "interpret"),
    "bigger larger": ("bigger", "larger", "greater", "huger", "more massive", "wider"),
    "higher": ("higher", "upper", "more upward", "topmost", "closer to the sky"),
    "lower": ("lower", "more downward", "bottommost", "deeper", "closer to the ground"),
    "further more": ("further", "more", "farther", "nearer", "closer"),
    "same": ("same", "identical", "equal", "exact same", "very same", "matching"),
    "different": ("different", "unlike", "distinct", "not alike", "dissimilar", "other"),
    "changed": ("changed", "altered", "modified", "varied", "switched", "edited", "replaced"),
    "difference change": ("difference", "change", "distinction", "variation", "alteration"),
    "count": ("count", "tally", "total", "enumerate", "number"),
    "number": ("number", "count", "sum", "quantity", "figure", "amount"),
    "written printed": ("written", "printed", "lettered", "typed", "inscribed", "spelled",
        "noted", "stated", "put down"),
    "text word writing": ("text", "word", "writing", "label", "lettering", "inscription",
        "notice", "term", "message", "caption", "print"),
    "read": ("read", "decipher", "recite", "decode", "read off", "speak", "pronounce"),
    "sign": ("sign", "board", "plate", "label", "poster", "signboard", "notice", "banner"),
    "where": ("where", "whereabouts", "in what place", "in which spot", "in which region"),
    "located placed": ("located", "placed", "situated", "positioned", "found", "set", "sitting"),
    "colour color": ("colour", "color", "hue", "paint colour", "shade", "colouring", "coloring"),
    "which": ("which", "what"),
    "know": ("know", "learn", "find out", "understand", "hear", "discover"),
    "want": ("want", "need", "wish", "would love", "have", "am trying"),
    "please": ("please", "kindly", "pls", "plz"),
    "here there": ("here", "there", "in it", "in front of you", "on display", "around"),
    "can could": ("can", "could", "would", "will", "might"),
    "thanks": ("thanks", "thank you", "cheers", "thx"),
    "quick short brief": ("quick", "short", "brief", "concise", "simple", "little"),
    "exactly really": ("exactly", "really", "precisely", "truly", "actually"),
}  # fmt: skip
_SAME = {word: same for words, same in _SYNONYMS.items() for word in words.split()}


_NAMED = rf"\b(?:an? )?(?:(?:{'|'.join(COLOURS)}) )?(?:{'|'.join(KINDS)})(?:es|s)?\b"


def names_aside(text: str) -> str:
    """A question's or pattern's words alone: no names, no capitals, no punctuation."""
    named = re.sub(_NAMED, "{}", re.sub(r"{\d}", "{}", text.lower()))
    return " ".join(re.findall(r"[a-z{}0-9']+", named))


@cache
def held_out() -> frozenset[str]:
    """The phrasings that training must not see."""
    return frozenset(names_aside(text) for texts in phrasings("unseen").values() for text in texts)


def loosen(rng: Random, text: str) -> str:
    """Now and then the words as people type them, though never those that are held out."""
    loose = _loosened(rng, text)
    return text if names_aside(loose) in held_out() else loose


def _loosened(rng: Random, text: str) -> str:
    """Polite, in other words, in small letters, with a slip."""
    if rng.random() < 0.3:
        text = _reworded(rng, text)
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


def _reworded(rng: Random, text: str) -> str:
    """Other words for some."""

    def reword(found: re.Match[str]) -> str:
        word = found[0]
        same = _SAME.get(word.lower())
        if same is None or rng.random() < 0.4:
            return word
        other = rng.choice(same)
        return other.capitalize() if word[0].isupper() else other

    return re.sub(r"[A-Za-z]+", reword, text)


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
