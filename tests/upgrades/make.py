"""Write what the tests of upgrades open: python tests/upgrades/make.py 0.1.0

To be run with the release of that name, once: what an older one wrote is never made again.
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from PIL import Image

import mmchat
from mmchat.engine.sampling import SamplingParams
from mmchat.export import ExportPlan, export_model
from mmchat.loading.options import LoadOptions
from mmchat.repl import saving

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
from tests.loading import test_loader  # noqa: E402
from tests.models.mllama.oracle import THIN, random_weights  # noqa: E402
from tests.synthetic_tokenizer import tiktoken_lines, trained_tokens  # noqa: E402

QUESTION, GREEDY = "What is it?", SamplingParams(temperature=0.0, max_new_tokens=6)


def small_model(folder: Path) -> Path:
    """A checkpoint of random weights and 512 tokens."""
    text = replace(
        THIN.text_config, vocab_size=512, hidden_size=16, intermediate_size=16, num_hidden_layers=2
    )
    vision = replace(
        THIN.vision_config, hidden_size=12, intermediate_size=16, num_hidden_layers=2,
        num_global_layers=1, image_size=28, intermediate_layers_indices=(0, 1),
    )  # fmt: skip
    config = replace(THIN, text_config=text, vision_config=vision)
    tokenizer = folder / "vocabulary"
    tokenizer.write_bytes(tiktoken_lines(trained_tokens(merges=0)))
    test_loader.TOKENIZER = tokenizer
    return test_loader.write_hf_folder(folder / "model", config, random_weights(config))


def main(version: str) -> None:
    target = Path(__file__).parent / version
    target.mkdir()
    picture = target / "picture.png"
    Image.effect_noise((40, 30), 60).convert("P").save(picture)
    with tempfile.TemporaryDirectory() as scratch:
        model = small_model(Path(scratch))
        for scheme in ("none", "int8"):
            options = LoadOptions(checkpoint_path=model, dtype="bfloat16", quantize=scheme)
            export_model(ExportPlan(options, target / f"export-{scheme}", "safetensors"))
    answers = {}
    for scheme in ("none", "int8"):
        session = mmchat.load(target / f"export-{scheme}", device="cpu").chat()
        *_, end = session.send(QUESTION, [picture], GREEDY)
        answers[scheme] = [list(end.output_ids), end.text]
    (target / "answers.json").write_text(json.dumps(answers))
    chat = saving.SavedChat(session.conversation, "tiny", {"temperature": 0.5, "seed": 7})
    saving.write_folder(target / "chat", chat)
    saving.write(target / "copy.json", chat)
    for written in (target / "chat/chat.json", target / "copy.json"):
        written.write_text(written.read_text("utf-8").replace(str(target), "/home/me"), "utf-8")
    config = '# mine\nmodel = "tiny"\nquantize = "int8"\ndevice = "cpu"\n'
    (target / "config.toml").write_text(config)


if __name__ == "__main__":
    main(sys.argv[1])
