"""Benchmarks of lm_eval with a model of ours: tasks are found and run, results become JSON."""

from __future__ import annotations

import json
import logging
import math
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import platformdirs

from mmchat.errors import MissingExtra, MmchatError, NetworkError, UsageError, disk_errors, quoted
from mmchat.offline import go_offline, is_hub_offline
from mmchat.spelling import closest

if TYPE_CHECKING:
    from mmchat.evals.engine_lm import Bar
    from mmchat.loading.loader import LoadedModel

EXTRA = "benchmarks need lm_eval: pip install 'mmchat[eval]'; 'mmchat eval scenes' does without"
SEED = 1234  # as lm_eval has it for numpy, torch and examples; Python's own begins at 0
# What of lm_eval's results is recorded, by its names
RECORDED = ("results", "groups", "n-shot", "n-samples", "versions", "higher_is_better", "configs")


@dataclass(frozen=True)
class Tasks:
    """lm_eval's tasks, with their data sets. loaded: as its TaskManager gives them."""

    loaded: Any

    @property
    def names(self) -> list[str]:
        return list(self.loaded["tasks"])

    @property
    def has_pictures(self) -> bool:
        return any(getattr(task, "MULTIMODAL", False) for task in self.loaded["tasks"].values())


@dataclass(frozen=True)
class Outcome:
    """record: what is kept of lm_eval's results, as JSON has it. samples: of each task."""

    record: dict[str, Any]
    samples: dict[str, list[Any]]
    notices: list[str]


def check_extra() -> None:
    """Raises MissingExtra."""
    if find_spec("lm_eval") is None:
        raise MissingExtra(EXTRA)


def load_tasks(names: Sequence[str], folder: Path | None, num_fewshot: int | None) -> Tasks:
    """Find tasks, groups and patterns, and fetch their data sets.

    folder: of task files, which may run Python of their own. Raises MissingExtra, UsageError for
    tasks that are none or cannot be loaded, NetworkError for data that is not here.
    """
    check_extra()
    if is_hub_offline():
        go_offline()
    os.environ.setdefault("TQDM_DISABLE", "1")  # there is a bar of our own
    for name in ("lm_eval", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)
    manager = _manager(names, folder)
    for name in names:
        if not manager.match_tasks([name]):
            alike = (task for task in manager.all_tasks if task[:3] == name[:3])
            near = closest(name, ["scenes", *alike], cutoff=0.6)
            hint = f"nearest: {quoted(near[0])}" if near else "'lm_eval ls tasks' lists them"
            raise UsageError(f"there is no task {quoted(name)}; {hint}")
    try:
        loaded = manager.load(list(names))
    except ConnectionError as error:
        raise _not_here(names, error) from None
    except Exception as error:  # of files that others wrote, and the Python in them
        raise UsageError(f"{_said(names)} cannot be loaded: {_reason(error)}") from None
    for name, task in loaded["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False):
            raise UsageError(f"the task {quoted(name)} runs code that models write; not done here")
        given = task.get_config("num_fewshot")
        if given is None or (num_fewshot is not None and given != 0):  # 0 there is meant so
            task.set_config(key="num_fewshot", value=num_fewshot or 0)
        task.set_fewshot_seed(seed=SEED)
    return Tasks(loaded)


def _manager(names: Sequence[str], folder: Path | None) -> Any:
    """lm_eval's TaskManager; its own 14,000 tasks are read only where they are needed."""
    if folder is not None and not folder.is_dir():
        raise UsageError(f"--include-path {quoted(folder)} is no folder; give one of task files")
    from lm_eval.tasks import TaskManager  # type: ignore[import-not-found]

    if folder is not None:
        own = TaskManager(include_path=str(folder), include_defaults=False)
        if all(own.match_tasks([name]) for name in names):
            return own
    return TaskManager(include_path=None if folder is None else str(folder))


def _said(names: Sequence[str]) -> str:
    return f"the task{'s' * (len(names) > 1)} {', '.join(map(quoted, names))}"


def _reason(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _not_here(names: Sequence[str], error: Exception) -> NetworkError:
    if is_hub_offline():
        return NetworkError(
            f"the data of {_said(names)} is not on this machine, and this run is offline; run it"
            " once without --offline and HF_HUB_OFFLINE"
        )
    return NetworkError(f"the data of {_said(names)} cannot be fetched: {error}; try again")


def run(
    model: LoadedModel,
    tasks: Tasks,
    *,
    rows: int,
    limit: int | None,
    is_chat: bool,
    cache_key: str | None,
    bar: Bar,
) -> Outcome:
    """Ask all of it. limit: questions of each task. cache_key: of answers that are kept, and taken
    where they are known: it stands for the model and how it is held and asked. bar: as of EngineLM.

    Raises what the model raises, and UsageError for tasks that fail.
    """
    import numpy as np
    from lm_eval.api.model import CachingLM  # type: ignore[import-not-found]
    from lm_eval.evaluator import evaluate  # type: ignore[import-not-found]

    from mmchat.evals.engine_lm import EngineLM

    random.seed(0)
    np.random.seed(SEED)
    lm = EngineLM(model, rows, is_chat=is_chat, bar=bar)
    asked: Any = (
        lm if cache_key is None else CachingLM(lm, str(_cache_folder() / f"{cache_key}.db"))
    )
    try:
        found: Any = evaluate(
            asked,
            tasks.loaded,
            limit=limit,
            apply_chat_template=is_chat,
            fewshot_as_multiturn=is_chat,
        )
    except MmchatError:
        raise
    except Exception as error:  # of files that others wrote, and the Python in them
        raise UsageError(f"{_said(tasks.names)} failed: {_reason(error)}") from error
    samples = {name: plain(rows) for name, rows in found["samples"].items()}
    record = {name: plain(found[name]) for name in RECORDED if name in found}
    return Outcome(record, samples, lm.notices)


def _cache_folder() -> Path:
    """lm_eval unpickles what it keeps, so nobody else may write there."""
    folder = platformdirs.user_cache_path("mmchat", appauthor=False) / "eval"
    with disk_errors(f"cannot make the folder {quoted(folder)}"):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.chmod(0o700)
    return folder


def plain(value: Any) -> Any:
    """A value of lm_eval's results as JSON has it: numbers that are none become null."""
    from lm_eval.utils import handle_non_serializable  # type: ignore[import-not-found]

    text = json.dumps(value, default=handle_non_serializable)
    return json.loads(text, parse_constant=lambda _: None)


def metrics(record: dict[str, Any]) -> list[tuple[str, str, float, float | None]]:
    """(task, metric, value, its standard error if there is one), in lm_eval's order."""
    lines = []
    for task, found in {**record["results"], **record.get("groups", {})}.items():
        for key, value in found.items():
            metric, comma, kind = key.partition(",")
            if not comma or metric.endswith("_stderr") or not _is_number(value):
                continue
            error = found.get(f"{metric}_stderr,{kind}")
            name = metric if kind == "none" else f"{metric} ({kind})"
            lines.append((task, name, float(value), error if _is_number(error) else None))
    return lines


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
