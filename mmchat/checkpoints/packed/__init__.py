"""Checkpoints that other programs quantised, a file for each: from config.json to a `Packing`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmchat.checkpoints.packed.base import Packing
from mmchat.checkpoints.packed.bitsandbytes import Bitsandbytes
from mmchat.checkpoints.packed.compressed_tensors import CompressedTensors
from mmchat.checkpoints.packed.gptq import Gptq
from mmchat.checkpoints.packed.mlx import Mlx
from mmchat.errors import quoted
from mmchat.strict_json import Where, as_object

__all__ = ["Packing", "packed_key", "packing_of"]

_MLX = "mlx"  # which gives itself no name
_METHODS = {
    "bitsandbytes": Bitsandbytes,
    "compressed-tensors": CompressedTensors,
    "fbgemm_fp8": CompressedTensors,
    "gptq": Gptq,
    "awq": Gptq,
    "auto-round": Gptq,
    "intel/auto-round": Gptq,
    _MLX: Mlx,
}
_READ = "bitsandbytes, compressed-tensors, GPTQ, AWQ, auto-round and MLX"


def packed_key(found: Mapping[str, Any]) -> str | None:
    """The key of a config.json that says that the weights are packed; None: they are not."""
    keys = ("quantization_config", "quantization")
    return next((key for key in keys if found.get(key) is not None), None)


def packing_of(found: Mapping[str, Any], where: Where) -> Packing | None:
    """How the weights beside a config.json are packed; None: they are not.

    Raises where's error for a packing that is not read, with what to do.
    """
    key = packed_key(found)
    if key is None:
        return None
    where = where.child(key)
    config = as_object(found[key], where)
    is_mlx = "quant_method" not in config and "bits" in config and "group_size" in config
    method = config.get("quant_method") if not is_mlx else _MLX
    make = _METHODS.get(method) if isinstance(method, str) else None
    try:
        if make:
            return make(config)
        reason = f"packed by {quoted(method)}" if method else "quantised by another program"
    except ValueError as error:
        reason = f"packed by {method}: {error}"
    raise where.fail(
        f"{reason}; mmchat reads {_READ}: take such a repository, or the original weights, which"
        " --quantize int4 brings to the same size"
    )
