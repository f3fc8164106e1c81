"""The nearest name is found, and at a bounded price."""

from difflib import SequenceMatcher

from mmchat.spelling import closest


def test_the_nearest_names_come_best_first():
    names = ["before.jpg", "After.jpg", "dog.png"]
    assert closest("afterr.jpg", names, cutoff=0.6) == ["After.jpg"]
    assert closest("bfore.jpg", names, cutoff=0.3, count=2) == ["before.jpg", "After.jpg"]
    assert closest("zzz", names, cutoff=0.6) == []


def test_few_names_are_compared_letter_by_letter_and_none_whole(monkeypatch):
    compared = []
    real = SequenceMatcher.ratio
    monkeypatch.setattr(
        SequenceMatcher, "ratio", lambda s: compared.append(len(s.a) + len(s.b)) or real(s)
    )
    closest("a" * 250 + "x", ["a" * 250 + str(n) for n in range(5_000)], cutoff=0.6)
    assert len(compared) <= 20
    assert max(compared) <= 128
