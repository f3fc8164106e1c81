"""Where an answer looked: what is computed of it, and what is shown."""

import json
import re

import numpy as np
import pytest
from PIL import Image as PILImage

import mmchat
from mmchat.conversation import Message, Text
from mmchat.engine.engine import Engine
from mmchat.engine.events import Finished
from mmchat.engine.sampling import SamplingParams
from mmchat.errors import UsageError
from mmchat.evals.scenes import heldout_scenes
from mmchat.evals.scenes.questions import caption
from mmchat.explain.draw import draw_look, lit
from mmchat.explain.look import Look, Word, look, look_request, looked
from mmchat.explain.show import look_page, look_record, look_rows, rendered
from mmchat.images import load_image
from mmchat.nn.norm import RMSNorm

QUESTION = "What's in this image?"
SLOW_SCENES = 200


@pytest.fixture(scope="module")
def tiny():
    return mmchat.load("tiny", dtype="float32")


@pytest.fixture(scope="module")
def dog():
    return load_image("assets/dog.jpg")


@pytest.fixture(scope="module")
def found(tiny, dog):
    session = tiny.chat()
    [*_, end] = session.send(QUESTION, [dog])
    assert isinstance(end, Finished)
    return session.look()


def said(*content):
    return Message("user", [Text(part) if isinstance(part, str) else part for part in content])


def asked(tiny, *content):
    return tiny.processor.chat([said(*content)])


def test_every_word_has_its_place_in_the_answer(found):
    assert [word.text for word in found.words] == found.answer.split()
    assert all(found.answer[word.start : word.end] == word.text for word in found.words)


def test_shares_are_parts_of_one_reading(found):
    for word in found.words:
        [shares] = word.shares
        assert shares.shape == found.grids[0]
        assert 0.5 < shares.sum() <= 1 + 1e-6  # the rest went to class tokens and padding
        [heat] = found.heat(word)
        assert heat.min() >= 0
        assert heat.max() == 1


def test_all_that_a_position_reads_sums_to_one(tiny, dog):
    request = look_request(tiny, asked(tiny, dog, QUESTION), "A brown dog.")
    answer = tiny.engine.submit(request)
    while not answer.is_over:
        tiny.engine.step()
    first = request.watch.first
    assert sorted(request.watch.read) == list(range(first, len(request.prompt.token_ids)))
    for _, shares in request.watch.read.values():
        assert float(shares.sum()) == pytest.approx(1, abs=1e-5)


def test_a_look_changes_nothing_that_is_said_later(tiny, dog):
    def talk(*, looks):
        session = tiny.chat()
        [*_, first] = session.send(QUESTION, [dog])
        if looks:
            session.look()
        [*_, second] = session.send("What colour is it?")
        return first.output_ids, second.output_ids, second.prompt_ids

    assert talk(looks=True) == talk(looks=False)


def same(left: Look, right: Look) -> bool:
    pairs = zip(left.words, right.words, strict=True)
    return all(
        a.text == b.text
        and [s is None for s in a.shares] == [s is None for s in b.shares]
        and all(
            np.allclose(x, y, atol=1e-5)
            for x, y in zip(a.shares, b.shares, strict=True)
            if x is not None
        )
        for a, b in pairs
    )


def test_neighbours_and_pieces_change_nothing(tiny, dog, monkeypatch):
    prompt = asked(tiny, dog, QUESTION)
    alone = look(tiny, prompt, [dog], "A brown dog, I think.")
    monkeypatch.setattr("mmchat.engine.reading.PIECE", 5)
    engine = Engine(tiny, rows=3)
    request = look_request(tiny, prompt, "A brown dog, I think.")
    params = SamplingParams(temperature=0.0, max_new_tokens=8)
    others = [tiny.request(asked(tiny, dog, text), params) for text in ("Is it red?", "Hello!")]
    answers = [engine.submit(one) for one in (others[0], request, others[1])]
    while not all(answer.is_over for answer in answers):
        engine.step()
    assert all(answer.error is None for answer in answers)
    assert same(looked(tiny, [dog], "A brown dog, I think.", request), alone)


def test_two_at_once_each_have_their_own(tiny, dog):
    cat = load_image(PILImage.new("RGB", (150, 90), "navy"))
    pairs = [(dog, "A brown dog."), (cat, "A cat and more.")]
    engine = Engine(tiny, rows=2)
    requests = [look_request(tiny, asked(tiny, image, QUESTION), text) for image, text in pairs]
    answers = [engine.submit(request) for request in requests]
    while not all(answer.is_over for answer in answers):
        engine.step()
    for (image, text), request in zip(pairs, requests, strict=True):
        alone = look(tiny, asked(tiny, image, QUESTION), [image], text)
        assert same(looked(tiny, [image], text, request), alone)


