"""The drawn world: seeds, pictures, and answers that follow from what is drawn."""

from collections import Counter

import pytest

from assets.tiny.textures import LEARNT
from mmchat.evals.scenes import QUESTION_TYPES, SCENE_KINDS, heldout_scenes, make_scene
from mmchat.evals.scenes.questions import caption
from mmchat.evals.scenes.textures import HELDOUT, draw_texture
from mmchat.evals.scenes.world import CANVAS_SIDES, COLOURS, KINDS, SHAPES, THINGS, Item, View
from mmchat.models.mllama.tiling import choose_layout


def item(kind, colour="red", cell=(1, 1), text=""):
    return Item(kind, colour, cell, (10, 10, 30, 30), text=text)


def view(*items):
    return View(100, 100, (255, 255, 255), items)


def scenes(kind, count=60, **options):
    return [make_scene(seed, kind=kind, **options) for seed in range(count)]


def test_a_seed_always_gives_the_same_scene():
    first, second = make_scene(7), make_scene(7)
    assert first.views == second.views
    assert first.questions == second.questions
    assert [p.tobytes() for p in first.pictures] == [p.tobytes() for p in second.pictures]


def test_the_splits_share_no_scene():
    train = {(s.views, s.questions) for s in (make_scene(n, "train") for n in range(300))}
    heldout = {(s.views, s.questions) for s in (make_scene(n, "heldout") for n in range(300))}
    pictures = {views for views, _ in train if views}
    assert not pictures & {views for views, _ in heldout if views}


def test_the_world_is_as_large_as_promised():
    assert len(SHAPES) >= 6
    assert len(COLOURS) >= 8
    assert set(THINGS) >= {"dog", "cat", "fish", "house", "tree", "car", "sun", "flower"}


@pytest.mark.parametrize("canvas", list(CANVAS_SIDES))
def test_a_picture_fills_the_canvas_it_was_made_for(canvas):
    for seed in range(40):
        scene = make_scene(seed, kind="objects", canvas=canvas)
        (picture,) = scene.pictures
        layout = choose_layout(picture.height, picture.width, 112, 4)
        assert layout.aspect_ratio == canvas


def test_pictures_are_rgb_and_of_the_described_size():
    for kind in SCENE_KINDS:
        scene = make_scene(3, kind=kind)
        sizes = [(picture.mode, picture.height, picture.width) for picture in scene.pictures]
        assert sizes == [("RGB", each.height, each.width) for each in scene.views]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_drawn_in_its_colour(kind):
    from mmchat.evals.scenes.draw import draw_view

    picture = draw_view(view(item(kind, "purple")))
    colours = {colour: count for count, colour in picture.getcolors(10000) or ()}
    assert colours[COLOURS["purple"]] > 50


def test_items_lie_inside_the_picture():
    for kind in ("objects", "count"):
        for scene in scenes(kind):
            for each in scene.views[0].items:
                left, top, width, height = each.box
                assert left >= 0
                assert top >= 0
                assert left + width <= scene.views[0].width
                assert top + height <= scene.views[0].height


def test_a_caption_names_everything_in_reading_order():
    picture = view(
        item("dog", "brown", (2, 0)), item("star", "orange", (0, 1)), item("word", text="STOP")
    )
    assert caption(picture) == "A brown dog, an orange star and the word STOP."


def test_a_caption_counts_equal_things():
    picture = view(item("fish"), item("fish"), item("fish"), item("cross", "blue"))
    assert caption(picture) == "Three red fish and a blue cross."


def test_items_are_listed_left_to_right_then_top_to_bottom():
    for scene in scenes("objects"):
        cells = [each.cell[::-1] for each in scene.views[0].items]
        assert cells == sorted(cells)


def test_things_that_are_asked_about_are_unique():
    for scene in scenes("objects"):
        kinds = Counter(each.kind for each in scene.views[0].items)
        assert max(kinds.values()) == 1


