import pytest

from mmchat.bench import rounds
from mmchat.bench.rounds import Summary, interleave, summary


def test_a_summary_is_the_median_and_the_range():
    assert summary([2.0, 9.0, 1.0]) == Summary(2.0, 1.0, 9.0, 3)


def test_all_alternate_and_every_round_has_its_number():
    order = []

    def run(name):
        return lambda index: order.append((name, index))

    found = interleave({"a": run("a"), "b": run("b")}, rounds=3, seconds=60)
    assert order == [("a", 0), ("b", 0), ("a", 1), ("b", 1), ("a", 2), ("b", 2)]
    assert found == [{"a": None, "b": None}] * 3


@pytest.mark.parametrize(("allowed", "done"), [(0.0, 1), (9.0, 1), (20.0, 2), (35.0, 3)])
def test_no_round_begins_that_would_end_too_late(monkeypatch, allowed, done):
    now = [0.0]
    monkeypatch.setattr(rounds.time, "perf_counter", lambda: now[0])

    def run(index):
        now[0] += 10.0

    assert len(interleave({"a": run}, rounds=5, seconds=allowed)) == done
