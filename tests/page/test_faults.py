"""The server fails, wants a key, goes and comes back; the page says so and loses nothing."""

from __future__ import annotations

import pytest
from playwright.sync_api import expect

pytestmark = pytest.mark.process


def test_a_reload_in_mid_answer_keeps_what_was_there(visit):
    visit.server.answers = ["One word after the other. " * 40]
    visit.server.pause = 0.03
    visit.send("Tell me much.")
    visit.answers.get_by_text("One word after the other. One").wait_for()
    visit.page.wait_for_timeout(900)  # kept now and then
    visit.page.reload()
    visit.ready()
    visit.answers.get_by_text("The page was closed while this was being written.").wait_for()
    assert "One word after" in visit.answers.locator(".prose").inner_text()
    visit.server.pause = 0
    visit.button("Answer again").click()
    visit.page.get_by_role("group", name="Version 2 of 2").wait_for()


def test_what_ended_before_its_first_word_is_asked_again_in_its_place(visit):
    visit.server.answers = [""]
    visit.send("What is this?")
    visit.answers.get_by_text("The model had nothing to say.").wait_for()
    visit.server.answers = ["A brown dog."]
    visit.button("Answer again").click()
    visit.answers.get_by_text("A brown dog.").wait_for()
    assert visit.page.get_by_role("group", name="Version").count() == 0
    assert visit.page.get_by_text("nothing to say").count() == 0


def test_a_broken_stream_is_said_and_sent_again(visit):
    visit.server.answers = ["A brown dog that looks to the left."]
    visit.server.breaks = 3
    visit.send("What is this?")
    visit.answers.get_by_text("The connection broke in the middle of the answer.").wait_for()
    assert visit.answers.locator(".prose").inner_text() == "A brown dog"
    visit.server.breaks = None
    visit.button("Send again").click()
    visit.answers.get_by_text("A brown dog that looks to the left.").wait_for()
    assert visit.page.get_by_role("group", name="Version 2 of 2").count() == 1


def test_the_server_goes_and_comes_back(visit, screenshot):
    visit.ask("What is this?")
    visit.server.stop()
    visit.send("Still there?")
    visit.page.get_by_text("Nothing is lost").wait_for()
    screenshot(visit, "gone")
    visit.server.start()
    visit.server.answers = ["Still here."]
    banner = visit.page.locator("#banner")
    banner.get_by_text("The server is back.").wait_for()
    visit.answers.get_by_role("button", name="Send again").click()  # the banner's does the same
    visit.answers.get_by_text("Still here.").wait_for()
    assert banner.is_hidden()
    expect(visit.page.locator(".question")).to_have_count(2)
    assert visit.page.get_by_role("group", name="Version").count() == 0  # nothing came: no branch


def test_a_key_is_asked_for_and_kept_in_memory(new_visit, server):
    server.key = "a key of sixteen letters"
    visit = new_visit()
    visit.page.goto(server.url)
    for key, title in (("wrong", "asks for a key"), (server.key, "does not take this key")):
        visit.page.get_by_text(title).wait_for()
        visit.page.get_by_label("Key", exact=True).fill(key)
        visit.page.keyboard.press("Enter")
    visit.ready()
    visit.ask("What is this?")
    kept = "() => JSON.stringify([{...localStorage}, {...sessionStorage}])"
    assert server.key not in visit.page.evaluate(kept)
    visit.page.reload()
    visit.page.get_by_text("asks for a key").wait_for()


@pytest.mark.parametrize(
    ("error", "said"),
    [
        ((400, "context_length_exceeded", "the prompt is longer than 1,024 tokens"), "is longer"),
        ((429, "rate_limit_exceeded", "the queue is full"), "the queue is full"),
        ((500, "server_error", "the server failed"), "the server failed"),
    ],
)
def test_a_refusal_is_said(visit, error, said):
    visit.server.error = error
    visit.send("What is this?")
    visit.answers.get_by_text(said).wait_for()
    visit.server.error = None
    visit.button("Send again").click()
    visit.answers.get_by_text("A brown dog.").wait_for()


def test_a_cut_answer_is_said(visit):
    visit.server.finish = "length"
    visit.ask("What is this?")
    visit.button("Allow more").click()
    visit.page.get_by_role("dialog", name="Settings").get_by_label("Longest answer").wait_for()


def test_a_loading_model_is_waited_for(visit):
    visit.server.status = "loading"
    visit.server.error = (503, "overloaded", "the model is not loaded yet")
    visit.server.breaks = 0
    visit.send("What is this?")
    visit.answers.get_by_text("not loaded yet").wait_for()
    banner = visit.page.locator("#banner")
    banner.get_by_text("The model is being loaded.").wait_for()
    visit.server.reset()
    banner.get_by_text("The model is ready.").wait_for()
    banner.get_by_role("button", name="Send again").click()
    visit.answers.get_by_text("A brown dog.").wait_for()


def test_a_page_that_is_opened_while_the_model_is_loaded(new_visit, server):
    """Nothing was away, so nothing is back."""
    server.status = "loading"
    visit = new_visit().open()
    banner = visit.page.locator("#banner")
    banner.get_by_text("The model is being loaded.").wait_for()
    server.status = "ok"
    banner.get_by_text("The model is ready.").wait_for()
    visit.ask("What is this?")
    assert visit.server.bodies[-1]["model"] == "tiny"


def test_what_the_browser_has_no_room_for_is_said(visit, tmp_path):
    quota = {"origin": visit.server.url.rstrip("/"), "quotaSize": 1}
    visit.page.context.new_cdp_session(visit.page).send("Storage.overrideQuotaForOrigin", quota)
    visit.pick("dog.jpg")
    visit.ask("What is this?")
    said = visit.page.locator("#toasts").get_by_text("This chat is not kept")
    said.wait_for()
    assert "no room left" in said.inner_text()
    with visit.page.expect_download() as download:
        visit.button("Save as JSON").click()
    download.value.save_as(tmp_path / "chat.json")
    kept = (tmp_path / "chat.json").read_text("utf-8")
    assert "What is this?" in kept
    assert "data:image/jpeg;base64," in kept
    visit.page.reload()
    visit.ready()
    expect(visit.page.locator(".question")).to_have_count(0)
