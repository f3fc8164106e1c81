"""Where chats are kept, who may write them, and how they are found again."""

import json
import os
import time
from pathlib import Path

import pytest
from PIL import Image as PILImage

from mmchat.conversation import Conversation, Turn, question
from mmchat.errors import DiskError, SavedChatError, UsageError
from mmchat.images import from_pil
from mmchat.repl import chats, saving
from mmchat.repl.chats import Keeper
from tests.repl.terminals import ChatTerminal


def talk(*answers):
    return Conversation(None, tuple(Turn(question("Hi", []), answer) for answer in answers))


@pytest.fixture
def keeper(tmp_path):
    """Makes programs that keep a chat; `.notes` is what they said."""
    made = []

    def make(saves=True):
        notes = []
        kept = Keeper(
            tmp_path, lambda chat: saving.SavedChat(chat, "tiny"), notes.append, saves=saves
        )
        kept.notes = notes
        made.append(kept)
        return kept

    yield make
    for kept in made:
        kept.start_new()


def answers(path):
    return [turn["answer"] for turn in json.loads((path / "chat.json").read_text())["turns"]]


def test_two_new_chats_of_one_second_are_two(keeper, monkeypatch):
    monkeypatch.setattr(time, "strftime", lambda form: "2026-11-29_150000")
    first, second = keeper(), keeper()
    first.save(talk("A"))
    second.save(talk("B"))
    first.save(talk("A", "A2"))
    assert answers(first.folder.path) == ["A", "A2"]
    assert answers(second.folder.path) == ["B"]
    assert second.folder.path.name == "2026-11-29_150000-2"


def test_a_chat_that_another_window_has_goes_on_as_a_copy(keeper, tmp_path):
    first, second, third = keeper(), keeper(), keeper()
    first.save_as("trip", talk("one"))
    second.go_on(tmp_path / "trip")
    assert second.notes == ["'trip' is open in another window; this one goes on as 'trip-2'"]
    second.save(talk("one", "two"))
    first.save(talk("one", "other two"))
    assert answers(tmp_path / "trip") == ["one", "other two"]
    assert answers(tmp_path / "trip-2") == ["one", "two"]
    first.start_new()  # left, so that the chat is free
    third.go_on(tmp_path / "trip")
    assert third.notes == []
    third.save(talk("three"))
    assert answers(tmp_path / "trip") == ["three"]


def test_a_name_is_given_to_the_chat_and_never_taken_from_another(keeper, tmp_path):
    kept = keeper()
    kept.save(talk("one"))
    kept.save_as("trip", talk("one"))
    assert [path.name for path in tmp_path.iterdir()] == ["trip"]  # renamed, not copied
    kept.save(talk("one", "two"))
    assert answers(tmp_path / "trip") == ["one", "two"]
    kept.save_as("trip", talk("one"))  # its own name again
    kept.save_as("other", talk("one"))
    assert {path.name for path in tmp_path.iterdir()} == {"trip", "other"}
    with pytest.raises(UsageError, match="there is a chat 'trip' already"):
        kept.save_as("trip", talk("three"))
    assert answers(tmp_path / "trip") == ["one"]


@pytest.mark.parametrize("saves", [True, False])
def test_a_name_by_the_time_that_was_told_stays_as_a_chosen_one_does(saves, keeper, tmp_path):
    kept, name = keeper(saves=saves), "2026-12-02_150000"
    kept.save(talk("one"))
    kept.save_as(kept.folder.path.name if saves else name, talk("one"))
    first = kept.folder.path
    kept.save_as("trip", talk("one", "two"))
    assert answers(first) == ["one"]
    assert answers(tmp_path / "trip") == ["one", "two"]


@pytest.mark.parametrize("name", [".hidden", "x" * 300, "a\nb", "\x1b[2J", "ä" * 101, ".."])
def test_what_is_no_name_for_a_chat_is_refused(name, keeper, tmp_path):
    with pytest.raises(UsageError, match="is no name for a chat"):
        keeper().save_as(name, talk("one"))
    assert list(tmp_path.iterdir()) == []


def test_without_saving_only_what_is_asked_for_is_kept(keeper, tmp_path):
    kept = keeper(saves=False)
    kept.save(talk("one"))
    assert list(tmp_path.iterdir()) == []
    kept.save_as("first", talk("one"))
    kept.save(talk("one", "secret"))
    assert answers(tmp_path / "first") == ["one"]
    kept.save_as("first", talk("one", "two"))
    assert answers(tmp_path / "first") == ["one", "two"]


def test_the_latest_chat_and_chats_by_name(keeper, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SavedChatError, match="no chat to continue"):
        chats.latest_chat(tmp_path)
    first, second = keeper(), keeper()
    first.save_as("first", talk("one"))
    second.save_as("second", talk("two"))
    os.utime(tmp_path / "first" / "chat.json", ns=(1, 1))
    assert chats.latest_chat(tmp_path) == tmp_path / "second"
    first.save(talk("one", "more"))
    assert chats.latest_chat(tmp_path) == tmp_path / "first"
    assert chats.find_chat("first", tmp_path) == tmp_path / "first"
    assert chats.find_chat("./first", tmp_path) == tmp_path / "first"
    with pytest.raises(SavedChatError, match="nearest: 'second'"):
        chats.find_chat("secnd", tmp_path)
    with pytest.raises(SavedChatError, match=r"'\./first' means the one here"):
        chats.find_chat("first", tmp_path / "none")


