"""Our model against golden tensors made with Meta's own code (tests/golden, float32).

The weights come through the checkpoint reader and the translation from Meta's names, so both are
part of what is compared.
"""

from __future__ import annotations

import hashlib
import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image as PILImage
from safetensors.torch import load_file

from mmchat.checkpoints.checkpoint import open_checkpoint
from mmchat.conversation import Image
from mmchat.models.mllama.build import MllamaBuild
from mmchat.models.mllama.config import (
    ImageProcessorConfig,
    MllamaConfig,
    RopeScaling,
    TextConfig,
    VisionConfig,
)
from mmchat.models.mllama.meta_format import shard_dims
from mmchat.models.mllama.model import MllamaForConditionalGeneration
from mmchat.models.mllama.processor import preprocess
from mmchat.models.mllama.tiling import choose_layout, layout_facts
from mmchat.models.prepared import PreparedImage
from tests.models.mllama import oracle
from tests.models.mllama.oracle import TOLERANCE, distance

BUILD = MllamaBuild()

GOLDEN = Path(__file__).parents[2] / "golden"
INDEX = json.loads((GOLDEN / "mllama.json").read_text())
PREPROCESSING = json.loads((GOLDEN / "preprocessing.json").read_text())
PARAMS, VISION = INDEX["params"], INDEX["vision"]
NORMALISATION = ImageProcessorConfig(
    (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711), "drop"
)
CONFIG = MllamaConfig(
    vision_config=VisionConfig(
        hidden_size=VISION["width"],
        intermediate_size=4 * VISION["width"],
        num_hidden_layers=VISION["layers"],
        num_global_layers=VISION["n_global_layers"],
        attention_heads=VISION["heads"],
        num_channels=3,
        image_size=PARAMS["vision_chunk_size"],
        patch_size=VISION["patch_size"],
        max_num_tiles=PARAMS["vision_max_num_chunks"],
        intermediate_layers_indices=tuple(VISION["intermediate"]),
        norm_eps=1e-5,
    ),
    text_config=TextConfig(
        vocab_size=PARAMS["vocab_size"],
        hidden_size=PARAMS["dim"],
        intermediate_size=176,  # 2/3 of 4 · dim, times 1.3, rounded up to a multiple of 16
        num_hidden_layers=9,
        num_attention_heads=PARAMS["n_heads"],
        num_key_value_heads=PARAMS["n_kv_heads"],
        cross_attention_layers=(2, 7),  # before self-attention layers 2 and 6 of 0..6
        rms_norm_eps=PARAMS["norm_eps"],
        rope_theta=PARAMS["rope_theta"],
        rope_scaling=RopeScaling(8.0, 1.0, 4.0, 8192),
        max_position_embeddings=131072,
    ),
    image_processor=NORMALISATION,
)


@cache
def tensors(name: str) -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / f"mllama_{name}.safetensors")


def load(folder: Path) -> MllamaForConditionalGeneration:
    with open_checkpoint(folder, merge_rules=shard_dims) as checkpoint:
        weights = {name: value.float() for name, value in BUILD.iter_weights(checkpoint, CONFIG)}
    model = MllamaForConditionalGeneration(CONFIG)
    model.load_state_dict(weights, strict=True)
    return model.eval()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("meta")
    torch.save(tensors("meta_weights"), folder / "consolidated.00.pth")
    return load(folder)


def golden_picture(name: str) -> PreparedImage:
    """The stored tiles, normalised here as the picture transform does."""
    tiles = tensors("pictures")[f"{name}/tiles"].float() / 255
    mean, std = (
        torch.tensor(values)[:, None, None]
        for values in (NORMALISATION.image_mean, NORMALISATION.image_std)
    )
    layout = choose_layout(*INDEX["pictures"][name], PARAMS["vision_chunk_size"], 4)
    facts = layout_facts(layout, CONFIG.vision_config)
    return PreparedImage(
        name, facts, ((tiles - mean) / std, torch.tensor([layout.aspect_ratio_id]))
    )


def golden_run(case: str) -> tuple[list[oracle.Row], oracle.Outputs]:
    stored = tensors("cases")
    ids = stored[f"{case}/input_ids"].tolist()
    pictures = [[golden_picture(name) for name in row] for row in INDEX["cases"][case]]
    outputs = oracle.Outputs(
        list(stored[f"{case}/prefill_logits"]),
        stored[f"{case}/decode_logits"],
        stored[f"{case}/generated"],
    )
    return list(zip(ids, pictures, strict=True)), outputs


