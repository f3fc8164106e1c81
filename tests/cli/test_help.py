"""Help pages: nothing cut, wrapped once, defaults shown."""

import re

import pytest
from typer.main import get_command

from mmchat.cli import app as frame

COMMANDS = {name: frame.load(name) for name in frame.COMMANDS}


@pytest.mark.parametrize("columns", ["50", "80", "200"])
@pytest.mark.parametrize("name", [*COMMANDS, None])
def test_help_fits_the_terminal_and_names_every_option_whole(monkeypatch, capsys, name, columns):
    monkeypatch.setenv("COLUMNS", columns)
    with pytest.raises(SystemExit) as ended:
        frame.app([*([name] if name else []), "--help"], prog_name="mmchat")
    done = capsys.readouterr()
    assert (done.err, ended.value.code) == ("", 0)
    assert "\x1b" not in done.out
    assert not re.search(r"(?<![\]}])\.\.\.$", done.out, re.M)  # as Typer cuts
    lines = done.out.splitlines()
    wide = [line for line in lines if len(line) > max(int(columns), 66)]
    assert all(re.fullmatch(r" +(-\S.*|\S+)", line) for line in wide)  # names are never cut
    words = set(re.findall(r"--[\w-]+", done.out))
    command = COMMANDS[name] if name else get_command(frame.app)
    for parameter in command.params:
        if parameter.param_type_name == "option" and not parameter.hidden:
            assert {opt for opt in parameter.opts if opt.startswith("--")} <= words
            between = "" if columns == "50" else " "  # there Typer breaks words that are long
            help_text = between.join((parameter.help or "").split())
            assert help_text in between.join(done.out.split())
    if name is None:
        assert all(re.search(rf"(?m)^  {one} ", done.out) for one in COMMANDS)


def test_defaults_are_shown_also_those_of_the_model(mmchat_command):
    page = " ".join(mmchat_command("chat", "--help").stdout.split())
    assert "-n, --max-new-tokens N Longest answer, tokens. [default: (1024); x>=1]" in page
    assert (
        "--thumbnails <auto|off|kitty|iterm2|sixel|blocks> How attached pictures are shown." in page
    )
    assert "-i, --image-prompt, --image-prompts, --image PATH|URL A picture" in page


@pytest.mark.parametrize(
    ("command", "shown"),
    [
        ("generate", "Only the N likeliest; 0 is all. [x>=0]"),
        ("generate", "the model's own if left out. [0<=x<=100]"),
        ("generate", "Only the likeliest that hold this probability. [0<=x<=1]"),
        ("generate", "Same seed, same answer; 0 counts. [0<=x<=9223372036854775807]"),
        ("generate", "Guess the next N tokens (at most 64) from"),
        ("generate", "With --json: the N likeliest at every token. [default: 0; 0<=x<=20]"),
        ("chat", "Context to reserve, positions. [x>=1]"),
        ("export", "pictures that one question may see; 16 if left out. [1<=x<=16]"),
        ("export", "or none, whatever the model's own are packed in. [default: none]"),
    ],
)
def test_numbers_that_are_refused_are_outside_of_the_range_that_is_shown(
    mmchat_command, command, shown
):
    assert shown in " ".join(mmchat_command(command, "--help").stdout.split())


@pytest.mark.parametrize("command", ["export", "verify", "tiles", "bench", "download"])
def test_the_options_of_a_command_stand_in_groups(mmchat_command, command):
    page = mmchat_command(command, "--help").stdout
    _, _, others = page.partition("\nOptions:\n")
    assert others == "  -h, --help" + others.partition("  -h, --help")[2]
    assert others.count("\n") == 1


def test_generate_and_chat_share_their_options():
    generate, chat = ({p.name: p for p in COMMANDS[name].params} for name in ("generate", "chat"))
    shared = set(generate) & set(chat)
    assert {"temperature", "stop", "dtype", "checkpoint_path", "offline", "name"} <= shared
    for name in shared - {"images", "help"}:
        first, second = generate[name], chat[name]
        assert (first.opts, first.help, first.default) == (second.opts, second.help, second.default)


def test_a_command_is_listed_with_the_first_sentence_of_its_help():
    for name, command in COMMANDS.items():
        paragraph = " ".join(command.help.split("\n\n")[0].split())
        assert frame.COMMANDS[name] == paragraph.partition(". ")[0].removesuffix(".") + ".", name


def test_no_command_where_nothing_can_be_asked_shows_the_commands(mmchat_command):
    assert mmchat_command().stdout == mmchat_command("--help").stdout
