"""Write weights as other programs pack them, by the plainest arithmetic: one writer for each kind.

A writer takes a weight [N, K] and its module's name and gives the tensors that are stored. What the
real libraries make of the same layouts is in tests/golden; here any values of the right form do.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

GOLDEN = Path(__file__).parent / "golden"
_BNB = load_file(GOLDEN / "packed.safetensors")
NF4 = _BNB["nf4/stored/x.weight.quant_map"]
DYNAMIC = _BNB["nf4-nested/stored/x.weight.nested_quant_map"]
Stored = dict[str, Tensor]


def words(codes: Tensor, bits: int) -> Tensor:
    """Codes [..., n] -> int32 [..., n·bits/32], the low bits first."""
    per = 32 // bits
    grouped = codes.long().unflatten(-1, (-1, per))
    summed = sum(grouped[..., i] << (bits * i) for i in range(per))
    return (summed & 0xFFFFFFFF).to(torch.int64).where(summed < 2**31, summed - 2**32).int()


def affine(weight: Tensor, group: int, bits: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [N, K], scales and whole zeros [N, K/group], both of float16 values."""
    grouped = weight.float().unflatten(1, (-1, group))
    low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
    scale = ((high - low) / (2**bits - 1)).clamp(min=1e-4).half().float()
    zero = (-low / scale).round().clamp(1, 2**bits - 1)
    codes = (grouped / scale[..., None] + zero[..., None]).round().clamp(0, 2**bits - 1)
    return codes.flatten(1), scale, zero


def nearest(table: Tensor, values: Tensor) -> Tensor:
    """Which number of the table, which is in order, each value is nearest to."""
    return torch.bucketize(values, (table[1:] + table[:-1]) / 2)


def bnb4(module: str, weight: Tensor, *, nested: bool) -> Stored:
    flat = weight.float().reshape(-1, 64)
    absmax = flat.abs().amax(1).clamp(min=1e-8)
    codes = nearest(NF4, flat / absmax[:, None]).flatten()
    packed = (codes[::2] << 4 | codes[1::2]).to(torch.uint8)[:, None]
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [*weight.shape]}
    name = f"{module}.weight"
    stored = {name: packed, f"{name}.quant_map": NF4}
    if nested:
        offset = float(absmax.mean())
        padded = torch.nn.functional.pad(absmax - offset, (0, -len(absmax) % 256)).reshape(-1, 256)
        outer = padded.abs().amax(1).clamp(min=1e-8)
        inner = nearest(DYNAMIC, padded / outer[:, None])
        stored[f"{name}.absmax"] = inner.flatten()[: len(absmax)].to(torch.uint8)
        stored |= {f"{name}.nested_absmax": outer, f"{name}.nested_quant_map": DYNAMIC}
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset}
    else:
        stored[f"{name}.absmax"] = absmax
    text = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    return stored | {f"{name}.quant_state.bitsandbytes__nf4": text}


def bnb8(module: str, weight: Tensor) -> Stored:
    largest = weight.float().abs().amax(1).clamp(min=1e-8)
    codes = (weight.float() * 127 / largest[:, None]).round().to(torch.int8)
    form = torch.tensor(0, dtype=torch.uint8)
    return {f"{module}.weight": codes, f"{module}.SCB": largest, f"{module}.weight_format": form}


def fp8(module: str, weight: Tensor) -> Stored:
    scale = (weight.float().abs().amax(1, keepdim=True) / 448).clamp(min=1e-8).bfloat16()
    codes = (weight.float() / scale.float()).clamp(-448, 448).to(torch.float8_e4m3fn)
    return {f"{module}.weight": codes, f"{module}.weight_scale": scale}


def w8a8(module: str, weight: Tensor) -> Stored:
    scale = (weight.float().abs().amax(1, keepdim=True) / 127.5).clamp(min=1e-8).bfloat16()
    codes = (weight.float() / scale.float()).round().clamp(-128, 127).to(torch.int8)
    return {f"{module}.weight": codes, f"{module}.weight_scale": scale}


def w4a16(module: str, weight: Tensor) -> Stored:
    grouped = weight.float().unflatten(1, (-1, 128))
    scale = (grouped.abs().amax(-1) / 7.5).clamp(min=1e-8).bfloat16()
    codes = (grouped / scale.float()[..., None]).round().clamp(-8, 7).flatten(1) + 8
    return {
        f"{module}.weight_packed": words(codes, 4),
        f"{module}.weight_scale": scale,
        f"{module}.weight_shape": torch.tensor(weight.shape),
    }


def mlx(module: str, weight: Tensor, *, bits: int) -> Stored:
    codes, scale, zero = affine(weight, 64, bits)
    return {
        f"{module}.weight": words(codes, bits).view(torch.uint32),
        f"{module}.scales": scale.bfloat16(),
        f"{module}.biases": (-zero * scale).bfloat16(),
    }


