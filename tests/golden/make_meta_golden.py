"""Make the golden tensors of this folder with Meta's own Llama 3.2 Vision code.

Run in an environment of its own (see README.md): `python make_meta_golden.py`. It builds Meta's
classes with tiny sizes, gives every parameter a random value (gates too, which Meta starts at 0 and
which would then hide all cross-attention), runs each case in float32 on the CPU and writes what the
tests compare with. Nothing here is imported by the tests.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from pathlib import Path

import numpy as np
import torch
import torch.distributed
from PIL import Image
from safetensors.torch import save_file

# PyPI's torchvision is a CUDA build; its extension does not load next to a CPU-only torch, so the
# two operators that its import refers to are declared here.
with contextlib.suppress(RuntimeError):
    _torchvision_ops = torch.library.Library("torchvision", "DEF")
    for _name in ("nms", "qnms"):
        _torchvision_ops.define(f"{_name}(Tensor dets, Tensor scores, float threshold) -> Tensor")

import fairscale.nn.model_parallel.initialize as model_parallel
import llama_models.llama3.multimodal.model as meta
from llama_models.llama3.args import ModelArgs
from llama_models.llama3.chat_format import create_vision_mask
from llama_models.llama3.multimodal.image_transform import VariableSizeImageTransform

FOLDER = Path(__file__).parent
# No two axes are equal, and patches + class token (10) is not a multiple of 8.
PARAMS = {
    "dim": 48,
    "n_layers": 7,
    "n_heads": 6,
    "n_kv_heads": 2,
    "vocab_size": 256,
    "ffn_dim_multiplier": 1.3,
    "multiple_of": 16,
    "norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "use_scaled_rope": True,
    "vision_chunk_size": 42,
    "vision_max_num_chunks": 4,
    "vision_num_cross_attention_layers": 2,
}
VISION = {"width": 40, "layers": 6, "heads": 2, "n_global_layers": 2, "patch_size": 14}
INTERMEDIATE = [1, 2, 4, 5]
IMAGE = PARAMS["vocab_size"]  # the image token's id
STEPS = 7
MAX_SEQ_LEN = 32

# (height, width) in pixels of the pictures: one for each canvas (rows, columns) of 42 px tiles.
PICTURES = {
    "1x1": (31, 42),
    "1x2": (40, 80),
    "1x3": (37, 126),
    "1x4": (30, 161),
    "2x1": (84, 23),
    "2x2": (71, 84),
    "3x1": (110, 33),
    "4x1": (165, 42),
}
I = IMAGE  # noqa: E741
# name -> (token ids, pictures); batches are lists of such pairs with equally many ids.
CASES = {
    "A_start_picture_text": ([1, I, 17, 33, 9, 4, 77], ["1x2"]),
    "B_text_between_pictures": ([1, 5, I, 17, 33, I, 4, 77, 8], ["2x1", "1x1"]),
    "B_three_pictures": ([1, I, 5, I, 17, 33, I, 4], ["1x1", "1x3", "2x1"]),
    "C_adjacent": ([1, I, I, 33, 9, 4, 77], ["1x1", "3x1"]),
    "C_adjacent_then_apart": ([1, 7, I, I, 33, 9, I, 4, 77], ["1x2", "1x1", "2x1"]),
    "C_apart_then_adjacent": ([1, I, 33, 9, I, I, 4, 77], ["1x1", "2x1", "1x2"]),
    "D_text_only": ([1, 5, 17, 33, 9], []),
    "E_picture_first": ([I, 17, 33, 9, 4, 77], ["2x2"]),
    **{
        f"F_canvas_{name}": ([1, 40 + i, I, 60 + 3 * i, 9], [name])
        for i, name in enumerate(PICTURES)
    },
    "G_one_and_two_pictures": [
        ([1, 8, I, 17, 33, 9, 4], ["1x3"]),
        ([1, I, 21, 5, I, 44, 90], ["1x1", "2x2"]),
    ],
    "G_one_and_no_picture": [([1, 8, I, 17, 33], ["4x1"]), ([1, 90, 12, 43, 7], [])],
}


class TinyVision(torch.nn.Module):
    """Meta's vision wrapper, whose constructor knows only the released sizes, with tiny ones."""

    forward = meta.CrossAttentionTransformerVision.forward

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.image_res, self.max_num_chunks = args.vision_chunk_size, args.vision_max_num_chunks
        self.patch_size = VISION["patch_size"]
        self.vision_input_dim = VISION["width"] * (1 + len(INTERMEDIATE))
        self.vision_encoder = meta.VisionEncoder(
            max_num_tiles=self.max_num_chunks,
            image_size=self.image_res,
            global_model=True,
            return_intermediate=INTERMEDIATE,
            **VISION,
        )
        self.vision_projection = meta.ColumnParallelLinear(
            self.vision_input_dim, args.dim, bias=True, init_method=lambda weight: weight
        )


