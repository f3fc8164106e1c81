"""What mmchat does not read, recognised by the names of its files, and the step that helps."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

_ORIGINAL = "take the original weights, which --quantize int4 makes as small"
_DCP = "python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER model.pt"
# Patterns of names, what they tell, the next step.
_KINDS = (
    (("*.uqff", "residual.safetensors"), "UQFF of mistral.rs", _ORIGINAL),
    (("*.distcp", ".metadata"), "a distributed checkpoint of torch (DCP)", f"join it by '{_DCP}'"),
    (
        ("global_step*", "zero_pp_rank_*", "mp_rank_*", "zero_to_fp32.py"),
        "a checkpoint of DeepSpeed",
        "join it by 'python zero_to_fp32.py FOLDER OUT', which DeepSpeed wrote beside it",
    ),
    (
        ("checkpoint-*[0-9]", "epoch_*[0-9]"),
        "the output of a training",
        "name one of the folders in it",
    ),
    (("*.onnx", "*.onnx_data", "*.onnx.data"), "ONNX", _ORIGINAL),
    (("*.mlpackage", "*.mlmodel", "*.mlmodelc"), "Core ML", _ORIGINAL),
    (("openvino_*.xml", "openvino_*.bin"), "OpenVINO", _ORIGINAL),
    (("qmodel.pt",), "HQQ", _ORIGINAL),
    (("output.safetensors", "output-?????-of-?????.safetensors"), "ExLlama (exl2)", _ORIGINAL),
    (("*.engine",), "TensorRT", _ORIGINAL),
    (("*.h5", "*.msgpack"), "weights of TensorFlow or Flax", _ORIGINAL),
)


def explain_foreign(names: Iterable[str]) -> str | None:
    """What a folder of files with these names, or one file, is, and what to do; None if unknown."""
    tops = {part for name in names for part in name.split("/")}
    for patterns, kind, step in _KINDS:
        found = sorted(n for n in tops if any(fnmatchcase(n, pattern) for pattern in patterns))
        if found:
            return f"{found[0]!r} is of {kind}, which mmchat does not read; {step}"
    return None
