"""What the words behind `generate` and `chat` are: a model, the question, pictures."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from mmchat.errors import ParamsError, UsageError, quoted

MISTYPED = 0.7  # from here on a word is the name of a model with a slip in it
WEIGHTS = (".safetensors", ".pth", ".pt", ".pt2", ".pte", ".gguf")
_PATH = re.compile(r"(\.{0,2}|~[\w-]*)/")
_NAMED_LIKE_A_MODEL = re.compile(r"(?=.*[A-Za-z])(?=.*\d)(?=.*[:._-])\S+|\S+:\S+")
_ENDING = re.compile(r"[^\s.]\.([A-Za-z]\w{1,4})")
_MOST_WORDS_IN_NAME = 3  # of a picture that is not there; more of them are a question

# A known model or a folder may be a word of the question too; a "word" may be anything.
Kind = Literal["model", "known", "folder", "picture", "text", "word"]


@dataclass(frozen=True)
class Said:
    """model and question: None if there is none. notes: where a word could mean something else."""

    model: str | None = None
    question: str | None = None
    pictures: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def sort_words(words: Sequence[str], *, has_prompt: bool = False) -> Said:
    """Tell MODEL, QUESTION and PICTUREs apart.

    A word that names a known model or a folder is the model, if it comes first or beside a question
    in quotes; what is a file, or is named like one, is a picture; all else is the question. A
    picture that is missing stays one, so that its error says so. has_prompt: the question is given
    otherwise. Raises UsageError for two models or two questions, ParamsError for a mistyped model.
    """
    models: list[str] = []
    texts: list[str] = []
    pictures: list[str] = []
    notes: list[str] = []
    kinds: dict[str, Kind] = {}
    for word in words:
        kind, is_first = kind_of(word), not models and not texts
        kinds[word] = kind
        if kind == "word" and is_first:
            kind = _first_of_unknown(word)
        is_model = kind == "model" or (is_first and kind in ("known", "folder"))
        if kind == "picture":
            pictures.append(word)
        elif is_model or (has_prompt and not _is_sentence(word)):
            models.append(word)
        else:
            texts.append(word)
    behind = [word for word in texts if kinds[word] in ("known", "folder")]
    is_quoted = all(_is_sentence(text) for text in texts if text not in behind)
    for word in behind:
        if is_quoted:
            texts.remove(word)
            models.append(word)
        elif kinds[word] == "known":
            notes.append(f"{quoted(word)} is taken as a word of the question; -m {word} takes")
            notes[-1] += " the model"
    return _said(models, texts, pictures, notes, has_prompt)


def _said(
    models: list[str], texts: list[str], pictures: list[str], notes: list[str], has_prompt: bool
) -> Said:
    if len(models) > 1:
        both = " and ".join(map(quoted, models[:2]))
        raise UsageError(f"{both} are two models; give one, and a question in quotes")
    question = " ".join(texts) or None
    if question and has_prompt:
        raise UsageError(f"{quoted(question)} and --prompt are two questions; give one of them")
    for model in models:
        if is_known(model) and os.path.exists(model):  # noqa: PTH110 - raises nothing
            notes.append(f"{quoted(model)} is taken as the model; ./{model} is what lies here")
    if len(texts) == 1 and not _is_sentence(texts[0]):
        notes.append(f"{quoted(texts[0])} is no model and no picture; taken as the question")
    elif len(texts) > 1 and any(map(_is_sentence, texts)):  # not a question without quotes
        notes.append(f"{' '.join(map(quoted, texts))} are taken as one question")
    return Said(models[0] if models else None, question, tuple(pictures), tuple(notes))


def kind_of(word: str) -> Kind:
    """What a word is by itself. Raises UsageError if it is empty."""
    from mmchat.repl.paths import existing, looks_like_picture

    if not word.strip():
        raise UsageError("an argument is empty; leave it out, or write the question there")
    if word == "-" or _is_address(word):
        return "picture"
    if is_known(word):
        return "known"
    if os.path.isdir(os.path.expanduser(word)):  # noqa: PTH111, PTH112 - raise nothing
        if looks_like_picture(word):
            return "picture"
        return "model" if _PATH.match(word) else "folder"
    if file := existing(word):
        if word.lower().endswith(WEIGHTS):
            return "model"
        from mmchat.images.sources import holds_picture

        return "picture" if "." in word or "/" in word or holds_picture(file) else "text"
    if _is_sentence(word):
        return "picture" if looks_like_picture(word) and not _is_about_picture(word) else "text"
    if looks_like_picture(word) or _ends_nearly_like_picture(word):
        return "picture"
    if _PATH.match(word) or word.lower().endswith(WEIGHTS):
        return "model"
    return "word"


def _first_of_unknown(word: str) -> Kind:
    """Raises ParamsError for a mistyped model."""
    from mmchat.checkpoints.hub_cache import is_repo_id

    if is_repo_id(word):
        return "model"
    if near := mistyped(word):
        nearest = f"nearest: {', '.join(map(quoted, near))}; " if near != [""] else ""
        raise ParamsError(
            f"no model {quoted(word)} ({nearest}'mmchat list' shows all, or give a path);"
            " a question of one word goes behind --prompt"
        )
    return "text"


def mistyped(word: str) -> list[str]:
    """The names of models that a word was meant for; [""] if it is named like a model of others."""
    from mmchat.catalog.known import known_specs, nearest_names
    from mmchat.spelling import closest

    if re.search(r"\s|\?$", word):
        return []
    names = [name for spec in known_specs() for name in (spec.name, *spec.aliases)]
    begun = len(word) > 3 and any(n.casefold().startswith(word.casefold()) for n in names)
    letters = sorted(word.casefold())  # of which two may have changed their places
    swapped = any(sorted(name.casefold()) == letters for name in names)
    if begun or swapped or closest(word, names, cutoff=MISTYPED):
        return nearest_names(word)
    return (nearest_names(word) or [""]) if _NAMED_LIKE_A_MODEL.fullmatch(word) else []


def is_known(word: str) -> bool:
    """Whether a word is the name, alias or repository of a model that mmchat knows or has kept."""
    from mmchat.catalog.kept import kept_by
    from mmchat.catalog.known import find_spec

    return find_spec(word) is not None or kept_by(word) is not None


def _is_sentence(word: str) -> bool:
    return bool(re.search(r"\s|\?$", word.strip()))


def _is_address(word: str) -> bool:
    return bool(re.match(r"(?i)(https?|file)://|data:", word))


def _is_about_picture(sentence: str) -> bool:
    """Whether a text that ends like a picture asks about it, and is not the name of one."""
    from mmchat.repl.paths import existing

    words = sentence.split()
    return len(words) > _MOST_WORDS_IN_NAME or existing(words[-1]) is not None


def _ends_nearly_like_picture(word: str) -> bool:
    """`dog.jgp`: a file name that ends in a picture's ending with a slip."""
    from mmchat.spelling import closest
    from mmchat.words import PICTURE_ENDINGS

    ending = re.search(_ENDING.pattern + "$", word)
    return bool(ending and closest(ending[1], PICTURE_ENDINGS, cutoff=0.6))
