"""A known model that is not on this machine: say what to run, and on a terminal offer to do it."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from mmchat.cli import console
from mmchat.errors import CheckpointError
from mmchat.offline import is_hub_offline
from mmchat.words import size

if TYPE_CHECKING:
    from mmchat.catalog.source import ModelSource
    from mmchat.catalog.spec import ModelSpec
    from mmchat.loading.options import LoadOptions

_BYTES_PER_PARAMETER = 2  # the Hub's files are in bfloat16


def find_or_offer(model: LoadOptions, *, looks: bool = False) -> ModelSource:
    """`model.find()`; where that fails for want of a download, ask whether to start it.

    Nothing is asked, and nothing fetched, unless a person sits at the terminal and says yes.
    looks: raises UsageError for models that do not tell where they look; they are not even asked
    for.
    """
    if looks and model.name is not None:
        from mmchat.catalog.known import find_spec
        from mmchat.explain.look import check_spec

        if named := find_spec(str(model.name)):
            check_spec(named)
    try:
        return model.find()
    except CheckpointError:
        spec = _downloadable(model)
        if spec is None:
            raise
        if not _is_wanted(spec):
            raise CheckpointError(
                f"{spec.name} is not here; 'mmchat download {spec.name}' fetches it"
            ) from None
        from mmchat.cli.download import carry_out, say_plan
        from mmchat.hub import download as hub

        with console.interrupt_says(f"stopped; 'mmchat download {spec.name}' goes on"):
            plan = hub.plan(hub.Request(spec.repo or ""))
            say_plan(plan)
            carry_out(plan)
        return model.find()


def _downloadable(model: LoadOptions) -> ModelSpec | None:
    """The known model that is meant and not here, if it can be fetched and someone can be asked.

    Raises CheckpointError or UsageError for adapters that would be refused after the download.
    """
    from mmchat.catalog.adapters import find_adapters
    from mmchat.catalog.known import base_spec, find_spec, folder_on_disk

    is_seen = console.is_terminal(sys.stdin) and console.is_terminal(sys.stderr)
    if model.name is None or model.checkpoint_path is not None or not is_seen or is_hub_offline():
        return None
    spec = find_spec(str(model.name)) or base_spec(model.name)
    if spec is None or spec.repo is None or folder_on_disk(spec) is not None:
        return None
    find_adapters(model.adapter)
    return spec


def _is_wanted(spec: ModelSpec) -> bool:
    from mmchat.checkpoints.hub_cache import cache_folder
    from mmchat.storage.space import free_bytes

    needed = spec.parameters * _BYTES_PER_PARAMETER
    free = free_bytes(cache_folder())
    console.say(f"{spec.name} is not on this machine: about {size(needed)} from {spec.repo}")
    console.say(f"{size(free)} are free in {cache_folder()}")
    return console.confirm("download it now?")
