"""Four times the input is about four times the work, and not sixteen: counted, not timed.

What is counted are the lines of Python that run; for the loops inside of C there is a bound on the
processor time that the largest input takes.
"""

from __future__ import annotations

import base64
import contextlib
import json
import struct
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from mmchat.checkpoints.checkpoint import open_checkpoint
from mmchat.checkpoints.manifest import MANIFEST_NAME, FileRecord, Manifest, write_manifest
from mmchat.checkpoints.pickle_scan import scan
from mmchat.conversation import Conversation, Turn, question
from mmchat.errors import MmchatError
from mmchat.hub.integrity import verify_folder
from mmchat.images.web import _parse
from mmchat.repl import saving
from mmchat.strict_json import Where, loads
from mmchat.terminal import filled, sanitize
from mmchat.tokenizers.tiktoken_file import parse_tiktoken
from tests.attack.bounds import OverBound, in_a_child
from tests.checkpoints.hostile_files import header_file, item
from tests.repl.screens import Terminal

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning"),
]
MOST = 7.0  # times the work for four times the input: 4 is linear, 16 quadratic
ENOUGH = 4_000_000  # lines that are counted; more is endless


def work(call: Callable[[], object]) -> int:
    """Lines of Python that `call` runs, up to ENOUGH."""
    count = 0

    def trace(_frame: FrameType, _event: str, _arg: Any) -> Any:
        nonlocal count
        count += 1
        if count > ENOUGH:
            raise OverBound("endless work")
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        with contextlib.suppress(MmchatError, ValueError):
            call()
    finally:
        sys.settrace(before)
    return count


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def shared_tuples(depth: int) -> bytes:
    """A dict whose key holds itself twice, that twice again, and so on: few bytes, many strings."""
    return b"\x80\x02}" + b")" + b"q\x00" + b"h\x00\x86q\x00" * depth + b"K\x01s."


def markdown(source: str) -> None:
    stream = Terminal().markdown()
    for start in range(0, len(source), 40):
        stream.feed(source[start : start + 40])
    stream.finish()


SCANNERS: dict[str, tuple[int, Callable[[int], Callable[[], object]]]] = {
    "json: many keys": (
        100, lambda n: lambda: loads(json.dumps({f"k{i}": i for i in range(n)}).encode())
    ),
    "json: an open string": (100, lambda n: lambda: loads(b'{"' + b'\\"' * n)),
    "json: brackets": (100, lambda n: lambda: loads(b"[" * n)),
    "pickle: many strings": (
        100, lambda n: lambda: scan(b"\x80\x02}(" + (text("a") + text("b")) * n + b"u.")
    ),
    "pickle: nested": (100, lambda n: lambda: scan(b"\x80\x02" + b"(" * n + b"t" * n + b".")),
    "pickle: shared tuples": (8, lambda n: lambda: scan(shared_tuples(n))),
    "pickle: marks": (100, lambda n: lambda: scan(b"\x80\x02" + b"(" * n + b"N" * n + b"t" * n)),
    "tokenizer.model": (
        100,
        lambda n: lambda: parse_tiktoken(
            b"".join(base64.b64encode(b"%d" % i) + b" %d\n" % i for i in range(n)), Where("x")
        ),
    ),
    "address": (50, lambda n: lambda: _parse("http://a.b/" + "%2e/" * n + "?" + "a=b&" * n)),
    "terminal: text": (200, lambda n: lambda: sanitize("ab\ncd \u202e" * n)),
    "terminal: sequences": (200, lambda n: lambda: sanitize("\x1b]52;c;" * n)),
    "terminal: words": (200, lambda n: lambda: filled("a 'b c" * n, 80)),
    "markdown: a table": (20, lambda n: lambda: markdown("|a|b|\n|-|-|\n" + "|1|2|\n" * n)),
    "markdown: a paragraph": (20, lambda n: lambda: markdown("some words in a line\n" * n)),
    "markdown: quotes": (10, lambda n: lambda: markdown(">" * n + " x\n")),
    "markdown: emphasis": (20, lambda n: lambda: markdown("*a _b " * n)),
    "markdown: links": (20, lambda n: lambda: markdown("[a](" * n)),
    "markdown: a list": (10, lambda n: lambda: markdown("- a\n" * n)),
}  # fmt: skip


