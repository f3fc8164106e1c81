import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import mmchat
from mmchat.export import export_model
from mmchat.export.plan import ExportPlan
from mmchat.loading.options import LoadOptions

ROOT = Path(__file__).parents[1]
HEAVY = "{'torch', 'numpy', 'PIL', 'tiktoken', 'tokenizers', 'prompt_toolkit', 'huggingface_hub'}"
LIGHT_MODULES = (
    "mmchat",
    "mmchat.cli.app",
    "mmchat.errors",
    "mmchat.engine.events",
    "mmchat.limits",
    "mmchat.conversation",
    "mmchat.catalog.find",
    "mmchat.estimate.memory",
    "mmchat.quant.schemes",
    "mmchat.models.mllama.config",
    "mmchat.models.mllama.footprint",
    "mmchat.models.mllama.tiling",
)


@pytest.mark.process
def test_import_contracts_hold():
    program = (
        "import sys; from importlinter.cli import lint_imports;"
        "sys.exit(lint_imports(config_filename='pyproject.toml', no_cache=True))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.process
def test_light_modules_import_nothing_heavy():
    program = (
        "import sys, importlib\n"
        f"for name in {LIGHT_MODULES!r}:\n"
        "    importlib.import_module(name)\n"
        f"    assert not ({HEAVY} & set(sys.modules)), name\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.process
@pytest.mark.parametrize("command", ["serve", "server"])
def test_the_help_of_the_server_needs_neither_torch_nor_its_extra(command):
    program = (
        "import sys\n"
        "sys.modules.update(dict.fromkeys(('starlette', 'uvicorn', 'h11', 'torch', 'pydantic')))\n"
        "from mmchat.cli.app import app\n"
        f"app([{command!r}, '--help'])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "--allow-remote-images" in done.stdout


@pytest.mark.process
@pytest.mark.parametrize(
    "arguments",
    [
        ("generate", "tyni", "-p", "x"),
        ("generate", "-p", "x", "--device", "warp"),
        ("generate", "-p", "x", "--max-seq-len", "999999"),
        ("chat", "tyni"),
        ("bench", "tyni"),
        ("eval", "scenes", "tyni"),
        ("export", "tyni"),
        ("export", "tiny", "-o", "no-such-folder/out"),
        ("export", "tiny", "--format", "executorch", "--dtype", "bfloat16"),
        ("serve", "tyni"),
        ("serve", "--host", "0.0.0.0"),
        ("serve", "--kv-memory", "much"),
    ],
)
def test_what_needs_no_torch_is_refused_without_it(arguments):
    program = (
        "import sys\n"
        "from mmchat.cli.app import app\n"
        "try:\n"
        f"    app({list(arguments)!r})\n"
        "except SystemExit as ended:\n"
        "    assert ended.code in (1, 2, 3, 7)\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.stderr.count("\n") == 1
    assert done.returncode == 0, done.stderr


@pytest.mark.process
@pytest.mark.parametrize("exported", [False, True])
def test_an_answer_needs_nothing_of_torchs_compiler(exported, tmp_path):
    """Loading it takes two seconds, and some operations on the meta device do that."""
    name = None
    if exported:
        name = str(tmp_path / "exported")
        export_model(ExportPlan(LoadOptions(quantize="int4"), Path(name), "safetensors"))
    scheme = "int4" if exported else "int8"
    program = (
        "import sys, mmchat\n"
        f"model = mmchat.load({name!r}, device='cpu', quantize={scheme!r})\n"
        "*_, done = model.chat().send('What is here?', ['assets/dog.jpg'])\n"
        "assert done.text\n"
        "assert not {'torch._dynamo', 'torch._inductor', 'sympy'} & set(sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", mmchat.__all__)
def test_every_public_name_can_be_had(name):
    assert getattr(mmchat, name) is not None
    assert name in dir(mmchat)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'chatt'"):
        _ = mmchat.chatt


def test_the_version_is_the_projects():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert mmchat.__version__ == project["version"]
