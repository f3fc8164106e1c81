import pytest
import torch

from mmchat.bench.run import Variant


@pytest.mark.parametrize(
    ("variant", "label"),
    [
        (Variant(), "bfloat16"),
        (Variant("int8"), "int8"),
        (Variant("int4-g32"), "int4-g32"),
        (Variant(compile="on"), "bfloat16 compiled"),
        (Variant("int8", "off"), "int8 eager"),
        (Variant(exported=True), "bfloat16 exported"),
        (Variant("int8", exported=True), "int8 exported"),
    ],
)
def test_a_variant_is_named_by_its_weights_and_how_it_runs(variant, label):
    assert variant.label(torch.bfloat16) == label
