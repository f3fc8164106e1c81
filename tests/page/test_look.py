"""Where an answer looked: what lights up, by mouse, by touch and by keyboard."""

from __future__ import annotations

import pytest
from playwright.sync_api import expect

from tests.page.conftest import PHONE

pytestmark = pytest.mark.process

# How dark each of 4 x 4 places of a picture is made, row by row; None where nothing lies over it.
DARK = """canvas => {
  if (canvas.hidden) return null;
  const pen = canvas.getContext("2d");
  const at = (n) => [canvas.width, canvas.height].map((side, i) =>
    Math.floor(side * ((i ? Math.floor(n / 4) : n % 4) + 0.5) / 4));
  return [...Array(16).keys()].map((n) => pen.getImageData(...at(n), 1, 1).data[3]);
}"""


@pytest.fixture
def looked(visit):
    """A question about a picture, and its answer looked into."""
    visit.server.answers = ["A *brown* dog."]
    visit.pick("dog.jpg")
    visit.ask("What is this?")
    visit.button("Where did it look?").click()
    visit.page.locator(".word.lit").wait_for()
    return visit


def lit(visit, nth: int = 0) -> int | None:
    dark = visit.page.locator(".look canvas").nth(nth).evaluate(DARK)
    return None if dark is None else dark.index(min(dark))


def test_a_word_under_the_pointer_lights_its_place(looked, screenshot):
    words = looked.page.locator(".word")
    expect(words).to_have_text(["A", "brown", "dog."], use_inner_text=True)
    assert not looked.answers.locator(".prose").is_visible()
    words.nth(2).hover()
    assert lit(looked) == 2
    screenshot(looked, "look")
    assert looked.page.locator(".look-said").inner_text() == "“dog” read most at the top"
    words.nth(1).click()
    looked.page.mouse.move(0, 0)
    assert lit(looked) == 1  # held
    assert words.nth(1).get_attribute("aria-pressed") == "true"
    assert "not why it said so" in looked.page.locator(".look").inner_text()
    asked = looked.server.bodies[-1]
    assert asked == {"messages": looked.server.bodies[-2]["messages"], "answer": "A *brown* dog."}
    looked.button("Back to the answer").click()
    assert looked.answers.locator(".prose em").inner_text() == "brown"
    looked.button("Where did it look?").click()
    looked.page.locator(".word.lit").wait_for()
    assert len(looked.server.bodies) == 2  # it is known


def test_the_picture_of_an_earlier_answer_covers_nothing(looked):
    looked.server.answers = ["A line.\n\n" * 60]
    looked.ask("And else?")
    note = looked.page.locator(".look-note")
    at_top = note.evaluate("""e => {
      e.scrollIntoView({ block: "start" });
      const { left, top } = e.getBoundingClientRect();
      return e === document.elementFromPoint(left + 5, top + 5);
    }""")
    assert at_top


def test_by_keyboard(looked):
    keys = looked.page.keyboard
    assert lit(looked) == 0  # the first word has the focus
    keys.press("ArrowRight")
    assert lit(looked) == 1
    keys.press("ArrowLeft")
    keys.press("ArrowLeft")
    assert lit(looked) == 2
    keys.press("Home")
    keys.press("Enter")
    assert looked.page.locator(".word[aria-pressed=true]").inner_text() == "A"
    keys.press("Escape")
    expect(looked.page.locator(".look")).to_have_count(0)
    button = looked.button("Where did it look?")
    assert button.evaluate("e => e === document.activeElement")
    assert button.get_attribute("aria-expanded") == "false"


def test_by_touch_on_a_narrow_phone(new_visit, screenshot):
    visit = new_visit(**PHONE | {"viewport": {"width": 360, "height": 740}}).open()
    visit.pick("dog.jpg", "street.jpg")
    visit.box.fill("What is this?")
    visit.button("Send").click()
    visit.button("Where did it look?").tap()
    visit.page.locator(".word").get_by_text("brown").tap()
    assert lit(visit) == 1
    dark = visit.page.locator(".look canvas").nth(1).evaluate(DARK)
    assert min(dark) == max(dark) > 150  # it saw nothing of this one
    assert "of dog.jpg" in visit.page.locator(".look-said").inner_text()
    assert visit.page.evaluate("document.documentElement.scrollWidth") == 360
    screenshot(visit, "look-phone")


def test_it_is_offered_where_there_is_something_to_tell(visit):
    visit.ask("Hello")
    expect(visit.button("Where did it look?")).to_have_count(0)
    visit.pick("dog.jpg")
    visit.ask("What is this?")
    visit.ask("And its colour?")
    expect(visit.button("Where did it look?")).to_have_count(2)
    visit.server.heat = False
    visit.page.reload()
    visit.ready()
    expect(visit.answers).to_have_count(3)
    expect(visit.button("Where did it look?")).to_have_count(0)


def test_offsets_count_characters_as_the_server_does(visit):
    visit.server.answers = ["\N{DOG FACE}\N{DOG FACE} a dog"]
    visit.pick("dog.jpg")
    visit.ask("What is this?")
    visit.button("Where did it look?").click()
    words = visit.page.locator(".words")
    words.wait_for()
    assert words.inner_text() == "\N{DOG FACE}\N{DOG FACE} a dog"


def test_what_goes_wrong_is_said_and_it_can_be_stopped(visit):
    visit.pick("dog.jpg")
    visit.ask("What is this?")
    visit.server.error = (503, "overloaded", "too much data waits already; try again")
    visit.button("Where did it look?").click()
    visit.page.locator("#toasts").get_by_text("too much data waits already").wait_for()
    visit.server.error, visit.server.pause = None, 5
    visit.button("Where did it look?").click()
    visit.button("Looking").click()
    visit.button("Where did it look?").wait_for()
    visit.server.pause = 0
    visit.button("Where did it look?").click()
    visit.page.locator(".word.lit").wait_for()


def test_a_long_answer_begins_in_sight(visit, screenshot):
    """And its pictures stay there while the words are gone through."""
    visit.server.answers = ["word " * 600 + "last"]
    visit.pick("dog.jpg")
    visit.ask("Tell me all.")
    visit.button("Where did it look?").click()
    words = visit.page.locator(".word")
    words.first.wait_for()
    before, now = -1, words.first.bounding_box()["y"]
    while before != now:  # until it is where it stays
        visit.page.wait_for_timeout(200)
        before, now = now, words.first.bounding_box()["y"]
    assert 300 < now < 600
    screenshot(visit, "look-long")
    visit.page.keyboard.press("End")
    assert words.last.inner_text() == "last"
    picture = visit.page.locator(".look .frame").bounding_box()
    word = words.last.bounding_box()
    assert picture["y"] >= 50
    assert picture["y"] + picture["height"] <= word["y"] < 700
