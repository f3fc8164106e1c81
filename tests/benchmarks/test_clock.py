from benchmarks.clock import Elapsed, Rounds
from mmchat.bench.rounds import Summary, summary


def seconds(*values):
    """One round for each pair (slow, fast), processor and wall alike but for the wall's 1 s."""
    return Rounds(
        [
            {
                "slow": {"total": Elapsed(slow + 1, slow)},
                "fast": {"total": Elapsed(fast + 1, fast)},
            }
            for slow, fast in values
        ]
    )


def test_a_ratio_pairs_the_two_runs_of_one_round():
    found = seconds((2.0, 1.0), (30.0, 10.0), (8.0, 2.0))  # the machine was slow in the second
    assert found.ratios("slow", "fast", "total", "cpu") == [2.0, 3.0, 4.0]
    assert summary(found.ratios("slow", "fast", "total", "cpu")) == Summary(3.0, 2.0, 4.0, 3)


def test_the_clock_is_chosen():
    found = seconds((2.0, 1.0))
    assert found.seconds("slow", "total", "cpu") == [2.0]
    assert found.seconds("slow", "total", "wall") == [3.0]


def test_a_difference_of_times_is_never_negative():
    assert Elapsed(1.0, 2.0) - Elapsed(1.5, 0.5) == Elapsed(0.0, 1.5)
