"""The page that `mmchat look -o` writes: one file, by keyboard, at any width, with no network."""

from __future__ import annotations

import re

import numpy as np
import pytest
from PIL import Image as PILImage

from mmchat.conversation import Image
from mmchat.explain.look import Look, Word
from mmchat.explain.show import look_page

pytestmark = pytest.mark.process

# The darkness over the middle of each quarter of each picture; null where nothing is shown.
DARK = """() => [...document.querySelectorAll("canvas")].map((canvas) => {
  if (!canvas.classList.contains("on")) return null;
  const pen = canvas.getContext("2d");
  return [[.25, .25], [.75, .25], [.25, .75], [.75, .75]].map(([x, y]) =>
    pen.getImageData(canvas.width * x, canvas.height * y, 1, 1).data[3]);
})"""


@pytest.fixture
def opened(browser, tmp_path):
    """Two pictures; the words light quarter 0 of the first, 3 of the first, 1 of the second."""
    places = [(0, 0), (0, 3), (1, 1)]
    words = []
    for found, (image, quarter) in zip(
        re.finditer(r"\S+", "left right other"), places, strict=True
    ):
        shares = np.full((2, 2, 2), 0.01)
        shares[image].flat[quarter] = 0.5
        words.append(Word(found[0], found.start(), found.end(), tuple(shares)))
    pictures = tuple(
        Image(PILImage.new("RGB", size, "white"), "p", "0" * 64) for size in ((40, 40), (900, 300))
    )
    look = Look("left right other", pictures, ((2, 2),) * 2, ((20, 20), (150, 450)), tuple(words))
    (tmp_path / "look.html").write_text(look_page(look, "What?", "tiny"))
    context = browser.new_context(offline=True)
    page = context.new_page()
    page.faults = []
    page.on("pageerror", lambda error: page.faults.append(str(error)))
    page.goto((tmp_path / "look.html").as_uri())
    yield page
    assert page.faults == []
    context.close()


def lit(page) -> tuple[int, int] | None:
    """The picture and the quarter that are brightest."""
    dark = page.evaluate(DARK)
    if None in dark:
        return None
    image = min(range(2), key=lambda i: min(dark[i]))
    return image, dark[image].index(min(dark[image]))


def test_by_keyboard_and_by_pointer(opened):
    assert lit(opened) is None
    opened.keyboard.press("Tab")
    assert lit(opened) == (0, 0)
    opened.keyboard.press("ArrowRight")
    assert lit(opened) == (0, 3)
    opened.keyboard.press("Enter")
    opened.keyboard.press("ArrowRight")
    assert lit(opened) == (1, 1)
    opened.locator("button").nth(2).blur()
    assert lit(opened) == (0, 3)  # kept
    opened.locator("button").first.hover()
    assert lit(opened) == (0, 0)
    opened.mouse.move(1, 1)
    assert lit(opened) == (0, 3)
    opened.locator("button").first.focus()
    opened.keyboard.press("Escape")
    assert opened.locator("button[aria-pressed=true]").count() == 0


@pytest.mark.parametrize("width", [320, 1200])
def test_pictures_stand_beside_each_other_where_there_is_room(opened, width):
    opened.set_viewport_size({"width": width, "height": 700})
    assert opened.evaluate("document.documentElement.scrollWidth") == width
    first, second = (opened.locator("figure").nth(i).bounding_box() for i in range(2))
    assert first["width"] > 250  # also of a picture of 40 pixels
    assert (second["x"] > first["x"]) == (width == 1200)
