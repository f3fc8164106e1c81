"""Rows answered on a Ray cluster that runs already: a model in each actor, through Ray Data.

Ray answers each row at least once, and some twice where a node is lost; whoever reads the answers
here is told of each row once, and writes the file. So a lost driver loses what no reader was told.
"""

from __future__ import annotations

import json
import logging
import math
import os
import platform
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mmchat
from mmchat import errors
from mmchat.batch.rows import Row
from mmchat.errors import MissingExtra, MmchatError, NetworkError, UsageError, quoted

if TYPE_CHECKING:
    from mmchat.batch.run import Defaults, Line
    from mmchat.catalog.source import ModelSource
    from mmchat.loading.loader import LoadedModel
    from mmchat.loading.options import LoadOptions

MOST_ROWS = 32  # of a task, which is given to another actor where its own is lost
CONNECT_SECONDS = 5.0
CHECK_SECONDS = 120.0
# Usage is sent by default; of a lost node 60 lines are written, to stdout and stderr.
_BEFORE_IMPORT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    "RAY_DEDUP_LOGS_SKIP_REGEX": ".",
}
GOES_ON = "the same command goes on from what is written"


@dataclass(frozen=True)
class Job:
    """How rows are answered. rows: at once in each actor, None for as usual."""

    options: LoadOptions
    source: ModelSource
    defaults: Defaults
    rows: int | None


def check_address(address: str, ranks: int = 1) -> None:
    """Raises MissingExtra, UsageError, NetworkError if nothing listens there.

    ranks: that a model would be shared by.
    """
    if ranks > 1:
        raise UsageError(
            f"--ray gives each actor a model of its own, and --parallel {ranks} shares one; leave"
            " one of them out"
        )
    if find_spec("ray") is None:
        raise MissingExtra("a cluster needs Ray: pip install 'mmchat[ray]'")
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    if not (host and port.isascii() and port.isdigit() and "/" not in host):
        raise UsageError(
            f"--ray {quoted(address)} is no address; write HOST:PORT of a cluster that runs, or"
            " auto on one of its machines: none is started here"
        )
    try:  # Ray itself tries for minutes
        socket.create_connection((host, int(port)), CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise NetworkError(
            f"no Ray cluster answers at {quoted(address)}: {reason}; give that of one that runs"
        ) from None


def answer_lines(address: str, rows: Sequence[Row], job: Job) -> Iterator[Line]:
    """The line of each row, told once. Raises MmchatError of the job or the cluster."""
    ray = _connect(address)
    told: set[str] = set()
    try:
        for found in _answered(ray, rows, job):
            if (custom_id := found.get("custom_id")) is None:
                raise getattr(errors, found["code"], MmchatError)(found["message"])
            if custom_id not in told:
                told.add(custom_id)
                yield found
    except ray.exceptions.RayError as error:
        first = str(error).strip().partition("\n")[0]
        raise MmchatError(f"the cluster failed: {first[:300]}; {GOES_ON}") from None
    finally:
        ray.shutdown()  # before nodes end, or this process ends with an error


def _connect(address: str) -> Any:
    """Ray, connected. Raises UsageError for another version there, NetworkError."""
    os.environ.update(_BEFORE_IMPORT)
    import ray  # type: ignore[import-not-found]
    import ray.data  # type: ignore[import-not-found]

    try:
        ray.init(address=address, logging_level=logging.CRITICAL, log_to_driver=False)
    except (ConnectionError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise NetworkError(f"no Ray cluster at {quoted(address)}: {reason[:200]}") from None
    except RuntimeError as error:
        raise UsageError(f"--ray {quoted(address)}: {' '.join(str(error).split())[:400]}") from None
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    ray.data.DataContext.get_current().enable_progress_bars = False
    return ray


def _answered(ray: Any, rows: Sequence[Row], job: Job) -> Iterator[dict[str, Any]]:
    """What replicas tell, as it comes."""
    nodes = [node for node in ray.nodes() if node["Alive"]]
    check_nodes(_facts(ray, nodes))
    count, resources = actors([node["Resources"] for node in nodes], str(job.options.device))
    size = max(1, min(MOST_ROWS, math.ceil(len(rows) / (4 * count))))
    tasks = math.ceil(len(rows) / size)
    count = min(count, tasks)
    options = replace(job.options, progress=None)
    items = [{"row": row} for row in rows]
    data = ray.data.from_items(items, override_num_blocks=tasks).map_batches(
        Replica,
        batch_size=size,
        fn_constructor_args=(
            options, job.options.identity(job.source), job.defaults, job.rows, str(Path.cwd()),
        ),
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=count, initial_size=count),
        **resources,
    )  # fmt: skip
    for block in data.iter_batches(batch_size=None, prefetch_batches=0):
        yield from (json.loads(str(told)) for told in block["told"])


def actors(nodes: Sequence[Mapping[str, float]], device: str) -> tuple[int, dict[str, float]]:
    """How many, and what each takes. nodes: resources of each. Raises UsageError for no room.

    One for each GPU, or without any one for each node, with all its processors.
    """
    gpus = sum(int(node.get("GPU", 0)) for node in nodes)
    if gpus and (device == "auto" or device.startswith("cuda")):
        return gpus, {"num_gpus": 1, "num_cpus": 1}
    cpus = [int(node["CPU"]) for node in nodes if node.get("CPU", 0) >= 1]
    if not cpus or device.startswith("cuda"):
        raise UsageError(f"the cluster has no {'GPU' if cpus else 'processor'} to give; add a node")
    return len(cpus), {"num_cpus": min(cpus)}


def _facts(ray: Any, nodes: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, str | None]]:
    """Of each node (its address, Python's version, mmchat's version or None)."""
    from ray.util.scheduling_strategies import (  # type: ignore[import-not-found]
        NodeAffinitySchedulingStrategy as OnNode,
    )

    def versions() -> tuple[str, str | None]:  # within: else Ray would look for it in their mmchat
        import platform

        try:
            import mmchat
        except ImportError:
            return platform.python_version(), None
        return platform.python_version(), mmchat.__version__

    ask = ray.remote(num_cpus=0)(versions)
    asked = [ask.options(scheduling_strategy=OnNode(n["NodeID"], soft=False)) for n in nodes]
    found = ray.get([one.remote() for one in asked], timeout=CHECK_SECONDS)
    return [(n["NodeManagerAddress"], *facts) for n, facts in zip(nodes, found, strict=True)]


