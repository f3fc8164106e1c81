"""The versions that .ci/run tests with.

    python .ci/versions.py lowest       the lowest version of every runtime dependency but torch
    python .ci/versions.py differences  where this environment differs from .ci/constraints.txt
    python .ci/versions.py freeze       write this environment's versions there, after a green run
    python .ci/versions.py failed       the tests that failed in the last run of pytest

The first prints lines for pip's `--constraint`.
"""

import json
import re
import sys
import tomllib
from importlib.metadata import distributions
from pathlib import Path

HERE = Path(__file__).parent
CONSTRAINTS = HERE / "constraints.txt"
HEADER = "# The versions of the last green run of .ci/run; made by: python .ci/versions.py freeze\n"


def installed() -> dict[str, str]:
    """Name -> version of everything that is installed, without builds such as +cpu."""
    packages = {d.name.lower().replace("_", "-"): d.version.split("+")[0] for d in distributions()}
    return {n: v for n, v in sorted(packages.items()) if n not in ("mmchat", "pip", "setuptools")}


def lowest() -> list[str]:
    """NAME==VERSION of what users install, extras of one package included; not torch."""
    project = tomllib.loads((HERE.parent / "pyproject.toml").read_text("utf-8"))["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["heif"], *extras["pdf"], *extras["tokenizers"]]
    wanted += [*extras["clipboard"], *extras["server"], *extras["bench"]]
    pairs = [re.match(r"([\w-]+)>=([\d.]+)", line).groups() for line in wanted]
    return [f"{name}=={version}" for name, version in pairs if name != "torch"]


def differences() -> list[str]:
    """A line for each package that is newer, older or missing on one side."""
    lines = [line for line in CONSTRAINTS.read_text("utf-8").splitlines() if "==" in line]
    tested, here = dict(line.split("==") for line in lines), installed()
    return [
        f"{name}: {here.get(name, 'not here')}, tested with {tested.get(name, 'none')}"
        for name in sorted(tested.keys() | here.keys())
        if tested.get(name) != here.get(name)
    ]


def failed() -> list[str]:
    """The names of the tests, as pytest keeps them."""
    kept = HERE.parent / ".pytest_cache" / "v" / "cache" / "lastfailed"
    return list(json.loads(kept.read_text("utf-8"))) if kept.exists() else []


def main(action: str) -> None:
    if action == "freeze":
        lines = "".join(f"{name}=={version}\n" for name, version in installed().items())
        CONSTRAINTS.write_text(HEADER + lines, "utf-8")
    else:
        shown = {"lowest": lowest, "differences": differences, "failed": failed}[action]
        print("\n".join(shown()))


if __name__ == "__main__":
    main(sys.argv[1])
