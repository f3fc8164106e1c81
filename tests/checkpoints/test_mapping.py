import pytest
import torch

from mmchat.checkpoints.mapping import (
    Rule,
    concatenate,
    expand,
    identity,
    interleaved_to_halves,
    reshape,
    scalar,
    to_target,
)


def test_rotary_rows_move_from_pairs_to_halves():
    """Two heads of six rows: rows 2i and 2i + 1 of a head go to i and i + 3."""
    rows = torch.arange(12.0).unsqueeze(1).expand(12, 5)
    moved = interleaved_to_halves(heads=2)([rows])
    assert moved[:, 0].tolist() == [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]


@pytest.mark.parametrize(
    ("transform", "shapes", "expected"),
    [
        (identity, [(3, 5)], (3, 5)),
        (scalar, [(1,)], (1,)),
        (reshape((3, 2, 4, 5)), [(3, 40)], (3, 2, 4, 5)),
        (concatenate, [(7, 5), (2, 5), (3, 5)], (12, 5)),
    ],
)
def test_numbers_stay_in_their_order(transform, shapes, expected):
    sources = [torch.randn(shape) for shape in shapes]
    found = transform(sources)
    assert tuple(found.shape) == expected
    assert torch.equal(found.flatten(), torch.cat([source.flatten() for source in sources]))


def test_rotary_rows_are_moved_and_none_is_lost():
    rows = torch.randn(30, 7)
    moved = interleaved_to_halves(3)([rows])
    assert sorted(map(tuple, moved.tolist())) == sorted(map(tuple, rows.tolist()))


@pytest.mark.parametrize("stored", [torch.tensor(0.5), torch.tensor([0.5]), torch.full((8,), 0.5)])
def test_a_scalar_may_be_stored_in_any_length(stored):
    assert scalar([stored]).tolist() == [0.5]


def test_a_rule_for_layers_stands_for_one_rule_each():
    rule = Rule(("a.{}.w", "a.{}.v"), "b.{}", concatenate, layers=((0, 3), (1, 8)))
    first, second = expand([rule])
    assert (first.sources, first.target) == (("a.0.w", "a.0.v"), "b.3")
    assert (second.sources, second.target) == (("a.1.w", "a.1.v"), "b.8")


def test_rules_translate_by_name():
    rules = expand([Rule(("x", "y"), "xy", concatenate), Rule(("z",), "zz")])
    sources = {"x": torch.randn(2, 3), "y": torch.randn(1, 3), "z": torch.randn(4)}
    targets = dict(to_target(rules, sources.__getitem__))
    assert targets.keys() == {"xy", "zz"}
    assert torch.equal(targets["xy"][:2], sources["x"])
    assert torch.equal(targets["xy"][2:], sources["y"])
    assert torch.equal(targets["zz"], sources["z"])


@pytest.mark.parametrize(
    "rules",
    [
        [Rule(("a",), "x"), Rule(("a",), "y")],
        [Rule(("a",), "x"), Rule(("b",), "x")],
        [Rule(("a.{}",), "x", layers=((0, 0), (1, 1)))],
    ],
)
def test_a_name_in_two_rules_is_a_bug(rules):
    with pytest.raises(ValueError, match="two rules name"):
        expand(rules)
