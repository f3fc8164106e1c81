"""The page's files: nothing but what is written here, and one library that is known by its hash."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "mmchat" / "server" / "page"
MODULES = sorted(PAGE.glob("*.js"))
MARKDOWN_IT = "391f2aa638e75e6c7859d0a5c5650ef0956722a45998f17e05b83bc655778e1e"  # 15.0.3, MIT
# What parses text as markup or code; Trusted Types refuse it too, but only when it runs.
PARSERS = re.compile(
    r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|DOMParser|createContextualFragment"
    r"|setHTML|\beval\(|new Function|srcdoc|javascript:"
)
TAG = re.compile(r"<(?:script|style)\b[^>]*>(?P<inside>[^<]*)")
LONGEST = 300  # lines of a module


def test_the_library_is_the_released_one():
    library = PAGE / "vendor" / "markdown-it.umd.min.js"
    assert hashlib.sha256(library.read_bytes()).hexdigest() == MARKDOWN_IT
    assert "Permission is hereby granted" in (PAGE / "vendor/markdown-it.LICENSE").read_text(
        "utf-8"
    )


def test_index_holds_no_code_and_no_style():
    index = (PAGE / "index.html").read_text("utf-8")
    assert all(not found["inside"].strip() for found in TAG.finditer(index))
    assert not re.search(r"\s(?:style|on\w+)=", index)
    assert not re.search(r"(?:https?:)?//", index)  # nothing from elsewhere


def test_index_names_files_that_are_there():
    index = (PAGE / "index.html").read_text("utf-8")
    names = re.findall(r'(?:href|src)="([^"#]+)"', index)
    assert {"app.js", "app.css", "vendor/markdown-it.umd.min.js"} <= set(names)
    assert all((PAGE / name).is_file() for name in names)


@pytest.mark.parametrize("module", MODULES, ids=lambda path: path.name)
def test_a_module_parses_no_markup_and_asks_nobody_else(module):
    text = module.read_text("utf-8")
    assert not PARSERS.search(text)
    assert set(re.findall(r"https?://[^\s\"`)]+", text)) <= {"http://www.w3.org/2000/svg"}
    assert all((PAGE / name).is_file() for name in re.findall(r'from "\./([^"]+)"', text))
    assert len(text.splitlines()) <= LONGEST


def test_the_samples_are_those_of_the_project():
    samples = sorted((PAGE / "samples").iterdir())
    assert samples
    for sample in samples:
        assert sample.read_bytes() == (ROOT / "assets" / sample.name).read_bytes()
