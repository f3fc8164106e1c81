"""Make packed.safetensors and packed.json with the libraries that write quantised checkpoints.

Run in an environment of its own (see README.md): `python make_packed_golden.py`. For each kind it
rounds one random weight with the real library and stores what a checkpoint would hold, under
`KIND/stored/NAME`, and what the library makes of it again, under `KIND/weight`. Nothing here is
imported by the tests.
"""

from __future__ import annotations

import json
from pathlib import Path

import bitsandbytes.functional as bnb
import mlx.core as mx
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import save_file
from torch import Tensor

FOLDER = Path(__file__).parent
tensors: dict[str, Tensor] = {}
configs: dict[str, object] = {}


def weight(rows: int, columns: int, seed: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Normal, with a few outliers and a row of zeros."""
    draw = torch.Generator().manual_seed(seed)
    made = torch.randn(rows, columns, generator=draw) * 0.02
    made[:, 5] *= 9
    made[3] = 0
    return made.to(dtype)


def keep(kind: str, config: object, stored: dict[str, Tensor], value: Tensor) -> None:
    configs[kind] = config
    tensors[f"{kind}/weight"] = value.contiguous()
    for name, tensor in stored.items():
        tensors[f"{kind}/stored/{name}"] = tensor.contiguous()


def four_bit(kind: str, quant_type: str, nested: bool, dtype: torch.dtype, seed: int) -> None:
    plain = weight(144, 128, seed, dtype)  # more than 256 blocks of 64, so that nested scales vary
    packed, state = bnb.quantize_4bit(
        plain, blocksize=64, compress_statistics=nested, quant_type=quant_type
    )
    config = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": quant_type,
        "bnb_4bit_use_double_quant": nested,
    }
    stored = {"x.weight": packed}
    stored |= {f"x.weight.{name}": tensor for name, tensor in state.as_dict(packed=True).items()}
    keep(kind, {"quantization_config": config}, stored, bnb.dequantize_4bit(packed, state))


def eight_bit() -> None:
    plain = weight(24, 64, 4, torch.float16)
    codes, scale, _ = bnb.int8_vectorwise_quant(plain)
    config = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    stored = {"x.weight": codes, "x.SCB": scale, "x.weight_format": torch.tensor(0).byte()}
    value = bnb.int8_vectorwise_dequant(codes, scale).to(torch.bfloat16)
    keep("bnb-int8", {"quantization_config": config}, stored, value)


def compressed(kind: str, format: str, seed: int, **arguments: object) -> None:
    plain = weight(24, 256, seed)
    args = QuantizationArgs(**arguments)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    if args.strategy == "group":
        groups = plain.unflatten(1, (-1, args.group_size))
        low, high = groups.amin(-1), groups.amax(-1)
    elif args.strategy == "channel":
        low, high = plain.amin(1, keepdim=True), plain.amax(1, keepdim=True)
    else:
        low, high = plain.amin().reshape(1), plain.amax().reshape(1)
    scale, zero = calculate_qparams(low, high, args)
    state = {"weight": plain, "weight_scale": scale.to(torch.bfloat16)}
    if not args.symmetric:
        state["weight_zero_point"] = zero
    compressor = BaseCompressor.get_value_from_registry(format)
    stored = compressor.compress(state, scheme)
    value = compressor.decompress(stored, scheme)["weight"]
    weights = {name: getattr(args, name) for name in ("num_bits", "group_size", "symmetric")}
    weights |= {"type": str(args.type), "strategy": str(args.strategy)}
    config = {
        "quant_method": "compressed-tensors",
        "format": format,
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head"],
    }
    stored = {f"x.{name}": tensor for name, tensor in stored.items()}
    keep(kind, {"quantization_config": config}, stored, value)


def mlx(kind: str, bits: int, group: int, dtype: torch.dtype, seed: int) -> None:
    plain = weight(24, 128, seed, torch.float32)
    kinds = {torch.bfloat16: mx.bfloat16, torch.float16: mx.float16}
    made = mx.array(plain.numpy()).astype(kinds[dtype])
    codes, scales, biases = mx.quantize(made, group_size=group, bits=bits, stream=mx.cpu)
    value = mx.dequantize(codes, scales, biases, group_size=group, bits=bits, stream=mx.cpu)
    out = FOLDER / "mlx.tmp.safetensors"
    mx.save_safetensors(str(out), {"w": codes, "s": scales, "b": biases, "v": value})
    from safetensors.torch import load_file

    found = load_file(out)
    out.unlink()
    config = {"quantization": {"group_size": group, "bits": bits}}
    stored = {"x.weight": found["w"], "x.scales": found["s"], "x.biases": found["b"]}
    keep(kind, config, stored, found["v"])


def main() -> None:
    four_bit("nf4-nested", "nf4", True, torch.bfloat16, 0)
    four_bit("nf4", "nf4", False, torch.bfloat16, 1)
    four_bit("nf4-float16", "nf4", True, torch.float16, 2)
    four_bit("fp4", "fp4", False, torch.bfloat16, 3)
    eight_bit()
    eight = {"num_bits": 8, "symmetric": True}
    compressed("fp8-dynamic", "float-quantized", 5, **eight, type="float", strategy="channel")
    compressed("fp8", "float-quantized", 6, **eight, type="float", strategy="tensor")
    compressed("w8a8", "int-quantized", 7, **eight, type="int", strategy="channel")
    four = {"num_bits": 4, "type": "int", "strategy": "group"}
    compressed("w4a16", "pack-quantized", 8, **four, group_size=128, symmetric=True)
    compressed("w4a16-asym", "pack-quantized", 9, **four, group_size=32, symmetric=False)
    compressed("w8a16", "pack-quantized", 10, **eight, type="int", strategy="channel")
    mlx("mlx-4bit", 4, 64, torch.bfloat16, 11)
    mlx("mlx-4bit-float16", 4, 32, torch.float16, 12)
    mlx("mlx-8bit", 8, 64, torch.float16, 13)
    save_file(tensors, FOLDER / "packed.safetensors")
    text = json.dumps(configs, indent=1, sort_keys=True)
    (FOLDER / "packed.json").write_text(text + "\n")


main()
