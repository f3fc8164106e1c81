"""What the wheel holds, what it needs, and which warnings are errors."""

import ast
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import warnings
import zipfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from mmchat.cli import app as frame

ROOT = Path(__file__).parents[1]
DATA = "mmchat/_data"
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["version"]


def build_wheel(folder: Path, compiler: str) -> Path:
    program = "import sys; from hatchling.build import build_wheel; build_wheel(sys.argv[1])"
    command = [sys.executable, "-c", program, str(folder)]
    subprocess.run(command, cwd=ROOT, env={**os.environ, "CC": compiler}, check=True)
    [wheel] = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def members(tmp_path_factory) -> dict[str, bytes]:
    """Name -> content of every file in a wheel, built where no compiler is."""
    wheel = build_wheel(tmp_path_factory.mktemp("wheel"), "no-such-compiler")
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def files_under(folder: Path) -> dict[str, bytes]:
    """Path below `folder` -> content, without what running Python leaves there."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def members_under(members: dict[str, bytes], prefix: str) -> dict[str, bytes]:
    return {
        name.removeprefix(prefix): content
        for name, content in members.items()
        if name.startswith(prefix)
    }


@pytest.mark.process
def test_the_wheel_holds_the_package(members):
    packed = {
        name: content
        for name, content in members_under(members, "mmchat/").items()
        if not name.startswith("_data/")
    }
    assert packed == files_under(ROOT / "mmchat")


@pytest.mark.process
def test_the_wheel_holds_our_data(members):
    assert members_under(members, f"{DATA}/model_params/") == files_under(ROOT / "model_params")
    model, folder = members_under(members, f"{DATA}/assets/tiny/"), ROOT / "assets/tiny"
    manifest = json.loads(model["mmchat-manifest.json"])
    assert model.keys() == {"mmchat-manifest.json", *manifest["files"]}  # not how it was trained
    assert model == {name: (folder / name).read_bytes() for name in model}


@pytest.mark.process
def test_the_wheel_holds_nothing_else(members):
    tops = {name.split("/")[0] for name in members}
    ours = f"mmchat-{VERSION}"
    assert tops == {"mmchat", f"{ours}.dist-info", f"{ours}.data"}
    data = {name.split("/")[2] for name in members if name.startswith(f"{DATA}/")}
    assert data == {"model_params", "assets"}


SHARED = {
    "man/man1/mmchat.1",
    "bash-completion/completions/mmchat",
    "zsh/site-functions/_mmchat",
    "fish/vendor_completions.d/mmchat.fish",
}


@pytest.fixture(scope="module")
def shared(members) -> dict[str, str]:
    """Place below `share` of an environment -> text of the manual page and of completions."""
    texts = members_under(members, f"mmchat-{VERSION}.data/data/share/")
    return {name: content.decode() for name, content in texts.items()}


@pytest.mark.process
def test_the_manual_page_is_the_help_of_all_commands(shared):
    assert shared.keys() == SHARED
    page = shared["man/man1/mmchat.1"]
    assert page.isascii()
    for name in frame.COMMANDS:
        _, _, rest = page.partition(f".SS mmchat {name}\n")
        section = re.sub(r"\\f[BIR]", " ", rest.partition("\n.S")[0]).replace(r"\-", "-")
        for parameter in frame.load(name).params:
            if parameter.param_type_name == "option" and not parameter.hidden:
                shown = set(re.findall(r"(?<![\w-])--?[\w-]+", section))
                assert set(parameter.opts) <= shown, (name, parameter.opts)
    if shutil.which("groff"):
        command = ["groff", "-man", "-ww", "-Tutf8"]
        done = subprocess.run(command, input=page, capture_output=True, text=True, check=True)
        assert done.stderr == ""


@pytest.mark.process
def test_bash_completes_by_what_the_wheel_brings(shared, tmp_path):
    bash = shutil.which("bash") or pytest.skip("NOT TESTED: there is no bash here")
    (tmp_path / "mmchat").write_text(f'#!/bin/sh\nexec {sys.executable} -m mmchat "$@"\n')
    (tmp_path / "mmchat").chmod(0o755)
    asked = 'COMP_WORDS=(mmchat ser); COMP_CWORD=1; _mmchat_completion mmchat; echo "$COMPREPLY"'
    script = shared["bash-completion/completions/mmchat"] + asked
    place = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([bash, "-c", script], env=place, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("serve\n", "")


# One mistake a line, each of another kind.
MISTAKES = """\
import mmchat
model = mmchat.load(7)
mmchat.SamplingParams(temperature="hot")
model.chat().send(["What?"])
model.generate_many(["What?"], rows="4")
[event.answer for event in model.chat().complete("The")]
"""

# What is taken although it is kept as something else.
RIGHT = """\
import mmchat
import torch
model = mmchat.load("tiny", device=torch.device("cpu"), dtype=torch.float32)
message = mmchat.Message("user", "Hello")
message.content[0]
sampling = mmchat.SamplingParams(stop="x")
for end in model.generate_many(["What?", ("What?", "dog.jpg"), message], sampling):
    end.text