def build_model() -> meta.CrossAttentionTransformer:
    """Meta's model at float32 with random values that bfloat16 represents exactly."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29517", RANK="0", WORLD_SIZE="1")
    torch.distributed.init_process_group("gloo")
    model_parallel.initialize_model_parallel(1)
    meta.CrossAttentionTransformerVision = TinyVision
    model = meta.CrossAttentionTransformer(ModelArgs(**PARAMS, max_seq_len=MAX_SEQ_LEN))
    generator = torch.Generator().manual_seed(20240925)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = random_values(name, parameter.shape, generator)
            parameter.copy_(values.bfloat16())
    model.setup_cache(2, torch.device("cpu"), torch.float32)
    return model.eval()


def random_values(name: str, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """Gates far from 0, norm weights around 1, all else by fan-in.

    What enters a norm directly is small, so that the norm's epsilon can be seen in the output, and
    attention to pictures is peaked.
    """
    noise = torch.randn(shape, generator=generator)
    if name.endswith(("gate", "gate_attn", "gate_ffn", "gate_ffwd")):
        return noise.sign() * (0.4 + 0.3 * noise.abs())
    if "norm" in name or ".ln_" in name:
        size = 2.5 if "q_norm" in name or "k_norm" in name else 0.02 if "ln_post" in name else 1
        return size * (0.1 * noise if name.endswith("bias") else 1 + 0.2 * noise)
    if name.endswith("bias"):
        return 0.3 * noise
    if "embed" in name:
        return noise * (0.03 if "post_tile" in name else 0.015)
    small = "conv1" in name or ("cross_attention_layers" in name and "wk" in name)
    return noise * (0.02 if small else 1.2) * shape[-1] ** -0.5


def draw(height: int, width: int) -> Image.Image:
    """A coloured pattern without symmetry; the tests draw the same one."""
    y, x, c = np.ogrid[:height, :width, :3]
    value = (x * 73856093) ^ (y * 19349663) ^ ((c + 1) * 83492791)
    smooth = 90 + 80 * ((x * (c + 1)) // 9 % 2) + 3 * (y // 5)
    return Image.fromarray(((value >> 9) % 70 + smooth).clip(0, 255).astype(np.uint8))


def run_pictures(model) -> tuple[dict[str, Image.Image], dict[str, torch.Tensor]]:
    """Tiles as uint8, encoder output and projected states (valid tiles only) of each picture."""
    pictures = {name: draw(*size) for name, size in PICTURES.items()}
    tensors = {}
    for name, picture in pictures.items():
        tiles, ratio = model.image_transform(picture)
        if f"{ratio[0]}x{ratio[1]}" != name:
            raise ValueError(f"picture {name} went to canvas {ratio}")
        raw, _ = VariableSizeImageTransform(PARAMS["vision_chunk_size"])(
            picture, PARAMS["vision_max_num_chunks"], normalize_img=False
        )
        stacked, _ = meta._stack_images([[tiles]], 4, PARAMS["vision_chunk_size"], 1)
        ratios = torch.tensor([[list(ratio)]])
        count = len(tiles)
        tensors[f"{name}/tiles"] = (raw * 255).round().to(torch.uint8)
        tensors[f"{name}/features"] = model.vision_model.vision_encoder(stacked, ratios)[0, 0]
        tensors[f"{name}/projected"] = model.vision_model(stacked, ratios)[0, 0]
        for kind in ("features", "projected"):
            tensors[f"{name}/{kind}"] = tensors[f"{name}/{kind}"][:count].clone()
    return pictures, tensors


def run_case(model, rows, pictures, *, open_end: bool) -> dict[str, torch.Tensor]:
    """Prefill logits [B, S, V], greedy tokens [B, STEPS] and the logits that chose them.

    open_end: let generated tokens see the last picture of several (and those adjacent to it), as
    they see a single one; Meta's own intervals end with the prompt when there are several.
    """
    masks = []
    for ids, _ in rows:
        intervals = [list(interval) for interval in create_vision_mask(ids, IMAGE)]
        for interval in intervals:
            if open_end and interval[1] == len(ids):
                interval[1] = -1
        masks.append(intervals)
    prompt = torch.tensor([ids for ids, _ in rows])
    length, total = prompt.shape[1], prompt.shape[1] + STEPS
    images = [[pictures[name] for name in names] for _, names in rows]
    caches, mask, row_mask = model.compute_vision_tokens_masks(
        images, masks, total, torch.device("cpu")
    )
    tokens = torch.cat((prompt, torch.zeros(len(rows), STEPS, dtype=torch.long)), dim=1)
    positions = torch.arange(length)
    logits, steps = None, []
    for step in range(STEPS):
        out = model(positions, tokens, mask, row_mask, caches, text_only_inference=not any(images))
        logits = out if logits is None else logits
        steps.append(out[:, -1])
        tokens[:, length + step] = out[:, -1].argmax(-1)
        positions = torch.tensor([length + step])
    return {
        "input_ids": prompt,
        "prefill_logits": logits.clone(),
        "generated": tokens[:, length:].clone(),
        "decode_logits": torch.stack(steps, dim=1),
    }


def run_cases(model, pictures) -> dict[str, torch.Tensor]:
    tensors = {}
    for name, case in CASES.items():
        rows = case if isinstance(case, list) else [case]
        for key, value in run_case(model, rows, pictures, open_end=True).items():
            tensors[f"{name}/{key}"] = value
        if max(len(names) for _, names in rows) > 1:
            closed = run_case(model, rows, pictures, open_end=False)
            if not torch.equal(closed["prefill_logits"], tensors[f"{name}/prefill_logits"]):
                raise ValueError(f"{name}: opening the last interval changed the prefill")
            for key in ("generated", "decode_logits"):
                tensors[f"{name}/closed_{key}"] = closed[key]
    return tensors


def preprocessing() -> dict:
    """Tiles of odd picture sizes as hashes, and layouts over a grid of sizes."""
    transform = VariableSizeImageTransform(PARAMS["vision_chunk_size"])
    sides = [1, 2, 13, 41, 42, 43, 83, 85, 127, 168, 169, 401]
    pairs = [
        (h, w) for h in sides for w in sides if (h + 2 * w) % 3 and max(h, w) < 160 * min(h, w)
    ]
    tiles = []
    for height, width in pairs[::2]:
        values, ratio = transform(draw(height, width), 4)
        digest = hashlib.sha256(values.contiguous().numpy().tobytes()).hexdigest()
        tiles.append({"size": [height, width], "canvas": list(ratio), "sha256": digest})
    rng = np.random.default_rng(7)
    sizes = [(560, 560), (1120, 560), (1121, 560), (448, 897), (300, 800), (1, 1), (37, 3000)]
    sizes += [tuple(map(int, np.exp(rng.uniform(3, 8.7, 2)))) for _ in range(150)]
    sizes += [tuple(map(int, rng.integers(400, 2300, 2))) for _ in range(150)]
    layouts = []
    for tile in (448, 560):
        for height, width in sizes:
            layouts.append([tile, height, width, *layout(tile, height, width)])
    return {"tile_size": PARAMS["vision_chunk_size"], "tiles": tiles, "layouts": layouts}


def layout(tile: int, height: int, width: int) -> list[int]:
    """Canvas rows and columns, then the resized height and width."""
    transform = VariableSizeImageTransform(tile)
    canvases = torch.tensor(transform.find_supported_resolutions(4, tile))
    canvas = transform.get_best_fit((width, height), canvases)
    target = tuple(
        min(max(side, tile), limit) for side, limit in zip((width, height), canvas, strict=True)
    )
    resized = transform.get_max_res_without_distortion((width, height), target)
    return [canvas[1] // tile, canvas[0] // tile, resized[1], resized[0]]


@torch.inference_mode()
def main() -> None:
    torch.set_num_threads(1)
    model = build_model()
    weights = {name: value.bfloat16() for name, value in model.state_dict().items()}
    pictures, picture_tensors = run_pictures(model)
    case_tensors = run_cases(model, pictures)
    cases = {
        name: [names for _, names in (case if isinstance(case, list) else [case])]
        for name, case in CASES.items()
    }
    index = {
        "params": PARAMS,
        "vision": {**VISION, "intermediate": INTERMEDIATE},
        "pictures": PICTURES,
        "cases": cases,
    }
    save_file(weights, FOLDER / "mllama_meta_weights.safetensors")
    save_file(picture_tensors, FOLDER / "mllama_pictures.safetensors")
    save_file(case_tensors, FOLDER / "mllama_cases.safetensors")
    (FOLDER / "mllama.json").write_text(json.dumps(index, indent=1) + "\n")
    (FOLDER / "preprocessing.json").write_text(compact(preprocessing()))
    torch.distributed.destroy_process_group()


def compact(value: dict) -> str:
    """JSON with one line for each tile entry and each layout."""
    tiles, layouts = (",\n".join(map(json.dumps, value[key])) for key in ("tiles", "layouts"))
    first = f'{{"tile_size": {value["tile_size"]},\n"tiles": [\n{tiles}\n],\n'
    return f'{first}"layouts": [\n{layouts}\n]}}\n'


if __name__ == "__main__":
    main()
