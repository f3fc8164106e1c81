"""People's own words: many for training, some that training never sees."""

import re
from random import Random
from typing import get_args

import pytest

from assets.tiny.loosen import held_out, loosen, names_aside
from mmchat.evals.scenes import QUESTION_TYPES, SCENE_KINDS, heldout_scenes, make_scene
from mmchat.evals.scenes.phrasings import Wording, choose, phrasings, readings

# Kinds of phrasings that the questions of a type use, where they are not named like it.
KINDS_OF_TYPE = {
    "absent": ("colour", "where"),
    "order": ("left", "right", "above", "below"),
    "follow": ("and", "colour it", "where it", "colour they"),
    "talk": ("talk hello", "talk who", "talk thanks", "talk can", "talk fine", "talk bye"),
    "outside": ("caption", "count"),
}


def bare(text: str) -> str:
    """The words alone: no capitals, no punctuation."""
    return " ".join(re.findall(r"[a-z{}0-9']+", text.lower()))


def test_a_pattern_stands_for_all_its_readings():
    found = readings(("(Show|Tell) me (the|) dog( (please|now)|).",))
    assert len(found) == 12
    assert {"Show me the dog please.", "Tell me dog now.", "Tell me dog."} < set(found)


def test_no_held_out_phrasing_is_ever_trained_on():
    trained = {
        bare(reading)
        for wording in ("plain", "rich")
        for patterns in phrasings(wording).values()
        for reading in readings(patterns)
    }
    assert len(trained) > 5000
    unseen = {bare(text) for texts in phrasings("unseen").values() for text in texts}
    assert not unseen & trained


@pytest.mark.parametrize("type_", QUESTION_TYPES)
def test_every_type_has_twenty_held_out_phrasings(type_):
    unseen = phrasings("unseen")
    texts = [text for key in KINDS_OF_TYPE.get(type_, (type_,)) for text in unseen[key]]
    assert len(set(texts)) >= 20 - (type_ == "follow") * 3


def test_every_kind_of_question_has_words_of_its_own_in_each_list():
    plain, rich, unseen = (set(phrasings(w)) for w in ("plain", "rich", "unseen"))
    assert plain <= unseen
    assert rich == unseen


def test_questions_in_all_wordings_name_what_they_ask_about():
    for wording in get_args(Wording):
        for kind in SCENE_KINDS:
            for seed in range(30):
                for question in make_scene(seed, kind=kind, wording=wording).questions:
                    for each in (*question.earlier, question):
                        assert "{" not in each.text
                        assert "|" not in each.text
                        assert "  " not in each.text


def test_the_wording_changes_neither_pictures_nor_types():
    for plain, unseen in zip(heldout_scenes(45), heldout_scenes(45, wording="unseen"), strict=True):
        assert plain.questions[0].type == unseen.questions[0].type
        assert plain.kind == unseen.kind
    first, second = (make_scene(3, kind="objects", wording=w) for w in ("plain", "unseen"))
    assert first.views == second.views


def test_the_other_end_of_a_line_is_asked_in_the_same_words():
    assert "Is the {} or the {} further right?" in readings(phrasings("rich")["right"])
    assert "Is the {} or the {} lower down?" in readings(phrasings("rich")["below"])


def test_loosened_words_keep_what_is_asked_about():
    rng = Random(1)
    changed = kept = words = 0
    for _ in range(300):
        text = choose(rng, "colour", "rich").format("dog")
        loose = loosen(rng, text)
        changed += loose != text
        kept += len(set(bare(text).split()) & set(bare(loose).split()))
        words += len(set(bare(text).split()))
        assert "dog" in loose.lower()
    assert 150 < changed < 275
    assert kept > 0.8 * words


def test_loosening_never_ends_in_held_out_words():
    rng = Random(2)
    unseen = {bare(text) for texts in phrasings("unseen").values() for text in texts}
    for key in phrasings("rich"):
        for _ in range(100):
            assert bare(loosen(rng, choose(rng, key, "rich"))) not in unseen


def test_names_and_articles_do_not_hide_held_out_words():
    assert names_aside("Is there a red STAR?") == names_aside("is there {0}")
    assert names_aside("How many foxes?") != names_aside("How many {}?")
    for seed in range(30):
        for question in make_scene(seed, kind="objects", wording="unseen").questions:
            assert names_aside(question.text) in held_out()