def test_a_forward_that_runs_again_counts_once(tiny, dog, monkeypatch):
    prompt = asked(tiny, dog, QUESTION)
    alone = look(tiny, prompt, [dog], "A brown dog.")
    failed = []
    real = RMSNorm.forward

    def once_short(norm, x):
        if norm is last and not failed:  # behind all layers
            failed.append(norm)
            raise MemoryError
        return real(norm, x)

    last = tiny.runtime.model.language_model.model.norm
    monkeypatch.setattr(RMSNorm, "forward", once_short)
    engine = Engine(tiny)
    request = look_request(tiny, prompt, "A brown dog.")
    answer = engine.submit(request)
    while not answer.is_over:
        engine.step()
    assert failed
    assert answer.error is None
    assert same(looked(tiny, [dog], "A brown dog.", request), alone)


def test_each_word_reads_the_pictures_that_it_sees(tiny, dog):
    plain = load_image(PILImage.new("RGB", (260, 90), "white"))
    together = look(tiny, asked(tiny, dog, plain, "What changed?"), [dog, plain], "The colour.")
    for word in together.words:
        assert all(shares is not None for shares in word.shares)
        assert sum(shares.sum() for shares in word.shares) <= 1 + 1e-6
        assert max(heat.max() for heat in together.heat(word)) == 1
    messages = [
        said(dog, QUESTION),
        Message("assistant", "A dog."),
        said(plain, "And here?"),
    ]
    apart = look(tiny, tiny.processor.chat(messages), [dog, plain], "Nothing.")
    assert [shares is not None for shares in apart.words[0].shares] == [False, True]
    assert apart.heat(apart.words[0])[0] is None
    assert look_rows(apart, None)[0][1].endswith("of picture 2")


def test_the_same_picture_twice_is_two_pictures(tiny, dog):
    twice = look(tiny, asked(tiny, dog, dog, "What changed?"), [dog, dog], "Nothing.")
    first, second = twice.words[0].shares
    assert np.allclose(first, second, atol=1e-6)


def test_words_of_several_bytes_and_tokens(tiny, dog):
    answer = "  Ein süßer\n\nHund 🐶, ja!"
    found = look(tiny, asked(tiny, dog, QUESTION), [dog], answer)
    assert [word.text for word in found.words] == ["Ein", "süßer", "Hund", "🐶,", "ja!"]
    assert all(word.shares[0] is not None for word in found.words)


def test_a_word_is_found_by_its_text_and_by_its_number(found):
    last = found.words[-1]
    assert found.find("DOG") is last
    assert found.find(str(len(found.words))) is last
    with pytest.raises(UsageError, match=r"'cow' is no word of the answer; its words are: 1 A"):
        found.find("cow")


@pytest.mark.parametrize(
    ("content", "answer", "reason"),
    [
        ((QUESTION,), "A dog.", "no picture"),
        (("dog", QUESTION), " \n", "no words"),
    ],
)
def test_what_cannot_be_looked_at_is_refused(tiny, dog, content, answer, reason):
    parts = [dog if part == "dog" else part for part in content]
    with pytest.raises(UsageError, match=reason):
        look(tiny, asked(tiny, *parts), [], answer)


@pytest.mark.parametrize("shape", [(100, 100), (80, 210), (230, 90), (90, 330)])
def test_a_place_lights_up_where_it_is(shape):
    height, width = shape
    image = PILImage.new("RGB", (width, height), (200, 200, 200))
    heat = np.zeros((4, 9))
    heat[2, 7] = 1
    cell = (height / 3.7, width / 8.6)  # the last cells reach over the edge
    reach = 4 * cell[0] / height, 9 * cell[1] / width
    drawn = np.asarray(lit(image, heat, reach), dtype=float).sum(-1)
    assert drawn.shape == shape
    row, column = np.unravel_index(drawn.argmax(), drawn.shape)
    assert abs(row - 2.5 * cell[0]) < cell[0] / 2
    assert abs(column - 7.5 * cell[1]) < cell[1] / 2
    assert lit(image, None).getextrema() == ((50, 50),) * 3


def made(answer="A dog <b>&\n</script> end", source="x\n<img>.png", size=(30, 20), pictures=1):
    picture = mmchat.Image(PILImage.new("RGB", size, "white"), source, "0" * 64)
    words = tuple(
        Word(
            m[0],
            m.start(),
            m.end(),
            (np.full((2, 3), 0.1),) * pictures,
        )
        for m in re.finditer(r"\S+", answer)
    )
    cell = (size[1] / 2, size[0] / 3)
    return Look(answer, (picture,) * pictures, ((2, 3),) * pictures, (cell,) * pictures, words)