def test_a_question_has_one_answer_within_a_scene():
    for kind in ("objects", "count", "text", "pair"):
        for scene in scenes(kind):
            answers = {}
            for question in scene.questions:
                key = (question.earlier, question.text)
                assert answers.setdefault(key, question.answer) == question.answer


def test_nothing_is_said_about_what_is_missing():
    for scene in scenes("objects"):
        drawn = {each.kind for each in scene.views[0].items}
        for question in scene.questions:
            if question.type == "absent":
                kind = question.answer.removeprefix("There is no ").removesuffix(".")
                assert kind in set(KINDS) - drawn


def test_the_two_pictures_of_a_pair_differ_as_the_answer_says():
    for scene in scenes("pair"):
        first, second = (each.items[0] for each in scene.views)
        change = next(q.answer for q in scene.questions if q.type == "change")
        expected = {
            "Nothing changed.": (True, True, True),
            "The colour changed.": (True, False, True),
            "The position changed.": (True, True, False),
            "The object changed.": (False, True, True),
        }[change]
        same = (first.kind == second.kind, first.colour == second.colour)
        assert (*same, first.cell == second.cell) == expected


def test_level_zero_has_one_object():
    assert all(len(scene.views[0].items) == 1 for scene in scenes("objects", level=0))


def test_heldout_scenes_ask_every_type_equally_often():
    asked = Counter(scene.questions[0].type for scene in heldout_scenes(3 * len(QUESTION_TYPES)))
    assert asked == dict.fromkeys(QUESTION_TYPES, 3)


def test_heldout_scenes_are_all_different_and_have_one_question():
    found = list(heldout_scenes(40))
    assert len({scene.seed for scene in found}) == 40
    assert all(len(scene.questions) == 1 for scene in found)


def test_pairs_are_drawn_on_more_than_one_tile():
    canvases = Counter(scene.canvas for scene in scenes("pair", 100))
    assert set(canvases) == {(1, 1), (1, 2), (2, 1), (2, 2)}
    assert canvases[1, 1] > 40
    for scene in scenes("pair", 30):
        for picture in scene.pictures:
            layout = choose_layout(picture.height, picture.width, 112, 4)
            assert layout.aspect_ratio == scene.canvas


def test_a_follow_up_asks_about_the_thing_of_the_question_before():
    follows = [q for s in scenes("objects") for q in s.questions if q.type == "follow"]
    assert len(follows) > 60
    for question in follows:
        (first,) = question.earlier
        assert not first.earlier
        if first.type == "presence":
            assert first.answer.startswith("Yes")
        assert question.answer != first.answer or question.text.startswith("And")


def test_it_is_asked_only_of_a_thing_that_stands_alone():
    seen = 0
    for scene in scenes("objects", wording="rich"):
        asked = {q.text for q in scene.questions if not q.earlier}
        its = asked & {"What colour is it?", "Where is it?", "What color is it?"}
        assert not its or len(scene.views[0].items) == 1
        seen += bool(its)
    assert seen


@pytest.mark.parametrize("name", [*LEARNT, *HELDOUT])
def test_a_texture_is_the_same_every_time_and_of_its_size(name):
    first, second = (draw_texture(name, 5, 61, 83) for _ in range(2))
    assert (first.mode, first.size) == ("RGB", (83, 61))
    assert first.tobytes() == second.tobytes()
    assert name == "blank" or draw_texture(name, 6, 61, 83).tobytes() != first.tobytes()


def test_no_texture_of_training_is_held_out():
    assert not set(LEARNT) & set(HELDOUT)
    for given, names in (({}, HELDOUT), ({"textures": tuple(LEARNT)}, LEARNT)):
        scenes_ = [make_scene(seed, kind="outside", **given) for seed in range(40)]
        drawn = [scene.views[0].texture for scene in scenes_]
        assert {texture[0] for texture in drawn if texture} <= set(names)
        assert all(drawn)
    answers = {q.answer for s in scenes("outside") for q in s.questions}
    assert answers == {"I only know simple drawings."}
