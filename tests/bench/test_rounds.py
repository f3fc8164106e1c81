import pytest

from mmchat.bench import rounds
from mmchat.bench.clock import Elapsed
from mmchat.bench.rounds import Rounds, interleave, summary


def seconds(*values):
    """One round for each pair (slow, fast), processor and wall alike but for the wall's 1 s."""
    return Rounds(
        tuple(
            {
                "slow": {"total": Elapsed(slow + 1, slow)},
                "fast": {"total": Elapsed(fast + 1, fast)},
            }
            for slow, fast in values
        )
    )


def test_a_ratio_pairs_the_two_runs_of_one_round():
    found = seconds((2.0, 1.0), (30.0, 10.0), (8.0, 2.0))  # the machine was slow in the second
    assert found.ratios("slow", "fast", "total", "cpu") == [2.0, 3.0, 4.0]
    assert summary(found.ratios("slow", "fast", "total", "cpu")) == rounds.Summary(3.0, 2.0, 4.0, 3)


def test_the_clock_is_chosen():
    found = seconds((2.0, 1.0))
    assert found.seconds("slow", "total", "cpu") == [2.0]
    assert found.seconds("slow", "total", "wall") == [3.0]


def test_contestants_alternate_and_every_round_has_its_number():
    order = []

    def run(name):
        def once(index):
            order.append((name, index))
            return {"total": Elapsed(1.0, 1.0)}

        return once

    found = interleave({"a": run("a"), "b": run("b")}, rounds=3, seconds=60)
    assert order == [("a", 0), ("b", 0), ("a", 1), ("b", 1), ("a", 2), ("b", 2)]
    assert len(found.rounds) == 3


@pytest.mark.parametrize(("allowed", "done"), [(0.0, 1), (9.0, 1), (20.0, 2), (35.0, 3)])
def test_no_round_begins_that_would_end_too_late(monkeypatch, allowed, done):
    now = [0.0]
    monkeypatch.setattr(rounds.time, "perf_counter", lambda: now[0])

    def run(index):
        now[0] += 10.0
        return {"total": Elapsed(10.0, 10.0)}

    assert len(interleave({"a": run}, rounds=5, seconds=allowed).rounds) == done


def test_a_difference_of_times_is_never_negative():
    assert Elapsed(1.0, 2.0) - Elapsed(1.5, 0.5) == Elapsed(0.0, 1.5)
