"""What text reads of its pictures, beside transformers' own attention and planted keys."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image as PILImage

from mmchat.images import load_image
from mmchat.models.base import Batch, Watch
from mmchat.models.mllama import tiling
from mmchat.models.mllama.processor import preprocess
from mmchat.models.prompt import PlacedMedia, Prompt
from mmchat.nn.attention import attention_weights
from tests.models.mllama import oracle
from tests.models.mllama import transformers_mllama as theirs
from tests.models.mllama.oracle import CANVASES, CASES, CONFIG

EPSILON = 1e-5


@pytest.fixture(scope="module")
def weights():
    return oracle.random_weights()


@pytest.fixture(scope="module")
def ours(weights):
    return oracle.build(weights)


@torch.inference_mode()
def watched(model, ids, pictures, pieces=()):
    """The watch of a prompt that is read whole, or in pieces that end at these positions."""
    places = oracle.image_positions(ids)
    placed = tuple(PlacedMedia(at, 1, p) for at, p in zip(places, pictures, strict=True))
    cache = model.new_cache(1, 64)
    cache.begin(0, Prompt(tuple(ids), placed))
    for one in pictures:
        for _ in model.encode([one], cache):
            pass
    watch, start = Watch(0), 0
    for end in (*pieces, len(ids)):
        piece = torch.tensor(ids[start:end])
        batch = Batch.last_of(piece, start)
        model.forward(replace(batch, watch=watch), cache)
        start = end
    return watch


def shares_of(model):
    gates = [
        abs(float(layer.cross_attn_attn_gate.detach().tanh())) for layer in model._cross_layers()
    ]
    return [gate / sum(gates) for gate in gates]


def test_text_alone_reads_nothing(ours):
    assert watched(ours, *CASES["D_text_only"][0]).read == {}


WITH_PICTURES = [name for name, rows in CASES.items() if len(rows) == 1 and rows[0][1]]


@pytest.mark.parametrize("case", WITH_PICTURES)
def test_the_weights_are_those_of_transformers(case, ours, weights):
    [(ids, pictures)] = CASES[case]
    model = theirs.build(weights, attention="eager")
    inputs = theirs.inputs_of(CASES[case])
    maps = []  # of each layer [S, pictures · slots · tokens]
    for layer in model.model.language_model.layers:
        if hasattr(layer, "cross_attn"):
            layer.cross_attn.register_forward_hook(lambda *told: maps.append(told[2][1][0].mean(0)))
    with torch.inference_mode():
        model(**inputs, position_ids=theirs.positions_of(inputs["attention_mask"]))
    expected = sum(share * one for share, one in zip(shares_of(ours), maps, strict=True))
    watch = watched(ours, ids, pictures)
    slots, tokens = CONFIG.vision_config.max_num_tiles, CONFIG.vision_config.tokens_per_tile
    places = oracle.image_positions(ids)
    assert sorted(watch.read) == list(range(places[0], len(ids)))
    for position, (seen, shares) in watch.read.items():
        row = expected[position].unflatten(0, (len(pictures), slots * tokens))
        parts = [
            row[places.index(at), : len(pictures[places.index(at)].tensors[0]) * tokens]
            for at in seen
        ]
        assert float(shares.sum()) == pytest.approx(1, abs=EPSILON)
        assert oracle.distance(shares, torch.cat(parts)) < EPSILON


@pytest.mark.parametrize("pieces", [(3,), (1, 2, 5), (4, 6)])
def test_pieces_tell_the_same_as_the_whole(pieces, ours):
    [(ids, pictures)] = CASES["C_adjacent_then_apart"]
    whole, cut = watched(ours, ids, pictures), watched(ours, ids, pictures, pieces)
    assert whole.read.keys() == cut.read.keys()
    for position, (seen, shares) in whole.read.items():
        assert cut.read[position][0] == seen
        assert oracle.distance(cut.read[position][1], shares) < EPSILON


def test_grouped_heads_each_attend_by_themselves():
    query, key = torch.randn(5, 6, 8), torch.randn(2, 11, 8)
    expected = torch.stack(
        [(query[:, h] @ key[h // 3].T / 8**0.5).softmax(-1) for h in range(6)]
    ).mean(0)
    assert oracle.distance(attention_weights(query, key), expected) < EPSILON


SIDE = 168  # of a tile: 12 patches


def turned(image, tmp_path):
    """The same picture as a file that must be rotated to be seen so."""
    path = tmp_path / "turned.png"
    exif = PILImage.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees clockwise
    image.transpose(PILImage.Transpose.ROTATE_90).save(path, exif=exif)
    return path


@pytest.mark.parametrize("is_turned", [False, True])
@pytest.mark.parametrize("canvas", CANVASES)
def test_a_planted_patch_lights_up_at_its_pixels(canvas, is_turned, tmp_path):
    """A spot in the picture -> the tile that the encoder gets it in -> a key that equals the query
    -> the patch, and its place in the picture."""
    vision = replace(CONFIG.vision_config, image_size=SIDE)
    height, width = canvas[0] * SIDE - 7, canvas[1] * SIDE - 11
    y, x = height * 2 // 3, width * 4 // 5
    drawn = np.zeros((height, width, 3), dtype=np.uint8)
    drawn[y - 12 : y + 12, x - 12 : x + 12] = 255
    plain = PILImage.fromarray(drawn)
    image = load_image(turned(plain, tmp_path) if is_turned else plain)
    assert (image.height, image.width) == (height, width)
    tiled = preprocess(image, replace(CONFIG, vision_config=vision))
    assert tiled.facts.grid == canvas
    patch, grid = vision.patch_size, SIDE // vision.patch_size
    means = tiled.tensors[0].mean(1).unflatten(1, (grid, patch)).unflatten(3, (grid, patch))
    brightest = int(means.mean((2, 4)).flatten(1).argmax())  # over tiles and patches
    tile, inside = divmod(brightest, grid * grid)
    keys = torch.randn(1, tiled.facts.tokens, 8) * 0.1
    query = 6 * torch.ones(1, 1, 8)
    keys[0, tile * vision.tokens_per_tile + 1 + inside] = query[0, 0]
    shares = attention_weights(query, keys)[0].numpy()
    places = tiling.patches(replace(CONFIG, vision_config=vision), height, width)
    row, column = np.unravel_index((heat := shares[np.array(places.token)]).argmax(), heat.shape)
    assert heat.max() > 0.9
    assert row * places.cell[0] <= y + 12
    assert y - 12 <= (row + 1) * places.cell[0]
    assert column * places.cell[1] <= x + 12
    assert x - 12 <= (column + 1) * places.cell[1]


@pytest.mark.parametrize("size", [(560, 560), (30, 900), (1111, 700), (5, 5), (3000, 10)])
def test_no_patch_of_padding_and_none_twice(size):
    vision = replace(CONFIG.vision_config, image_size=560)
    layout = tiling.layout_of(vision, *size)
    places = tiling.patches(replace(CONFIG, vision_config=vision), *size)
    tokens = [token for row in places.token for token in row]
    assert len(set(tokens)) == len(tokens)
    assert max(tokens) < layout.num_tiles * vision.tokens_per_tile
    assert all(token % vision.tokens_per_tile for token in tokens)  # no class token
    rows, columns = len(places.token), len(places.token[0])
    assert (rows - 1) * places.cell[0] < size[0] <= rows * places.cell[0] + 1e-6
    assert (columns - 1) * places.cell[1] < size[1] <= columns * places.cell[1] + 1e-6
