"""Where activations are rounded a sum in another order moves logits by percents, as any nudge does.

So a quantised model that ranks share is asked what the whole one is asked, and must be as right.
"""

from __future__ import annotations

import pytest

import mmchat
from mmchat.evals.run import judge_scenes
from mmchat.evals.scenes import heldout_scenes
from tests.parallel.thread_group import ranks_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

SCENES = 200
MARGIN = 0.02  # of the questions


def accuracy(scheme: str, ranks: int) -> float:
    def right(model: mmchat.Model) -> float:
        found = [one.is_right for one in judge_scenes(model, heldout_scenes(SCENES), rows=8)]
        return sum(found) / len(found)

    if ranks == 1:
        return right(mmchat.load(quantize=scheme))
    with ranks_of(ranks):
        return right(mmchat.load(quantize=scheme, parallel=ranks))


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_ranks_answer_as_well_as_one_process(scheme):
    found = {ranks: accuracy(scheme, ranks) for ranks in (1, 4)}  # two change less than four
    print(scheme, found)  # for docs/parallel.md
    assert min(found.values()) > found[1] - MARGIN
