"""The page before `mmchat serve` itself, with the built-in model."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
from PIL import Image
from playwright.sync_api import expect

from tests.page.fake_server import FakeServer

pytestmark = pytest.mark.process


class RealServer:
    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}/"


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealServer]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("serve") / "log"
    command = [sys.executable, "-m", "mmchat", "serve", "--port", str(port)]
    with log.open("w") as out, subprocess.Popen(command, stderr=out, stdout=out) as process:
        deadline = time.monotonic() + 60
        while not _listens(port):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        yield RealServer(port)
        process.terminate()
        assert process.wait(30) == 0, log.read_text()


def test_a_first_visit(new_visit, server, screenshot, tmp_path):
    """Also while the model is being loaded: the page is there before it."""
    visit = new_visit(viewport={"width": 1280, "height": 800})
    visit.page.goto(server.url)
    visit.page.locator("#model").get_by_text("tiny").wait_for(timeout=60_000)
    visit.button("What is this?").click()
    visit.answers.get_by_text("A brown dog.").wait_for(timeout=60_000)
    visit.pick("street.jpg")
    expect(visit.chips.get_by_text("3 tiles · 195 tokens")).to_have_count(1)
    visit.ask("Describe this picture.")
    assert "a green tree" in visit.answers.last.inner_text()
    assert "tokens/s" in visit.answers.last.inner_text()
    screenshot(visit, "real")
    with visit.page.expect_file_chooser() as chooser:
        visit.button("Add pictures").click()
    pages = [Image.new("RGB", (100, 50 * n)) for n in (1, 2)]
    pages[0].save(tmp_path / "two.pdf", save_all=True, append_images=pages[1:])
    chooser.value.set_files(tmp_path / "two.pdf")
    visit.chips.get_by_text("2 pages").wait_for()


def test_a_schema_holds_the_answer_or_is_refused_in_words(new_visit, server):
    visit = new_visit()
    visit.page.goto(server.url)
    visit.page.locator("#model").get_by_text("tiny").wait_for(timeout=60_000)

    def schema(text):
        visit.page.keyboard.press("Control+,")
        dialog = visit.page.get_by_role("dialog", name="Settings")
        dialog.get_by_text("JSON by schema").click()
        dialog.get_by_label("JSON schema").fill(text)
        dialog.get_by_role("button", name="Close").click()

    schema('{"enum": ["a zebra", "an okapi"]}')
    visit.ask("What is this?")
    assert visit.answers.last.locator(".code").inner_text().endswith(('"a zebra"', '"an okapi"'))
    schema('{"type": "array", "uniqueItems": true}')
    visit.send("What is this?")
    visit.answers.last.get_by_text('"uniqueItems" cannot be enforced').wait_for()


def test_another_origin_reaches_nothing(new_visit, server):
    """Neither by a script nor by what a browser sends without asking first."""
    with FakeServer().running() as elsewhere:
        visit = new_visit(bypass_csp=True)  # a page elsewhere has no such policy
        visit.page.goto(elsewhere.url)
        visit.ready()
        statuses: list[int] = []
        network = visit.page.context.new_cdp_session(visit.page)
        network.send("Network.enable")
        network.on(
            "Network.responseReceivedExtraInfo",
            lambda answer: statuses.append(answer["statusCode"]),
        )
        ways = ["{}", "{method: 'POST', body: '{}', headers: {'Content-Type': 'application/json'}}"]
        ways.append("{method: 'POST', body: '{}', mode: 'no-cors'}")
        for way in ways:
            script = f"(url) => fetch(url, {way}).then((r) => r.text(), () => 'refused')"
            url = f"{server.url}v1/chat/completions"
            assert visit.page.evaluate(script, url) == "refused"
        assert set(statuses) == {403}
        visit.foreign.clear()


def test_a_word_lights_the_object_that_it_names(new_visit, server, screenshot):
    """The brightest column of "tree" is that of the tree, in the middle of street.jpg."""
    visit = new_visit(viewport={"width": 1280, "height": 800})
    visit.page.goto(server.url)
    visit.page.locator("#model").get_by_text("tiny").wait_for(timeout=60_000)
    visit.button("Settings").click()
    dialog = visit.page.get_by_role("dialog", name="Settings")
    dialog.get_by_label("Temperature").fill("0")
    dialog.get_by_role("button", name="Close").click()
    visit.pick("street.jpg")
    visit.ask("Describe this picture.")
    visit.button("Where did it look?").click()
    brightest = """canvas => {
      const {width, height} = canvas;
      const {data} = canvas.getContext("2d").getImageData(0, 0, width, height);
      let best = 0;
      for (let at = 0; at < data.length; at += 4) if (data[at + 3] < data[best + 3]) best = at;
      return (best / 4) % width / width;
    }"""
    canvas = visit.page.locator(".look canvas")
    for word, left, right in (("car", 0, 0.36), ("tree", 0.42, 0.63), ("house", 0.68, 1)):
        visit.page.locator(".word").get_by_text(word).hover()
        assert left < canvas.evaluate(brightest) < right
    screenshot(visit, "look-real")
