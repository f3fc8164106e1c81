"""The figures in docs/quantization.md are measured, and can be measured again."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FIGURES = ROOT / "benchmarks" / "figures"
PAGE = " ".join((ROOT / "docs" / "quantization.md").read_text(encoding="utf-8").split())

TABLE = {
    "int4": "`int4`",
    "int4, calibrated": "`int4`, calibrated",
    "int4-b32": "`int4-b32`",
    "int4-b32, calibrated": "`int4-b32`, calibrated",
}


def test_the_page_gives_the_committed_figures():
    found = json.loads((FIGURES / "quantization.json").read_text(encoding="utf-8"))
    ways = found["built_in"]["ways"]
    search, plain = (ways[name] for name in ("int4", "int4, plain rounding"))
    errors = [f"{100 * way['relative_error']:.1f} %" for way in (search, plain)]
    assert f"are {errors[0]} off float32's where plain rounding leaves {errors[1]}," in PAGE
    assert f"diverge by {search['kl']:.5f} and {plain['kl']:.5f} nats" in PAGE
    scenes, right = found["built_in"]["scenes"], found["built_in"]["right"]
    said = f"Of {scenes} held-out scenes the built-in model answers {right['float32']} rightly"
    assert f"{said} in float32, {right['int8']} in int8 and {right['int4']} in int4" in PAGE
    for way, name in TABLE.items():
        cells = (
            f"{1e6 * ways[way]['kl']:.0f}",
            f"{100 * ways[way]['relative_error']:.1f} %",
            f"{right[way]} of {scenes}",
        )
        assert f"| {name} | {' | '.join(cells)} |" in PAGE
    for scheme in ("int4", "int4-b32"):
        assert ways[f"{scheme}, calibrated"]["kl"] < 0.5 * ways[scheme]["kl"]
    layers = [e for kind, e in found["wide"]["layers"].items() if kind.startswith("text ")]
    ratios = [errors["int4"] / errors["int4, plain rounding"] for errors in layers]
    assert f"are {100 * (1 - sum(ratios) / len(ratios)):.0f} % closer" in PAGE

    times = found["speed"]["milliseconds by tokens"].values()
    for tokens, said in (("1", "1 token"), ("64", "64 tokens")):
        assert " | ".join([said, *(f"{time[tokens]:.2f}" for time in times)]) in PAGE


@pytest.mark.slow
def test_the_figures_can_be_measured_again(tmp_path):
    command = [
        sys.executable, "-m", "benchmarks.quantization", "--shapes", "tiny", "--scenes", "30",
        "--samples", "24", "--width", "256",
    ]  # fmt: skip
    output = tmp_path / "found.json"
    done = subprocess.run(
        [*command, "-o", str(output)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(output.read_text())
    for part in ("built_in", "wide"):
        ways = found[part]["ways"]
        assert ways["int8"]["kl"] < ways["int4"]["kl"]
        names = ("int8", "int4", "int4, plain rounding")
        errors = [ways[name]["relative_error"] for name in names]
        assert errors == sorted(errors)
        assert ways["int8"]["top1"] > 0.9
    ways = found["built_in"]["ways"]
    for scheme in ("int4", "int4-b32"):
        calibrated = ways[f"{scheme}, calibrated"]["relative_error"]
        assert calibrated < ways[scheme]["relative_error"]
    times = found["speed"]["milliseconds by tokens"]
    assert {"int4", "int4-b32", "nf4", "int8"} < times.keys()
    assert all(time["64"] > time["1"] > 0 for time in times.values())
