"""Questions about scenes and their one right answer, in several phrasings."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from mmchat.evals.scenes.world import COLOURS, KINDS, Item, View

QUESTION_TYPES = (
    "caption", "colour", "count", "where", "presence", "text", "order", "size",
    "absent", "unknown", "same", "change", "talk",
)  # fmt: skip
NUMBER_WORDS = ("none", "one", "two", "three", "four", "five")

CAPTION = (
    "What's in this image?",
    "What is in this image?",
    "What is in this picture?",
    "What's in this picture?",
    "What is in the image?",
    "What is in the picture?",
    "Describe this image.",
    "Describe this picture.",
    "Describe the image.",
    "Describe the picture.",
    "What do you see?",
    "What can you see?",
    "What is this?",
    "What does this picture show?",
    "What does this image show?",
    "Describe it.",
    "What's this?",
    "What is here?",
    "What do you see here?",
    "What is shown here?",
    "What's in the image?",
    "What's in the picture?",
)
COLOUR = ("What colour is the {}?", "What color is the {}?", "Which colour is the {}?")
COLOUR_MANY = ("What colour are the {}?", "What color are the {}?", "Which colour are the {}?")
COUNT = ("How many {} are there?", "How many {} do you see?", "How many {} are in the picture?")
COUNT_ALL = ("How many things are there?", "How many objects are there?", "How many things?")
WHERE = ("Where is the {}?", "Where is the {} in the picture?", "Where do you see the {}?")
PRESENCE = ("Is there {}?", "Is there {} in the picture?", "Do you see {}?", "Can you see {}?")
TEXT = (
    "What does the text say?",
    "What is written here?",
    "Read the text.",
    "What does it say?",
    "What is the text?",
    "What text is in the picture?",
    "What does the sign say?",
    "What's written here?",
)
LEFT = ("Which is further left, the {} or the {}?", "Which is on the left, the {} or the {}?")
RIGHT = ("Which is further right, the {} or the {}?", "Which is on the right, the {} or the {}?")
ABOVE = ("Which is higher, the {} or the {}?", "Which is above, the {} or the {}?")
BELOW = ("Which is lower, the {} or the {}?", "Which is below, the {} or the {}?")
SIZE = ("Which is bigger, the {} or the {}?", "Which is larger, the {} or the {}?")
SAME = (
    "Are these pictures the same?",
    "Are the two pictures the same?",
    "Are these images the same?",
    "Same or different?",
    "Are these the same?",
    "Are they the same?",
    "Are the pictures the same?",
)
CHANGE = (
    "What changed?",
    "What is different?",
    "What has changed?",
    "What changed between the pictures?",
    "What's different?",
    "What's changed?",
    "What is the difference?",
)
CHANGE_ANSWERS = {
    "": "Nothing changed.",
    "colour": "The colour changed.",
    "position": "The position changed.",
    "object": "The object changed.",
}
CANNOT_TELL = "I can't tell from this picture."
UNKNOWN = (
    "What is the weather like?", "What time is it?", "Who took this picture?", "Who made this?",
    "Where was this taken?", "How old is it?", "What is its name?", "How much does it cost?",
    "What day is it?", "Who lives here?", "Why is it here?", "Is it happy?", "What is it thinking?",
    "When was this taken?", "How heavy is it?", "What happened before?",
)  # fmt: skip
NO_PICTURE = "Please show me a picture."
TALK = {
    "Hello! I can look at pictures.": (
        "Hello.", "Hello!", "Hi!", "Hi", "Hello", "Hey!", "Good morning.",
    ),
    "I am a tiny model that looks at pictures.": (
        "Who are you?", "What are you?", "What is your name?", "Tell me about yourself.",
    ),
    "You're welcome!": ("Thanks.", "Thanks!", "Thank you.", "Thank you!", "Great, thanks!"),
    "I can name shapes, colours and things, count them and read words.": (
        "What can you do?", "How can you help me?", "What do you know?", "Help", "What can I ask?",
    ),
    "I am fine, thank you.": ("How are you?", "How are you today?", "How do you do?"),
    "Goodbye!": ("Bye.", "Bye!", "Goodbye.", "Goodbye!", "See you!", "Good night."),
    NO_PICTURE: (
        *CAPTION, *TEXT, COUNT_ALL[0], COUNT_ALL[1], "What colour is it?", "Where is it?",
        "Where is the dog?", "What colour is the dog?", "How many circles are there?",
        "Is there a cat?", "What changed?", "Are these pictures the same?",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Question:
    """A question about a scene, its type (one of QUESTION_TYPES) and its one right answer."""

    type: str
    text: str
    answer: str


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

    def __init__(self, rng: Random, view: View) -> None:
        self.rng, self.view = rng, view
        self.groups = [(item, count) for item, count in _groups(view) if not item.text]
        self.printed = next((item for item in view.items if item.text), None)
        self.missing = [kind for kind in KINDS if all(kind != it.kind for it in view.items)]

    def _ask(self, type_: str, phrasings: tuple[str, ...], answer: str, *names: str) -> Question:
        return Question(type_, self.rng.choice(phrasings).format(*names), answer)

    def caption(self) -> list[Question]:
        return [self._ask("caption", CAPTION, caption(self.view))]

    def colour(self) -> list[Question]:
        asked = []
        for item, count in self.groups:
            if count > 1:
                answer = f"They are {item.colour}."
                asked.append(self._ask("colour", COLOUR_MANY, answer, plural(item.kind)))
            else:
                asked.append(self._ask("colour", COLOUR, f"It is {item.colour}.", item.kind))
        return asked

    def count(self) -> list[Question]:
        asked = [
            self._ask("count", COUNT, self._count_answer(count), plural(item.kind))
            for item, count in self.groups
        ]
        if self.printed is None:
            total = self._count_answer(sum(count for _, count in self.groups))
            asked.append(self._ask("count", COUNT_ALL, total))
        if self.rng.random() < 0.3:
            kind = self.rng.choice(self.missing)
            asked.append(self._ask("count", COUNT, "There are none.", plural(kind)))
        return asked

    @staticmethod
    def _count_answer(count: int) -> str:
        return f"There {'is' if count == 1 else 'are'} {NUMBER_WORDS[count]}."

    def where(self) -> list[Question]:
        asked = []
        for item in (item for item, count in self.groups if count == 1):
            preposition = "In" if item.place == "middle" else "At"
            if item.place in ("left", "right"):
                preposition = "On"
            answer = f"{preposition} the {item.place}."
            asked.append(self._ask("where", WHERE, answer, item.kind))
        return asked

    def presence(self) -> list[Question]:
        asked = []
        for item, count in self.groups:
            if count == 1:
                name = article(item.kind)
                asked.append(self._ask("presence", PRESENCE, f"Yes, there is {name}.", name))
                name = article(f"{item.colour} {item.kind}")
                asked.append(self._ask("presence", PRESENCE, f"Yes, there is {name}.", name))
                other = self.rng.choice([name for name in COLOURS if name != item.colour])
                name = f"{other} {item.kind}"
                answer = f"No, there is no {name}."
                asked.append(self._ask("presence", PRESENCE, answer, article(name)))
        for kind in self.rng.sample(self.missing, 2):
            answer = f"No, there is no {kind}."
            asked.append(self._ask("presence", PRESENCE, answer, article(kind)))
        return asked

    def text(self) -> list[Question]:
        if self.printed is not None:
            return [self._ask("text", TEXT, f"It says {self.printed.text}.")]
        return [self._ask("text", TEXT, "There is no text.")] if self.rng.random() < 0.2 else []

    def _compare(
        self, phrasings: tuple[str, ...], right: Item, wrong: Item, type_: str
    ) -> Question:
        names = [right.kind, wrong.kind]
        self.rng.shuffle(names)
        return self._ask(type_, phrasings, f"The {right.kind}.", *names)

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
            asked.append(self._compare(LEFT, left, right, "order"))
            asked.append(self._compare(RIGHT, right, left, "order"))
        if pair and pair[0].cell[0] != pair[1].cell[0]:
            above, below = sorted(pair, key=lambda item: item.cell[0])
            asked.append(self._compare(ABOVE, above, below, "order"))
            asked.append(self._compare(BELOW, below, above, "order"))
        return asked

    def size(self) -> list[Question]:
        pair = self._two_singles()
        if not pair:
            return []
        small, big = sorted(pair, key=lambda item: item.box[2])
        if small.box[2] * 1.45 > big.box[2]:
            return []
        return [self._compare(SIZE, big, small, "size")]

    def absent(self) -> list[Question]:
        kind = self.rng.choice(self.missing)
        phrasings = self.rng.choice((COLOUR, WHERE))
        return [self._ask("absent", phrasings, f"There is no {kind}.", kind)]

    def unknown(self) -> list[Question]:
        return [self._ask("unknown", UNKNOWN, CANNOT_TELL)]

    def all(self) -> list[Question]:
        """Every question that this picture allows, in random order."""
        makers = (
            self.caption, self.colour, self.count, self.where, self.presence, self.text,
            self.order, self.size, self.absent, self.unknown,
        )  # fmt: skip
        asked = [question for make in makers for question in make()]
        self.rng.shuffle(asked)
        return asked


def ask_pair(rng: Random, change: str) -> list[Question]:
    """The questions about two pictures that differ in `change` ("" for not at all)."""
    same = "No, they are different." if change else "Yes, they are the same."
    asked = [
        Question("same", rng.choice(SAME), same),
        Question("change", rng.choice(CHANGE), CHANGE_ANSWERS[change]),
    ]
    rng.shuffle(asked)
    return asked


def ask_talk(rng: Random) -> list[Question]:
    """Small talk without a picture."""
    answers = rng.sample(tuple(TALK), 4)
    return [Question("talk", rng.choice(TALK[answer]), answer) for answer in answers]
