"""What a reader does on the page, in a real browser."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest
from playwright.sync_api import expect

pytestmark = pytest.mark.process

ROOT = Path(__file__).parents[2]
DOG = (ROOT / "assets/dog.jpg").read_bytes()
# A DataTransfer can be made by the page alone; `how` is the event that brings it.
GIVE = """([how, name, data]) => {
  const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
  const transfer = new DataTransfer();
  transfer.items.add(new File([bytes], name, {type: "image/jpeg"}));
  const event = how === "paste"
    ? new ClipboardEvent("paste", {clipboardData: transfer, bubbles: true, cancelable: true})
    : new DragEvent(how, {dataTransfer: transfer, bubbles: true, cancelable: true});
  document.querySelector("textarea").dispatchEvent(event);
}"""


def give(visit, how: str, name: str = "dog.jpg") -> None:
    visit.page.evaluate(GIVE, [how, name, base64.b64encode(DOG).decode()])


def pictures_of(message) -> list[bytes]:
    urls = [part["image_url"]["url"] for part in message["content"] if part["type"] == "image_url"]
    return [base64.b64decode(url.partition("base64,")[2]) for url in urls]


def test_a_first_visit(visit, screenshot):
    """An example asks by itself; then a question of one's own, with the first as its past."""
    screenshot(visit, "welcome")
    visit.server.answers = ["A brown **dog**.", "It looks to the left."]
    visit.button("What is this?").click()
    visit.answers.get_by_text("A brown dog.").wait_for()
    assert visit.answers.locator("strong").inner_text() == "dog"
    assert pictures_of(visit.asked()[0]) == [DOG]
    visit.ask("Where does it look?")
    assert [message["role"] for message in visit.asked()] == ["user", "assistant", "user"]
    assert visit.asked()[1]["content"] == "A brown **dog**."
    assert visit.page.locator("#chats .chat").inner_text() == "What is this?"
    assert "12 of 30 cached" in visit.answers.last.inner_text()
    assert "pictures 118 ms" in visit.answers.last.inner_text()
    assert visit.page.get_by_role("meter").get_attribute("aria-valuetext") == "36 of 1,024 tokens"


@pytest.mark.parametrize("how", ["drop", "paste", "pick", "camera"])
def test_a_picture_is_given(visit, how):
    if how == "pick":
        visit.pick("dog.jpg")
    elif how == "camera":
        visit.button("Take a photo").click()
        visit.button("Take it").click()
    else:
        if how == "drop":
            give(visit, "dragenter")
            visit.page.get_by_text("Drop the pictures here").wait_for()
        give(visit, how)
    visit.chips.get_by_text("tokens").wait_for()
    expect(visit.chips).to_have_count(1)
    visit.ask("What is this?")
    [picture] = pictures_of(visit.asked()[0])
    if how == "camera":
        assert picture.startswith(b"\xff\xd8")
    else:
        assert picture == DOG
    expect(visit.page.locator(".question .print img")).to_have_count(1)


def test_a_phone_opens_its_own_camera(new_visit):
    visit = new_visit(viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True).open()
    with visit.page.expect_file_chooser() as chooser:
        visit.button("Take a photo").click()
    assert chooser.value.element.get_attribute("capture") == "environment"
    chooser.value.set_files(ROOT / "assets/dog.jpg")
    visit.chips.get_by_text("tokens").wait_for()


