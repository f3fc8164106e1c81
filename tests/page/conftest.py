"""One Chromium a file, one page a test, before the fake server.

MMCHAT_SCREENSHOTS names a folder that the pictures of the page are kept in.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.page.fake_server import FakeServer

ROOT = Path(__file__).parents[2]
CHROMIUM = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
ARGUMENTS = [
    "--no-sandbox",  # the tests may run as root
    "--use-fake-device-for-media-stream",
    "--use-fake-ui-for-media-stream",
]
PHONE = {
    "viewport": {"width": 390, "height": 844},
    "has_touch": True,
    "is_mobile": True,
    "device_scale_factor": 2,
}


@pytest.fixture(scope="module")  # its event loop runs on, and another file may need its own
def browser() -> Iterator[Any]:
    found = next(filter(None, map(shutil.which, CHROMIUM)), None)
    if found is None:
        pytest.skip(f"THE PAGE IS NOT TESTED: no Chromium here (looked for {', '.join(CHROMIUM)})")
    sync_api = pytest.importorskip(
        "playwright.sync_api", reason="THE PAGE IS NOT TESTED: pip install playwright"
    )
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=ARGUMENTS)
        sync_api.expect.set_options(timeout=10_000)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def shared_server() -> Iterator[FakeServer]:
    with FakeServer().running() as server:
        yield server


@pytest.fixture
def server(shared_server: FakeServer) -> FakeServer:
    shared_server.reset()
    return shared_server


class Visit:
    """A visit of the page: `page` is playwright's, the rest what a reader does."""

    def __init__(self, page: Any, server: FakeServer) -> None:
        self.page, self.server = page, server
        self.foreign: list[str] = []  # requests that left the server's origin
        self.errors: list[str] = []
        page.set_default_timeout(10_000)
        page.on("request", self._note)
        page.on("pageerror", lambda error: self.errors.append(str(error)))

    def _note(self, request: Any) -> None:
        own = (self.server.url, f"blob:{self.server.url}", "data:")
        if not request.url.startswith(own):
            self.foreign.append(request.url)

    def open(self) -> Visit:
        self.page.goto(self.server.url)
        self.ready()
        return self

    def ready(self) -> None:
        self.page.locator("body[data-ready]").wait_for()

    @property
    def box(self) -> Any:
        return self.page.get_by_label("Your question")

    @property
    def answers(self) -> Any:
        return self.page.locator(".answer")

    @property
    def chips(self) -> Any:
        return self.page.locator("#dock .chip")

    def button(self, name: str) -> Any:
        return self.page.get_by_role("button", name=name)

    def send(self, text: str) -> None:
        self.box.fill(text)
        self.box.press("Enter")

    def ask(self, text: str) -> None:
        """Sends, and waits for the end of the answer."""
        before = self.answers.count()
        self.send(text)
        self.answers.nth(before).locator(".stats").wait_for()

    def pick(self, *names: str) -> None:
        with self.page.expect_file_chooser() as chooser:
            self.button("Add pictures").last.click()
        chooser.value.set_files([ROOT / "assets" / name for name in names])
        self.chips.nth(len(names) - 1).get_by_text("tokens").wait_for()

    def asked(self) -> list[Any]:
        """The messages of the last request."""
        return self.server.bodies[-1]["messages"]


@pytest.fixture
def new_visit(browser: Any, server: FakeServer) -> Iterator[Callable[..., Visit]]:
    """A function of a browser context's options; nothing may go wrong or leave on any visit."""
    visits: list[Visit] = []

    def make(**options: Any) -> Visit:
        context = browser.new_context(**options)
        context.grant_permissions(["clipboard-read", "clipboard-write", "camera"])
        visits.append(Visit(context.new_page(), server))
        return visits[-1]

    yield make
    for visit in visits:
        visit.page.context.close()
        assert not visit.errors
        assert not visit.foreign


@pytest.fixture
def visit(new_visit: Callable[..., Visit]) -> Visit:
    return new_visit(viewport={"width": 1280, "height": 800}).open()


@pytest.fixture
def screenshot() -> Callable[[Visit, str], None]:
    """Keeps a picture of the page, where somebody wants it."""

    def keep(visit: Visit, name: str) -> None:
        if folder := os.environ.get("MMCHAT_SCREENSHOTS"):
            Path(folder).mkdir(parents=True, exist_ok=True)
            visit.page.screenshot(path=Path(folder) / f"{name}.png", animations="disabled")

    return keep
