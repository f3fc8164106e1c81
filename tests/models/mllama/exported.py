"""Checks of a model that calls exported programs, whichever form these have."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from mmchat.errors import ExportError
from tests.models.mllama import oracle
from tests.models.mllama.oracle import CASES, IMAGE, TOLERANCE, distance, picture

ONE_ROW = [name for name, rows in CASES.items() if len(rows) == 1]


def grouped(program: Any, tensors: Sequence[torch.Tensor]) -> list[Any]:
    """A flat list of arguments in the lists that the program takes."""
    rest = list(tensors)
    arguments = [
        [rest.pop(0) for _ in example] if isinstance(example, list) else rest.pop(0)
        for example in program.args
    ]
    assert not rest
    return arguments


def check_logits(exported: Any, model: Any, case: str, steps: int) -> None:
    [row] = CASES[case]
    expected = oracle.run(model, [row], steps)
    reader = oracle.Reader(exported)
    got = [reader.prefill(row)]
    for step in range(steps - 1):
        got.append(reader.decode(expected.tokens[:, step : step + 1]))
    assert distance(torch.stack(got, dim=1), expected.steps) < TOLERANCE


def check_draft(exported: Any, model: Any, case: str) -> None:
    """Several tokens at once, and one after some of them are taken back."""
    [row] = CASES[case]
    draft = torch.tensor([[61, 7, 120]])
    logits = []
    for runs in (model, exported):
        reader = oracle.Reader(runs)
        reader.prefill(row)
        logits.append(reader.verify(draft))
        reader.truncate(len(row[0]) + 2)
        logits.append(reader.verify(draft[:, :1]))
    assert logits[2].shape == (1, 3, oracle.CONFIG.text_config.vocab_size)
    assert distance(logits[0], logits[2]) < TOLERANCE
    assert distance(logits[1], logits[3]) < TOLERANCE


def check_any_cut_of_a_prefill(exported: Any, model: Any, case: str) -> None:
    [(ids, pictures)] = CASES[case]
    expected = oracle.run(model, [(ids, pictures)], 1).steps[:, 0]
    for cut in range(1, len(ids)):
        reader, count = oracle.Reader(exported), ids[:cut].count(IMAGE)
        reader.prefill((ids[:cut], pictures[:count]))
        got = reader.prefill((ids[cut:], pictures[count:]))
        assert distance(got, expected) < TOLERANCE, cut


def check_a_turn_taken_back(exported: Any, model: Any, encoded: Callable[[], int]) -> None:
    """encoded: how many pictures the programs have encoded so far."""
    reader = oracle.Reader(exported)
    first = ([1, 8, IMAGE, 17, 33], [picture((1, 3))])
    reader.prefill(first)
    reader.prefill(([44, IMAGE, 3, 12], [picture((2, 1))]))
    reader.decode(torch.tensor([[61]]))
    reader.truncate(5)
    got = reader.prefill(([90, 3], []))
    fresh = oracle.run(model, [([*first[0], 90, 3], first[1])], 1)
    assert distance(got, fresh.steps[:, 0]) < TOLERANCE
    assert encoded() == 2


def check_more_pictures_are_refused(exported: Any, ids: list[int]) -> None:
    """ids: of four pictures seen at once, by a model exported for three."""
    row = (ids, [picture((1, 1), seed) for seed in range(4)])
    with pytest.raises(ExportError, match=r"4 pictures .* exported for 3; .* --max-images"):
        oracle.Reader(exported).prefill(row)
