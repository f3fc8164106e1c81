"""LoadOptions: one list of options for Python, type checkers and the command line."""

import inspect
import json
import subprocess
import sys
from dataclasses import dataclass, fields, replace
from typing import Annotated, get_args

import pytest
import typer
from typer.testing import CliRunner

import mmchat
from mmchat.checkpoints import exported_folder
from mmchat.cli.app import app
from mmchat.cli.option_groups import Only, Without, with_option_groups
from mmchat.cli.options import LOADING, ModelName
from mmchat.errors import DeviceError, UsageError
from mmchat.export import ExportPlan, export_model
from mmchat.loading.options import LoadOptions, called_with

NAMES = [field.name for field in fields(LoadOptions)]


def test_load_takes_what_the_options_take():
    signature = inspect.signature(mmchat.load)
    assert list(signature.parameters) == NAMES
    name, *others = signature.parameters.values()
    assert name.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    assert {other.kind for other in others} == {inspect.Parameter.KEYWORD_ONLY}
    assert signature.return_annotation == "Model"
    assert mmchat.load.__name__ == "load"
    assert mmchat.load.__doc__.startswith("Load a model by name")
    assert "text_only leaves vision" in mmchat.load.__doc__
    with pytest.raises(TypeError, match="unexpected keyword argument 'foo'"):
        mmchat.load(foo=1)


def test_a_function_of_one_object_is_called_with_what_makes_it():
    @called_with(LoadOptions)
    def options(given):
        return given

    assert options("tiny", quantize="int8") == LoadOptions("tiny", quantize="int8")


CHECKED = """
import mmchat
from typing import assert_type
assert_type(mmchat.load("tiny", quantize="int8"), mmchat.Model)
assert_type(mmchat.load(), mmchat.Model)
mmchat.load(foo=1)
mmchat.load("tiny", "cpu")
mmchat.load("tiny", max_seq_len="many")
mmchat.load("tiny", compile="perhaps")
"""


@pytest.mark.slow
def test_a_type_checker_knows_the_arguments_of_load(tmp_path):
    pytest.importorskip("pyright")
    (tmp_path / "example.py").write_text(CHECKED)
    command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable]
    done = subprocess.run(
        [*command, "example.py"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    found = json.loads(done.stdout)["generalDiagnostics"]
    assert {one["range"]["start"]["line"] for one in found} == {5, 6, 7, 8}
    assert {one["rule"] for one in found} == {"reportCallIssue", "reportArgumentType"}


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"device": "warp"}, DeviceError, "unknown device 'warp'; use auto, cpu"),
        ({"device": "cuda:128"}, DeviceError, "unknown device 'cuda:128'; use auto, cpu"),
        ({"device": "cuda:01"}, DeviceError, "unknown device 'cuda:01'; use auto, cpu"),
        ({"device": "cpu:٣"}, DeviceError, "unknown device 'cpu:٣'; use auto, cpu"),
        ({"quantize": "int3"}, UsageError, "unknown quantisation scheme 'int3'"),
        (
            {"quantize": "none", "quantize_keep": ["head"]},
            UsageError,
            "--quantize-keep head keeps nothing",
        ),
        ({"quantize": "int8", "quantize_keep": "tail"}, UsageError, "unknown part 'tail'"),
        ({"alpha": "black"}, UsageError, "alpha must be 'white' or 'drop', not 'black'"),
        ({"compile": "maybe"}, UsageError, "compile must be auto, on or off, not 'maybe'"),
        ({"kv": "int4"}, UsageError, "kv must be auto or int8, not 'int4'"),
        ({"max_seq_len": True}, UsageError, "max_seq_len must be a whole number, not bool True"),
        ({"name": 5}, UsageError, "name must be a string or a path, not int 5"),
    ],
)
def test_a_wrong_value_is_said_when_the_options_are_made(given, error, message):
    with pytest.raises(error, match=message):
        LoadOptions(**given)


def test_options_that_say_the_same_are_the_same():
    asked = LoadOptions(quantize="int8", quantize_keep=["head"])
    assert asked == LoadOptions(quantize="int8", quantize_keep="head")
    assert replace(asked, quantize_keep=()) != asked


