"""A family comes through the registry alone, and nobody outside of models names one."""

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

import mmchat
from mmchat.catalog.known import data_path, find_spec
from mmchat.catalog.spec import load_spec, params_document
from mmchat.cli.app import app
from mmchat.errors import ParamsError
from mmchat.models.family import Description
from mmchat.models.mllama.family import MllamaFamily
from mmchat.models.registry import FAMILIES, get_family, register
from mmchat.strict_json import Where

PACKAGE = Path(mmchat.__file__).parent
OF_A_FAMILY = re.compile(r"(?i:vision_config|mllama|llava|qwen|(?<![a-z])tile)|(?<=[a-z])Tile")
# File -> what of a family may be said there.
ALLOWED = {
    "__init__.py": {"Mllama"},  # what the package is for, as `cli/app.py` says it too
    "bench/workloads.py": {"tile"},  # the unit of `bench --vision`
    "catalog/source.py": {"qwen"},  # a file of tokens, qwen.tiktoken
    "cli/app.py": {"Mllama", "tile"},  # what the program is for; the command `tiles`
    "cli/bench.py": {"tile"},  # help of `bench --vision`
    "cli/doctor.py": {"tile"},  # the note below its table
    "cli/eval.py": {"tile"},  # `--by tiles`
    "cli/generate.py": {"tile"},  # help of --dry-run
    "cli/options.py": {"qwen"},  # help of --tokenizer-path
    "cli/tiles.py": {"tile"},  # the command
    "cli/wrong_names.py": {"tile"},  # the command
    "server/app.py": {"tile"},  # the route `/page/tiles`
    "server/page.py": {"tile"},  # what answers there
    "evals/run.py": {"tile"},  # `--by tiles`
    "evals/scenes/__init__.py": {"tile"},  # sizes in which scenes are drawn
    "evals/scenes/world.py": {"tile", "TILE"},
    "hub/selection.py": {"qwen"},  # qwen.tiktoken, to be fetched
    "hardware/cpu.py": {"tile"},  # a feature of processors, amx_tile
    "nn/__init__.py": {"tile"},  # the legend of axes
    "quant/kernels/compiler.py": {"tile"},  # amx_tile
    "quant/kernels/ops.py": {"tile"},  # amx_tile
    "repl/picture_commands.py": {"tile"},  # the command \tiles
    "tokenizers/__init__.py": {"qwen", "Qwen"},  # whose files are read
    "tokenizers/byte_pair.py": {"Qwen", "QWEN"},
    "tokenizers/text_steps.py": {"QWEN"},
    "tokenizers/tiktoken_file.py": {"qwen", "Qwen", "QWEN"},
}


class OtherFamily(MllamaFamily):
    """Mllama under another name, which sees pictures otherwise."""

    model_type = "other"
    loads = 0

    @classmethod
    def load(cls) -> "OtherFamily":
        cls.loads += 1
        return cls()

    def describe(self, config) -> Description:
        return Description(7, "seven by seven", (("eyes", "two"),), {"eyes": 2}, (), {})


@pytest.fixture
def params_file(tmp_path):
    OtherFamily.loads = 0
    register("other", OtherFamily.load)
    path = tmp_path / "params.json"
    path.write_text(json.dumps(params_document(find_spec("tiny")) | {"model_type": "other"}))
    yield path
    del FAMILIES["other"]


def test_a_family_from_elsewhere_is_loaded_once_and_when_it_is_asked_for(params_file):
    assert OtherFamily.loads == 0
    specs = [load_spec(params_file) for _ in range(2)]
    assert [type(spec.family) for spec in specs] == [OtherFamily, OtherFamily]
    assert OtherFamily.loads == 1


def test_a_family_from_elsewhere_speaks_in_its_own_words_and_answers(params_file):
    def said(*arguments: str) -> str:
        done = CliRunner().invoke(app, [*arguments, "--params-path", str(params_file)])
        assert done.exit_code == 0, done.stderr
        return done.stdout

    folder, dog = str(data_path("assets", "tiny")), str(data_path("assets", "dog.jpg"))
    assert "\neyes " in said("inspect", folder)
    assert "tile" not in said("inspect", folder)
    assert json.loads(said("inspect", folder, "--json"))["eyes"] == 2
    question = ("generate", folder, "-p", "What is it?", "-i", dog, "-n", "2", "--json")
    assert json.loads(said(*question, "--dry-run"))["prompt_tokens"] > 1
    assert json.loads(said(*question))["text"]


def test_a_name_is_taken_once(params_file):
    with pytest.raises(ValueError, match="'other' is registered already"):
        register("other", OtherFamily)
    with pytest.raises(ValueError, match="'mllama' is registered already"):
        register("mllama", OtherFamily)


def test_an_unknown_family_is_refused_with_those_that_there_are():
    with pytest.raises(ParamsError, match=r"'mlama' \(nearest: 'mllama'\); mmchat runs 'mllama'"):
        get_family("mlama", Where("x.json"))


def test_nobody_outside_of_models_says_what_belongs_to_a_family():
    """Also in imports for types alone, which the import contract passes over."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).as_posix()
        words = set(OF_A_FAMILY.findall(path.read_text()))
        if words and not name.startswith("models/"):
            found[name] = words
    assert found == ALLOWED
