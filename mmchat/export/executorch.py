"""Lower a model's programs to ExecuTorch and write them, with their weights, as one .pte file.

XNNPACK takes what it can, ExecuTorch's portable operators the rest. The methods of the file share
their weights: those of XNNPACK lie in it once, whatever the number of methods.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmchat.checkpoints.exported_folder import PROGRAM_NAME
from mmchat.checkpoints.writers import new_file
from mmchat.errors import ExportError
from mmchat.export.aoti import quiet, trace
from mmchat.models.base import ExportProgram
from mmchat.progress import ProgressCallback
from mmchat.quant.formats.int4 import Int4
from mmchat.quant.formats.plain import PLAIN
from mmchat.quant.schemes import Plan
from mmchat.runtime.executorch import missing_extra


def quantize_linears(model: Any, plan: Plan) -> None:
    """Round the weights as ExecuTorch's users expect, to int4 in groups or int8 by rows.

    Activations are rounded to int8 with a scale for each token as the model runs. Raises
    MissingExtra.
    """
    if plan.scheme == "none":
        return
    with quiet():
        torchao = _module("torchao.quantization")
    chosen = {
        name: plan.layer_format(part, *model.get_submodule(name).weight.shape)
        for name, part in model.linear_parts().items()
    }
    for kind in set(chosen.values()) - {PLAIN}:
        groups = torchao.PerGroup(kind.group_size) if isinstance(kind, Int4) else torchao.PerAxis(0)
        config = torchao.Int8DynamicActivationIntxWeightConfig(
            weight_dtype=getattr(torch, kind.name), weight_granularity=groups
        )
        torchao.quantize_(model, config, lambda _, name, kind=kind: chosen.get(name) == kind)


def lower_programs(
    folder: Path, programs: Sequence[ExportProgram], progress: ProgressCallback
) -> tuple[str, ...]:
    """Write programs.pte; returns the names of its methods. Raises ExportError, MissingExtra."""
    with quiet():
        lowered = _lower(programs, progress)
        with new_file(folder / PROGRAM_NAME) as file:
            lowered.write_to_file(file)
    return tuple(program.name for program in programs)


def _lower(programs: Sequence[ExportProgram], progress: ProgressCallback) -> Any:
    exir, passes = _module("executorch.exir"), _module("executorch.exir.passes")
    shapes = _module("executorch.exir.passes.sym_shape_eval_pass")
    xnnpack = _module("executorch.backends.xnnpack.partition.xnnpack_partitioner")
    traced = {}
    for number, program in enumerate(programs, start=1):
        progress(f"tracing {program.name}", number, len(programs))
        traced[program.name] = trace(program).run_decompositions(_DECOMPOSITIONS)
    progress("lowering to XNNPACK, which takes minutes", 0, 1)
    # arguments are used where they lie: caches are large; dynamic shapes are planned for the most
    settings = exir.ExecutorchBackendConfig(
        memory_planning_pass=passes.MemoryPlanningPass(alloc_graph_input=False),
        sym_shape_eval_pass=shapes.ConstraintBasedSymShapeEvalPass(),
    )
    lowered = exir.to_edge_transform_and_lower(
        traced,
        partitioner={name: [xnnpack.XnnpackPartitioner()] for name in traced},
        compile_config=exir.EdgeCompileConfig(_check_ir_validity=False),
    )
    return lowered.to_executorch(settings)


def _module(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise missing_extra(error) from None


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attention as products of three axes, which XNNPACK takes; torch's own has more to guard."""
    if dropout_p or is_causal or enable_gqa:
        raise ExportError("attention of this kind has no form for ExecuTorch")
    dim = query.shape[-1]
    folded = (query * (scale or dim**-0.5)).flatten(0, 1)
    scores = torch.bmm(folded, key.flatten(0, 1).transpose(1, 2))
    if attn_mask is not None:
        scores = scores + attn_mask.flatten(0, 1)
    out = torch.bmm(torch.softmax(scores, -1), value.flatten(0, 1))
    return out.unflatten(0, query.shape[:2])


_DECOMPOSITIONS: dict[Any, Any] = {torch.ops.aten.scaled_dot_product_attention.default: _attention}
