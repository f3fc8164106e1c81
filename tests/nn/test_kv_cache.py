"""Tensors of a layer's cache, whoever makes them."""

import torch

from mmchat.nn.kv_cache import LayerCache


def test_no_tensor_of_a_cache_is_bound_to_inference_mode():
    """One that is could be written by none but those in that mode, and compiles for itself."""
    with torch.inference_mode():
        layer = LayerCache(3, 1, 4, 8)
        layer.grow(0, 8)
        layer.shrink(1, 2)
    assert [layer.capacity(slot) for slot in range(3)] == [8, 2, 4]
    assert not any(tensor.is_inference() for slot in range(3) for tensor in layer.row(slot))
