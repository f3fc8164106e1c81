"""The figures of drafts that the README gives are measured, and can be measured again."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FIGURES = ROOT / "benchmarks" / "figures"
README = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())


def test_the_readme_gives_the_committed_figures():
    ways = json.loads((FIGURES / "speculation.json").read_text(encoding="utf-8"))["ways"]

    def gains(text):
        names = ("mmchat bfloat16", "mmchat int8", "mmchat int4")
        return [f"{ways[name][text]['times_as_fast']:.2f}" for name in names]

    copied = "{} times as fast in bfloat16, {} times in int8 and {} times in int4,"
    assert copied.format(*gains("copied")) in README
    assert "left out and added too {}, {} and {} times,".format(*gains("edited")) in README
    assert "prose that goes on {}, {} and {} times,".format(*gains("prose")) in README
    assert "made to mislead it {}, {} and {} times:".format(*gains("misleading")) in README


@pytest.mark.slow
def test_the_figures_can_be_measured_again(tmp_path):
    output = tmp_path / "found.json"
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.speculation", "--shapes", "tiny", "--tokens", "32",
         "--rounds", "1", "--quantize", "int8", "-o", str(output)],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    [way] = json.loads(output.read_text())["ways"].values()
    assert set(way) == {"copied", "edited", "prose", "misleading"}
