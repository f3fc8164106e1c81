"""By keyboard alone, read aloud, on a phone, in the dark: the page serves everybody."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.page.conftest import PHONE

pytestmark = pytest.mark.process

AXE = (Path(__file__).parent / "vendor" / "axe.min.js").read_text("utf-8")
LONG = (
    "A word that is long: " + "w" * 200 + "\n\n| " + " | ".join(f"column {n}" for n in range(12))
    + " |\n|" + "---|" * 12 + "\n| " + " | ".join("value" for _ in range(12)) + " |\n\n```\n"
    + "code " * 60 + "\n```\n\n" + "https://example.org/" + "a" * 120
)  # fmt: skip


def test_everything_by_keyboard(visit):
    """Without a mouse: ask, edit, leaf through versions, search, stop, see the list of keys."""
    page, keys = visit.page, visit.page.keyboard
    assert visit.box.evaluate("e => e === document.activeElement")
    visit.server.answers = ["First.", "Second.", "Third."]
    keys.type("What is this?")
    keys.press("Shift+Enter")
    keys.type("Really?")
    keys.press("Enter")
    page.locator(".stats").wait_for()
    assert visit.asked()[0]["content"][0]["text"] == "What is this?\nReally?"
    keys.press("Alt+ArrowUp")
    assert visit.answers.evaluate("e => e === document.activeElement")
    keys.press("r")
    visit.answers.get_by_text("Second.").wait_for()
    page.locator(".stats").wait_for()
    page.locator(".answer").focus()
    keys.press("ArrowLeft")
    visit.answers.get_by_text("First.").wait_for()
    keys.press("c")
    assert page.evaluate("() => navigator.clipboard.readText()") == "First."
    keys.press("Alt+ArrowDown")
    assert visit.box.evaluate("e => e === document.activeElement")
    keys.press("ArrowUp")  # the last question
    keys.type(" Sure?")
    keys.press("Enter")
    visit.answers.get_by_text("Third.").wait_for()
    visit.answers.last.locator(".stats").wait_for()  # it is complete
    assert visit.asked()[0]["content"][0]["text"].endswith("Really? Sure?")
    with page.expect_file_chooser():
        keys.press("Alt+p")
    visit.server.answers, visit.server.pause = ["A long answer. " * 60], 0.03
    visit.send("More")
    visit.answers.last.get_by_text("A long").wait_for()
    keys.press("Escape")
    visit.answers.last.get_by_text("Stopped.").wait_for()
    keys.press("Control+k")
    assert page.get_by_role("searchbox").evaluate("e => e === document.activeElement")
    keys.press("ArrowDown")
    keys.press("Enter")
    keys.press("Control+b")
    assert page.locator("#sidebar").is_hidden()
    keys.press("Control+/")
    dialog = page.get_by_role("dialog", name="Keyboard")
    assert "Ctrl Shift O" in dialog.inner_text()
    keys.press("Escape")
    dialog.wait_for(state="detached")


def test_everything_that_acts_is_reached_by_tab(visit):
    visit.ask("What is this?")
    visit.page.locator(".skip").focus()
    reached = set()
    for _ in range(40):
        visit.page.keyboard.press("Tab")
        name = (
            "() => { const e = document.activeElement; return e.ariaLabel || e.innerText || e.id }"
        )
        reached.add(visit.page.evaluate(name))
    wanted = {"Search the chats", "What is this?", "Add pictures (Alt+P)", "Take a photo", "Send"}
    wanted |= {"Answer again", "Copy the answer", "Edit the question", "Settings (Ctrl+,)"}
    assert reached >= wanted


def test_sentences_are_read_aloud_as_they_end(visit):
    visit.server.answers = ["A brown dog. It looks to the left. And"]
    visit.server.pause = 0.02
    visit.ask("What is this?")
    log = visit.page.locator("#announcer")
    assert log.get_attribute("aria-live") == "polite"
    said = " ".join(log.locator("p").all_inner_texts())
    assert "A brown dog. It looks to the left. And" in said
    assert log.locator("p").count() >= 2


@pytest.mark.parametrize("width", [360, 390])
def test_a_phone_never_scrolls_sideways(new_visit, screenshot, width):
    phone = {**PHONE, "viewport": {"width": width, "height": 780}}
    visit = new_visit(**phone, color_scheme="dark" if width == 360 else "light").open()

    def fits() -> bool:
        return visit.page.evaluate("document.documentElement.scrollWidth <= innerWidth")

    assert fits()
    screenshot(visit, f"phone-{width}-welcome")
    visit.pick("street.jpg", "dog.jpg")
    assert fits()
    screenshot(visit, f"phone-{width}-pictures")
    visit.server.answers = [LONG]
    visit.box.fill("What is " + "t" * 90)
    visit.button("Send").click()
    visit.page.locator(".stats").wait_for()
    assert fits()
    screenshot(visit, f"phone-{width}-answer")
    visit.button("Settings").click()
    assert fits()
    screenshot(visit, f"phone-{width}-settings")
    visit.page.keyboard.press("Escape")
    visit.button("Chats").click()
    visit.page.get_by_role("searchbox").wait_for()
    assert fits()
    box = visit.page.locator("#backdrop").bounding_box()
    visit.page.mouse.click(box["x"] + box["width"] - 10, 400)
    visit.page.locator("#sidebar").wait_for(state="hidden")


def test_reduced_motion_moves_nothing(new_visit):
    visit = new_visit(reduced_motion="reduce").open()
    visit.server.answers, visit.server.pause = ["A long answer. " * 20], 0.02
    visit.send("What is this?")
    visit.answers.get_by_text("A long").wait_for()
    assert visit.page.evaluate("document.getAnimations().length") == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("scene", ["welcome", "chat", "look", "settings", "phone"])
def test_axe_finds_nothing_serious(new_visit, screenshot, scheme, scene):
    visit = new_visit(
        **(PHONE if scene == "phone" else {"viewport": {"width": 1280, "height": 800}}),
        color_scheme=scheme,
        reduced_motion="reduce",
        bypass_csp=True,  # axe is added to the page, in this context only
    ).open()
    if scene != "welcome":
        visit.server.answers = [
            "**A dog.**\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\n```py\nx\n```\n\n> so"
        ]
        visit.pick("dog.jpg")
        visit.box.fill("What is this?")
        visit.button("Send").click()
        visit.page.locator(".stats").wait_for()
        visit.pick("street.jpg")
    if scene in ("look", "phone"):
        visit.button("Where did it look?").click()
        visit.page.locator(".word.lit").wait_for()
    if scene == "settings":
        visit.button("Settings").click()
        visit.page.get_by_text("JSON by schema").click()
    screenshot(visit, f"{scene}-{scheme}")
    visit.page.evaluate(AXE)
    found = visit.page.evaluate("() => axe.run()")
    serious = [
        (rule["id"], node["html"], node["failureSummary"])
        for rule in found["violations"]
        if rule["impact"] in ("serious", "critical")
        for node in rule["nodes"]
    ]
    assert not serious
