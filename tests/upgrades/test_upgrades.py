"""What an older mmchat wrote opens, and what none of ours wrote is refused with the next step.

make.py wrote the folders, each with the release of its name.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest

import mmchat
from mmchat.cli import defaults
from mmchat.engine.sampling import SamplingParams
from mmchat.errors import MmchatError
from mmchat.hardware import kept_code
from mmchat.repl import saving

HERE = Path(__file__).parent
RELEASES = sorted(path for path in HERE.iterdir() if (path / "answers.json").exists())
of_each_release = pytest.mark.parametrize("old", RELEASES, ids=lambda path: path.name)


def test_there_are_some() -> None:
    assert [path.name for path in RELEASES][:1] == ["0.1.0"]


@of_each_release
@pytest.mark.parametrize("scheme", ["none", "int8"])
def test_an_exported_folder_answers_as_it_did(old: Path, scheme: str) -> None:
    session = mmchat.load(old / f"export-{scheme}", device="cpu").chat()
    greedy = SamplingParams(temperature=0.0, max_new_tokens=6)
    *_, end = session.send("What is it?", [old / "picture.png"], greedy)
    assert isinstance(end, mmchat.Finished)
    assert [list(end.output_ids), end.text] == json.loads((old / "answers.json").read_text())[
        scheme
    ]


@of_each_release
@pytest.mark.parametrize("name", ["chat", "copy.json"])
def test_a_saved_chat_opens(old: Path, name: str) -> None:
    chat = saving.read(old / name)
    [turn] = chat.conversation.turns
    picture, text = turn.question.content
    assert text.text == "What is it?"
    assert picture.content_hash == mmchat.load_image(old / "picture.png").content_hash
    assert turn.answer == json.loads((old / "answers.json").read_text())["int8"][1]
    assert (chat.model, chat.settings) == ("tiny", {"temperature": 0.5, "seed": 7})


@of_each_release
def test_the_defaults_hold(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(defaults, "config_path", lambda: old / "config.toml")
    found = {name: default.value for name, default in defaults.defaults().items()}
    assert found == {"model": "tiny", "quantize": "int8", "device": "cpu"}


def test_code_that_an_older_one_compiled_is_left_alone(tmp_path: Path) -> None:
    content = b"of another source: loading it would end the process"
    name = f"kernels-{'0' * 24}-{hashlib.sha256(content).hexdigest()}.so"
    (tmp_path / name).write_bytes(content)
    assert kept_code.find(tmp_path, f"kernels-{'1' * 24}", ".so") is None
    assert (tmp_path / name).exists()  # the older one may still run


def changed(file: Path, old: str, new: str) -> None:
    text = file.read_text("utf-8")
    assert old in text
    file.write_text(text.replace(old, new), "utf-8")


@pytest.mark.parametrize(
    ("file", "old", "new", "says"),
    [
        ("chat/chat.json", '"version": 1', '"version": 9', "version 9; this mmchat reads 1"),
        ("export-int8/mmchat-manifest.json", '"format": 1', '"format": 9', "a later mmchat"),
    ],
)
def test_what_a_later_one_wrote_is_refused_with_the_next_step(
    file: str, old: str, new: str, says: str, tmp_path: Path
) -> None:
    path = tmp_path / file
    shutil.copytree(RELEASES[-1] / path.parent.name, path.parent)
    changed(path, old, new)
    with pytest.raises(MmchatError, match=says) as refused:
        saving.read(path.parent) if path.name == "chat.json" else mmchat.load(
            path.parent, device="cpu"
        )
    assert "upgrade mmchat" in str(refused.value)