def test_a_spot_too_small_to_be_seen_leaves_what_is_read_beside_it():
    """Of the 80 x 80 patches of a large picture; where there are few, each is itself."""
    shares = np.full((80, 80), 1e-6)
    shares[40:60, 10:30] = 0.001
    shares[5, 70] = 0.005
    picture = mmchat.Image(PILImage.new("RGB", (80, 80)), "p", "0" * 64)
    words = tuple(Word(t, 0, 1, (s,)) for t, s in (("a", shares), ("b", shares * 0)))
    [heat] = Look("a b", (picture,), ((80, 80),), ((1.0, 1.0),), words).heat(words[0])
    assert heat[50, 20] > 0.6
    assert heat[0, 0] < 0.01
    few = np.random.default_rng(0).random((8, 8))
    words = (Word("a", 0, 1, (few,)),)
    [heat] = Look("a", (picture,), ((8, 8),), ((10.0, 10.0),), words).heat(words[0])
    assert np.allclose(heat, few / few.max(), atol=0.01)


def test_a_page_holds_all_it_needs_and_runs_no_text():
    page = look_page(made(), "<i>$what?", "tiny")
    assert not re.search(r"""(src|href)=(?!"data:)|url\(|import|fetch""", page)
    assert page.count("</script>") == 1
    assert "&lt;i&gt;$what?" in page
    assert "<b>" not in page
    assert "<img>" not in page
    data = json.loads(re.search(r"const look = (.*);\n", page)[1])
    assert data["grids"] == [[2, 3, [1.0, 1.0]]]
    assert data["words"][0] == [[99] * 6]


def test_the_pictures_of_an_answer_fit_a_screen(found):
    assert max(draw_look(found).size) < 2000
    assert max(draw_look(found, found.words[0]).size) < 1200
    assert rendered(".png", found, None, QUESTION, "tiny").startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.parametrize("size", [(30, 20), (9, 4000), (5000, 9), (6000, 5000)])
def test_many_words_and_pictures_make_no_huge_picture(size, monkeypatch):
    """And none is lit at its own size, which takes gigabytes."""
    lit_at = []
    real = lit
    monkeypatch.setattr(
        "mmchat.explain.draw.lit", lambda one, *rest: lit_at.append(one.size) or real(one, *rest)
    )
    for pictures in (1, 3, 16):
        many = made("word " * 30 + "x" * 3000, size=size, pictures=pictures)
        assert max(draw_look(many).size) < 5200
        assert max(draw_look(many, many.words[-1]).size) < 2000
    assert max(map(max, lit_at)) <= 2 * 760


def test_words_that_are_not_drawn_are_said(monkeypatch):
    said = []
    monkeypatch.setattr(
        "mmchat.explain.draw.draw_title", lambda draw, name, lines, width: said.append(lines[1])
    )
    draw_look(made("word " * 30))
    draw_look(made("word " * 24))
    assert said[0].startswith("the first 24 of 30 words; brighter where")
    assert said[1].startswith("brighter where")


def test_a_label_is_not_cut_by_a_narrow_picture():
    sheet = np.asarray(draw_look(made("i" * 4 + "M" * 5, size=(4, 400))))
    labels = sheet[132:164, 28:].min(-1) < 200
    columns = np.flatnonzero(labels.any(0))
    assert columns.max() > 168 + 60  # the second column: the word goes on beside its picture


def test_json_says_what_was_read(found):
    record = json.loads(json.dumps(look_record(found)))
    assert record["pictures"][0]["grid"] == list(found.grids[0])
    [first, *_] = record["words"]
    assert first["text"] == "A"
    assert np.array(first["pictures"][0]["heat"]).shape == found.grids[0]
    assert 0.5 < first["pictures"][0]["share"] <= 1


@pytest.mark.slow
def test_the_word_of_an_object_reads_the_object(tiny):
    """The brightest place lies inside the box that the object was drawn in."""
    scenes = (
        s for s in heldout_scenes(10_000) if s.kind == "objects" and len(s.views[0].items) == 1
    )
    right = 0
    for scene, _ in zip(scenes, range(SLOW_SCENES), strict=False):
        [item] = scene.views[0].items
        image = load_image(scene.pictures[0])
        prompt = asked(tiny, image, "What is in the picture?")
        found = look(tiny, prompt, [image], caption(scene.views[0]))
        [heat] = found.heat(found.find(item.kind))
        row, column = np.unravel_index(heat.argmax(), heat.shape)
        y, x = (row + 0.5) * found.cells[0][0], (column + 0.5) * found.cells[0][1]
        left, top, width, height = item.box
        right += left <= x <= left + width and top <= y <= top + height
    assert right >= 0.8 * SLOW_SCENES, f"{right} of {SLOW_SCENES}"
