"""Each dangerous thing is done in one place, where it is guarded; nowhere else in the package."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "mmchat"

# What is dangerous, and the files that may do it.
PLACES: dict[str, set[str]] = {
    "opens a picture": {"images/decode.py"},
    "opens a document": {"images/pdf.py"},
    "draws a page": {"images/decode.py"},
    "decodes a picture": {"images/worker/process.py"},
    "unpickles or runs code": {
        "images/clipboard.py",  # runs wl-paste and xclip
        "images/worker/__init__.py",  # runs this Python, to decode pictures
        "quant/kernels/compiler.py",  # runs the C compiler on the package's own source
        "quant/kernels/native.py",  # asks whether there is one
        "parallel/launch.py",  # runs this Python, for the ranks that share a model
    },
    "reads weights with a library": set(),
    "talks to the network": {
        "batch/cluster.py",  # whether a cluster is there at all
        "hub/client.py",
        "images/web/__init__.py",
        "images/web/transport.py",
        "parallel/group.py",  # says this machine's name to the other ranks
        "parallel/launch.py",  # listens on 127.0.0.1, or reaches the rank 0 of a launcher
        "server/running.py",  # listens
    },
    "writes a file": {
        "storage/atomic_file.py",
        "storage/safe_files.py",
        "checkpoints/writers.py",  # weights, into a folder that is renamed when it is complete
    },
    "opens a descriptor for writing": {
        "storage/safe_files.py",
        "cli/console.py",
    },
    "makes a Console": {"cli/console.py"},
    "writes to a standard stream": set(),  # but by cli/console.py, through its `write_out`
    "lets text become special tokens": {"tokenizers/byte_pair.py"},
    "renders a template": set(),
    "compares spellings": {"spelling.py"},  # quadratic work, bounded there
    "opens for reading": {
        "checkpoints/hub_cache.py",
        "checkpoints/read_ahead.py",
        "checkpoints/manifest.py",
        "strict_json.py",
        "evals/scenes/phrasings.py",  # of the package itself
        "explain/show.py",  # of the package itself
        "images/sources.py",
        "repl/chats.py",  # opens folders, to lock them
        "storage/safe_files.py",
        "quant/kernels/native.py",
        "runtime/native_steps.py",  # the source that a program was made from
        "hardware/cpu.py",
        "cli/console.py",
        "cli/serve.py",  # opens a browser
        "server/media.py",  # below the folder that --media-dir names, component by component
        "server/page.py",  # of the package itself
    },
}

CALLS = {
    "PIL.Image.open": "opens a picture",
    "PIL.ImageFile.Parser": "opens a picture",
    "pillow_heif.open_heif": "opens a picture",
    "pypdfium2.PdfDocument": "opens a document",
    "mmchat.images.pdf.draw": "draws a page",
    "mmchat.images.decode.decode": "decodes a picture",
    "torch.load": "unpickles or runs code",
    "numpy.load": "unpickles or runs code",
    "eval": "unpickles or runs code",
    "exec": "unpickles or runs code",
    "compile": "unpickles or runs code",
    "os.system": "unpickles or runs code",
    "os.popen": "unpickles or runs code",
    "torch.save": "writes a file",
    "numpy.save": "writes a file",
    "rich.console.Console": "makes a Console",
    "print": "writes to a standard stream",
    "rich.print": "writes to a standard stream",
    "typer.echo": "writes to a standard stream",
    "sys.stdout.write": "writes to a standard stream",
    "sys.stderr.write": "writes to a standard stream",
}
IMPORTS = {
    "pickle": "unpickles or runs code",
    "marshal": "unpickles or runs code",
    "shelve": "unpickles or runs code",
    "subprocess": "unpickles or runs code",
    "safetensors": "reads weights with a library",
    "http": "talks to the network",
    "urllib.request": "talks to the network",
    "requests": "talks to the network",
    "httpx": "talks to the network",
    "httpx2": "talks to the network",
    "socket": "talks to the network",
    "jinja2": "renders a template",
    "difflib": "compares spellings",
}
KEYWORDS = {
    "allowed_special": "lets text become special tokens",
    "trust_remote_code": "unpickles or runs code",
}


def findings(tree: ast.Module) -> set[str]:
    """The kinds of danger that a module contains."""
    names: dict[str, str] = {}
    found: set[str] = set()
    for node in ast.walk(tree):
        for local, full in imported(node):
            names[local] = full
            found |= {kind for root, kind in IMPORTS.items() if f"{full}.".startswith(f"{root}.")}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            found |= set(call_findings(node, names))
        elif isinstance(node, ast.Attribute) and node.attr in ("O_WRONLY", "O_RDWR", "O_CREAT"):
            found.add("opens a descriptor for writing")
    return found


def imported(node: ast.AST) -> Iterator[tuple[str, str]]:
    """(local name, full name) of what an import statement brings in."""
    if isinstance(node, ast.Import):
        for alias in node.names:
            yield (
                alias.asname or alias.name.split(".")[0],
                (alias.name if alias.asname else alias.name.split(".")[0]),
            )
            yield f"import {alias.name}", alias.name
    elif isinstance(node, ast.ImportFrom):
        for alias in node.names:
            yield alias.asname or alias.name, f"{node.module}.{alias.name}"


def call_findings(call: ast.Call, names: dict[str, str]) -> Iterator[str]:
    full = dotted(call.func, names)
    if full in CALLS:
        yield CALLS[full]
    yield from (KEYWORDS[k.arg] for k in call.keywords if k.arg in KEYWORDS)
    method = full.rsplit(".", 1)[-1]
    if method in ("write_text", "write_bytes", "save_file", "touch"):
        if not full.startswith("mmchat.storage.atomic_file."):
            yield "writes a file"
    elif method in ("open", "fdopen") and CALLS.get(full) != "opens a picture":
        mode = open_mode(call, is_method=full not in ("open", "io.open", "os.fdopen", "os.open"))
        yield "writes a file" if set(mode) & set("wax+") else "opens for reading"
    elif method in ("read_text", "read_bytes"):
        yield "opens for reading"


def open_mode(call: ast.Call, *, is_method: bool) -> str:
    """The mode of an open call; one that cannot be read counts as writing."""
    position = 0 if is_method else 1
    given = [k.value for k in call.keywords if k.arg == "mode"]
    if len(call.args) > position and not given:
        given = [call.args[position]]
    if not given:
        return "r"
    if isinstance(given[0], ast.Constant) and isinstance(given[0].value, str):
        return given[0].value
    return "r" if is_os_flags(given[0]) else "w"


def is_os_flags(node: ast.expr) -> bool:
    """Flags of os.open; writing ones are found by their names."""
    return isinstance(node, ast.BinOp | ast.Attribute | ast.Name)


def dotted(node: ast.expr, names: dict[str, str]) -> str:
    """`PIL.Image.open` for `PILImage.open`; `?.open` where the object is not a plain name."""
    if isinstance(node, ast.Name):
        return names.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value, names)}.{node.attr}"
    return "?"


@cache
def dangers() -> dict[str, set[str]]:
    """The kinds of danger in each module of the package."""
    files = sorted(PACKAGE.rglob("*.py"))
    return {str(f.relative_to(PACKAGE)): findings(ast.parse(f.read_text())) for f in files}


@pytest.mark.parametrize("kind", PLACES)
def test_each_danger_stays_in_its_place(kind):
    found = {name for name, kinds in dangers().items() if kind in kinds}
    assert found == PLACES[kind]


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("from PIL import Image\nImage.open(x)", "opens a picture"),
        ("from PIL import Image as P\nP.open(x)", "opens a picture"),
        ("import PIL.Image\nPIL.Image.open(x)", "opens a picture"),
        ("import torch\ntorch.load(x)", "unpickles or runs code"),
        ("from torch import load\nload(x)", "unpickles or runs code"),
        ("import pickle", "unpickles or runs code"),
        ("def f():\n    import subprocess", "unpickles or runs code"),
        ("f(x, trust_remote_code=True)", "unpickles or runs code"),
        ("from safetensors import safe_open", "reads weights with a library"),
        ("from safetensors.torch import load_file", "reads weights with a library"),
        ("import urllib.request", "talks to the network"),
        ("from urllib.request import urlopen", "talks to the network"),
        ("import http.client", "talks to the network"),
        ("open(p, 'w')", "writes a file"),
        ("open(p, mode='ab')", "writes a file"),
        ("p.open('x')", "writes a file"),
        ("p.open(how)", "opens for reading"),
        ("p.write_text('x')", "writes a file"),
        ("import torch\ntorch.save(x, p)", "writes a file"),
        ("import os\nos.open(p, os.O_RDWR)", "opens a descriptor for writing"),
        ("from rich.console import Console\nConsole()", "makes a Console"),
        ("print('x')", "writes to a standard stream"),
        ("import sys\nsys.stderr.write('x')", "writes to a standard stream"),
        ("e.encode(t, allowed_special='all')", "lets text become special tokens"),
        ("from jinja2 import Template", "renders a template"),
        ("p.read_text()", "opens for reading"),
        ("open(p)", "opens for reading"),
    ],
)
def test_the_search_sees_each_form(code, kind):
    assert kind in findings(ast.parse(code))


@pytest.mark.parametrize(
    "code",
    [
        "from mmchat.storage import atomic_file\natomic_file.write_text(p, 'x')",
        "from urllib.parse import quote",
        "re.compile('x')",
        "model.eval()",
    ],
)
def test_the_search_passes_what_is_harmless(code):
    assert findings(ast.parse(code)) == set()
