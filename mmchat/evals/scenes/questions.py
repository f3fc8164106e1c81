"""Questions about scenes and their one right answer, in several phrasings."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from mmchat.evals.scenes.phrasings import Wording, choose
from mmchat.evals.scenes.world import ANIMALS, COLOURS, KINDS, Item, View

QUESTION_TYPES = (
    "caption", "colour", "count", "where", "presence", "text", "order", "size",
    "absent", "unknown", "same", "change", "talk", "follow", "outside",
)  # fmt: skip
NUMBER_WORDS = ("none", "one", "two", "three", "four", "five")

CHANGE_ANSWERS = {
    "": "Nothing changed.",
    "colour": "The colour changed.",
    "position": "The position changed.",
    "object": "The object changed.",
}
CANNOT_TELL = "I can't tell from this picture."
OUTSIDE = "I only know simple drawings."
NO_PICTURE = "Please show me a picture."
# Small talk: name -> the answer.
TALK = {
    "hello": "Hello! I can look at pictures.",
    "who": "I am a tiny model that looks at pictures.",
    "thanks": "You're welcome!",
    "can": "I can name shapes, colours and things, count them and read words.",
    "fine": "I am fine, thank you.",
    "bye": "Goodbye!",
}


@dataclass(frozen=True)
class Question:
    """A question about a scene, its type (one of QUESTION_TYPES) and its one right answer.

    earlier: what was asked before in the same conversation.
    """

    type: str
    text: str
    answer: str
    earlier: tuple[Question, ...] = ()


def article(phrase: str) -> str:
    """The phrase with "a" or "an" before it."""
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def plural(kind: str) -> str:
    return {"fish": "fish", "cross": "crosses"}.get(kind, kind + "s")


def _sentence(words: str) -> str:
    return words[0].upper() + words[1:] + "."


def _groups(view: View) -> list[tuple[Item, int]]:
    """The first item of each kind and how many there are, in reading order."""
    groups: dict[str, list[Item]] = {}
    for item in view.items:
        groups.setdefault(item.kind, []).append(item)
    return [(items[0], len(items)) for items in groups.values()]


def caption(view: View) -> str:
    """The whole picture in one sentence: "A brown dog and the word STOP."."""
    phrases = []
    for item, count in _groups(view):
        if item.text:
            phrases.append(f"the {item.kind} {item.text}")
        elif count > 1:
            phrases.append(f"{NUMBER_WORDS[count]} {item.colour} {plural(item.kind)}")
        else:
            phrases.append(article(f"{item.colour} {item.kind}"))
    head, last = phrases[:-1], phrases[-1]
    return _sentence(f"{', '.join(head)} and {last}" if head else last)


class Asker:
    """Makes the questions of one scene; all randomness comes from `rng`."""

    def __init__(self, rng: Random, view: View, wording: Wording = "plain") -> None:
        self.rng, self.view = rng, view
        self.wording: Wording = wording
        self.groups = [(item, count) for item, count in _groups(view) if not item.text]
        self.printed = next((item for item in view.items if item.text), None)
        self.missing = [kind for kind in KINDS if all(kind != it.kind for it in view.items)]
        self.alone = len(self.groups) == 1 and self.printed is None

    def _ask(self, type_: str, key: str, answer: str, *names: str) -> Question:
        text = choose(self.rng, key, self.wording).format(*names)
        return Question(type_, text[0].upper() + text[1:], answer)

    def caption(self) -> list[Question]:
        asked = [self._ask("caption", "caption", caption(self.view))]
        if self.alone and self.wording != "plain":
            item, count = self.groups[0]
            if count == 1 and item.kind in ANIMALS:
                asked.append(self._ask("caption", "caption animal", caption(self.view)))
        return asked

    def _colour(self, item: Item, count: int, *, it: bool = False) -> Question:
        if count > 1:
            key = "colour they" if it else "colour many"
            return self._ask("colour", key, f"They are {item.colour}.", plural(item.kind))
        return self._ask(
            "colour", "colour it" if it else "colour", f"It is {item.colour}.", item.kind
        )

    def colour(self) -> list[Question]:
        asked = [self._colour(*group) for group in self.groups]
        if self.alone and self.wording != "plain":
            asked.append(self._colour(*self.groups[0], it=True))
        return asked

    def count(self) -> list[Question]:
        asked = [
            self._ask("count", "count", self._count_answer(count), plural(item.kind))
            for item, count in self.groups
        ]
        if self.printed is None:
            total = self._count_answer(sum(count for _, count in self.groups))
            asked.append(self._ask("count", "count all", total))
        if self.rng.random() < 0.3:
            kind = self.rng.choice(self.missing)
            asked.append(self._ask("count", "count", "There are none.", plural(kind)))
        return asked

    @staticmethod
    def _count_answer(count: int) -> str:
        return f"There {'is' if count == 1 else 'are'} {NUMBER_WORDS[count]}."

    def _where(self, item: Item, *, it: bool = False) -> Question:
        preposition = "In" if item.place == "middle" else "At"
        if item.place in ("left", "right"):
            preposition = "On"
        answer = f"{preposition} the {item.place}."
        return self._ask("where", "where it" if it else "where", answer, item.kind)

    def where(self) -> list[Question]:
        asked = [self._where(item) for item, count in self.groups if count == 1]
        if asked and self.alone and self.wording != "plain":
            asked.append(self._where(self.groups[0][0], it=True))
        return asked

    def _presence(self, name: str, answer: str, many: str) -> Question:
        return self._ask("presence", "presence", f"{answer} {name}.", article(name), name, many)

    def presence(self) -> list[Question]:
        yes, no = "Yes, there is", "No, there is no"
        asked = []
        for item, count in self.groups:
            many = plural(item.kind)
            if count == 1:
                asked.append(self._presence(item.kind, f"{yes} {_an(item.kind)}", many))
                name = f"{item.colour} {item.kind}"
                asked.append(self._presence(name, f"{yes} {_an(name)}", f"{item.colour} {many}"))
                other = self.rng.choice([name for name in COLOURS if name != item.colour])
                asked.append(self._presence(f"{other} {item.kind}", no, f"{other} {many}"))
        for kind in self.rng.sample(self.missing, 2):
            asked.append(self._presence(kind, no, plural(kind)))
        return asked

    def text(self) -> list[Question]:
        if self.printed is not None:
            return [self._ask("text", "text", f"It says {self.printed.text}.")]
        return [self._ask("text", "text", "There is no text.")] if self.rng.random() < 0.2 else []

    def _compare(self, key: str, right: Item, wrong: Item, type_: str) -> Question:
        names = [right.kind, wrong.kind]
        self.rng.shuffle(names)
        return self._ask(type_, key, f"The {right.kind}.", *names)

    def _two_singles(self) -> tuple[Item, Item] | None:
        singles = [item for item, count in self.groups if count == 1]
        if len(singles) < 2:
            return None
        first, second = self.rng.sample(singles, 2)
        return first, second

    def order(self) -> list[Question]:
        asked = []
        pair = self._two_singles()
        if pair and pair[0].cell[1] != pair[1].cell[1]:
            left, right = sorted(pair, key=lambda item: item.cell[1])
            asked.append(self._compare("left", left, right, "order"))
            asked.append(self._compare("right", right, left, "order"))
        if pair and pair[0].cell[0] != pair[1].cell[0]:
            above, below = sorted(pair, key=lambda item: item.cell[0])
            asked.append(self._compare("above", above, below, "order"))
            asked.append(self._compare("below", below, above, "order"))
        return asked

    def size(self) -> list[Question]:
        pair = self._two_singles()
        if not pair:
            return []
        small, big = sorted(pair, key=lambda item: item.box[2])
        if small.box[2] * 1.45 > big.box[2]:
            return []
        return [self._compare("size", big, small, "size")]

    def absent(self) -> list[Question]:
        kind = self.rng.choice(self.missing)
        key = self.rng.choice(("colour", "where"))
        return [self._ask("absent", key, f"There is no {kind}.", kind)]

    def unknown(self) -> list[Question]:
        return [self._ask("unknown", "unknown", CANNOT_TELL)]

    def follow(self) -> list[Question]:
        """Questions that only the question before makes clear."""
        asked = []
        for item, count in self.groups:
            if count > 1:
                first = self._ask("count", "count", self._count_answer(count), plural(item.kind))
                asked.append((first, self._colour(item, count, it=True)))
            else:
                told = [self._colour(item, 1), self._where(item)]
                name = item.kind
                told.append(self._presence(name, f"Yes, there is {_an(name)}", plural(name)))
                first = self.rng.choice(told)
                if first.type != "colour":
                    asked.append((first, self._colour(item, 1, it=True)))
                if first.type != "where":
                    asked.append((first, self._where(item, it=True)))
        pair = self._two_singles()
        if pair:
            ask = self.rng.choice((lambda item: self._colour(item, 1), self._where))
            again = ask(pair[1])
            asked.append((ask(pair[0]), self._ask("follow", "and", again.answer, pair[1].kind)))
        return [
            Question("follow", again.text, again.answer, earlier=(first,)) for first, again in asked
        ]

    def all(self) -> list[Question]:
        """Every question that this picture allows, in random order."""
        makers = (
            self.caption, self.colour, self.count, self.where, self.presence, self.text,
            self.order, self.size, self.absent, self.unknown, self.follow,
        )  # fmt: skip
        asked = [question for make in makers for question in make()]
        self.rng.shuffle(asked)
        return asked


def _an(name: str) -> str:
    """The article alone."""
    return article(name).split(" ", 1)[0]


def ask_pair(rng: Random, change: str, wording: Wording) -> list[Question]:
    """The questions about two pictures that differ in `change` ("" for not at all)."""
    same = "No, they are different." if change else "Yes, they are the same."
    asked = [
        Question("same", choose(rng, "same", wording), same),
        Question("change", choose(rng, "change", wording), CHANGE_ANSWERS[change]),
    ]
    rng.shuffle(asked)
    return asked


def ask_outside(rng: Random, wording: Wording) -> list[Question]:
    """What is asked of a picture that is none of the world's drawings."""
    keys = rng.sample(("caption", "caption", "caption", "count", "where", "colour", "presence"), 3)
    return [Question("outside", _filled(rng, key, wording), OUTSIDE) for key in keys]


def _filled(rng: Random, key: str, wording: Wording) -> str:
    """A question of a kind, about anything."""
    kind, other = rng.sample(KINDS, 2)
    names = {"presence": (article(kind), kind, plural(kind)), "count": (plural(kind),)}
    return choose(rng, key, wording).format(*names.get(key, (kind, other)))


def ask_talk(rng: Random, wording: Wording) -> list[Question]:
    """Small talk, and questions about a picture, without one."""
    names = rng.sample(tuple(TALK), 4)
    asked = [Question("talk", choose(rng, f"talk {n}", wording), TALK[n]) for n in names]
    key = rng.choice(("caption", "text", "colour", "count", "where", "presence", "change", "same",
                      "colour it", "where it", "count all"))  # fmt: skip
    asked.insert(rng.randrange(2), Question("talk", _filled(rng, key, wording), NO_PICTURE))
    return asked
