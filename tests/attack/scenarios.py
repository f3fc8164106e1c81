"""What writes files: each is run whole, killed or given a fault at one of its calls, and run again.

As a program (`python -m tests.attack.scenarios`, with faults.c preloaded) it forks a child for each
line of JSON on stdin, and says on stdout how the child ended.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image as PILImage

from mmchat.checkpoints.checkpoint import open_checkpoint
from mmchat.checkpoints.manifest import MANIFEST_NAME, read_manifest
from mmchat.conversation import Conversation, Turn, question
from mmchat.errors import DiskError, MmchatError
from mmchat.export import ExportPlan, export_model
from mmchat.export.plan import Format
from mmchat.hardware import kept_code
from mmchat.hub import download as hub
from mmchat.hub.holdings import holding
from mmchat.hub.integrity import verify_folder
from mmchat.images import from_pil
from mmchat.loading.options import LoadOptions
from mmchat.repl import saving
from mmchat.storage import atomic_file
from tests.hub_server import REPO


class Scenario:
    """One way to write below a folder. Content is "old" or "new"."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, content: str) -> None:
        raise NotImplementedError

    def read(self) -> str | None:
        """The content that is there whole, None if there is nothing; AssertionError if torn."""
        raise NotImplementedError

    def names(self) -> set[str]:
        """All that may be there after a whole run."""
        raise NotImplementedError

    def left(self) -> set[str]:
        found = {str(p.relative_to(self.folder)) for p in self.folder.rglob("*") if not p.is_dir()}
        found |= {p.name for p in self.folder.rglob(".*")}
        return found - self.names()


class Output(Scenario):
    """`-o FILE`."""

    def write(self, content: str) -> None:
        atomic_file.write_text(self.folder / "answer.txt", content * 20_000)

    def read(self) -> str | None:
        path = self.folder / "answer.txt"
        if not path.exists():
            return None
        text = path.read_text()
        assert text in ("old" * 20_000, "new" * 20_000)
        return text[:3]

    def names(self) -> set[str]:
        return {"answer.txt"}


class Chat(Scenario):
    """A chat that is saved after each turn, with a picture."""

    def write(self, content: str) -> None:
        picture = from_pil(PILImage.effect_noise((40, 30), 60).convert("RGB"))
        turns = (Turn(question("?", [picture], marks=True), content, "stop"),)
        saving.write(self.folder / "chat", saving.SavedChat(Conversation(None, turns), "tiny"))

    def read(self) -> str | None:
        if not (self.folder / "chat" / saving.DOCUMENT).exists():
            return None
        return saving.read(self.folder / "chat").conversation.turns[0].answer

    def left(self) -> set[str]:
        return {p.name for p in self.folder.rglob(".*")}


class Cache(Scenario):
    """Native code that is kept."""

    def write(self, content: str) -> None:
        def make(path: Path) -> None:
            path.write_text(content * 1000)

        if not kept_code.find(self.folder, content, ".so"):
            try:
                kept_code.keep(self.folder, content, ".so", make)
            except OSError as error:
                raise DiskError(str(error)) from None

    def read(self) -> str | None:
        for content in ("new", "old"):
            for path in self.folder.glob(f"{content}-*.so"):
                assert path.read_text() == content * 1000
                return content
        return None

    def left(self) -> set[str]:
        return {p.name for p in self.folder.iterdir() if p.suffix != ".so"}


class Export(Scenario):
    """`mmchat export`, which replaces its own folder."""

    format: Format = "safetensors"
    model = "ATTACK_MODEL"

    def write(self, content: str) -> None:
        dtype = {"old": "bfloat16", "new": "float32"}[content]
        options = LoadOptions(os.environ[self.model], device="cpu", dtype=dtype)
        export_model(ExportPlan(options, self.folder / "out", self.format))

    def read(self) -> str | None:
        out = self.folder / "out"
        if not out.exists():
            return None
        assert not verify_folder(out).faults
        manifest = read_manifest(out / MANIFEST_NAME)
        assert manifest
        assert {*manifest.files, MANIFEST_NAME} == {p.name for p in out.iterdir()}
        return {"bfloat16": "old", "float32": "new"}[self.dtype(out)]

    def dtype(self, out: Path) -> str:
        with open_checkpoint(out) as written:
            [dtype] = {entry.dtype for entry in written.entries.values()}
        manifest = read_manifest(out / MANIFEST_NAME)
        assert manifest
        assert manifest.export
        assert manifest.export.dtype == dtype
        return dtype

    def left(self) -> set[str]:
        return {p.name for p in self.folder.iterdir()} - {"out"}


class ExportHub(Export):
    """`mmchat export --format hf` of Meta's files."""

    format = "hf"
    model = "ATTACK_META"

    def dtype(self, out: Path) -> str:
        return json.loads((out / "config.json").read_text())["torch_dtype"]


class Download(Scenario):
    """`mmchat download` into the cache."""

    def write(self, content: str) -> None:
        os.environ["HF_HUB_CACHE"] = str(self.folder)
        hub.carry_out(hub.plan(hub.Request(REPO)), workers=1)

    def read(self) -> str | None:
        os.environ["HF_HUB_CACHE"] = str(self.folder)
        found = holding(REPO)
        for path in self.folder.glob("models--*/snapshots/*/[!.]*"):
            # a copy, which is checked below, where a link could not be made
            assert path.resolve().parent.name == "blobs" or not path.is_symlink()
        if found.state != "present" or found.folder is None:
            return None
        assert not verify_folder(found.folder).faults
        return "new"

    def left(self) -> set[str]:
        return {p.name for p in self.folder.rglob(".*")} | {
            p.name for p in self.folder.rglob("*.part")
        }


SCENARIOS: dict[str, type[Scenario]] = {
    "-o": Output, "chat": Chat, "cache": Cache, "export": Export, "export hf": ExportHub,
    "download": Download,
}  # fmt: skip
NOTHING, FAIL, KILL_BEFORE, KILL_AFTER = range(4)


def _child(job: dict, writing: int) -> None:
    library = ctypes.CDLL(os.environ["LD_PRELOAD"])
    said = {"message": ""}
    begin = library.faults_arm
    begin(os.fsencode(job["folder"]), job["nth"], job["action"], job["error"])
    try:
        SCENARIOS[job["scenario"]](Path(job["folder"])).write(job["content"])
        said["outcome"] = "done"
    except MmchatError as error:
        said |= {"outcome": type(error).__name__, "message": str(error)}
    except BaseException:
        said |= {"outcome": "bug", "message": traceback.format_exc()}
    said["calls"] = library.faults_seen()
    begin(b"", 0, NOTHING, 0)
    os.write(writing, json.dumps(said).encode())


def _run(job: dict) -> dict:
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        try:
            _child(job, writing)
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        said = pipe.read()
    _, status = os.waitpid(child, 0)
    killed = {"outcome": "killed" if os.WIFSIGNALED(status) else "no answer", "calls": job["nth"]}
    return json.loads(said) if said else killed


def _serve(answer: Callable[[dict], dict]) -> None:
    for line in sys.stdin:
        sys.stdout.write(json.dumps(answer(json.loads(line))) + "\n")
        sys.stdout.flush()


def _import_all() -> None:
    """Run each once, so that no child imports and compiles anew what all of them need."""
    for scenario in SCENARIOS.values():
        with tempfile.TemporaryDirectory() as folder:
            scenario(Path(folder)).write("new")
    gc.collect()
    gc.freeze()


if __name__ == "__main__":
    torch.set_num_threads(1)
    _import_all()
    _serve(_run)
