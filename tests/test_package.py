"""What the wheel holds, compared with the folders it is made of."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import mmchat

ROOT = Path(__file__).parents[1]
DATA = "mmchat/_data"


@pytest.fixture(scope="module")
def members(tmp_path_factory) -> dict[str, bytes]:
    """Name -> content of every file in a freshly built wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    program = "import sys; from hatchling.build import build_wheel; build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", program, str(folder)], cwd=ROOT, check=True)
    [wheel] = folder.glob("*.whl")
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


def test_the_wheel_holds_the_package(members):
    packed = {
        name: content
        for name, content in members_under(members, "mmchat/").items()
        if not name.startswith("_data/")
    }
    assert packed == files_under(ROOT / "mmchat")


@pytest.mark.parametrize("folder", ["model_params", "assets/tiny"])
def test_the_wheel_holds_our_data(members, folder):
    packed = members_under(members, f"{DATA}/{folder}/")
    assert packed
    assert packed == files_under(ROOT / folder)


def test_the_wheel_holds_nothing_else(members):
    tops = {name.split("/")[0] for name in members}
    assert tops == {"mmchat", f"mmchat-{mmchat.__version__}.dist-info"}
    data = {name.split("/")[2] for name in members if name.startswith(f"{DATA}/")}
    assert data == {"model_params", "assets"}