def test_pictures_show_their_tiles_and_cost(visit, screenshot):
    visit.pick("dog.jpg", "street.jpg")
    expect(visit.chips.nth(0).get_by_text("4 tiles · 260 tokens")).to_have_count(1)
    expect(visit.chips.nth(1).get_by_text("3 tiles · 195 tokens")).to_have_count(1)
    expect(visit.chips.nth(1).locator(".tiles .upright")).to_have_count(2)
    screenshot(visit, "pictures")
    visit.button("Show street.jpg").click()
    dialog = visit.page.get_by_role("dialog", name="street.jpg")
    assert "327 × 85 px" in dialog.inner_text()
    assert "195 to attend to" in dialog.inner_text()
    dialog.get_by_role("button", name="Tiles").click()
    assert dialog.get_by_role("button", name="Tiles").get_attribute("aria-pressed") == "false"
    dialog.get_by_role("button", name="Close").click()
    visit.button("Remove dog.jpg").click()
    with visit.page.expect_file_chooser() as chooser:
        visit.button("Replace street.jpg").click()
    chooser.value.set_files(ROOT / "assets/fish.jpg")
    visit.chips.get_by_text("fish.jpg").wait_for()
    visit.ask("How many?")
    assert pictures_of(visit.asked()[0]) == [(ROOT / "assets/fish.jpg").read_bytes()]


