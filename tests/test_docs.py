"""What docs/architecture.md and CONTRIBUTING.md name is in the repository, and under that name."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NAMES = ("docs/architecture.md", "CONTRIBUTING.md")
PAGES = {name: (ROOT / name).read_text("utf-8") for name in NAMES}
FILE = re.compile(r"[\w.-]*[\w-]+(/[\w.-]+)*(/|\.(?:py|md|toml|json|c|txt|yml))|\.ci/\w+")
OF_OTHERS = {"config.json", "utils", "pytest", "pyright", "gpu"}
DEFINITION = re.compile(r"^(?:def |class )?(\w+)(?= =|\(|:)", re.M)
NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")


@cache
def defined() -> dict[str, set[str]]:
    """ "" -> every name that package or tests define; a class of the package -> its names."""
    found: dict[str, set[str]] = defaultdict(set)
    for path in (ROOT / "mmchat").rglob("*.py"):
        found[""] |= {path.stem, path.parent.name}
        tree = ast.parse(path.read_text("utf-8"))
        found[""] |= names_in(tree)
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                found[node.name] |= names_in(node)
    for path in (ROOT / "tests").rglob("*.py"):
        found[""] |= set(DEFINITION.findall(path.read_text("utf-8")))
    return found


def names_in(tree: ast.AST) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                found.add(name)
            case ast.Name(id=name, ctx=ast.Store()) | ast.Attribute(attr=name, ctx=ast.Store()):
                found.add(name)
    return found


def codes(page: str) -> list[str]:
    """What stands between backticks, outside of blocks."""
    text = re.sub(r"^```.*?^```", "", PAGES[page], flags=re.M | re.S)
    return [code for code in re.findall(r"`([^`\n]+)`", text) if code not in OF_OTHERS]


def exists(path: str) -> bool:
    return any((ROOT / base / path).exists() for base in ("", "mmchat", "mmchat/models/mllama"))


@pytest.mark.parametrize("page", PAGES)
def test_every_file_that_a_page_names_exists(page):
    named = [code for code in codes(page) if FILE.fullmatch(code)]
    assert len(named) > 10
    assert [path for path in named if not exists(path)] == []


@pytest.mark.parametrize("page", PAGES)
def test_every_link_of_a_page_leads_to_a_file(page):
    links = re.findall(r"\]\(([^)#:]+)", PAGES[page])
    assert [link for link in links if not (ROOT / page).parent.joinpath(link).exists()] == []


@pytest.mark.parametrize("page", PAGES)
def test_every_name_in_code_that_a_page_uses_is_defined(page):
    named = [code for code in codes(page) if NAME.fullmatch(code) and not FILE.fullmatch(code)]
    assert len(named) > 10
    assert [name for name in named if not is_defined(name)] == []


def is_defined(name: str) -> bool:
    *owners, last = name.split(".")
    if owners and owners[-1] in defined():
        return last in defined()[owners[-1]]
    return defined()[""].issuperset([*owners, last])


@pytest.mark.parametrize("name", ["Engine.stop", "Engin", "engine.stepp"])
def test_a_name_that_is_nowhere_is_seen(name):
    assert not is_defined(name)


def test_every_command_of_the_table_of_differences_selects_tests():
    page = (ROOT / "docs/correctness.md").read_text("utf-8")
    commands = re.findall(r"`pytest (?:-m slow )?(tests\S*) -k (?:\"(.+?)\"|(\w+))`", page)
    assert len(commands) == page.count(" -k ") >= 20
    for place, several, one in commands:
        files = [ROOT / place] if place.endswith(".py") else (ROOT / place).rglob("test_*.py")
        code = "".join(f'"{file.stem}"{file.read_text("utf-8")}' for file in files)
        for word in (several or one).split(" or "):
            assert re.search(rf"^def \w*{word}\w*\(|\"\w*{word}", code, re.M), (place, word)


def tree() -> dict[str, str]:
    """Path -> what the tree of the architecture says of it; a folder's path ends in "/"."""
    [block] = re.findall(r"^```text\n(.*?)^```$", PAGES["docs/architecture.md"], re.M | re.S)
    found, parents = {}, []
    for line in filter(str.strip, block.splitlines()):
        name, *said = line.split()
        del parents[(len(line) - len(line.lstrip())) // 2 :]
        found["".join([*parents, name])] = " ".join(said)
        parents.append(name)
    return found


def test_the_tree_names_what_is_there():
    assert [path for path in tree() if not (ROOT / path).exists()] == []
    assert [path for path, said in tree().items() if not said and path != "mmchat/"] == []


def test_the_tree_names_every_package():
    packages = {path.parent for path in (ROOT / "mmchat").rglob("__init__.py")}
    named = {ROOT / path for path in tree()}
    named |= {path.parent for path in named}
    assert sorted(packages - named) == []
