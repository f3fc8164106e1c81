import math

import pytest
import torch

from benchmarks.agreement import Agreement, DisagreementError, check, compare


def test_equal_logits_agree_wholly():
    logits = torch.randn(1, 50)
    assert compare(logits, logits) == Agreement(0.0, 0.0, True)


def test_the_error_is_relative_and_kl_is_in_nats():
    expected = torch.tensor([[math.log(0.5), math.log(0.5)]])
    found = compare(torch.tensor([[math.log(0.75), math.log(0.25)]]), expected)
    assert found.kl == pytest.approx(0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25))
    assert compare(2 * expected, expected).relative_error == pytest.approx(1.0)


def test_another_likeliest_token_is_seen_in_any_row():
    expected = torch.tensor([[1.0, 2.0], [2.0, 1.0]])
    assert compare(expected, expected).top1
    assert not compare(expected[:1].repeat(2, 1), expected).top1


@pytest.mark.parametrize("error", [0.02, float("nan"), float("inf")])
def test_an_error_over_the_limit_ends_the_run(error):
    with pytest.raises(DisagreementError, match=r"of mmchat are .* away from those of other") as e:
        check(Agreement(error, 0.0, True), 0.01, name="mmchat", against="other", workload="decode")
    assert e.value.exit_code == 1


def test_an_error_at_the_limit_passes():
    check(Agreement(0.01, 0.0, True), 0.01, name="a", against="b", workload="decode")
