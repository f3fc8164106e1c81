import pytest
import torch

from mmchat.bench.plan import Variant


@pytest.mark.parametrize(
    "variant",
    [
        Variant(),
        Variant("int8"),
        Variant("int4-g32", "on"),
        Variant("none", "on"),
        Variant("int8", exported=True),
    ],
)
def test_a_variant_survives_its_name(variant):
    assert Variant.parse(str(variant)) == variant


@pytest.mark.parametrize(
    ("variant", "options", "label", "bits"),
    [
        (Variant(), {}, "mmchat bfloat16", None),
        (Variant("int8"), {"quantize": "int8"}, "mmchat int8", 8),
        (Variant("int4-g32"), {"quantize": "int4-g32"}, "mmchat int4-g32", 4),
        (Variant("fp8"), {"quantize": "fp8"}, "mmchat fp8", 8),
        (Variant("none", "on"), {"compile": "on"}, "mmchat bfloat16 compiled", None),
        (Variant(exported=True), {}, "mmchat bfloat16 exported", None),
        (Variant("int8", exported=True), {"quantize": "int8"}, "mmchat int8 exported", 8),
    ],
)
def test_a_variant_is_what_the_loader_gets(variant, options, label, bits):
    assert variant.options() == options
    assert variant.label(torch.bfloat16) == label
    assert variant.bits == bits