for end in model.generate_many(["What?"], return_exceptions=True):
    end.text if isinstance(end, mmchat.Finished) else end.exit_code
"""


@pytest.mark.slow  # pyright fetches itself when it runs for the first time
def test_a_type_checker_reads_the_types_of_the_wheel(members, tmp_path):
    site = tmp_path / "env/lib" / f"python3.{sys.version_info.minor}" / "site-packages"
    for name, content in members_under(members, "mmchat/").items():
        if name.endswith((".py", ".typed")):
            path = site / "mmchat" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    others = [path for path in sys.path if path.endswith("site-packages")]
    (site / "others.pth").write_text("\n".join(others))
    for example in (ROOT / "examples").glob("*.py"):
        shutil.copy(example, tmp_path)
    (tmp_path / "mistakes.py").write_text(MISTAKES)
    (tmp_path / "right.py").write_text(RIGHT)
    # reportMissingTypeStubs: what is imported has types of its own, as py.typed says
    settings = {"venvPath": ".", "venv": "env", "reportMissingTypeStubs": "error"}
    chosen = {"include": ["*.py"], "typeCheckingMode": "standard"}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings | chosen))
    done = subprocess.run(
        [sys.executable, "-m", "pyright", "--outputjson"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    report = json.loads(done.stdout)
    assert report["summary"]["filesAnalyzed"] > 4
    found = [
        (Path(fault["file"]).name, fault["range"]["start"]["line"] + 1)
        for fault in report["generalDiagnostics"]
    ]
    assert set(found) == {("mistakes.py", line) for line in range(2, 7)}, done.stdout


def test_the_change_log_is_in_the_form_of_keep_a_changelog():
    _, *releases = re.split(r"(?m)^## ", (ROOT / "CHANGELOG.md").read_text("utf-8"))
    headings = [release.partition("\n")[0] for release in releases]
    assert any(heading.startswith(f"[{VERSION}] - ") for heading in headings)
    kinds = "Added|Changed|Deprecated|Removed|Fixed|Security"
    for heading, release in zip(headings, releases, strict=True):
        assert re.fullmatch(r"\[Unreleased\]|\[[\d.]+\] - \d{4}-\d\d-\d\d", heading)
        for line in filter(None, release.splitlines()[1:]):
            assert re.match(rf"- \S|### ({kinds})(: .+)?$", line), line


def statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Those of a file and of all within them, without their expressions, which import nothing."""
    for statement in body:
        yield statement
        for name in ("body", "handlers", "orelse", "finalbody", "cases"):
            yield from statements(getattr(statement, name, []))


packages_distributions = cache(importlib.metadata.packages_distributions)


@cache
def third_party(folder: Path) -> set[str]:
    """The names of the packages that the Python files below `folder` import, anywhere in them."""
    modules = set()
    for path in folder.rglob("*.py"):
        for node in statements(ast.parse(path.read_text("utf-8")).body):
            match node:
                case ast.Import(names=names):
                    modules |= {alias.name for alias in names}
                case ast.ImportFrom(module=str(module), level=0):
                    modules.add(module)
    tops = {module.split(".")[0] for module in modules} - sys.stdlib_module_names
    packages = packages_distributions()
    return {packages[top][0].lower().replace("_", "-") for top in tops if top in packages}