def test_every_option_is_one_of_generate_and_says_what_it_does():
    shown = " ".join(CliRunner().invoke(app, ["generate", "--help"]).stdout.split())
    *offered, progress = fields(LoadOptions)
    assert progress.name == "progress"
    assert "--progress" not in shown
    for option in offered:
        settings = ModelName if option.name == "name" else LOADING[option.name]
        name = "model" if option.name == "name" else option.name.replace("_", "-")
        assert f" --{name} " in shown
        assert get_args(settings)[1].help in shown


# A command with options of its own, and some of a group


@dataclass(frozen=True)
class Group:
    depth: Annotated[int, typer.Option(help="How deep.")] = 3
    tags: Annotated[list[str] | None, typer.Option(help="Names.")] = ()
    hidden: str = "not for the command line"


def run(command, *arguments):
    program = typer.Typer()
    program.command()(with_option_groups(command))
    return CliRunner().invoke(program, list(arguments))


def test_a_command_has_all_options_of_a_group_or_some():
    def all_of_it(group: Group) -> None:
        print(group)

    def without(group: Annotated[Group, Without("tags")]) -> None:
        print(group)

    def only(*, depth: int = 1, group: Annotated[Group, Only("tags")]) -> None:
        print(depth, group)

    assert run(all_of_it).stdout.strip() == str(Group())
    assert run(all_of_it, "--depth", "5", "--tags", "a").stdout.strip() == str(Group(5, ["a"]))
    assert run(without, "--depth", "5").stdout.strip() == str(Group(5))
    assert run(without, "--tags", "a").exit_code == 2
    assert run(only, "--depth", "5", "--tags", "a").stdout.strip() == f"5 {Group(3, ['a'])}"


def test_an_option_that_a_group_lacks_cannot_be_left_out():
    def wrong(group: Annotated[Group, Without("dpeth")]) -> None: ...

    with pytest.raises(TypeError, match="Group has no option dpeth"):
        with_option_groups(wrong)


# Folders that `mmchat export` wrote


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("exports") / "out"
    export_model(
        ExportPlan(LoadOptions(quantize="int8", quantize_keep=["head"]), out, "safetensors")
    )
    return out


def test_what_an_export_was_made_for_takes_the_place_of_what_is_open(folder):
    model = mmchat.load(folder, device="cpu")
    assert (model.options.quantize, model.options.quantize_keep) == ("int8", ("head",))
    assert model.options.dtype == "float32"
    assert model.placement.reason == "as exported"


def test_an_export_is_not_run_exactly_when_it_is_rounded(folder):
    with pytest.raises(UsageError, match="--quantize int8, which cannot be changed; export again"):
        mmchat.load(folder, device="cpu", quantize="none")
    for options in ({"quantize": "int8"}, {"quantize": "int8", "quantize_keep": "head"}):
        assert mmchat.load(folder, device="cpu", **options).options.quantize == "int8"


def test_an_export_is_exported_again_as_it_is(folder, tmp_path):
    export_model(ExportPlan(LoadOptions(folder, device="cpu"), tmp_path / "again", "safetensors"))
    record = LoadOptions(tmp_path / "again").find().exported.record
    assert (record.scheme, record.keep) == ("int8", ("head",))


def test_the_record_of_an_export_is_read_once(folder, monkeypatch):
    read, seen = exported_folder.read_manifest, []
    monkeypatch.setattr(
        exported_folder, "read_manifest", lambda path: (seen.append(path), read(path))[1]
    )
    for more in ([], ["--dry-run"]):
        done = CliRunner().invoke(app, ["generate", str(folder), "-p", "x", "-n", "1", *more])
        assert done.exit_code == 0, done.stderr
        assert len(seen) == 1
        seen.clear()


def test_a_dry_run_refuses_what_the_export_has_not(folder):
    asked = ["-p", "x", "--dry-run", "--dtype", "float16"]
    done = CliRunner().invoke(app, ["generate", str(folder), *asked])
    assert done.exit_code == 2
    assert "was exported in float32, not float16; export again: mmchat export" in done.stderr
