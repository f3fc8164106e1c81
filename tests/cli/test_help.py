"""Help pages: nothing cut, wrapped once, defaults shown."""

import re

import pytest
from typer.main import get_command

from mmchat.cli.app import app

COMMANDS = get_command(app).commands  # type: ignore[attr-defined]


@pytest.mark.parametrize("columns", ["50", "80", "200"])
@pytest.mark.parametrize("name", [*COMMANDS, None])
def test_help_fits_the_terminal_and_names_every_option_whole(
    mmchat_command, monkeypatch, name, columns
):
    monkeypatch.setenv("COLUMNS", columns)
    done = mmchat_command(*([name] if name else []), "--help")
    assert (done.stderr, done.exit_code) == ("", 0)
    assert "\x1b" not in done.stdout
    lines = done.stdout.splitlines()
    wide = [line for line in lines if len(line) > max(int(columns), 66)]
    assert all(re.fullmatch(r" +(-\S.*|\S+)", line) for line in wide)  # names are never cut
    words = set(re.findall(r"--[\w-]+", done.stdout))
    command = COMMANDS[name] if name else get_command(app)
    for parameter in command.params:
        if parameter.param_type_name == "option" and not parameter.hidden:
            assert {opt for opt in parameter.opts if opt.startswith("--")} <= words
            help_text = " ".join((parameter.help or "").split())
            assert help_text in " ".join(done.stdout.split())
    if name is None:
        assert all(re.search(rf"(?m)^  {one} ", done.stdout) for one in COMMANDS)


def test_defaults_are_shown_also_those_of_the_model(mmchat_command):
    page = " ".join(mmchat_command("chat", "--help").stdout.split())
    assert "-n, --max-new-tokens N Longest answer, tokens. [1 or more; default: 1024]" in page
    assert "--thumbnails auto|off|kitty|sixel|blocks How attached pictures are shown." in page
    assert "Also --image-prompts, --image." in page


@pytest.mark.parametrize(
    ("command", "shown"),
    [
        ("generate", "Only the N likeliest; 0 is all. [0 or more]"),
        ("generate", "the model's own if left out. [0 to 100]"),
        ("generate", "Only the likeliest that hold this probability. [0 to 1]"),
        ("generate", "Same seed, same answer; 0 counts. [0 to 2**63 - 1]"),
        ("generate", "Guess the next N tokens (at most 64) from"),
        ("generate", "With --json: the N likeliest at every token. [0 to 20]"),
        ("chat", "Context to reserve, positions. [1 or more]"),
        ("export", "pictures that one question may see. [1 to 16; default: 16]"),
    ],
)
def test_numbers_that_are_refused_are_outside_of_the_range_that_is_shown(
    mmchat_command, command, shown
):
    assert shown in " ".join(mmchat_command(command, "--help").stdout.split())


@pytest.mark.parametrize("command", ["export", "verify", "tiles", "bench", "download"])
def test_the_options_of_a_command_stand_in_groups(mmchat_command, command):
    page = mmchat_command(command, "--help").stdout
    _, _, others = page.partition("\nOther\n")
    assert others == "  -h, --help" + others.partition("  -h, --help")[2]
    assert others.count("\n") == 1


def test_generate_and_chat_share_their_options():
    generate, chat = ({p.name: p for p in COMMANDS[name].params} for name in ("generate", "chat"))
    shared = set(generate) & set(chat)
    assert {"temperature", "stop", "dtype", "checkpoint_path", "offline", "name"} <= shared
    for name in shared - {"images", "help"}:
        first, second = generate[name], chat[name]
        assert (first.opts, first.help, first.default) == (second.opts, second.help, second.default)


def test_no_command_shows_the_commands(mmchat_command):
    assert mmchat_command().stdout == mmchat_command("--help").stdout
