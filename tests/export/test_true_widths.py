"""Exports of a model with 11B's widths and few layers, by the command, in float32."""

import re
import subprocess
import sys
from dataclasses import replace

import pytest

import mmchat
from mmchat.catalog.known import find_spec
from mmchat.engine.sampling import SamplingParams
from mmchat.images import from_pil
from tests.loading.test_loader import TOKENIZER, finish, write_hf_folder
from tests.models.mllama.oracle import random_weights

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
GIB = 2**30
GREEDY = SamplingParams(temperature=0.0, max_new_tokens=6, speculate="off")


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """One layer of self-attention, one of cross-attention and three of vision; a projector of two
    features of each patch in place of six; a small vocabulary."""
    spec = find_spec("Llama-3.2-11B-Vision-Instruct")
    assert spec is not None
    full = spec.config
    vision = replace(
        full.vision_config, num_hidden_layers=2, num_global_layers=1,
        intermediate_layers_indices=(0,),
    )  # fmt: skip
    text = replace(
        full.text_config, num_hidden_layers=2, cross_attention_layers=(1,),
        vocab_size=len(TOKENIZER.read_text().splitlines()) + 256,
    )  # fmt: skip
    config = replace(full, vision_config=vision, text_config=text)
    folder = tmp_path_factory.mktemp("models") / "wide"
    return write_hf_folder(folder, config, random_weights(config))


def picture(height, width):
    from PIL import Image

    return from_pil(Image.effect_noise((width, height), 60).convert("RGB"))


def answer(model, pictures):
    return finish(model.chat().send("What is here?", pictures, GREEDY)).output_ids


@pytest.fixture(scope="module")
def heard(wide):
    """Pictures, and what the model itself says about them.

    None fills all tiles: that one takes a minute, and the export compares it with the model itself.
    """
    model = mmchat.load(wide, device="cpu", dtype="float32")
    asked = [], [picture(300, 500)], [picture(560, 1100), picture(560, 560)]
    return [(pictures, answer(model, pictures)) for pictures in asked]


@pytest.mark.parametrize("format", ["aoti", "executorch"])
def test_it_says_what_the_model_says_and_its_peak_memory_is_told(wide, heard, tmp_path, format):
    if format == "executorch":
        pytest.importorskip("executorch", reason="needs mmchat[executorch]")
    out = tmp_path / "out"
    command = [
        sys.executable, "-m", "mmchat", "export", str(wide), "--format", format, "--dtype",
        "float32", "--max-seq-len", "128", "--max-images", "2", "-o", str(out),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    [(number, unit)] = re.findall(r"peak memory ([\d.]+) (MiB|GiB)", done.stdout + done.stderr)
    peak = float(number) * (GIB if unit == "GiB" else GIB / 1024)
    weights = (wide / "model.safetensors").stat().st_size
    assert weights < peak < (3 if format == "aoti" else 6) * weights + 2 * GIB

    exported = mmchat.load(out)
    for pictures, expected in heard:
        assert answer(exported, pictures) == expected
