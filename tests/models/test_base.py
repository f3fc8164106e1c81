"""A batch that says something impossible is refused before anything is read."""

from __future__ import annotations

import pytest
import torch

from mmchat.models.base import Batch

IDS = torch.tensor([1, 2, 3])
LENGTHS = (4, 0, 7)  # of three slots


def test_rows_go_on_where_their_slots_end() -> None:
    Batch(IDS, (2, 0), (7, 4), (1, 2), ()).check(LENGTHS)
    Batch(IDS, (1,), (0,), (3,), (0, 2)).check(LENGTHS)


@pytest.mark.parametrize(
    "batch",
    [
        Batch(IDS[:0], (), (), (), ()),
        Batch(IDS, (1,), (0,), (2,), (0, 1)),
        Batch(IDS, (1,), (0,), (4,), (0,)),
        Batch(IDS, (0, 0), (4, 4), (1, 2), (0,)),
        Batch(IDS, (0, 1), (4, 0), (3, 0), (0,)),
        Batch(IDS, (0, 1), (4,), (1, 2), (0,)),
        Batch(IDS, (0,), (4,), (1, 2), (0,)),
        Batch(IDS, (0,), (3,), (3,), (0,)),
        Batch(IDS, (3,), (0,), (3,), (0,)),
        Batch(IDS, (-1,), (7,), (3,), (0,)),
        Batch(IDS, (1,), (0,), (3,), (3,)),
        Batch(IDS, (1,), (0,), (3,), (-1,)),
        Batch(IDS, (1,), (0,), (3,), (1, 0)),
    ],
    ids=[
        "no row", "a token too many", "a token too few", "a slot twice", "an empty row",
        "a start too few", "a count too many", "another start", "no such slot", "a negative slot",
        "wanted beyond the end", "wanted before the start", "wanted in another order",
    ],
)  # fmt: skip
def test_what_does_not_fit_the_slots_is_refused(batch: Batch) -> None:
    with pytest.raises(ValueError, match=r"^slots .* read .* of \d tokens from .*; they hold"):
        batch.check(LENGTHS)
