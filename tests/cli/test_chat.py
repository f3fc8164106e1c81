r"""`mmchat chat` through pipes, as a shell script drives it; and its commands."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from mmchat import limits
from mmchat.cli import console
from mmchat.repl import chats, commands

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    Image.new("RGB", (200, 100), (120, 80, 40)).save(tmp_path / "dog.png")
    Image.new("RGB", (100, 300), (0, 80, 40)).save(tmp_path / "My Cat.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path


def piped(mmchat_command, lines, *answers, args=(), **options):
    mmchat_command.use(*answers, **options)
    return mmchat_command("chat", *args, stdin="\n".join(lines) + "\n")


def test_the_pictures_of_a_chat_are_bounded_together(mmchat_command, monkeypatch):
    monkeypatch.setattr(limits, "IMAGES_PIXELS", 60_000)  # a dog has 20,000, a cat 30,000
    lines = ["\\image dog.png What?", "\\image 'My Cat.png'", "dog.png And?"]
    lines += ["\\replace 1 My Cat.png", "\\image dog.png", "\\images"]
    done = piped(mmchat_command, lines, b"A dog.")
    errors = re.findall(r"error: .*", done.stderr)
    for error, count in zip(errors, ("70,000", "80,000"), strict=True):
        assert f"error: the pictures have {count} pixels together; at most 60,000" in error
        assert error.endswith("nothing was sent (\\say TEXT sends as is)")
    assert done.exit_code == 5
    assert re.findall(r"^(\d)  My Cat.png", done.stdout, re.MULTILINE) == ["1", "2"]


def test_a_chat_that_is_loaded_is_bounded_with_the_pictures_that_are_attached(
    mmchat_command, monkeypatch
):
    lines = ["\\image dog.png What?", "\\save one", "\\clear", "\\image 'My Cat.png'"]
    lines += ["\\load one", "\\images"]
    monkeypatch.setattr(limits, "IMAGES_PIXELS", 49_999)  # a dog has 20,000, a cat 30,000
    done = piped(mmchat_command, lines, b"A dog.")
    assert "error: the pictures have 50,000 pixels together; at most 49,999" in done.stderr
    assert done.exit_code == 5
    assert re.findall(r"^\d  (.*):", done.stdout, re.MULTILINE) == ["My Cat.png"]


def test_lines_in_and_answers_out(mmchat_command):
    done = piped(mmchat_command, ["Hi", "", "And you?"], b"Hello.", b"Fine.\n")
    assert (done.stdout, done.stderr, done.exit_code) == ("Hello.\nFine.\n", "", 0)


def test_a_script_may_begin_with_a_byte_order_mark_and_have_lines_of_windows(mmchat_command):
    script = b"\xef\xbb\xbf\\image dog.png What is it?\r\nAnd?\r\n\xef\xbb\xbf\\images\r\n"
    mmchat_command.use(b"A dog.", b"And.")
    done = mmchat_command("chat", stdin=script)
    assert done.stderr.startswith("attached dog.png: ")
    assert done.stdout.startswith("A dog.\nAnd.\n1  dog.png: 200 x 100 px")


def test_a_script_ends_where_it_is_no_text(mmchat_command):
    done = mmchat_command("chat", stdin=b"\\images\n" * 2000 + b"O\xf9\nHo\n")
    assert (done.stdout, done.exit_code) == ("no pictures\n" * 2000, 2)
    assert done.stderr == (
        "mmchat: error: line 2001 of stdin is not UTF-8 text (byte 0xf9 at 1); save it as UTF-8\n"
    )


def test_a_line_typed_in_another_encoding_is_not_sent(mmchat_command, folder):
    from mmchat.engine.sampling import SamplingParams
    from mmchat.repl.chat import Chat
    from mmchat.repl.screen import PlainScreen

    said = []
    session = mmchat_command.use(b"One.").chat()
    chat = Chat(session, PlainScreen(said.append, said.append), SamplingParams(), folder)
    chat.line("caf\udce9?")
    assert said[0].startswith("mmchat: error: the line is not UTF-8 text (byte 0xe9 at 3)")
    assert session.conversation.turns == ()


@pytest.mark.process
def test_a_piped_chat_writes_no_escape_codes_and_imports_no_editor(folder):
    script = json.dumps({"answers": ["One **dog**.", "Two."]})
    program = (
        f"import sys, runpy; sys.argv = ['x', {script!r}, 'chat']\n"
        "try:\n    runpy.run_module('tests.repl.fake_chat', run_name='__main__')\n"
        "finally:\n    assert not {'prompt_toolkit', 'markdown_it'} & set(sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        input=b"\\image 'My Cat.png' What is it?\nAnd now?\n\\tokens\n",
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        check=False,
    )
    assert done.stdout == b"One **dog**.\nTwo.\ncontext 39 of 131,072 tokens\n", done.stderr
    assert b"\x1b" not in done.stderr
    assert done.stderr.startswith(b"attached My Cat.png: 100 x 300 px, ")


@pytest.mark.process
def test_help_imports_no_editor():
    program = (
        "import sys\nfrom mmchat.cli.app import app\n"
        "try:\n    app(['chat', '--help'])\n"
        "finally:\n    assert not {'prompt_toolkit', 'torch', 'PIL'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert b"--continue" in done.stdout


def test_a_picture_is_asked_about_in_the_next_question(mmchat_command):
    model = mmchat_command.use(b"A dog.", b"And.")
    done = mmchat_command("chat", stdin="dog.png\nWhat is it?\nAnd?\n\\images\n")
    assert done.stderr == "attached dog.png: 200 x 100 px, 1 tile, 1,601 vision tokens\n"
    assert done.stdout == ("A dog.\nAnd.\n1  dog.png: 200 x 100 px, 1 tile, 1,601 vision tokens\n")
    assert len(model.runtime.prefills) == 2


def test_image_of_the_arguments_is_asked_about_first(mmchat_command):
    done = piped(mmchat_command, ["\\images"], args=["-i", "dog.png"])
    assert done.stdout.endswith("(for the next question)\n")


@pytest.mark.parametrize(
    ("line", "message", "code"),
    [
        ("gone.png", "mmchat: error: no such picture: 'gone.png'; nothing was sent", 2),
        ("\\image gone.png What?", "mmchat: error: 'gone.png' does not exist", 4),
        ("\\imge dog.png", "mmchat: error: there is no command \\imge; did you mean \\image?", 2),
        ("\\xyz", "mmchat: error: there is no command \\xyz; \\help lists the commands", 2),
        ("\\undo", "mmchat: error: nothing has been asked yet", 2),
        ("\\retry", "mmchat: error: nothing has been asked yet", 2),
        ("\\edit", "mmchat: error: nothing has been asked yet", 2),
        ("\\drop 3", "mmchat: error: there is no picture 3; \\images lists them", 2),
        ("\\drop x", "mmchat: error: the picture is a number, not 'x'", 2),
        (
            "\\tiles 1234567",
            "mmchat: error: the picture is a number of 6 digits at most, not '1234567'",
            2,
        ),
        ("\\replace 1 /gone", "mmchat: error: no such picture: '/gone'", 2),
        ("\\tiles", "mmchat: error: there are no pictures", 2),
        (
            "\\set temperatur 1",
            "mmchat: error: there is no setting 'temperatur'; did you mean temp",
            2,
        ),
        ("\\set temperature hot", "mmchat: error: temperature is a number, not 'hot'", 2),
        ("\\set temperature -1", "mmchat: error: temperature must be between 0 and 100, not -1", 2),
        ("\\set top_k 1.5", "mmchat: error: top_k must be a whole number, not 1.5", 2),
        ("\\set top_k", "mmchat: error: write \\set top_k VALUE; it is 0 now", 2),
        ("\\retry top_k", "mmchat: error: write \\retry top_k VALUE; it is 0 now", 2),
        ("\\foo", "mmchat: error: there is no command \\foo; \\help lists the commands", 2),
        ("\\load nothing", "mmchat: error: no saved chat 'nothing'", 1),
        ("\\save", "mmchat: error: nothing has been asked yet", 2),
        ("\\export pdf", "mmchat: error: write \\export md, json or html, not 'pdf'", 2),
        ("\\forget", "mmchat: error: the chat has 0 turns, so 1 cannot be dropped", 2),
        ("\\stats", "mmchat: error: there is no answer to time yet", 2),
        ("\\image", "mmchat: error: \\image needs a file, an address or the word clipboard", 2),
        ("\\image dog.png <|image|><|image|>?", "mmchat: error: the text has 2 <|image|> marks", 2),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line_and_the_chat_goes_on(
    line, message, code, mmchat_command
):
    done = piped(mmchat_command, [line, "\\images", "Hi"], b"Hello.")
    errors = [text for text in done.stderr.splitlines() if text.startswith("mmchat: error: ")]
    assert len(errors) == 1
    assert errors[0].startswith(message)
    assert done.stdout == "no pictures\nHello.\n"
    assert done.exit_code == code


def test_quiet_leaves_errors_alone_on_stderr(mmchat_command):
    done = piped(mmchat_command, ["Hi", "\\xyz"], b"Hello.", args=["-n", "2"])
    assert "cut at 2 tokens; \\set max_new_tokens N allows more\n" in done.stderr
    done = piped(mmchat_command, ["Hi", "\\xyz"], b"Hello.", args=["-n", "2", "-q"])
    assert done.stderr == "mmchat: error: there is no command \\xyz; \\help lists the commands\n"
    assert (done.stdout, done.exit_code) == ("He\n", 2)


def test_undo_retry_and_edit(mmchat_command):
    lines = ["Hi", "\\retry", "\\edit Ho", "Hu", "\\undo", "\\export json x.json"]
    done = piped(mmchat_command, lines, b"1", b"2", b"3", b"4")
    assert done.stdout == "1\n2\n3\n4\n"
    [turn] = json.loads(Path("x.json").read_text())["turns"]
    assert (turn["question"][0]["text"], turn["answer"]) == ("Ho", "3")


def test_a_slash_is_a_command_only_where_it_names_one(mmchat_command):
    done = piped(mmchat_command, ["/tokens", "/shrug", "/hepl"], b"Ok.")
    assert done.stdout == "context 0 of 1,000 tokens\nOk.\n"
    assert done.stderr == "mmchat: error: there is no command /hepl; did you mean \\help?\n"


def test_say_sends_what_would_be_a_path_or_command(mmchat_command):
    done = piped(mmchat_command, ["\\say \\help", "\\say gone.png"], b"1", b"2")
    assert done.stdout == "1\n2\n"


def test_a_mark_is_the_place_of_the_picture(mmchat_command):
    lines = ["\\image dog.png Is <|image|> a dog?", "\\save one.json"]
    done = piped(mmchat_command, lines, b"Yes.")
    assert done.exit_code == 0
    parts = json.loads(Path("one.json").read_text())["turns"][0]["question"]
    assert [part["text"] for part in parts] == ["Is ", None, " a dog?"]


def test_pictures_can_be_dropped_and_replaced_after_they_were_asked_about(mmchat_command):
    lines = ["\\image dog.png What?", "\\replace 1 My Cat.png", "\\images", "\\drop 1", "\\images"]
    done = piped(mmchat_command, lines, b"A dog.")
    assert done.stdout.splitlines()[1:] == [
        "1  My Cat.png: 100 x 300 px, 1 tile, 1,601 vision tokens",
        "no pictures",
    ]


def test_what_becomes_of_earlier_pictures_and_answers_is_said(mmchat_command):
    lines = ["dog.png", "\\replace 1 My Cat.png", "What?", "dog.png", "My Cat.png", "And?"]
    lines += ["\\replace 1 dog.png", "\\drop 2", "dog.png Now?"]
    done = piped(mmchat_command, lines, b"1", b"2", b"3")
    stay = "earlier answers stay as they are; \\retry answers the last question again"
    unseen = "earlier pictures are out of sight now; to compare, attach pictures together"
    kept = ("picture", "attached")
    assert [line for line in done.stderr.splitlines() if not line.startswith(kept)] == [
        unseen,  # once for the two of the second question
        stay,
        stay,
        unseen,
    ]


def test_what_saving_did_is_said(mmchat_command, folder):
    lines = ["Hi", "\\save trip", "\\save ./copy.json"]
    done = piped(mmchat_command, lines, b"Hello.")
    later = "; what follows is saved by the next \\save"
    assert done.stderr.splitlines() == [
        f"saved as 'trip'; \\load trip brings it back{later}",
        "a copy as it is now is in './copy.json'; \\load ./copy.json brings it back",
    ]
    lines = ["And?", "\\save trip", "\\save other", "Last?"]
    done = piped(mmchat_command, lines, b"Yes.", b"No.", args=["--resume", "trip"])
    assert done.stderr.splitlines()[1:] == [
        "saved as 'trip'; \\load trip brings it back",
        "goes on as 'other'; 'trip' stays as it was",
    ]
    place = folder / "state" / "mmchat" / "chats"
    turns = {
        name: len(json.loads((place / name / "chat.json").read_text())["turns"])
        for name in ("trip", "other")
    }
    assert turns == {"trip": 2, "other": 3}
    done = piped(
        mmchat_command, ["Hu", "\\save"], b"Ha.", args=["--no-history", "--resume", "trip"]
    )
    assert done.stderr.splitlines()[-1].endswith(later)


def test_settings_are_shown_as_they_are_set(mmchat_command):
    lines = [
        "\\set temperature 0.8",
        "\\set seed 7",
        "\\set stop END",
        "\\system Be brief.",
        "\\show",
    ]
    done = piped(mmchat_command, lines)
    for row in ("temperature +0.8", "seed +7", "stop +'END'", "system +Be brief.", "model +Llama"):
        assert re.search(f"(?m)^{row}", done.stdout), row


def test_a_full_context_names_what_would_have_to_go(mmchat_command):
    model = mmchat_command.use(b"x" * 10, b"y" * 10, b"z")
    model.max_seq_len = 40
    lines = ["a" * 8, "b" * 8, "c" * 8, "\\forget 1", "c" * 8]
    done = mmchat_command("chat", "-n", "12", stdin="\n".join(lines) + "\n")
    errors = [line for line in done.stderr.splitlines() if line.startswith("mmchat: error: ")]
    assert errors[0].startswith("mmchat: error: the prompt has 49 tokens and the context 40")
    assert "\\forget 2 drops the 2 oldest turns to make room" in errors[1]
    assert done.stdout.splitlines()[0] == "x" * 10


def test_pages_of_a_document_are_pictures(mmchat_command, tmp_path, monkeypatch):
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    pages = [Image.new("RGB", (30, 40), colour) for colour in ("red", "lime", "blue")]
    pages[0].save("paper.pdf", save_all=True, append_images=pages[1:])
    lines = [
        "\\image paper.pdf#2-3",
        "\\replace 2 paper.pdf",
        "\\replace 2 paper.pdf#1",
        "\\images",
    ]
    done = piped(mmchat_command, lines)
    assert re.findall(r"(?m)^(\d)  (paper.*):", done.stdout) == [
        ("1", "paper.pdf page 2"), ("2", "paper.pdf page 1"),
    ]  # fmt: skip
    assert "these are 3 pages; name one, as in: \\replace 1 paper.pdf#2" in done.stderr


def test_a_base_model_cannot_chat(mmchat_command):
    mmchat_command.use(params="llama3.2-11B-base")
    done = mmchat_command("chat")
    assert done.exit_code == 2
    assert "is a base model, which continues text and cannot chat; llama3.2-11B can" in done.stderr


def test_piped_chats_are_not_kept_unless_they_continue_one(mmchat_command, folder):
    piped(mmchat_command, ["Hi", "\\save first"], b"Hello.")
    piped(mmchat_command, ["Hi"], b"Hello.")
    place = folder / "state" / "mmchat" / "chats"
    assert [path.name for path in place.iterdir()] == ["first"]
    done = piped(mmchat_command, ["Go", "\\tokens"], b"On.", args=["--resume", "first"])
    assert done.stderr.startswith("going on after 1 turn with 0 pictures\n")
    saved = json.loads((place / "first" / "chat.json").read_text())
    assert [turn["answer"] for turn in saved["turns"]] == ["Hello.", "On."]


def test_to_open_a_chat_changes_nothing(mmchat_command, folder):
    for name in ("old", "new"):
        piped(mmchat_command, ["Hi", f"\\save {name}"], b"Hello.")
    place = folder / "state" / "mmchat" / "chats"
    os.utime(place / "old" / "chat.json", ns=(1, 1))
    for name in ("old", "./copy.json"):
        piped(mmchat_command, ["Hi", "\\save copy.json"] if "/" in name else [], b"Hello.")
        done = piped(
            mmchat_command, ["\\show", "\\load old"], args=["--resume", name, "--seed", "9"]
        )
        assert (done.stderr.count("going on after 1 turn"), done.exit_code) == (2, 0)
    assert chats.latest_chat(place) == place / "new"
    assert {path.name for path in place.iterdir()} == {"old", "new"}
    assert "seed" not in (place / "old" / "chat.json").read_text()


def test_a_copy_at_a_path_is_never_saved_to_unasked(mmchat_command, folder):
    piped(mmchat_command, ["Hi", "\\save one.json", "\\save ./two"], b"Hello.")
    before = [Path(name).read_text() for name in ("one.json", "two/chat.json")]
    for name in ("one.json", "./two"):
        done = piped(mmchat_command, ["Go"], b"On.", args=["--resume", name])
        assert (done.stdout, done.exit_code) == ("On.\n", 0)
    assert [Path(name).read_text() for name in ("one.json", "two/chat.json")] == before
    assert len(list((folder / "state" / "mmchat" / "chats").iterdir())) == 2  # the new chats


@pytest.mark.parametrize("name", [".", "/", "~nosuch/x", "x" * 300])
def test_no_chat_to_resume_is_said_in_one_line(mmchat_command, name):
    done = mmchat_command("chat", "--resume", name)
    assert done.exit_code == 1
    assert done.stderr.startswith("mmchat: error: no saved chat ")
    assert done.stderr.count("\n") == 1


def test_resume_without_a_name_or_a_terminal_says_where_names_are(mmchat_command):
    for arguments in (["--resume"], ["--resume", "-q"]):
        done = mmchat_command("chat", *arguments)
        assert done.exit_code == 2
        assert "--resume without a terminal needs a NAME; mmchat chats lists them" in done.stderr


def test_chats_are_listed_and_removed(mmchat_command, folder):
    assert "there are no chats in" in mmchat_command("chats").stderr
    piped(mmchat_command, ["\\image dog.png What?", "And?", "\\save dog"], b"A dog.", b"No.")
    piped(mmchat_command, ["Hi\tyou", "\\save hello"], b"Hello.")
    (folder / "state" / "mmchat" / "chats" / "hello" / "chat.json").touch()
    first, second = mmchat_command("chats").stdout.splitlines()
    assert re.fullmatch(r"hello  [-\d]{10} \d\d:\d\d  1 turn  Hi you", first)
    assert re.fullmatch(r"dog    [-\d]{10} \d\d:\d\d  2 turns, 1 picture  What\?", second)
    found = json.loads(mmchat_command("chats", "--json").stdout)
    assert [chat["name"] for chat in found] == ["hello", "dog"]
    assert found[1]["first_question"] == "What?"
    assert (found[1]["turns"], found[1]["pictures"]) == (2, 1)
    refused = mmchat_command("chats", "--remove", "dog")
    assert (refused.exit_code, "--yes" in refused.stderr) == (2, True)
    absent = mmchat_command("chats", "--remove", "dog", "--remove", "gone", "--yes")
    assert absent.exit_code == 1
    done = mmchat_command("chats", "--remove", "dog", "--remove", "dog", "--yes")
    assert (done.exit_code, done.stderr) == (0, "removed 'dog'\n")
    assert [chat["name"] for chat in json.loads(mmchat_command("chats", "--json").stdout)] == [
        "hello"
    ]


def test_removing_asks_about_one_chat_or_several_and_never_about_one_in_use(
    mmchat_command, folder, monkeypatch
):
    for name in ("one", "two"):
        piped(mmchat_command, ["Hi", f"\\save {name}"], b"Hello.")
    asked = []
    monkeypatch.setattr(console, "is_terminal", lambda stream: True)
    monkeypatch.setattr(console, "confirm", asked.append)
    assert mmchat_command("chats", "--remove", "one").exit_code != 0
    mmchat_command("chats", "--remove", "one", "--remove", "two")
    questions = ["remove 'one' with its pictures?", "remove 'one', 'two' with their pictures?"]
    assert asked == questions
    held = chats.hold(folder / "state" / "mmchat" / "chats" / "two")
    done = mmchat_command("chats", "--remove", "one", "--remove", "two")
    held.close()
    assert "'two' is open in another window" in done.stderr
    assert asked == questions
    assert len(list((folder / "state" / "mmchat" / "chats").iterdir())) == 2


def test_the_list_and_resume_count_the_same_pictures(mmchat_command):
    piped(mmchat_command, ["dog.png What?", "dog.png And?", "\\save dog"], b"A dog.", b"It.")
    assert "2 turns, 2 pictures  What?" in mmchat_command("chats").stdout
    done = piped(mmchat_command, [""], args=["--resume", "dog"])
    assert "going on after 2 turns with 2 pictures" in done.stderr


def test_a_chat_that_cannot_be_read_is_listed_with_the_reason(mmchat_command, folder):
    place = folder / "state" / "mmchat" / "chats" / "broken\nname"
    place.mkdir(parents=True)
    (place / "chat.json").write_text("{")
    done = mmchat_command("chats")
    assert done.stdout.count("\n") == 1
    assert "not valid JSON" in done.stdout
    assert "not valid JSON" in json.loads(mmchat_command("chats", "--json").stdout)[0]["problem"]


@pytest.mark.parametrize(
    ("line", "name"),
    [
        *((f"\\export {kind} {{}}", "README.md") for kind in ("md", "json", "html")),
        ("\\export md {}", "dog.png"),
        ("\\tiles 1 {}", "dog.png"),
        ("\\save {}", "other.json"),
        ("\\save ./{}", "other"),
    ],
)
def test_no_command_replaces_a_file_that_the_chat_did_not_write(line, name, mmchat_command, folder):
    files = [folder / "README.md", folder / "other.json", folder / "other" / "chat.json"]
    files[2].parent.mkdir()
    for file in files:
        file.write_text("mine")
    files.append(folder / "dog.png")
    before = [file.read_bytes() for file in files]
    done = piped(mmchat_command, ["\\image dog.png Hi", line.format(name), "Ho"], b"1", b"2")
    assert re.search(rf"^mmchat: error: '{name}' is there already; give an", done.stderr, re.M)
    assert (done.stdout, done.exit_code) == ("1\n2\n", 2)
    assert [file.read_bytes() for file in files] == before


def test_what_this_chat_wrote_is_replaced_by_the_same_command_alone(mmchat_command):
    lines = ["Hi", "\\save x.json", "\\export md x.md", "Ho", "\\save x.json", "\\export md x.md"]
    done = piped(mmchat_command, lines, b"1", b"2")
    assert done.exit_code == 0
    assert "\n2\n" in Path("x.md").read_text()
    lines = ["Hu", "\\save x.json", "\\export html x.json", "\\clear", "Hi", "\\save x.json"]
    done = piped(mmchat_command, lines, b"3", b"4", args=["--resume", "x.json"])
    assert done.stderr.count("'x.json' is there already; give another name") == 2
    assert len(json.loads(Path("x.json").read_text())["turns"]) == 3


@pytest.mark.parametrize("name", ["~nobody-of-this-name/x.md", "x" * 300, "gone/x.md"])
def test_an_export_to_what_is_no_name_is_said(name, mmchat_command):
    done = piped(mmchat_command, ["Hi", f"\\export md {name}", f"\\save {name}.json"], b"1")
    assert done.stderr.count("mmchat: error: cannot write ") == 2


def test_the_preview_of_tiles_has_the_name_of_a_png(mmchat_command):
    done = piped(mmchat_command, ["\\image dog.png", "\\tiles 1 tiles.jpg", "\\tiles 1 'a b.PNG'"])
    assert "error: the preview is a PNG; end the name in .png, not 'tiles.jpg'" in done.stderr
    assert Path("a b.PNG").is_file()
    assert not Path("tiles.jpg").exists()


def test_what_is_written_of_a_chat_is_for_the_user_alone(mmchat_command, folder):
    kinds = ("md", "json", "html")
    lines = ["dog.png Hi", *(f"\\export {kind} x.{kind}" for kind in kinds), "\\tiles 1 x.png"]
    piped(mmchat_command, lines, b"Hello.")
    files = list(folder.glob("x.*"))
    assert len(files) == 4
    assert {file.stat().st_mode & 0o777 for file in files} == {0o600}


def test_pictures_that_nobody_asked_about_are_not_saved_and_that_is_said(mmchat_command):
    said = "attached and not asked about; "
    done = piped(mmchat_command, ["Hi", "dog.png", "\\save one", "dog.png"], b"Hello.")
    assert re.findall(rf".* {said}.*", done.stderr) == [f"1 picture {said}not saved"]
    lines = ["dog.png", "dog.png", "\\quit"]
    for end in (lines, lines[:2]):
        done = piped(mmchat_command, end, args=["--resume", "one"])
        assert done.stderr.endswith(f"2 pictures {said}not saved\n")
    done = piped(mmchat_command, ["dog.png What?"], b"A dog.", args=["--resume", "one"])
    assert said not in done.stderr


@pytest.mark.parametrize("given", [(), ("--no-history",)])
def test_an_export_without_a_name_has_that_of_the_chat(mmchat_command, folder, given):
    lines = ["Hi", "\\save trip", "\\export md"]
    done = piped(mmchat_command, lines, b"1", args=given)
    assert "wrote 'trip.md'" in done.stderr
    assert (folder / "trip.md").is_file()


def test_export_is_a_page_that_runs_nothing(mmchat_command):
    lines = ["\\image dog.png <b>What?</b>", "\\export html x.html", "\\export md x.md"]
    done = piped(mmchat_command, lines, b"<script>alert(1)</script>")
    assert done.exit_code == 0
    page = Path("x.html").read_text()
    assert "&lt;script&gt;alert(1)" in page
    assert "<script" not in page
    assert 'src="data:image/png;base64,' in page
    assert "default-src 'none'" in page
    assert "## You\n\n![dog.png](data:image/png" in Path("x.md").read_text()


def test_help_lists_every_command_and_one_by_name(mmchat_command):
    done = piped(mmchat_command, ["\\help", "\\help undo"])
    assert max(map(len, done.stdout.splitlines())) < 80
    for name, command in commands.COMMANDS.items():
        assert f"\\{name}" in done.stdout
        assert command.help in done.stdout
    assert done.stdout.endswith("\\undo  Take back the last question and its answer\n")


def test_a_folder_is_named_and_the_pictures_in_it_are_offered(mmchat_command, folder):
    (folder / "empty dir").mkdir()
    lines = ["\\image .", f"{folder}", "\\image 'empty dir'", "./empty dir/", "empty"]
    done = piped(mmchat_command, lines, b"Sent.")
    first, second, third, fourth = done.stderr.splitlines()
    assert first == (
        "mmchat: error: '.' is a folder; in it: 'My Cat.png', 'dog.png';"
        " \\image 'My Cat.png' attaches the first"
    )
    assert second.startswith(
        f"mmchat: error: '{folder}' is a folder; in it: 'My Cat.png', 'dog.png';"
    )
    assert second.endswith("; nothing was sent")
    assert third == "mmchat: error: 'empty dir' is a folder without pictures"
    assert fourth == "mmchat: error: 'empty dir' is a folder without pictures; nothing was sent"
    assert done.stdout == "Sent.\n"  # a bare word is a question


@pytest.mark.parametrize("line", ["notes.txt", "./notes.txt", "'notes.txt'"])
def test_a_text_file_alone_on_the_line_is_said_and_not_sent(mmchat_command, folder, line):
    (folder / "notes.txt").write_text("Buy milk.")
    done = piped(mmchat_command, [line, "Read notes.txt for me", "gone.txt"], b"One.", b"Two.")
    [error] = done.stderr.splitlines()
    assert "notes.txt' is not a picture in a known format" in error
    assert error.endswith("; nothing was sent (\\say TEXT sends as is)")
    assert done.stdout == "One.\nTwo.\n"


def test_only_an_answer_that_would_be_the_same_is_said_to_be(mmchat_command):
    lines = [
        "\\image dog.png What?", "\\retry", "\\replace 1 My Cat.png", "\\retry", "\\retry",
        "\\retry temperature 0.8", "\\retry", "\\set temperature 1", "\\retry", "\\retry",
        "\\set seed 7", "\\retry", "\\retry",
    ]  # fmt: skip
    done = piped(mmchat_command, lines, *[b"x"] * 20, args=["-t", "0"])
    other = ("attached", "picture", "seed", "earlier answers stay")
    notes = [line for line in done.stderr.splitlines() if not line.startswith(other)]
    at_zero = "at temperature 0 the answer is the same; try \\retry temperature 0.8"
    assert notes == [
        at_zero,  # after the first question
        at_zero,  # after the retry with the other picture
        "temperature is 1",
        "with seed 7 the answer is the same; try \\retry seed none",
    ]


def test_undo_says_which_pictures_went_too(mmchat_command):
    lines = ["\\image dog.png 'My Cat.png' Both?", "Hi", "\\undo", "\\undo", "\\images"]
    done = piped(mmchat_command, lines, b"1", b"2")
    assert done.stderr.splitlines()[-2:] == [
        "took back 'Hi'",
        "took back 'Both?' with its pictures dog.png, My Cat.png",
    ]
    assert done.stdout.endswith("no pictures\n")


def test_set_and_drop_alone_do_something_sensible(mmchat_command):
    lines = ["\\drop", "\\set", "dog.png", "\\drop", "\\images"]
    done = piped(mmchat_command, lines)
    errors = done.stderr.splitlines()
    assert errors[0] == "mmchat: error: there are no pictures to drop"
    assert errors[-1] == "picture 1, dog.png, is out"
    assert re.search(r"(?m)^temperature +0.6$", done.stdout)
    assert done.stdout.endswith("no pictures\n")


def test_settings_come_back_with_the_chat_unless_others_are_given(mmchat_command, folder):
    lines = ["\\set temperature 0.8", "\\set stop END", "\\set seed 7", "Hi", "\\save first"]
    piped(mmchat_command, lines, b"Hello.")
    args = ["--resume", "first", "--seed", "9"]
    shown = piped(mmchat_command, ["\\set", "Hu"], b"x", args=args)
    assert "as before: temperature 0.8, stop 'END'\n" in shown.stderr
    for row in ("temperature +0.8", "seed +9", "stop +'END'", "top_p +0.9"):
        assert re.search(f"(?m)^{row}$", shown.stdout), row
    loaded = piped(mmchat_command, ["\\set top_k 5", "\\load first", "\\set"])
    assert "as before: temperature 0.8, seed 9, stop 'END'\n" in loaded.stderr
    assert re.search(r"(?m)^top_k +5$", loaded.stdout)


@pytest.mark.parametrize("value", ["-1", '"hot"', "1e400"])
def test_saved_settings_out_of_range_are_refused(mmchat_command, folder, value):
    piped(mmchat_command, ["\\set temperature 0.8", "Hi", "\\save a.json"], b"Hello.")
    text = Path("a.json").read_text()
    Path("a.json").write_text(text.replace('"temperature": 0.8', f'"temperature": {value}'))
    assert text != Path("a.json").read_text()
    done = piped(mmchat_command, ["\\load a.json"])
    assert done.exit_code == 1
    assert done.stderr.startswith("mmchat: error: a.json: ")
    assert done.stderr.count("\n") == 1


def test_a_line_break_in_a_name_forges_no_line(mmchat_command, folder):
    name = "x\nmmchat: error: forged\u2028y.png"
    Image.new("RGB", (20, 10)).save(folder / name, "PNG")
    done = piped(mmchat_command, ["\\images"], args=["-i", name])
    mmchat_command.use(b"x")
    asked = mmchat_command("generate", "-p", "x", "-i", name)
    tiles = mmchat_command("tiles", name)
    for outcome in (done, asked, tiles):
        assert outcome.exit_code == 0
        assert "\nmmchat: error: forged" not in outcome.stderr + outcome.stdout
    assert done.stdout.count("\n") == 1
    assert "attached x\\nmmchat: error: forged\\u2028y.png: 20 x 10 px" in done.stderr


def test_words_that_mean_to_leave_or_to_ask_for_help_are_not_sent(mmchat_command):
    for word in ("exit", "Quit", " exit "):
        done = piped(mmchat_command, [word, "Hi"], b"Hello.")
        assert (done.stdout, done.exit_code) == ("", 0)
    done = piped(mmchat_command, ["help", "\\", "exit now", "\\say exit"], b"1", b"2")
    assert done.stdout.startswith("\\image PATH|URL [QUESTION]")
    assert done.stdout.endswith("1\n2\n")
    assert done.stderr == "mmchat: error: \\ begins a command; \\help lists them\n"


def test_what_leaves_with_turns_is_said(mmchat_command):
    lines = ["\\image dog.png What?", "Hi", "\\forget 2"]
    done = piped(mmchat_command, lines, b"1", b"2")
    assert "dropped 2 of 2 turns with the picture dog.png; context " in done.stderr


def test_a_picture_in_the_place_of_another_is_said_so(mmchat_command):
    done = piped(mmchat_command, ["\\image dog.png What?", "\\replace 1 My Cat.png"], b"1")
    assert "picture 1 is now My Cat.png: 100 x 300 px" in done.stderr.splitlines()[-2]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ('"brown"', "'brown'"),
        ("brown dog", "'brown dog'"),
        ('"a b" \'c"d\'', "'a b' 'c\"d'"),
        ('"\\n\\n"', "'\\n\\n'"),
        ("it's", '"it\'s"'),
    ],
)
def test_a_stop_string_in_quotes_is_what_is_in_them(mmchat_command, text, shown):
    done = piped(mmchat_command, [f"\\set stop {text}", f"\\set stop {shown}", "\\set"])
    assert done.stderr == f"stop is {shown}\n" * 2
    bad = piped(mmchat_command, ['\\set stop "open', '\\set stop "a" b', "\\set"])
    assert bad.exit_code == 2
    assert bad.stderr.count("stop is one text, or several in quotes, not ") == 2
    assert re.search(r"(?m)^stop +none$", bad.stdout)
