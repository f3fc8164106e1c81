"""A known model that is not on this machine: say what to run, and on a terminal offer to do it."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from mmchat.cli import console
from mmchat.cli.download import carry_out, say_plan
from mmchat.cli.interrupts import interrupt_says
from mmchat.cli.units import size
from mmchat.errors import CheckpointError
from mmchat.offline import is_hub_offline

if TYPE_CHECKING:
    from mmchat.catalog.find import ModelParams, ModelSource
    from mmchat.loading.options import LoadOptions

_BYTES_PER_PARAMETER = 2  # the Hub's files are in bfloat16


def find_or_offer(model: LoadOptions) -> ModelSource:
    """`model.find()`; where that fails for want of a download, ask whether to start it.

    Nothing is asked, and nothing fetched, unless a person sits at the terminal and says yes.
    """
    try:
        return model.find()
    except CheckpointError:
        params = _downloadable(model)
        if params is None:
            raise
        if not _is_wanted(params):
            raise CheckpointError(
                f"{params.name} is not here; 'mmchat download {params.name}' fetches it"
            ) from None
        _download(params)
        return model.find()


def _downloadable(model: LoadOptions) -> ModelParams | None:
    """The known model that is meant, if it can be fetched now and someone can be asked."""
    from mmchat.catalog.find import find_params

    is_seen = console.is_terminal(sys.stdin) and console.is_terminal(sys.stderr)
    if model.name is None or model.checkpoint_path is not None or not is_seen or is_hub_offline():
        return None
    params = find_params(str(model.name))
    return params if params and params.repo else None


def _is_wanted(params: ModelParams) -> bool:
    from mmchat.checkpoints.hub_cache import cache_folder
    from mmchat.hub.places import free_bytes

    needed = params.parameters * _BYTES_PER_PARAMETER
    free = free_bytes(cache_folder())
    console.note(f"{params.name} is not on this machine: about {size(needed)} from {params.repo}")
    console.note(f"{size(free)} are free in {cache_folder()}")
    return console.confirm("download it now?")


def _download(params: ModelParams) -> None:
    from mmchat.hub import download as hub

    with interrupt_says(f"stopped; 'mmchat download {params.name}' goes on"):
        plan = hub.plan(hub.Request(params.repo or ""))
        say_plan(plan)
        carry_out(plan)