def test_what_is_no_picture_cannot_be_sent(visit, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with visit.page.expect_file_chooser() as chooser:
        visit.button("Add pictures").click()
    chooser.value.set_files(tmp_path / "broken.png")
    visit.chips.get_by_text("This file is not a picture in a known format").wait_for()
    visit.send("What is this?")
    assert not visit.server.bodies
    visit.button("Remove broken.png").click()
    visit.ask("What is this?")
    assert visit.asked() == [
        {"role": "user", "content": [{"type": "text", "text": "What is this?"}]}
    ]


def test_stop_keeps_what_was_written(visit, screenshot):
    visit.server.answers = ["One word after the other. " * 40]
    visit.server.pause = 0.03
    visit.send("Tell me much.")
    visit.answers.get_by_text("One word after").wait_for()
    screenshot(visit, "answering")
    assert visit.button("Send").get_attribute("aria-disabled") == "true"
    visit.button("Stop").click()
    visit.answers.get_by_text("Stopped.").wait_for()
    written = visit.answers.locator(".prose").inner_text()
    visit.page.wait_for_timeout(200)
    assert visit.answers.locator(".prose").inner_text() == written
    assert visit.server.abandoned == 1
    visit.server.pause = 0
    visit.server.answers = ["Now short."]
    visit.ask("Shorter.")


def test_edit_and_retry_keep_their_branches(visit):
    visit.server.answers = ["First.", "Second.", "Third."]
    visit.pick("dog.jpg")
    visit.ask("What is this?")
    visit.button("Answer again").click()
    visit.answers.get_by_text("Second.").wait_for()
    assert visit.page.get_by_role("group", name="Version 2 of 2").count() == 1
    visit.page.locator(".question").hover()
    visit.button("Edit the question").click()
    edit = visit.page.get_by_label("Edit the question", exact=True).and_(
        visit.page.locator("textarea")
    )
    assert edit.input_value() == "What is this?"
    visit.page.locator(".editing").get_by_role("button", name="Remove dog.jpg").click()
    edit.fill("What is that?")
    edit.press("Enter")
    visit.answers.get_by_text("Third.").wait_for()
    assert visit.asked() == [
        {"role": "user", "content": [{"type": "text", "text": "What is that?"}]}
    ]
    visit.page.locator(".question").get_by_role("button", name="Earlier version").click()
    visit.answers.get_by_text("Second.").wait_for()
    expect(visit.page.locator(".question .print")).to_have_count(1)
    visit.answers.get_by_role("button", name="Earlier version").click()
    visit.answers.get_by_text("First.").wait_for()
    visit.page.reload()
    visit.ready()
    visit.answers.get_by_text("First.").wait_for()  # the branch that was shown
    assert visit.page.get_by_role("group", name="Version 1 of 2").count() == 2


def test_a_picture_of_an_earlier_turn_is_replaced(visit):
    visit.pick("dog.jpg")
    visit.ask("What is this?")
    visit.page.locator(".print").click()
    with visit.page.expect_file_chooser() as chooser:
        visit.page.get_by_role("dialog").get_by_role("button", name="Replace").click()
    chooser.value.set_files(ROOT / "assets/fish.jpg")
    editing = visit.page.locator(".editing")
    editing.get_by_text("fish.jpg").wait_for()
    visit.server.answers = ["Three fish."]
    editing.get_by_role("button", name="Send").click()
    visit.answers.get_by_text("Three fish.").wait_for()
    assert pictures_of(visit.asked()[0]) == [(ROOT / "assets/fish.jpg").read_bytes()]


def test_settings_reach_the_request(visit, screenshot):
    visit.page.keyboard.press("Control+,")
    dialog = visit.page.get_by_role("dialog", name="Settings")
    dialog.get_by_label("System prompt").fill("Be short.")
    dialog.get_by_text("JSON by schema").click()
    dialog.get_by_label("JSON schema").fill('{"type": ')
    dialog.get_by_text("This is no JSON yet").wait_for()
    screenshot(visit, "settings")
    dialog.get_by_label("JSON schema").fill('{"type": "object"}')
    for name, value in (
        ("Temperature", "0"),
        ("Top p", "0.5"),
        ("Longest answer", "50"),
        ("Seed", "7"),
    ):
        dialog.get_by_label(name).fill(value)
    dialog.get_by_label("Show how probable").check()
    dialog.get_by_role("button", name="Close").click()
    visit.server.answers = ['{"animal": "dog"}']
    visit.ask("What is this?")
    body = visit.server.bodies[-1]
    assert body["messages"][0] == {"role": "system", "content": "Be short."}
    wanted = {"temperature": 0, "top_p": 0.5, "max_tokens": 50, "seed": 7, "logprobs": True}
    assert body.items() >= wanted.items()
    assert body["response_format"]["json_schema"]["schema"] == {"type": "object"}
    assert visit.answers.locator(".code").inner_text().startswith("json")
    visit.answers.get_by_text("of 5 tokens below 50 %").click()
    expect(visit.answers.locator(".tokens .least")).to_have_count(1)
    visit.page.reload()
    visit.ready()
    visit.ask("And now?")
    assert visit.server.bodies[-1]["temperature"] == 0
    assert visit.server.bodies[-1]["messages"][0]["role"] == "system"


def test_chats_are_kept_found_and_deleted(visit):
    visit.server.answers = ["A brown dog.", "Three fish."]
    visit.pick("dog.jpg")
    visit.ask("What is this?")
    visit.page.keyboard.press("Control+Shift+O")
    visit.ask("How many are there?")
    visit.page.reload()
    visit.ready()
    rows = visit.page.locator("#chats .chat")
    expect(rows).to_have_text(["How many are there?", "What is this?"], use_inner_text=True)
    visit.page.keyboard.press("Control+K")
    visit.page.keyboard.type("brown dog")
    expect(rows).to_have_text(["What is this?"], use_inner_text=True)
    visit.page.keyboard.press("Enter")
    visit.answers.get_by_text("A brown dog.").wait_for()
    visit.page.locator(".print img").wait_for()
    visit.page.get_by_role("searchbox").fill("")
    visit.button("More about What is this?").click()
    visit.page.get_by_role("menuitem", name="Delete").click()
    expect(rows).to_have_text(["How many are there?"], use_inner_text=True)
    visit.button("Undo").click()
    visit.answers.get_by_text("A brown dog.").wait_for()
    expect(rows).to_have_count(2)
    visit.button("More about What is this?").click()
    visit.page.get_by_role("menuitem", name="Rename").click()
    visit.page.get_by_label("Title").fill("My dog")
    visit.page.keyboard.press("Enter")
    rows.get_by_text("My dog").wait_for()


KEPT = """(change) => new Promise((resolve) => {
  const request = indexedDB.open("mmchat");
  request.onsuccess = () => {
    const pictures = request.result.transaction("pictures", "readwrite").objectStore("pictures");
    pictures.getAll().onsuccess = ({target}) => {
      for (const one of target.result) if (change) pictures.put({...one, ...change});
      resolve(target.result.map((one) => one.name));
    };
  };
})"""


def test_a_deleted_chat_comes_back_with_its_pictures(visit):
    """Also if another tab was opened meanwhile, which forgets what no chat holds."""
    visit.pick("dog.jpg")
    visit.ask("What is this?")
    visit.page.evaluate(KEPT, {"kept": 0})  # long ago
    visit.page.goto(visit.server.url)
    visit.ready()  # of another chat: this one's picture was not loaded yet
    visit.button("More about What is this?").click()
    visit.page.get_by_role("menuitem", name="Delete").click()
    visit.button("Undo").wait_for()

    def open_another_tab():
        page = visit.page.context.new_page()
        other = type(visit)(page, visit.server)
        page.goto(visit.server.url)
        other.ready()
        page.close()

    open_another_tab()
    assert visit.page.evaluate(KEPT) == []
    visit.button("Undo").click()
    visit.page.locator(".print img").wait_for()
    assert visit.page.evaluate(KEPT) == ["dog.jpg"]
    visit.page.reload()
    visit.ready()
    visit.ask("And now?")
    assert pictures_of(visit.asked()[0]) == [DOG]
    visit.button("More about What is this?").click()
    visit.page.get_by_role("menuitem", name="Delete").click()
    visit.button("Undo").wait_for()
    open_another_tab()
    assert visit.page.evaluate(KEPT) == ["dog.jpg"]  # too new to be forgotten


def test_a_question_under_a_schema_that_is_none_is_kept(visit):
    visit.page.keyboard.press("Control+,")
    dialog = visit.page.get_by_role("dialog", name="Settings")
    dialog.get_by_text("JSON by schema").click()
    dialog.get_by_label("JSON schema").fill('{"type": ')
    dialog.get_by_role("button", name="Close").click()
    visit.pick("dog.jpg")
    visit.send("What is this?")
    visit.answers.get_by_text("The JSON schema of this chat is not one yet.").wait_for()
    visit.page.reload()
    visit.ready()
    expect(visit.page.locator(".question .print img")).to_have_count(1)
    assert visit.page.locator("#chats .chat").inner_text() == "What is this?"
    assert not visit.server.bodies


def test_a_question_that_is_not_sent_stays_in_its_chat(visit):
    visit.ask("What is this?")
    visit.box.fill("Half a question")
    visit.page.keyboard.press("Control+Shift+O")
    assert visit.box.input_value() == ""
    visit.box.fill("Another half")
    visit.page.locator("#chats .chat").click()
    assert visit.box.input_value() == "Half a question"
    visit.page.keyboard.press("Control+Shift+O")
    assert visit.box.input_value() == "Another half"


def test_two_tabs_of_one_chat_lose_nothing(visit, new_visit):
    visit.server.answers = ["First.", "Second.", "Third."]
    visit.ask("One")
    page = visit.page.context.new_page()
    other = type(visit)(page, visit.server)
    page.goto(visit.page.url)
    other.ready()
    other.ask("Two")
    turned_to = "() => document.dispatchEvent(new Event('visibilitychange'))"
    visit.page.evaluate(turned_to)
    visit.answers.get_by_text("Second.").wait_for()
    visit.ask("Three")
    other.page.reload()
    other.ready()
    expect(other.answers.locator(".prose")).to_have_text(
        ["First.", "Second.", "Third."], use_inner_text=True
    )


def test_chats_leave_and_come_back_as_files(visit, new_visit, tmp_path):
    visit.pick("dog.jpg")
    visit.ask("What is this?")
    visit.button("Answer again").click()
    visit.page.get_by_role("group", name="Version 2 of 2").wait_for()

    def save(name: str) -> Path:
        visit.button("More about What is this?").click()
        with visit.page.expect_download() as download:
            visit.page.get_by_role("menuitem", name=name).click()
        path = tmp_path / download.value.suggested_filename
        download.value.save_as(path)
        return path

    text = save("Save as Markdown")
    assert text.name == "what-is-this.md"
    parts = ["# What is this?", "## You", "*Picture: dog.jpg*", "What is this?", "## tiny"]
    assert text.read_text("utf-8") == "\n\n".join([*parts, "A brown dog.\n"])
    kept = save("Save as JSON")
    other = new_visit().open()
    for path in (tmp_path / "other.json", kept):
        if path != kept:
            path.write_text(json.dumps({"kind": "something"}))
        other.button("Settings").click()
        with other.page.expect_file_chooser() as chooser:
            other.button("Import").click()
        chooser.value.set_files(path)
        said = "1 chat imported" if path == kept else "other.json holds no chats of this page."
        other.page.locator("#toasts").get_by_text(said).wait_for()
    other.page.locator("#chats .chat").click()
    other.page.get_by_role("group", name="Version 2 of 2").wait_for()
    other.ask("And now?")
    assert pictures_of(other.asked()[0]) == [DOG]


def test_a_growing_answer_reads_as_the_whole_does(visit):
    """Blocks that have ended are not read again; what they look like must not depend on it."""
    visit.server.answers = [
        "# Title\n\nA *word*, and\na line.\n\n- one\n- two\n\n  more of two\n\n1. first\n\n"
        "| a | b |\n|---|--:|\n| 1 | 2 |\n\n```py\nx = 1\n\ny = 2\n```\n\n> quoted\n> twice\n\n"
        "---\n\nend"
    ]
    visit.server.pause = 0.01
    markup = "document.querySelector('.answer .prose').cloneNode(true)"
    visit.send("Show all")
    visit.answers.get_by_text("quoted").wait_for()
    visit.page.evaluate(
        f"() => {{ window.seen = []; const keep = () => {{ const copy = {markup};"
        " copy.querySelector('.open-block')?.replaceWith(..."
        "copy.querySelector('.open-block').childNodes); seen.push(copy.innerHTML);"
        " requestAnimationFrame(keep); }; keep(); }"
    )
    visit.page.locator(".stats").wait_for()
    whole = visit.page.evaluate(f"() => {markup}.innerHTML")
    grown = visit.page.evaluate("() => seen.filter((text) => text.includes('>end'))")
    assert whole in grown
    expect(
        visit.answers.locator(".prose").locator("h3, li, td, pre, blockquote, hr")
    ).to_have_count(9)


def test_an_answer_is_followed_only_from_its_end(visit):
    visit.server.answers = ["A line.\n\n" * 60]
    visit.server.pause = 0.01
    visit.send("Much")
    scroll = visit.page.locator("#scroll")
    end = "e => e.scrollHeight - e.scrollTop - e.clientHeight"
    visit.answers.locator("p").nth(40).wait_for()
    visit.page.wait_for_function(  # a line is followed in the frame after it
        f"e => ({end})(e) < 5", arg=scroll.element_handle()
    )
    scroll.evaluate("e => e.scrollTo(0, 0)")
    visit.page.locator(".stats").wait_for()
    assert scroll.evaluate("e => e.scrollTop") == 0
    visit.button("To the end").click()
    assert scroll.evaluate(end) < 5


def test_a_chat_that_is_deleted_while_it_answers_stays_away(visit):
    visit.server.answers, visit.server.pause = ["Slowly does it. " * 60], 0.02
    visit.send("First")
    visit.answers.get_by_text("Slowly").wait_for()
    visit.button("More about First").click()
    visit.page.get_by_role("menuitem", name="Delete").click()
    visit.page.locator("#welcome").wait_for()
    visit.page.wait_for_timeout(200)
    visit.page.reload()
    visit.ready()
    expect(visit.page.locator("#chats .chat")).to_have_count(0)
    assert visit.server.abandoned == 1


def test_a_chat_answers_while_another_is_read(visit):
    visit.server.answers = ["Slowly does it. " * 12]
    visit.server.pause = 0.02
    visit.send("First")
    visit.answers.get_by_text("Slowly").wait_for()
    visit.page.keyboard.press("Control+Shift+O")
    expect(visit.page.locator("#chats .pulse")).to_have_count(1)
    visit.page.locator("#chats .pulse").wait_for(state="detached")
    visit.page.locator("#chats .chat").click()
    expect(visit.answers.locator(".stats")).to_have_count(1)
    assert visit.answers.locator(".prose").inner_text().count("Slowly") == 12
