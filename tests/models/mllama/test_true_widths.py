"""Our model against transformers at the true widths of the 11B model, with few layers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mmchat.catalog.known import find_spec
from mmchat.models.base import Batch
from mmchat.models.mllama.model import MllamaForConditionalGeneration
from mmchat.models.row_cache import Place
from tests.models.mllama import oracle
from tests.models.mllama import transformers_mllama as theirs


def few_layers():
    """11B Instruct with a self-, a cross- and a self-attention layer and a small vocabulary."""
    config = find_spec("llama3.2-11B").config
    vision = replace(
        config.vision_config,
        num_hidden_layers=2,
        num_global_layers=1,
        intermediate_layers_indices=(1,),
    )
    text = replace(
        config.text_config, num_hidden_layers=3, cross_attention_layers=(1,), vocab_size=1000
    )
    return replace(config, vision_config=vision, text_config=text)


@pytest.mark.slow
@torch.inference_mode()
def test_logits_agree_at_the_widths_of_11b():
    config = few_layers()
    weights = oracle.random_weights(config)
    with torch.device("meta"):
        ours = MllamaForConditionalGeneration(config)
    ours.load_state_dict(weights, strict=True, assign=True)
    ours.finish_loading(torch.device("cpu"))
    side = config.vision_config.image_size
    tiles = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(3))
    ids = torch.tensor([[1, 17, config.image_token_id, 33, 9, 4, 77]])
    ratio = torch.tensor([oracle.CANVASES.index((2, 1)) + 1])
    states = ours.eval().vision_states(tiles[None], ratio)
    assert states.shape == (1, 2 * 1601, 4096)
    cache = ours.new_cache(1, 7)
    cache.places[0] = (Place(2, 3, "picture"),)
    cache.keep_media("picture", ours.cross_key_values(states))
    logits = ours(Batch.all_of(ids[0], 0), cache)[None]

    expected = theirs.build(weights, ours=config)
    seen = torch.zeros(1, 7, 1, 4, dtype=torch.long)
    seen[:, 2:, :, :2] = 1
    used = torch.tensor([[[1, 1, 0, 0]]])
    pixels = torch.zeros(1, 1, 4, 3, side, side)
    pixels[0, 0, :2] = tiles
    their_logits = expected(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        pixel_values=pixels,
        aspect_ratio_ids=ratio[None],
        aspect_ratio_mask=used,
        cross_attention_mask=seen,
    ).logits
    assert float(their_logits.std()) > 0.1
    assert oracle.distance(logits, their_logits) < oracle.TOLERANCE
