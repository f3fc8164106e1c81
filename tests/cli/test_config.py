"""Defaults: an option, then MMCHAT_ variables, then config.toml, then what is built in."""

from __future__ import annotations

import json

import pytest

from mmchat.cli.defaults import config_path
from mmchat.errors import UsageError
from mmchat.quant.schemes import SCHEMES


@pytest.fixture
def config(tmp_path, monkeypatch):
    """Writes config.toml; returns its path."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    path = config_path()

    def write(text: str | bytes):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def taken(mmchat_command, *args):
    """(name, scheme, device) that `generate ARGS` loads with."""
    mmchat_command.use(b"x")
    done = mmchat_command("generate", "-q", "-p", "x", *args)
    assert (done.stderr, done.exit_code) == ("", 0)
    options = mmchat_command.loaded.pop()
    return options.name, options.quantize, options.device


def test_an_option_comes_before_a_variable_before_the_file_before_what_is_built_in(
    mmchat_command, config, monkeypatch
):
    assert taken(mmchat_command) == (None, "auto", "auto")
    config('model = "mllama-tiny"\nquantize = "int4"\ndevice = "cpu"\n')
    assert taken(mmchat_command) == ("mllama-tiny", "int4", "cpu")
    monkeypatch.setenv("MMCHAT_QUANTIZE", "int8")
    assert taken(mmchat_command) == ("mllama-tiny", "int8", "cpu")
    monkeypatch.setenv("MMCHAT_MODEL", "tiny")
    monkeypatch.setenv("MMCHAT_DEVICE", "")  # as good as unset
    assert taken(mmchat_command) == ("tiny", "int8", "cpu")
    options = ["--quantize", "none", "--device", "auto"]
    assert taken(mmchat_command, *options) == ("tiny", "none", "auto")
    assert taken(mmchat_command, "llama3.2-11B", *options) == ("llama3.2-11B", "none", "auto")
    assert taken(mmchat_command, "-m", "llama3.2-11B")[0] == "llama3.2-11B"
    assert taken(mmchat_command, "--params-path", "x.json")[0] is None


def test_parts_are_kept_from_a_default_scheme(mmchat_command, monkeypatch):
    monkeypatch.setenv("MMCHAT_QUANTIZE", "int8")
    for command in (["generate", "-p", "x"], ["chat"]):
        mmchat_command.use(b"x")
        assert mmchat_command(*command, "--quantize-keep", "head", stdin="hi").exit_code == 0
        assert mmchat_command.loaded.pop().quantize_keep == ("head",)


def test_chat_takes_them_too(mmchat_command, config):
    config('quantize = "int4"')
    mmchat_command("chat", stdin="hi")
    assert mmchat_command.loaded[0].quantize == "int4"


def test_a_default_scheme_is_not_for_what_is_exported_in_one(run_real, config, tmp_path):
    done = run_real("export", "tiny", "--format", "safetensors", "-o", str(tmp_path / "x"))
    assert done.exit_code == 0, done.stderr
    assert "\nin float32 (see --dtype)\n" in done.stderr
    config('quantize = "int4"')
    done = run_real("generate", str(tmp_path / "x"), "-q", "-p", "x", "--dry-run", "--json")
    assert (done.stderr, json.loads(done.stdout)["quantize"]) == ("", "none")


def test_the_file_is_where_config_path_says(mmchat_command, config):
    path = config("")
    assert mmchat_command("config", "path").stdout == f"{path}\n"
    assert path.name == "config.toml"


def test_show_says_where_each_value_comes_from(mmchat_command, config, monkeypatch):
    path = config('quantize = "int4"')
    monkeypatch.setenv("MMCHAT_DEVICE", "cuda:1")
    shown = mmchat_command("config", "show").stdout
    assert shown == (
        f"model     tiny    built in\nquantize  int4    {path}\ndevice    cuda:1  MMCHAT_DEVICE\n"
        f"file      {path}\n"
    )
    assert mmchat_command("config").stdout == shown
    assert json.loads(mmchat_command("config", "show", "--json").stdout) == {
        "model": {"value": "tiny", "origin": "built in"},
        "quantize": {"value": "int4", "origin": str(path)},
        "device": {"value": "cuda:1", "origin": "MMCHAT_DEVICE"},
        "file": str(path),
    }
    path.unlink()
    assert mmchat_command("config").stdout.endswith(f"file      {path} (not there)\n")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('modle = "tiny"', ": modle = 'tiny': there is no such setting; did you mean model?"),
        ("x = 1", ": x = 1: there is no such setting; there are model, quantize, device"),
        ("model = 3", ': model = 3: model is a text in quotes, such as "llama3.2-11B"'),
        ('[model]\nname = "tiny"', ": model = {'name': 'tiny'}: model is a text in quotes, such a"),
        ('device = ""', ": device = '': device is a text in quotes, such as \"cpu\""),
        (
            'quantize = "q4"',
            ": quantize = 'q4': unknown quantisation scheme 'q4' (did you mean int4?); use one of "
            + ", ".join(SCHEMES),
        ),
        ('device = "gpu"', ": device = 'gpu': unknown device 'gpu' (did you mean cuda, or mps on"),
        ("model = tiny", ": not TOML: Invalid value (at line 1, column 9); a line is written mo"),
        (b"\xff", ": not UTF-8 text; save it as UTF-8"),
        ("#" * 70_000, ": 70,000 bytes; such a file has at most 65,536"),
        ("a = " + "[" * 5_000, ": not TOML: "),
    ],
)  # fmt: skip
@pytest.mark.parametrize("command", [("config", "show"), ("generate", "-p", "x"), ("chat",)])
def test_what_is_wrong_in_the_file_names_it_the_key_the_value_and_what_is_allowed(
    mmchat_command, config, text, reason, command
):
    path = config(text)
    done = mmchat_command(*command)
    assert done.stderr.startswith(f"mmchat: error: {path}{reason}")
    assert (done.stdout, done.exit_code, done.stderr.count("\n")) == ("", 2, 1)
    assert mmchat_command("config", "path").exit_code == 0
    assert mmchat_command("generate", "--help").exit_code == 0


def test_a_variable_that_is_wrong_is_named(mmchat_command, monkeypatch):
    monkeypatch.setenv("MMCHAT_QUANTIZE", "q5")
    done = mmchat_command("generate", "-p", "x")
    assert done.stderr.startswith("mmchat: error: MMCHAT_QUANTIZE = 'q5': unknown quantisation sch")
    assert (done.stdout, done.exit_code) == ("", 2)


def test_a_default_model_that_is_none_says_whose_it_is(run_real, monkeypatch):
    monkeypatch.setenv("MMCHAT_MODEL", "tyni")
    done = run_real("generate", "-p", "x")
    assert done.stderr == (
        "mmchat: error: MMCHAT_MODEL, model = 'tyni': no model 'tyni' (nearest: 'tiny';"
        " 'mmchat list' shows all, or give a path)\n"
    )
    assert (done.stdout, done.exit_code) == ("", 3)


def test_set_writes_a_line_and_leaves_the_others(run_real, config):
    path = config("# mine\ndevice = 'cpu'")
    for value in ("llama3.2-11B", "tiny"):
        assert run_real("config", "set", "model", value).exit_code == 0
    assert path.read_text() == "# mine\ndevice = 'cpu'\nmodel = \"tiny\"\n"
    done = run_real("config", "set", "device", "cuda")
    assert done.stderr == f"device is 'cuda' in {str(path)!r}\n"
    assert path.read_text() == '# mine\ndevice = "cuda"\nmodel = "tiny"\n'


def test_set_makes_the_folder_and_names_a_variable_that_comes_first(run_real, config, monkeypatch):
    monkeypatch.setenv("MMCHAT_QUANTIZE", "int8")
    done = run_real("config", "set", "quantize", "int4")
    assert done.stderr.endswith("MMCHAT_QUANTIZE is set, and comes before it\n")
    assert config_path().read_text() == 'quantize = "int4"\n'


@pytest.mark.parametrize(
    ("args", "before", "reason"),
    [
        (["modle", "tiny"], "", "modle = 'tiny': there is no such setting; did you mean model?"),
        (["model", "nope"], "", "not written, model = 'nope': no model 'nope'"),
        (["device", "gpu"], "", "unknown device 'gpu'"),
        (["model", "tiny"], "model = [", "not TOML"),
        (["device", "cpu"], '"device" = "auto"', "change it by hand: device = "),
        (["device"], "", "Missing argument 'VALUE'"),
        ([], "", "Missing argument"),
    ],
)
def test_set_changes_nothing_where_it_cannot(run_real, config, args, before, reason):
    path = config(before)
    done = run_real("config", "set", *args)
    assert done.exit_code in (2, 3)
    assert reason in done.stderr
    assert path.read_text() == before


@pytest.mark.parametrize("args", [["help"], ["help", "help"], ["config", "help", "set"]])
def test_help_is_a_command_of_each_group(run_real, args):
    done = run_real(*args)
    assert (done.stderr, done.exit_code) == ("", 0)
    assert done.stdout.startswith("Usage: mmchat config set" if args[0] == "config" else "Usage:")


@pytest.mark.parametrize("word", ["get", "foo"])
def test_another_command_of_config_is_told_which_there_are(run_real, word):
    done = run_real("config", word)
    assert f"No such command {word!r}; there is path and show and set" in done.stderr


def test_export_takes_its_scheme_from_its_own_options_alone(monkeypatch, mmchat_command, config):
    plans = []

    def export(plan, _):
        plans.append(plan.model)
        raise UsageError("seen")

    monkeypatch.setattr("mmchat.export.export_model", export)
    config('quantize = "int4"')
    more = ("--quantize", "int8", "--quantize-keep", "vision")
    for options in ((), ("--quantize", "auto"), more):
        mmchat_command("export", "tiny", "--format", "safetensors", *options)
    found = [(model.quantize, model.quantize_keep) for model in plans]
    assert found == [("none", ()), ("none", ()), ("int8", ("vision",))]