def gptq(module: str, weight: Tensor, *, sorted: bool = True, bits: int = 4) -> Stored:
    order = torch.arange(weight.shape[1]) // 128
    if not sorted:  # inputs of one group stand apart
        order = order[torch.randperm(len(order), generator=torch.Generator().manual_seed(0))]
    at = torch.argsort(order, stable=True)
    codes, scale, zero = affine(weight[:, at], 128, bits)
    placed = torch.empty_like(codes)
    placed[:, at] = codes
    return {
        f"{module}.qweight": words(placed, bits).T.contiguous(),
        f"{module}.qzeros": words((zero - 1).T, bits),
        f"{module}.scales": scale.T.half().contiguous(),
        f"{module}.g_idx": order.int(),
    }


def awq(module: str, weight: Tensor) -> Stored:
    codes, scale, zero = affine(weight, 128)

    def shuffled(columns: Tensor) -> Tensor:
        """[m, n] -> words [m, n/8], whose nibble k holds output [0, 2, 4, 6, 1, 3, 5, 7][k]."""
        picked = columns.unflatten(1, (-1, 8))[..., [0, 2, 4, 6, 1, 3, 5, 7]]
        return words(picked.flatten(1), 4)

    return {
        f"{module}.qweight": shuffled(codes.T),
        f"{module}.qzeros": shuffled(zero.T),
        f"{module}.scales": scale.T.half().contiguous(),
    }


def _compressed(format: str, **weights: object) -> dict[str, object]:
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    return {"quant_method": "compressed-tensors", "format": format, "config_groups": groups}


def _bnb4(**more: object) -> dict[str, object]:
    return {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


# kind -> (key of config.json, its value, writer)
KINDS: dict[str, tuple[str, dict[str, object], Callable[[str, Tensor], Stored]]] = {
    "nf4": ("quantization_config", _bnb4(), lambda m, w: bnb4(m, w, nested=False)),
    "nf4-nested": ("quantization_config", _bnb4(), lambda m, w: bnb4(m, w, nested=True)),
    "bnb-int8": (
        "quantization_config",
        {"quant_method": "bitsandbytes", "load_in_8bit": True},
        bnb8,
    ),
    "fp8": ("quantization_config", _compressed("float-quantized"), fp8),
    "w8a8": ("quantization_config", _compressed("int-quantized"), w8a8),
    "w4a16": ("quantization_config", _compressed("pack-quantized", group_size=128), w4a16),
    "mlx4": ("quantization", {"group_size": 64, "bits": 4}, lambda m, w: mlx(m, w, bits=4)),
    "mlx8": ("quantization", {"group_size": 64, "bits": 8}, lambda m, w: mlx(m, w, bits=8)),
    "gptq": ("quantization_config", {"quant_method": "gptq", "bits": 4, "group_size": 128}, gptq),
    "gptq-act": (
        "quantization_config",
        {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": True},
        lambda m, w: gptq(m, w, sorted=False),
    ),
    "gptq8": (
        "quantization_config",
        {"quant_method": "gptq", "bits": 8, "group_size": 128},
        lambda m, w: gptq(m, w, bits=8),
    ),
    "auto-round": (
        "quantization_config",
        {"quant_method": "intel/auto-round", "packing_format": "auto_round:auto_gptq", "bits": 4},
        gptq,
    ),
    "awq": (
        "quantization_config",
        {"quant_method": "awq", "bits": 4, "version": "gemm", "zero_point": True},
        awq,
    ),
}  # fmt: skip


def is_packed(kind: str, name: str) -> bool:
    """Text layers in all kinds; the vision encoder as well where bitsandbytes is used."""
    parts = ("language_model.model.layers.",)
    if kind.startswith(("nf4", "bnb")):
        parts += ("vision_model.transformer.", "vision_model.global_transformer.")
    return name.startswith(parts) and name.endswith(("proj.weight", "fc1.weight", "fc2.weight"))


def pack_folder(folder: Path, kind: str, weights: Stored, config: dict[str, object]) -> Path:
    """Write model.safetensors and config.json of `weights` as `kind` packs them."""
    key, value, write = KINDS[kind]
    stored: Stored = {}
    for name, weight in weights.items():
        if is_packed(kind, name):
            stored |= write(name.removesuffix(".weight"), weight)
        elif kind.startswith("mlx") and name.endswith("patch_embedding.weight"):
            stored[name] = weight.permute(0, 2, 3, 1)
        else:
            stored[name] = weight
    if kind.startswith("mlx"):
        stored = {n.replace("vision_model.", "vision_tower.", 1): t for n, t in stored.items()}
    folder.mkdir(exist_ok=True)
    save_file({n: t.clone().contiguous() for n, t in stored.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({**config, key: value}))
    return folder
