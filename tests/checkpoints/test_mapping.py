import pytest
import torch

from mmchat.checkpoints.mapping import (
    Rule,
    concatenate,
    identity,
    interleaved_to_halves,
    reshape,
    scalar,
    source_shapes,
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


def test_the_shapes_of_sources_are_found_by_name():
    rules = [Rule(("x", "y"), "xy", ((2, 3), (1, 3)), concatenate), Rule(("z",), "zz", ((4,),))]
    assert source_shapes(rules) == {"x": (2, 3), "y": (1, 3), "z": (4,)}
