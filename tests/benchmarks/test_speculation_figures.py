"""The figures of drafts in docs/speed.md are measured, and can be measured again."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FIGURES = ROOT / "benchmarks" / "figures"
PAGE = (ROOT / "docs" / "speed.md").read_text(encoding="utf-8")


def test_the_page_gives_the_committed_figures():
    ways = json.loads((FIGURES / "speculation.json").read_text(encoding="utf-8"))["ways"]

    def gains(text):
        names = ("mmchat bfloat16", "mmchat int8", "mmchat int4")
        return [f"{ways[name][text]['times_as_fast']:.2f}" for name in names]

    rows = {
        "copied": "copies the text, with a word changed now and then",
        "edited": "copies it, with words left out and added too",
        "prose": "is prose that goes on",
        "misleading": "is made to mislead it",
    }
    for text, answer in rows.items():
        assert f"| {answer} | {' | '.join(gains(text))} |\n" in PAGE


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
