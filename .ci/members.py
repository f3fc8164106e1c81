"""Checks the members of what is released: python .ci/members.py dist/*

A wheel must hold the package, its data, and the kernels of its machine; an sdist all that it takes
to build and test a wheel. They are of pyproject.toml's version, which the change log must have.
"""

import re
import runpy
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
TORCHS_GLIBC = 28  # of 2.28: what torch's own wheels ask for
SOURCES = runpy.run_path(str(ROOT / "mmchat/quant/kernels/compiler.py"))
NEEDED = {
    "wheel": ("mmchat/py.typed", "mmchat/_data/assets/tiny/", "mmchat/_data/model_params/", ".1"),
    "sdist": ("hatch_build.py", "pyproject.toml", "LICENSE", "tests/", "docs/", "assets/dog.jpg"),
}
STRAY = re.compile(r"__pycache__|\.pyc$|(^|/)\.(git|venv|env|pytest|hypothesis|ruff)(/|_|$)")


def faults_of(path: Path, version: str) -> list[str]:
    """What is wrong with the members of this file, a line each."""
    kind = "wheel" if path.suffix == ".whl" else "sdist"
    if kind == "wheel":
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    else:
        with tarfile.open(path) as archive:
            names = [name.removeprefix(f"mmchat-{version}/") for name in archive.getnames()]
    found = [f"holds {name}" for name in names if STRAY.search(name)]
    for needed in NEEDED[kind]:
        if not any(name.startswith(needed) or name.endswith(needed) for name in names):
            found.append(f"lacks {needed}")
    if f"mmchat-{version}" not in path.name:
        found.append(f"is not of version {version}")
    if kind == "wheel":
        tag = re.search(r"-py3-none-manylinux_2_(\d+)_(\w+)\.whl$", path.name)
        if tag is None or int(tag[1]) > TORCHS_GLIBC:
            return [f"{path.name} is for another Linux than manylinux_2_{TORCHS_GLIBC}"]
        wanted = {f"{variant.name}.so" for variant in SOURCES["VARIANTS"][tag[2]]}
        kernels = {name.rpartition("/")[2] for name in names if name.endswith(".so")}
        if kernels != wanted:
            found.append(f"has the kernels {sorted(kernels)}, not {sorted(wanted)}")
    return [f"{path.name} {fault}" for fault in found]


def main(paths: list[str]) -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["version"]
    found = [fault for path in paths for fault in faults_of(Path(path), version)]
    heading = rf"(?m)^## \[{re.escape(version)}\] - \d{{4}}-\d\d-\d\d$"
    if not re.search(heading, (ROOT / "CHANGELOG.md").read_text("utf-8")):
        found.append(f"CHANGELOG.md has no heading of {version} with a date")
    print("\n".join(found or [f"{len(paths)} files of {version} are complete"]))
    sys.exit(bool(found))


if __name__ == "__main__":
    main(sys.argv[1:])
