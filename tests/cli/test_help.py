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
    assert "-n, --max-new-tokens N Longest answer, tokens. [default: 1024]" in page
    assert "--thumbnails auto|off|kitty|sixel|blocks How attached pictures are shown." in page
    assert "Also --image-prompts, --image." in page


def test_generate_and_chat_share_their_options():
    generate, chat = ({p.name: p for p in COMMANDS[name].params} for name in ("generate", "chat"))
    shared = set(generate) & set(chat)
    assert {"temperature", "stop", "dtype", "checkpoint_path", "offline", "name"} <= shared
    for name in shared - {"images", "help"}:
        first, second = generate[name], chat[name]
        assert (first.opts, first.help, first.default) == (second.opts, second.help, second.default)


def test_no_command_shows_the_commands(mmchat_command):
    assert mmchat_command().stdout == mmchat_command("--help").stdout