@pytest.mark.parametrize("name", SCANNERS)
def test_four_times_the_input_is_about_four_times_the_work(name: str) -> None:
    size, make = SCANNERS[name]

    def counts() -> list[int]:
        return [work(make(n)) for n in (size, size, 4 * size)]  # the first may import

    _, small, large = in_a_child(counts)
    assert large < MOST * small + 2_000, (small, large)


def safetensors_header(folder: Path, count: int) -> Callable[[], object]:
    entries = {f"t{i}": item(4 * i, 4 * i + 4) for i in range(count)}
    path = header_file(folder / f"{count}.safetensors", entries, bytes(4 * count))
    return lambda: open_checkpoint(path).close()


def zip_members(folder: Path, count: int) -> Callable[[], object]:
    path = folder / f"{count}.pth"
    with zipfile.ZipFile(path, "w") as archive:
        for number in range(count):
            archive.writestr(f"archive/data/{number}", b"")
    return lambda: open_checkpoint(path).close()


def index(folder: Path, count: int) -> Callable[[], object]:
    place = folder / str(count)
    place.mkdir(exist_ok=True)
    names = {f"t{i}": f"{i}.safetensors" for i in range(count)}
    (place / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    return lambda: open_checkpoint(place)


def manifest(folder: Path, count: int) -> Callable[[], object]:
    place = folder / str(count)
    place.mkdir(exist_ok=True)
    records = {f"f{i}": FileRecord(1, "0" * 64, None, True) for i in range(count)}
    write_manifest(place / MANIFEST_NAME, Manifest(records))
    return lambda: verify_folder(place)


def saved_chat(folder: Path, count: int) -> Callable[[], object]:
    turns = (Turn(question("a", []), "b", "stop"),) * count
    path = folder / f"{count}.json"
    saving.write(path, saving.SavedChat(Conversation(None, turns), "tiny"))
    return lambda: saving.read(path)


@pytest.mark.parametrize(
    "make", [safetensors_header, zip_members, index, manifest, saved_chat], ids=lambda f: f.__name__
)
def test_of_files_too(tmp_path: Path, make: Callable[[Path, int], Callable[[], object]]) -> None:
    calls = [make(tmp_path, count) for count in (50, 200)]
    small, large = [max(work(call), work(call)) for call in calls]
    assert large < MOST * small + 2_000, (small, large)


MEBI = 2**20
LARGEST = {
    "json: strings": lambda: loads(b'["' + b'\\"' * (MEBI // 2)),
    "json: an open string in each": lambda: loads(b'"[' * (MEBI // 2)),
    "json: digits": lambda: loads(b"[" + b"1" * MEBI + b"]"),
    "json: escapes": lambda: loads(b'["' + b"\\u0041" * (MEBI // 6) + b'"]'),
    "pickle: strings": lambda: scan(b"\x80\x02}(" + text("a") * MEBI + b"u."),
    "pickle: numbers": lambda: scan(b"\x80\x02\x8b" + struct.pack("<I", MEBI) + b"\x7f" * MEBI),
    "pickle: decimal": lambda: scan(b"I" + b"1" * MEBI + b"\n."),
    "tokenizer.model: one line": lambda: parse_tiktoken(b"YQ==" * (MEBI // 4), Where("x")),
    "address": lambda: _parse("http://" + "a." * MEBI),
    "terminal: an open sequence": lambda: sanitize("\x1b]" + "x" * MEBI),
    "terminal: words": lambda: filled("'" * MEBI, 80),
}


@pytest.mark.parametrize("name", LARGEST)
def test_the_largest_input_ends(name: str) -> None:
    def read() -> bool:
        with contextlib.suppress(MmchatError, ValueError):
            LARGEST[name]()
        return True

    assert in_a_child(read)
