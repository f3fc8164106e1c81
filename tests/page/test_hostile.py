"""What comes from a model, a file or another page cannot become code, nor reach anybody."""

from __future__ import annotations

import json

import pytest
from playwright.sync_api import expect

from tests.page.fake_server import FakeServer

pytestmark = pytest.mark.process

HOSTILE = """<script>window.hit = 1</script><img src=x onerror="window.hit = 1">

![picture](https://evil.example/pixel.png) ![](//evil.example/p.png)

[click](javascript:window.hit=1) [data](data:text/html,<script>window.hit=1</script>)
[bank](https://evil.example/login) <https://evil.example/auto>

<iframe src="https://evil.example"></iframe> <svg onload="window.hit = 1">

| <b onclick="window.hit=1">x</b> |
|---|
| \u202egnp.exe |

```html"onclick="window.hit=1
<script>window.hit = 1</script>
```

[ref]: javascript:window.hit=1
[ref]
"""


def test_hostile_markdown_stays_text(visit):
    visit.server.answers = [HOSTILE]
    visit.ask("Attack me")
    prose = visit.answers.locator(".prose")
    assert (
        prose.locator("script, img, iframe, svg:not(.icon), b, [onclick], [onerror]").count() == 0
    )
    links = prose.locator("a")
    addresses = ["https://evil.example/login", "https://evil.example/auto"]
    assert [link.get_attribute("href") for link in links.all()] == addresses
    assert links.first.get_attribute("rel") == "noopener noreferrer"
    assert "bank (https://evil.example/login)" in prose.inner_text()  # where it leads is seen
    assert visit.page.evaluate("window.hit === undefined")
    visit.page.reload()
    visit.ready()
    expect(visit.answers.locator("script, img, iframe, [onclick]")).to_have_count(0)
    assert visit.page.evaluate("window.hit === undefined")


@pytest.mark.parametrize(
    "name", ['<img src=x onerror="window.hit=1">.jpg', "\u202egpj.exe", "a\nb\tc.jpg", "x" * 300]
)
def test_hostile_file_names_stay_text(visit, name):
    visit.page.evaluate(
        """(name) => {
          const transfer = new DataTransfer();
          transfer.items.add(new File(["x"], name, {type: "image/jpeg"}));
          const given = {dataTransfer: transfer, bubbles: true};
          document.body.dispatchEvent(new DragEvent("drop", given));
        }""",
        name,
    )
    visit.chips.wait_for()
    shown = visit.chips.locator(".chip-name").inner_text()
    assert shown.isprintable()
    assert len(shown) <= 120
    assert visit.page.evaluate("window.hit === undefined")


def test_a_hostile_file_of_chats_stays_text(visit, tmp_path):
    attack = '<img src=x onerror="window.hit=1">'
    node = {"role": "user", "parent": "root", "text": attack, "pictures": ["p"], "created": 1}
    other = {"role": "system", "parent": "root", "text": "not known"}
    chat = {
        "title": attack,
        "nodes": {"__proto__": node, "a": node, "b": other, "c": 7},
        "chosen": {"root": "a", "__proto__": "a"},
    }
    picture = {"id": "p", "name": attack, "data": "data:text/html;base64,PHNjcmlwdD4="}
    content = {
        "kind": "mmchat chats",
        "version": 1,
        "chats": [chat, 5, None],
        "pictures": [picture],
    }
    path = tmp_path / "chats.json"
    path.write_text(json.dumps(content))
    visit.button("Settings").click()
    with visit.page.expect_file_chooser() as chooser:
        visit.button("Import").click()
    chooser.value.set_files(path)
    visit.page.locator("#toasts").get_by_text("1 chat imported").wait_for()
    visit.page.locator("#chats .chat").click()
    assert visit.page.locator(".bubble").inner_text() == attack
    assert visit.page.evaluate("window.hit === undefined")


def test_the_policy_holds(visit):
    """Even a mistake in the page's own code could not parse HTML or ask elsewhere."""
    assert (
        visit.page.evaluate(
            """() => { try { document.body.innerHTML = "<b>x</b>"; return "parsed"; }
                   catch (error) { return error.name; } }"""
        )
        == "TypeError"
    )
    refused = "(url) => fetch(url).then(() => 'asked', () => 'refused')"
    assert visit.page.evaluate(refused, "https://evil.example/") == "refused"
    visit.foreign.clear()  # the browser names what it then did not ask


def test_another_origin_is_kept_out(new_visit, server):
    """A page elsewhere can neither read an answer nor show this page as its own."""
    elsewhere = FakeServer()
    elsewhere.headers = {}
    with elsewhere.running():
        visit = new_visit()
        visit.page.goto(elsewhere.url)
        read = "(url) => fetch(url).then((r) => r.text(), () => 'refused')"
        assert visit.page.evaluate(read, f"{server.url}v1/models") == "refused"
        visit.page.evaluate(
            """(url) => { const frame = document.createElement("iframe");
                          frame.src = url; document.body.append(frame); }""",
            server.url,
        )
        visit.page.wait_for_timeout(300)
        frame = visit.page.frames[-1]
        expect(frame.locator("#question-box")).to_have_count(0)
        visit.foreign.clear()
        visit.errors.clear()
