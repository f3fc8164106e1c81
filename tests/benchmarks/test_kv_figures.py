"""The figures of `--kv int8` in docs/speed.md are measured, and can be measured again."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FIGURES = ROOT / "benchmarks" / "figures" / "kv.json"
PAGE = " ".join((ROOT / "docs" / "speed.md").read_text(encoding="utf-8").split())


def test_the_page_gives_the_committed_figures():
    found = json.loads(FIGURES.read_text(encoding="utf-8"))
    for context, measured in found["decoding"]["after"].items():
        layer, token = measured["attention of a layer"], measured["a token in full depth"]
        times = [
            f"{one['bfloat16']['median']:.{digits}f} ms, {one['int8']['median']:.{digits}f} ms"
            f" | {one['times as fast']['median']:.2f}"
            for one, digits in ((layer, 2), (token, 0))
        ]
        assert f"| {int(context):,} | {' | '.join(times)} |" in PAGE
    exact = found["exactness"]
    plain, half = exact["float32"], exact["bfloat16"]
    errors = [f"{100 * one['relative_error']:.2f} %" for one in (plain, half)]
    assert f"are {errors[0]} off in float32 and {errors[1]} in bfloat16" in PAGE
    most = [f"{one['largest_difference']:.2f}" for one in (plain, half)]
    assert f"at most {most[0]} and {most[1]}" in PAGE
    assert f"diverge by {plain['kl']:.7f} and {half['kl']:.7f} nats" in PAGE
    assert plain["top1"] == half["top1"] == 1
    [right] = {count for one in (plain, half) for count in one["right"].values()}
    assert f"Of {exact['scenes']} held-out scenes it answers {right} rightly" in PAGE


@pytest.mark.slow
def test_the_figures_can_be_measured_again(tmp_path):
    command = [sys.executable, "-m", "benchmarks.kv", "--shapes", "tiny", "--contexts", "256"]
    output = tmp_path / "found.json"
    done = subprocess.run(
        [*command, "--rounds", "2", "--scenes", "5", "-o", str(output)],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(output.read_text())
    assert found["decoding"]["after"]["256"]["attention of a layer"]["int8"]["median"] > 0
    assert 0 < found["exactness"]["float32"]["kl"] < 1e-4