@pytest.mark.parametrize("name", [".", "..", "/", "~nosuch/x", "x" * 300, "~", "\0", "/x\0", "a\n"])
def test_what_is_no_chat_is_said_whatever_its_name(name, tmp_path):
    with pytest.raises(SavedChatError, match="no saved chat") as caught:
        chats.find_chat(name, tmp_path)
    assert "\n" not in str(caught.value)


def test_removing_a_chat_leaves_what_is_not_of_it(keeper, tmp_path):
    picture = from_pil(PILImage.new("RGB", (3, 2)))
    chat = Conversation(None, (Turn(question("Hi", [picture]), "A dog"),))
    for name in ("whole", "mixed"):
        kept = keeper()
        kept.save_as(name, chat)
        if name == "mixed":
            (tmp_path / name / "images" / "notes.png").write_text("mine")
        kept.folder.remove()
    left = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert left == [tmp_path / "mixed" / "images" / "notes.png"]
    assert not (tmp_path / "whole").exists()


def test_a_chat_in_which_nothing_is_asked_is_not_kept_and_never_the_latest(keeper, tmp_path):
    asked = keeper()
    asked.save_as("asked", talk("one"))
    undone = keeper()
    undone.save_as("undone", talk("one"))
    undone.save(talk())
    failed = keeper()
    failed.save(talk(""))  # while the question is answered
    failed.save(talk())
    undone.go_on(tmp_path / "undone")  # which it has already
    undone.save(talk())
    assert undone.notes == []
    names = [path.name for path in tmp_path.iterdir()]
    assert len(names) == 3  # so far, since more may be asked
    os.utime(tmp_path / "asked" / "chat.json", ns=(1, 1))
    assert chats.latest_chat(tmp_path) == tmp_path / "asked"
    assert [chat.path.name for chat in chats.list_chats(tmp_path)] == ["asked"]
    for kept in (asked, undone, failed):
        kept.start_new()
    assert [path.name for path in tmp_path.iterdir()] == ["asked"]


@pytest.mark.process
def test_a_chat_whose_only_question_was_taken_back_is_gone_when_it_is_left(tmp_path):
    place = tmp_path / "state" / "mmchat" / "chats"
    chat = ChatTerminal(tmp_path, ["It is red."])
    chat.line("What colour?")
    chat.line("\\undo")
    assert len(list(place.iterdir())) == 1
    chat.send("\x04")
    assert chat.end() == 0
    assert list(place.iterdir()) == []


@pytest.mark.process
def test_two_windows_go_on_with_one_chat_and_no_turn_is_lost(tmp_path):
    place = tmp_path / "state" / "mmchat" / "chats"
    start = ChatTerminal(tmp_path, ["It is **red**."])
    start.line("What colour?")
    start.line("\\save trip")
    start.send("\x04")
    assert start.end() == 0
    first = ChatTerminal(tmp_path, ["One."], "--continue")
    assert "> What colour?\nIt is red.\n" in first.text()  # the last turn
    second = ChatTerminal(tmp_path, ["Two."], "--resume", "trip")
    assert "'trip' is open in another window; this one goes on as 'trip-2'" in second.text()
    first.line("First?")
    second.line("Second?")
    for chat in (first, second):
        chat.send("\x04")
        assert chat.end() == 0
    assert answers(place / "trip") == ["It is **red**.", "One."]
    assert answers(place / "trip-2") == ["It is **red**.", "Two."]


def test_the_folder_of_chats_may_be_on_a_disk_without_locks(keeper, monkeypatch):
    def no_locks(descriptor, operation):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(chats.fcntl, "flock", no_locks)
    kept = keeper()
    kept.save(talk("one"))
    assert answers(Path(kept.folder.path)) == ["one"]


def test_a_chat_that_is_a_link_is_neither_listed_nor_removed(keeper, tmp_path):
    held = keeper()
    elsewhere = tmp_path / "no chat" / "elsewhere"
    elsewhere.mkdir(parents=True)
    (elsewhere / "chat.json").write_text("{}")
    link = held.chats / "link"
    link.symlink_to(elsewhere)
    assert chats.list_chats(held.chats) == []
    with pytest.raises(DiskError, match="cannot open"):
        chats.hold(link)
    assert (elsewhere / "chat.json").exists()


def test_pictures_behind_a_link_stay_when_a_chat_is_removed(keeper, tmp_path):
    held = keeper()
    victim = tmp_path / "victim" / f"{'a' * 64}.png"
    victim.parent.mkdir()
    victim.write_bytes(b"mine")
    chat = chats.new_chat(held.chats, "evil")
    (chat.path / "images").symlink_to(victim.parent)
    with pytest.raises(DiskError, match="is a link"):
        chat.write(saving.SavedChat(talk("a"), "tiny", {}))
    chat.remove()
    assert victim.read_bytes() == b"mine"


def test_a_pipe_in_the_place_of_a_chat_hides_no_other(keeper):
    held = keeper()
    held.save(talk("a"))
    pipe = held.chats / "pipe"
    pipe.mkdir()
    os.mkfifo(pipe / "chat.json")
    assert [chat.path for chat in chats.list_chats(held.chats)] == [held.folder.path]
    assert chats.latest_chat(held.chats) == held.folder.path