def worst(model: MllamaForConditionalGeneration, case: str) -> float:
    rows, expected = golden_run(case)
    got = oracle.run(model, rows, expected.tokens)
    return oracle.difference(got, expected)


@pytest.mark.parametrize("case", INDEX["cases"])
def test_prefill_and_decode_agree(case, model):
    assert worst(model, case) < TOLERANCE


@pytest.mark.parametrize("name", INDEX["pictures"])
def test_vision_features_and_projected_states_agree(name, model):
    image = golden_picture(name)
    tiles, ratio = image.tensors[0][None], image.tensors[1]
    stored = tensors("pictures")
    with torch.inference_mode():
        features = model.vision_model(tiles, ratio)[0]
        projected = model.vision_states(tiles, ratio)[0]
    assert distance(features, stored[f"{name}/features"].flatten(0, 1)) < TOLERANCE
    assert distance(projected, stored[f"{name}/projected"].flatten(0, 1)) < TOLERANCE


def test_greedy_decoding_gives_the_same_tokens(model):
    for case in INDEX["cases"]:
        rows, expected = golden_run(case)
        got = oracle.run(model, rows, expected.tokens.shape[1])
        assert torch.equal(got.tokens, expected.tokens), case


def test_with_several_pictures_meta_alone_decodes_without_seeing_them(model):
    # Its last interval ends with the prompt; ours stays open, as for a single picture.
    stored = tensors("cases")
    closed = [key.split("/")[0] for key in stored if key.endswith("/closed_decode_logits")]
    assert len(closed) == 6
    for case in closed:
        meta = stored[f"{case}/closed_decode_logits"]
        assert distance(meta[:, 0], stored[f"{case}/decode_logits"][:, 0]) == 0, case
        assert distance(meta[:, 1], stored[f"{case}/decode_logits"][:, 1]) > 1e-2, case


# Model-parallel shards

COLUMNS = ("attention.wo.weight", "attn.wo.weight", "feed_forward.w2.weight", "c_proj.weight")
ROWS = (
    *("tok_embeddings.weight", "learnable_embedding.weight", "output.weight"),
    *(f"{kind}.w{part}.weight" for kind in ("attention", "attn") for part in "qkv"),
    *("feed_forward.w1.weight", "feed_forward.w3.weight", "c_fc.weight", "c_fc.bias"),
    *("conv1._linear.weight", "vision_projection.weight", "vision_projection.bias"),
)


def test_eight_shards_load_as_one_file_does(model, tmp_path):
    for rank in range(8):
        shard = {}
        for name, value in tensors("meta_weights").items():
            axis = 1 if name.endswith(COLUMNS) else 0 if name.endswith(ROWS) else None
            shard[name] = value if axis is None else value.chunk(8, axis)[rank].clone()
        torch.save(shard, tmp_path / f"consolidated.{rank:02d}.pth")
    merged = load(tmp_path).state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(merged[name], value), name


# The picture transform


def drawn(height: int, width: int) -> Image:
    """The pattern that make_meta_golden.py drew."""
    y, x, c = np.ogrid[:height, :width, :3]
    value = (x * 73856093) ^ (y * 19349663) ^ ((c + 1) * 83492791)
    smooth = 90 + 80 * ((x * (c + 1)) // 9 % 2) + 3 * (y // 5)
    pixels = ((value >> 9) % 70 + smooth).clip(0, 255).astype(np.uint8)
    return Image(PILImage.fromarray(pixels), "pattern", f"{height}x{width}")


def test_tiles_of_odd_sizes_are_the_same_bytes():
    assert len(PREPROCESSING["tiles"]) > 40
    for entry in PREPROCESSING["tiles"]:
        tiled = preprocess(drawn(*entry["size"]), CONFIG)
        found = hashlib.sha256(tiled.tensors[0].contiguous().numpy().tobytes()).hexdigest()
        assert list(tiled.facts.grid) == entry["canvas"], entry["size"]
        assert found == entry["sha256"], entry["size"]


@pytest.mark.parametrize("name", INDEX["pictures"])
def test_tiles_of_the_golden_pictures_are_the_same_bytes(name):
    tiled = preprocess(drawn(*INDEX["pictures"][name]), CONFIG)
    assert torch.equal(tiled.tensors[0], golden_picture(name).tensors[0])


def test_layouts_are_the_same_at_448_and_560_pixels():
    assert len(PREPROCESSING["layouts"]) > 600
    for tile, height, width, *expected in PREPROCESSING["layouts"]:
        layout = choose_layout(height, width, tile, 4)
        assert [*layout.aspect_ratio, *layout.resized] == expected, (tile, height, width)
