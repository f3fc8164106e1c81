"""Ranks that torchrun, srun or another launcher has started share the model of one command."""

from __future__ import annotations

from typing import Any

from mmchat.errors import UsageError
from mmchat.parallel import launch


def of_launcher(values: dict[str, Any], command: str) -> dict[str, Any]:
    """Fields of LoadOptions, with as many ranks as a launcher has started; without one as they are.

    Only rank 0 returns; the others follow it until it ends. Raises UsageError and RankError.
    """
    ranks = launch.launched_ranks()
    if ranks == 1:
        return values
    if command == "chat":
        raise UsageError(
            "chat has no terminal of its own under a launcher; use generate, batch or serve there,"
            " or mmchat chat --parallel N on one machine"
        )
    asked = values.get("parallel")
    if asked not in (None, ranks):
        raise UsageError(
            f"--parallel {asked}, but the launcher has started {ranks} ranks (WORLD_SIZE); leave"
            " out --parallel"
        )
    timeout = values["parallel_timeout"]
    if launch.launched_rank():
        from mmchat.loading.follower import follow

        launch.end_with_parent()
        follow(timeout, timeout)
    launch.adopt(group := launch.join(timeout, timeout))
    from mmchat.runtime.mirrored import driver_of

    driver_of(group).show_life()
    return {**values, "parallel": ranks}
