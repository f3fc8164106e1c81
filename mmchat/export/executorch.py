"""Lower a model's programs to ExecuTorch and write them, with their weights, as one .pte file.

XNNPACK takes what it can, ExecuTorch's portable operators the rest. The methods of the file share
their weights: those of XNNPACK lie in it once, whatever the number of methods.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmchat.errors import ExportError
from mmchat.export.aoti import trace
from mmchat.models.base import ExportLimits, ExportProgram
from mmchat.runtime.executorch import PROGRAM_NAME, missing_extra

# progress(program, its number from 1, how many)
Progress = Callable[[str, int, int], None]


def lower_programs(
    folder: Path, family_export: Any, model: Any, limits: ExportLimits, progress: Progress
) -> tuple[str, ...]:
    """Write programs.pte; returns the names of its methods. Raises ExportError, MissingExtra."""
    programs: list[ExportProgram] = family_export.export_programs(model, limits)
    with _quiet():
        file = _lower(programs, progress)
        with (folder / PROGRAM_NAME).open("wb") as opened:
            file.write_to_file(opened)
    return tuple(program.name for program in programs)


def _lower(programs: list[ExportProgram], progress: Progress) -> Any:
    try:
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import (
            EdgeCompileConfig,
            ExecutorchBackendConfig,
            to_edge_transform_and_lower,
        )
        from executorch.exir.passes import MemoryPlanningPass
        from executorch.exir.passes.sym_shape_eval_pass import ConstraintBasedSymShapeEvalPass
    except ImportError as error:
        raise missing_extra(error) from None
    steps = len(programs) + 1
    traced = {}
    for number, program in enumerate(programs, start=1):
        progress(program.name, number, steps)
        traced[program.name] = trace(program).run_decompositions(_DECOMPOSITIONS)
    progress("all for XNNPACK", steps, steps)
    # arguments are used where they lie: caches are large; dynamic shapes are planned for the most
    planning = MemoryPlanningPass(alloc_graph_input=False)
    lowered = to_edge_transform_and_lower(
        traced,
        partitioner={name: [XnnpackPartitioner()] for name in traced},
        compile_config=EdgeCompileConfig(_check_ir_validity=False),
    )
    return lowered.to_executorch(
        ExecutorchBackendConfig(
            memory_planning_pass=planning, sym_shape_eval_pass=ConstraintBasedSymShapeEvalPass()
        )
    )


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
    heads = query.shape[:2].numel()
    dim = query.shape[-1]
    folded = (query * (scale or dim**-0.5)).flatten(0, 1)
    scores = torch.bmm(folded, key.flatten(0, 1).transpose(1, 2))
    if attn_mask is not None:
        scores = scores + attn_mask.flatten(0, 1).expand(heads if attn_mask.shape[1] > 1 else 1, -1, -1)
    out = torch.bmm(torch.softmax(scores, -1), value.flatten(0, 1))
    return out.unflatten(0, query.shape[:2])


_DECOMPOSITIONS = {torch.ops.aten.scaled_dot_product_attention.default: _attention}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """What the compilers say of their own code is not for the user to mend."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