def declared(*extras: str) -> dict[str, str]:
    """Name -> version range of what pyproject.toml asks for."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    lines = [line for extra in extras for line in project["optional-dependencies"][extra]]
    split = [
        re.match(r"([\w-]+)(?:\[[\w,]+\])?([<>=][^; ]+)", line)
        for line in lines or project["dependencies"]
    ]
    return {found[1].replace("_", "-"): found[2] for found in split if found}


def test_what_the_package_imports_is_declared_and_the_reverse():
    through_uvicorn = {"h11"}  # declared for a version without known faults
    imported = third_party(ROOT / "mmchat") - {"mmchat"} | through_uvicorn
    optional = declared("heif", "pdf", "tokenizers", "clipboard", "server")
    heavy = declared("eval", "ray")  # which are not installed beside all tests
    assert imported | heavy.keys() == declared().keys() | optional.keys() | heavy.keys()


def test_what_only_the_tests_import_is_declared():
    imported = set.union(*(third_party(ROOT / name) for name in ("tests", "assets", "benchmarks")))
    wanted = imported - third_party(ROOT / "mmchat") - {"mmchat"}
    assert wanted <= declared("test", "bench", "test-peers").keys()


def test_every_dependency_has_a_lowest_and_a_highest_version():
    extras = "heif pdf tokenizers clipboard server bench test executorch eval ray"
    ranges = declared() | declared(*extras.split())
    assert len(ranges) > 25
    for name, versions in ranges.items():
        assert re.fullmatch(r">=[\d.]+,<=?[\d.]+", versions), (name, versions)


def test_oracles_and_test_tools_are_no_newer_than_the_last_green_run():
    lines = (ROOT / ".ci/constraints.txt").read_text("utf-8").splitlines()
    tested = dict(line.split("==") for line in lines if "==" in line)
    for name, versions in declared("bench", "test").items():
        assert versions.split("<=")[1] == tested[name], name


def resolved(requirements: list[str], *options: str) -> dict[str, str] | str:
    """Name -> the release that pip would install, nothing pinned; else what pip says."""
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--report", "-"]
    done = subprocess.run([*command, *options, *requirements], capture_output=True, text=True)
    if done.returncode:
        return done.stderr
    packages = [entry["metadata"] for entry in json.loads(done.stdout)["install"]]
    return {one["name"].lower().replace("_", "-"): one["version"] for one in packages}


def numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version.partition("+")[0])]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_all_extras_resolve_together_on_the_newest_releases():
    """So each does alone. Were one in another's way, pip would go back to an older release."""
    if isinstance(resolved(["packaging"], "--ignore-installed"), str):
        pytest.skip("NOT TESTED: whether the extras resolve; no index of packages is reached")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = project["optional-dependencies"].values()
    wanted = [*project["dependencies"], *(line for lines in extras for line in lines)]
    asked = [line for line in wanted if not line.startswith("mmchat[")]
    # What is installed is none of its work where there is no newer release.
    found = resolved(asked, "--upgrade", "--upgrade-strategy", "eager")
    assert isinstance(found, dict), found
    lines = (ROOT / ".ci/constraints.txt").read_text("utf-8").splitlines()
    tested = dict(line.split("==") for line in lines if "==" in line)
    names = {re.split(r"[^\w-]", line)[0].lower().replace("_", "-") for line in wanted}
    older = [
        (name, found[name])
        for name in sorted(names & tested.keys() & found.keys())
        if numbers(found[name]) < numbers(tested[name])
    ]
    assert older == []


def warn_as(module: str) -> None:
    exec("import warnings; warnings.warn('look', stacklevel=1)", {"__name__": module})


@pytest.mark.parametrize("module", ["mmchat.images", "tests.test_package", "mmchat"])
def test_a_warning_of_our_own_is_an_error(module):
    with pytest.raises(UserWarning, match="look"):
        warn_as(module)


@pytest.mark.parametrize("module", ["transformers.models", "torch", "mmchatty"])
def test_a_warning_of_a_library_is_none(module):
    with warnings.catch_warnings(record=True) as seen:
        warn_as(module)
    assert [str(warning.message) for warning in seen] == ["look"]


def test_a_test_that_is_skipped_says_why(pytestconfig):
    """Those of heavy peers, of kernels and of examples/native are left out where these are not."""
    assert "-rs" in pytestconfig.getini("addopts")


@pytest.mark.process
def test_the_wheel_holds_the_pictures_that_the_chat_offers_to_try(members):
    packed = members_under(members, f"{DATA}/assets/")
    for name in ("dog.jpg", "street.jpg"):
        assert packed[name] == (ROOT / "assets" / name).read_bytes()
