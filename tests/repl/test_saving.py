"""Saved chats come back as they were, and files that are not chats are refused in one line."""

import base64
import io
import json
import stat

import pytest
from PIL import Image as PILImage

from mmchat.conversation import Conversation, Image, Text, Turn, question
from mmchat.errors import DiskError, MmchatError, SavedChatError
from mmchat.images import from_pil
from mmchat.repl import chats, saving


@pytest.fixture
def chat():
    red = from_pil(PILImage.new("RGB", (30, 20), (200, 0, 0)), source="/home/me/red one.png")
    noise = from_pil(PILImage.effect_noise((41, 33), 60).convert("RGB"), source="noise")
    first = Turn(question("Is <|image|> red?", [red], marks=True), "Yes \x1b[31m\ud800 🐶", "stop")
    return Conversation(
        "Be brief.", (first, Turn(question("And?", [noise, red]), "", "interrupted"))
    )


def plain(chat):
    """A conversation with pictures as their content."""
    turns = [
        [
            (part.content_hash, part.source) if isinstance(part, Image) else part.text
            for part in turn.question.content
        ]
        + [turn.answer, turn.reason]
        for turn in chat.turns
    ]
    return chat.system, turns


@pytest.mark.parametrize("name", ["folder", "one.json"])
def test_a_chat_comes_back_as_it_was_also_from_another_place(name, chat, tmp_path):
    saving.write(tmp_path / name, saving.SavedChat(chat, "tiny"))
    (tmp_path / name).rename(tmp_path / f"moved-{name}")
    found = saving.read(tmp_path / f"moved-{name}")
    assert plain(found.conversation) == plain(chat)
    assert found.model == "tiny"


def test_a_chat_whose_first_save_was_killed_is_saved_again(chat, tmp_path):
    saving.write(tmp_path / "chat", saving.SavedChat(chat, "tiny"))
    (tmp_path / "chat" / saving.DOCUMENT).unlink()
    (tmp_path / "chat" / ".mmchat-0123456789abcdef.tmp").write_text("half")
    saving.write(tmp_path / "chat", saving.SavedChat(chat, "tiny"))
    assert plain(saving.read(tmp_path / "chat").conversation) == plain(chat)
    (tmp_path / "other" / "mine").mkdir(parents=True)
    with pytest.raises(DiskError, match="other files"):
        saving.write(tmp_path / "other", saving.SavedChat(chat, "tiny"))


def test_a_picture_is_stored_once(chat, tmp_path):
    folder = chats.new_chat(tmp_path, "chat")
    folder.write(saving.SavedChat(chat, "tiny"))
    pictures = list((tmp_path / "chat" / "images").iterdir())
    assert len(pictures) == 2
    times = [p.stat().st_mtime_ns for p in pictures]
    folder.write(saving.SavedChat(chat.without_last(), "tiny"))
    assert [p.stat().st_mtime_ns for p in pictures] == times


def test_only_the_user_can_read_what_is_saved(chat, tmp_path):
    saving.write(tmp_path / "a" / "chat", saving.SavedChat(chat, "tiny"))
    saving.write(tmp_path / "one.json", saving.SavedChat(chat, "tiny"))
    for file in tmp_path.rglob("*"):
        assert stat.S_IMODE(file.stat().st_mode) == (0o700 if file.is_dir() else 0o600), file


def test_a_folder_with_other_files_is_not_written_into(chat, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("x")
    with pytest.raises(DiskError, match="a folder with other files"):
        saving.write(tmp_path / "mine", saving.SavedChat(chat, "tiny"))


def change(document, **changes):
    return {**document, **changes}


BROKEN = [
    (lambda d: [], "not a chat saved by mmchat"),
    (lambda d: change(d, format="other"), "not a chat saved by mmchat"),
    (lambda d: change(d, version=2), "version 2; this mmchat reads 1"),
    (lambda d: change(d, extra=1), "unknown key 'extra'"),
    (lambda d: change(d, system=5), "system"),
    (lambda d: change(d, turns=[{"question": [], "answer": "x"}]), "missing key 'finish_reason'"),
    (lambda d: change(d, images=[{"content_hash": "../../etc/passwd"}]), "no hash of a picture"),
    (
        lambda d: change(d, turns=[{**d["turns"][0], "question": []}]),
        "a question has neither text nor a picture",
    ),
    (lambda d: change(d, images=[]), "is not in the chat"),
    (lambda d: change(d, images=[{**d["images"][0], "data": "%%"}]), "not valid base64"),
    (lambda d: change(d, images=[{**d["images"][0], "data": "AAAA"}]), "is not a picture|picture"),
    (
        lambda d: change(d, images=[{**d["images"][0], "data": d["images"][1]["data"]}]),
        "was changed after it was saved",
    ),
    (
        lambda d: change(d, images=[{**d["images"][0], "data": two_pages()}]),
        "was changed after it was saved",
    ),
]


def two_pages() -> str:
    """A document in the place of a picture."""
    file = io.BytesIO()
    page = PILImage.new("RGB", (8, 8))
    page.save(file, "TIFF", save_all=True, append_images=[page])
    return base64.b64encode(file.getvalue()).decode()


@pytest.mark.parametrize(("damage", "message"), BROKEN)
def test_what_is_no_saved_chat_is_refused_in_one_line(damage, message, chat, tmp_path):
    file = tmp_path / "x.json"
    saving.write(file, saving.SavedChat(chat, "tiny"))
    file.write_text(json.dumps(damage(json.loads(file.read_text()))))
    with pytest.raises(MmchatError, match=message) as caught:
        saving.read(file)
    assert "\n" not in str(caught.value)


def test_a_cut_file_is_refused(chat, tmp_path):
    file = tmp_path / "x.json"
    saving.write(file, saving.SavedChat(chat, "tiny"))
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(SavedChatError, match="not valid JSON"):
        saving.read(file)


def test_text_parts_stay_apart(tmp_path):
    turn = Turn(question("", []), "x", "length")
    saving.write(tmp_path / "c", saving.SavedChat(Conversation(None, (turn,)), "tiny"))
    [found] = saving.read(tmp_path / "c").conversation.turns
    assert found.question.content == (Text(""),)
    assert found.reason == "length"
