"""The prompt of a chat is up before torch is imported: here torch waits until the test says go."""

import shutil
import signal

import pytest

from mmchat.catalog.known import data_path
from tests.repl.terminals import READY, ChatTerminal

pytestmark = [pytest.mark.process, pytest.mark.timeout(300)]


@pytest.fixture
def folder(tmp_path):
    shutil.copy(data_path("assets", "dog.jpg"), tmp_path)
    return tmp_path


def held(folder, *options, model="tiny"):
    program = "tests.repl.held_torch", str(folder)
    return ChatTerminal(folder, None, *options, model=model, program=program)


def test_the_prompt_is_used_while_torch_is_imported_and_the_question_waits(folder):
    chat = held(folder)
    chat.wait_until((folder / "imported").exists, "import of torch")
    imported = set((folder / "imported").read_text().split())
    assert not {"torch._C", "numpy", "PIL"} & imported
    assert "prompt_toolkit.application.run_in_terminal" in imported
    assert "loading tiny   0 pictures" in chat.bottom()

    chat.line("\\help")
    assert "Take back the last question and its answer" in chat.text()
    chat.line("\\image dog.jpg")
    assert "attached dog.jpg" in chat.text()
    assert "loading tiny   1 picture, 1 new" in chat.bottom()
    chat.send("\\set temp")
    chat.wait(r"> \\set temp\n +temperature")  # offered below
    chat.send("\x03")
    chat.line("\\set temperature 0")
    assert "temperature is 0" in chat.text()

    chat.send("What's in this image?\r")
    chat.wait(r"loading tiny \(\d+ s, Ctrl-C stops\)")
    prompts = chat.written.count(READY)
    chat.send("\x03")
    chat.wait_until(lambda: chat.written.count(READY) > prompts, "prompt")
    chat.settle()
    assert "stopped" in chat.lines()
    chat.send("\x1b[A")  # which brings it back
    chat.wait(r"> What's in this image\?")
    chat.send("\r")
    (folder / "go").touch()
    chat.wait(r"tiny +cpu float32 +context [1-9]\d*/131,072")
    assert "A brown dog." in chat.lines()
    chat.send("\x04")
    assert chat.end() == 0

    (folder / "go").unlink()  # what is resumed and attached needs no model either
    chat = held(folder, "--continue", "-i", "dog.jpg")
    assert "going on after 1 turn with 1 picture" in chat.text()
    assert "loading tiny   2 pictures, 1 new" in chat.bottom()
    chat.line("\\undo")
    assert 'took back "What\'s in this image?" with its picture dog.jpg' in chat.text()
    chat.send("\x04")
    assert chat.end() == 0


@pytest.mark.parametrize(("key", "code"), [("\x04", 0), ("\x03", 130), (signal.SIGTERM, 143)])
def test_who_leaves_while_it_loads_waits_for_nothing(folder, key, code):
    chat = held(folder)
    if isinstance(key, str):
        chat.send(key)
    else:
        chat.child.kill(key)
    assert chat.end() == code
    assert "Traceback" not in chat.text()


def test_a_question_of_the_command_line_is_answered_before_the_first_prompt(folder):
    (folder / "go").touch()
    chat = held(folder, "-i", "dog.jpg", "What's in this image?")
    lines = chat.lines()
    said = ["> What's in this image?", "A brown dog."]
    assert [line for line in lines if line in said] == said
    assert "attached dog.jpg" in chat.text()
    chat.send("\x04")
    assert chat.end() == 0


def test_what_cannot_be_loaded_ends_the_prompt_with_its_line(folder):
    broken = folder / "broken"
    shutil.copytree(data_path("assets", "tiny"), broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    params = str(data_path("model_params", "tiny.json"))
    chat = held(folder, "--params-path", params, model=str(broken))
    chat.line("\\image dog.jpg")
    chat.send("What colour")
    chat.wait("> What colour")
    (folder / "go").touch()
    assert chat.end() == 3
    said = " ".join(chat.text().split())
    assert said.count("mmchat: error: ") == 1
    assert said.endswith("download it again")
    assert "Traceback" not in said
