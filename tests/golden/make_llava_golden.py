"""Write tests/golden/llava.npz: what the original code of LLaVA computes with random weights.

    python tests/golden/make_llava_golden.py

It needs `pip install --no-deps llava-torch==1.2.2.post1`, and ran with transformers 4.37.2,
numpy < 2, accelerate, sentencepiece, protobuf, and torchvision 0.28.0 (--no-deps) beside torch
2.13.0. The weights are not written: the tests draw the same ones (oracle.py). Nothing of the
original is stored.
"""

from __future__ import annotations

import importlib.util
import sys
import tempfile
import types
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.models.llava import oracle, original
from tests.models.llava.folders import original_names, tower_tensors
from tests.models.llava.oracle import Pixels
from tests.sentencepiece_model import trained

STEPS = 6


def import_original() -> None:
    """Make the two modules importable that are needed: its package imports much more."""
    if torch.version.cuda is None:  # PyPI's torchvision registers fakes for operators it lacks then
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        globals()["_kept"] = library
    found = importlib.util.find_spec("llava")
    assert found is not None, "pip install --no-deps llava-torch==1.2.2.post1"
    [home] = found.submodule_search_locations or ()
    for name, path in (("llava", home), ("llava.model", f"{home}/model")):
        package = types.ModuleType(name)
        package.__path__ = [path]
        sys.modules[name] = package


def write_tower(folder: Path, weights: dict[str, torch.Tensor]) -> Path:
    """The encoder as a repository of CLIP, which the original reads by its path."""
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

    sizes = vars(oracle.CONFIG.vision_config)
    model = CLIPVisionModel(CLIPVisionConfig(**sizes, hidden_act="quick_gelu"))
    held = {n: t for n, t in tower_tensors(weights).items() if n.startswith("vision_model.")}
    missing = model.load_state_dict(held, strict=False).missing_keys
    assert all("position_ids" in name for name in missing), missing
    model.save_pretrained(folder)
    side = oracle.CONFIG.vision_config.image_size
    CLIPImageProcessor(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}
    ).save_pretrained(folder)
    return folder


def build(config: oracle.LlavaConfig, weights: dict[str, torch.Tensor], tower: Path):
    from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM

    text = config.text_config
    theirs = LlavaConfig(
        **vars(text),
        mm_vision_tower=str(tower),
        mm_projector_type="mlp2x_gelu",
        mm_hidden_size=config.vision_config.hidden_size,
        mm_vision_select_layer=config.features.layer,
        mm_vision_select_feature={"default": "patch", "full": "cls_patch"}[
            config.features.strategy
        ],
        image_aspect_ratio="pad",
        mm_use_im_start_end=False,
        mm_use_im_patch_token=False,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    model = LlavaLlamaForCausalLM(theirs).float().eval()
    model.get_vision_tower().load_model()
    held = original_names(weights, torch.float32)
    held = {name: tensor for name, tensor in held.items() if "inv_freq" not in name}
    found = model.load_state_dict(held, strict=False)
    assert not found.unexpected_keys, found.unexpected_keys
    assert all("vision_tower" in name for name in found.missing_keys), found.missing_keys
    return model


@torch.inference_mode()
def run(model, parts) -> dict[str, np.ndarray]:
    """Logits of the prompt, and of what is written after it."""
    from llava.constants import IMAGE_TOKEN_INDEX

    pictures = [part.tensors[0] for part in parts if isinstance(part, Pixels)]
    ids = [IMAGE_TOKEN_INDEX if isinstance(part, Pixels) else part for part in parts]
    said: list[int] = []
    while True:
        tokens = torch.tensor([ids + said])
        given = {"images": torch.stack(pictures)} if pictures else {}
        logits = model(input_ids=tokens, attention_mask=torch.ones_like(tokens), **given).logits[0]
        if len(said) == STEPS:
            return {"logits": logits.numpy(), "said": np.array(said)}
        said.append(int(logits[-1].argmax()))


def logits(folder: Path) -> dict[str, np.ndarray]:
    found = {}
    for name, (config, small, cases) in original.MODELS.items():
        weights = oracle.random_weights(config, small=small)
        model = build(config, weights, write_tower(folder / name.replace(" ", ""), weights))
        for case in cases:
            found |= {f"{name}/{case}/{k}": v for k, v in run(model, oracle.CASES[case]).items()}
            print(name, case, found[f"{name}/{case}/logits"].shape)
    return found


def pixels(tower: Path) -> dict[str, np.ndarray]:
    """Pictures as the original prepares them, by their hash."""
    from llava.mm_utils import process_images
    from transformers import CLIPImageProcessor

    processor, found = CLIPImageProcessor.from_pretrained(tower), {}
    for kind, ratio in (("pad", "pad"), ("crop", None)):
        config, hashes = types.SimpleNamespace(image_aspect_ratio=ratio), []
        for size in original.SEEN_SIZES:
            image = Image.fromarray(original.noise(*size))
            [seen] = process_images([image], processor, config)
            hashes.append(sha256(seen.numpy().astype("<f4").tobytes()).hexdigest())
        found[f"pixels/{kind}"] = np.array(hashes)
    side = oracle.CONFIG.vision_config.image_size
    clear = Image.new("RGBA", (side, side), (200, 0, 0, 0)).convert(
        "RGB"
    )  # as its programs open it
    [seen] = process_images([clear], processor, config)
    return found | {"pixels/clear": seen[:, 0, 0].numpy()}


def token_ids(folder: Path) -> dict[str, np.ndarray]:
    """Ids of prompts whose pictures are marked, by the original's rule, and its own prompts."""
    from llava.conversation import conv_templates
    from llava.mm_utils import tokenizer_image_token
    from transformers import LlamaTokenizer

    path = folder / "tokenizer.model"
    path.write_bytes(trained())
    theirs = LlamaTokenizer(str(path), legacy=False)  # as the released tokenizer_config.json says
    ids = [tokenizer_image_token(text, theirs) for text in original.marked_texts()]
    found = {"ids": np.concatenate(ids).astype(np.int16), "ends": np.cumsum(list(map(len, ids)))}
    prompts = []
    for turns in original.TURNS:
        talk = conv_templates["vicuna_v1"].copy()
        for number, text in enumerate((*turns, None)):
            talk.append_message(talk.roles[number % 2], text)
        prompts.append(talk.get_prompt())
    # its program for terminals keeps an answer as it decodes it, with the mark of its end
    talk = conv_templates["vicuna_v1"].copy()
    for number, text in enumerate((original.TURNS[3][0], "A dog.</s>", "in?", None)):
        talk.append_message(talk.roles[number % 2], text)
    return found | {"prompts": np.array(prompts), "kept": np.array(talk.get_prompt())}


def main() -> None:
    import_original()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found = logits(folder)
        found |= pixels(folder / "random")
        found |= token_ids(folder)
    np.savez_compressed(original.GOLDEN, **found)
    print(original.GOLDEN, original.GOLDEN.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
