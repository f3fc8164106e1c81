"""Write tests/golden/qwen_vl.npz: what the original code computes with random weights.

    python tests/golden/make_qwen_vl_golden.py FOLDER

FOLDER holds modeling_qwen.py, visual.py, configuration_qwen.py and qwen_generation_utils.py of
Qwen/Qwen-VL-Chat, which are not part of this repository. They ran with transformers 4.37.2,
numpy < 2, einops and torchvision beside torch 2.13.0. The weights are not written: the tests draw
the same ones (oracle.py). The original finds pictures by paths in the prompt's ids and opens them.
"""

from __future__ import annotations

import importlib
import sys
import tempfile
import types
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.models.qwen_vl import oracle

PACKAGE = "original_qwen_vl"
STEPS = 6


def original(folder: Path) -> types.ModuleType:
    """modeling_qwen of the folder, whose files import each other as a package."""
    if torch.version.cuda is None:  # PyPI's torchvision registers fakes for operators it lacks then
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    package = types.ModuleType(PACKAGE)
    package.__path__ = [str(folder.resolve())]
    sys.modules[PACKAGE] = package
    return importlib.import_module(f"{PACKAGE}.modeling_qwen")


def build(modeling: types.ModuleType, side: int, small: bool) -> torch.nn.Module:
    config = oracle.config(side)
    text, vision = config.text_config, config.vision_config
    theirs = modeling.QWenConfig(
        vocab_size=text.vocab_size,
        hidden_size=text.hidden_size,
        num_hidden_layers=text.num_hidden_layers,
        num_attention_heads=text.num_attention_heads,
        kv_channels=text.head_dim,
        intermediate_size=2 * text.intermediate_size,
        layer_norm_epsilon=text.layer_norm_epsilon,
        seq_length=text.seq_length,
        max_position_embeddings=text.max_position_embeddings,
        rotary_emb_base=text.rotary_emb_base,
        use_dynamic_ntk=text.use_dynamic_ntk,
        use_logn_attn=text.use_logn_attn,
        use_flash_attn=False,
        fp32=True,
        no_bias=True,
        rotary_pct=1.0,
        emb_dropout_prob=0.0,
        attn_dropout_prob=0.0,
        visual={
            "heads": vision.heads,
            "image_size": side,
            "image_start_id": oracle.START,
            "layers": vision.layers,
            "mlp_ratio": vision.mlp_ratio,
            "output_dim": text.hidden_size,
            "patch_size": vision.patch_size,
            "width": vision.width,
        },
    )
    model = modeling.QWenLMHeadModel(theirs).float().eval()
    weights = oracle.random_weights(side, small=small)
    assert weights.keys() == dict(model.named_parameters()).keys()
    model.load_state_dict(weights, strict=False)
    return model


@torch.inference_mode()
def run(model: torch.nn.Module, ids: list[int]) -> dict[str, np.ndarray]:
    """Logits of some positions of the prompt, and of what is written after it."""
    tokens, mask = torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.long)
    found = model(input_ids=tokens, attention_mask=mask, use_cache=True, return_dict=True)
    rows, said = [found.logits[0, oracle.compared(len(ids))]], []
    last = found.logits[0, -1]
    for _ in range(STEPS):
        said.append(int(last.argmax()))
        mask = torch.cat((mask, mask[:, :1]), 1)
        found = model(
            input_ids=torch.tensor([[said[-1]]]),
            attention_mask=mask,
            past_key_values=found.past_key_values,
            use_cache=True,
            return_dict=True,
        )
        last = found.logits[0, -1]
        rows.append(last[None])
    return {"logits": torch.cat(rows).numpy(), "said": np.array(said)}


def main() -> None:
    modeling = original(Path(sys.argv[1]))
    found: dict[str, np.ndarray] = {}
    with tempfile.TemporaryDirectory() as folder:
        paths = []
        for number, pixels in enumerate(oracle.pictures()):
            paths.append(f"{folder}/{number}.png")
            Image.fromarray(pixels).save(paths[-1])
        for name, side, small in oracle.MODELS:
            model = build(modeling, side, small)
            visual = model.transformer.visual
            with torch.inference_mode():
                for number, path in enumerate(paths):
                    pixels = visual.image_transform(Image.open(path).convert("RGB"))
                    key = f"{name}/picture {number}"
                    found[f"{key}/features"] = visual(pixels[None])[0, ::16].numpy()
                    found[f"{key}/pixels"] = pixels.flatten()[:: side * side // 7].numpy()
            for case, parts in oracle.CASES.items():
                if small and case not in oracle.SMALL_CASES:
                    continue
                ids = oracle.token_ids(parts, [path.encode() for path in paths])
                found |= {f"{name}/{case}/{k}": v for k, v in run(model, ids).items()}
                alpha = model.transformer.rotary_emb._ntk_alpha_cached
                print(name, case, len(ids), "alpha", alpha, found[f"{name}/{case}/said"])
    np.savez_compressed(oracle.GOLDEN, **found)
    print(oracle.GOLDEN, oracle.GOLDEN.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