def check_nodes(facts: Sequence[tuple[str, str, str | None]]) -> None:
    """Raises UsageError for a node with another Python or mmchat than this process has."""
    ours = platform.python_version(), mmchat.__version__
    for address, *theirs in facts:
        if tuple(theirs) != ours:
            python, version = theirs
            found = f"mmchat {version}" if version else "no mmchat"
            raise UsageError(
                f"the node {address} has Python {python} and {found}, this machine Python"
                f" {ours[0]} and mmchat {ours[1]}; install the same on all"
            )


class Replica:
    """In an actor: the model, which answers the rows of a task."""

    def __init__(
        self,
        options: LoadOptions,
        identity: list[Any],
        defaults: Defaults,
        rows: int | None,
        folder: str,
    ) -> None:
        self.defaults, self.rows = defaults, rows
        self.model: LoadedModel | None = None
        self.error: Exception | None = None  # told with the first row: Ray would tell a traceback
        try:
            self.model = _loaded(options, identity, folder)
        except Exception as error:
            self.error = error

    def __call__(self, task: Mapping[str, Any]) -> dict[str, list[Any]]:
        from mmchat.batch.run import answer_lines

        try:
            if self.model is None:
                raise self.error or RuntimeError("there is no model")
            told = list(answer_lines(self.model, task["row"], self.defaults, self.rows))
        except Exception as error:  # of the job, not of a row
            text = f"node {platform.node()}: {error}"
            told = [{"code": type(error).__name__, "message": text}]
        return {"told": [json.dumps(one) for one in told]}


def _loaded(options: LoadOptions, identity: list[Any], folder: str) -> LoadedModel:
    from mmchat.loading.loader import load

    try:
        os.chdir(folder)
    except OSError as error:
        raise UsageError(
            f"the folder {quoted(folder)} is not there ({error.strerror}); run from one that all"
            " nodes share, with the pictures"
        ) from None
    source = options.find()
    if options.identity(source) != identity:
        raise UsageError(
            f"there are other weights of {source.spec.name} than where the job was begun; download"
            " the same on all nodes"
        )
    return load(options, source)
