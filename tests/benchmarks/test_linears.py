"""Linear layers beside other engines, and what share of the machine they reach."""

from __future__ import annotations

import shutil

import pytest
import torch
import torch.nn.functional as F

from benchmarks import linears
from benchmarks.agreement import DisagreementError
from mmchat.errors import MissingExtra

WIDTHS = 128, 256
CEILING = linears.integer_ceiling
MACHINE = {"read": 1e10, "dots": 1e12}


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    """One whose speeds are known."""
    monkeypatch.setattr(linears, "ceilings", lambda _: MACHINE)
    monkeypatch.setattr(linears, "integer_ceiling", lambda: None)


def is_installed(peer: str) -> bool:
    try:
        return bool(linears.version_of(peer))
    except MissingExtra:
        return False


@pytest.mark.parametrize("bits", [4, 8])
def test_our_layers_compute_what_the_weights_say(bits):
    weights = linears.draw(bits, WIDTHS)
    assert [tuple(w.levels.shape) for w in weights] == [(256, 128), (128, 256)] * 2
    x = torch.randn(3, 128)
    expected = x
    for weight in weights:
        expected = F.linear(expected, weight.widen())
    assert 0.3 < float(expected.std()) < 3  # neither vanishes nor grows
    error = (linears.mmchat(weights)(x) - expected).norm() / expected.norm()
    assert error < 0.03


@pytest.mark.process  # OpenVINO starts one
@pytest.mark.parametrize("peer", linears.PEERS)
@pytest.mark.parametrize("bits", [4, 8])
def test_a_peer_computes_the_same(bits, peer):
    if not is_installed(peer):
        pytest.skip(f"NOT TESTED: {peer} is not installed")
    for workload in linears.measure(linears.draw(bits, WIDTHS), [peer], rounds=2, seconds=1):
        assert workload["contestants"][peer]["relative_error"] < linears.LIMIT
        assert workload["contestants"][peer]["times"]["low"] > 0


def test_each_number_of_rows_has_times_gain_and_shares():
    weights = linears.draw(8, WIDTHS)
    one, eight, many = linears.measure(weights, [], rounds=1, seconds=1)
    assert [w["title"] for w in (one, eight, many)] == [
        "int8, 1 row",
        "int8, 8 rows",
        "int8, 64 rows",
    ]
    assert one["contestants"]["mmchat"]["gain"]["median"] == 1.0
    count = 4 * WIDTHS[0] * WIDTHS[1]
    for workload in (one, eight, many):
        ours, rows = workload["contestants"]["mmchat"], workload["rows"]
        seconds = ours["ms"]["total"]["median"] / 1000
        wanted = {
            "read": (count + 4 * 2 * sum(WIDTHS)) / seconds / MACHINE["read"],
            "dots": 2 * rows * count / seconds / MACHINE["dots"],
        }
        shares = {kind: share["median"] for kind, share in ours["shares"].items()}
        assert shares == pytest.approx(wanted, rel=1e-2)
        assert workload["machine"]["read"]["median"] == 10.0


def test_a_wrong_engine_is_not_timed(monkeypatch):
    def damaged(weights):
        ours = linears.mmchat(weights)
        return lambda x: 1.2 * ours(x)

    monkeypatch.setitem(linears.PEERS, "OpenVINO", damaged)
    with pytest.raises(DisagreementError, match="of OpenVINO are"):
        linears.measure(linears.draw(8, WIDTHS), ["OpenVINO"], rounds=1, seconds=1)


@pytest.mark.process
@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_the_ceiling_counts_its_operations():
    dots = CEILING()
    if dots is None:
        pytest.skip("NOT TESTED: no 8-bit instructions are known here")
    assert dots(1000) >= 2 * 16 * 12 * 1000  # at least 16 numbers in a register
    assert dots(2000) == 2 * dots(1000)
