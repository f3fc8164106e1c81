"""Who is given the next free row."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from mmchat.engine.room import Queue


def answer(owner: str, number: int = 0) -> Any:
    return SimpleNamespace(request=SimpleNamespace(owner=owner), number=number)


def queue_of(rows: int, *owners: str) -> Queue:
    queue = Queue(rows)
    for number, owner in enumerate(owners):
        queue.add(answer(owner, number))
    return queue


def admit(queue: Queue, running: Counter[str], rows: int) -> list[tuple[str, int]]:
    """Give rows as long as somebody may have one."""
    given = []
    while running.total() < rows and (found := queue.next(running)):
        queue.remove(found)
        running[found.request.owner] += 1
        given.append((found.request.owner, found.number))
    return given


def test_one_who_is_alone_comes_in_order_and_takes_all_rows_without_a_name():
    assert admit(queue_of(3, "", "", "", ""), Counter(), 3) == [("", 0), ("", 1), ("", 2)]


def test_owners_take_turns():
    queue = queue_of(8, "a", "a", "a", "a", "b", "c", "b")
    given = admit(queue, Counter(), 8)
    assert given[:3] == [("a", 0), ("b", 4), ("c", 5)]
    assert [owner for owner, _ in given].count("b") == 2


def test_the_last_free_row_waits_for_somebody_new():
    queue, running = queue_of(8, *"a" * 32), Counter()
    assert len(admit(queue, running, 8)) == 7
    queue.add(answer("b"))
    assert admit(queue, running, 8) == [("b", 0)]


def test_nobody_takes_more_than_half_while_others_wait():
    queue = queue_of(8, *"a" * 9, *"b" * 9)
    given = Counter(owner for owner, _ in admit(queue, Counter(), 8))
    assert max(given.values()) == 4
    assert given.total() >= 7


@given(
    st.integers(1, 9),
    st.lists(st.tuples(st.sampled_from(["", "a", "b", "c"]), st.booleans()), max_size=60),
)
def test_nobody_waits_for_ever(rows, events):
    """Whoever comes and goes: while somebody waits, somebody runs or is admitted."""
    queue, running, told = Queue(rows), Counter(), []
    for number, (owner, ends) in enumerate(events):
        queue.add(answer(owner, number))
        told += admit(queue, running, rows)
        assert not queue or running.total() > 0
        if ends and running.total():
            leaver = next(name for name in running if running[name])
            running[leaver] -= 1
    while queue:
        told += admit(queue, running, rows)
        assert running.total() > 0
        leaver = next(name for name in running if running[name])
        running[leaver] -= 1
    assert sorted(number for _, number in told) == list(range(len(events)))
    for owner in ("", "a", "b", "c"):  # nobody overtakes within one owner
        numbers = [number for name, number in told if name == owner]
        assert numbers == sorted(numbers)
