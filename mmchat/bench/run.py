"""Load the ways of running a model, time them in rounds, and report as one object."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from mmchat.bench.rounds import environment, interleave, rounded, spread, summary
from mmchat.bench.workloads import Workload
from mmchat.hardware.allocation import memory_errors

if TYPE_CHECKING:
    import torch

    from mmchat.loading.loader import LoadedModel

SCHEMA = 2
_COMPILED = {"auto": "", "off": " eager", "on": " compiled"}


@dataclass(frozen=True)
class Variant:
    """One way of running the model. quantize, compile: as the loader takes them.

    exported: from the folder that `mmchat export` wrote, not from the model that it was made of.
    """

    quantize: str = "none"
    compile: Literal["auto", "off", "on"] = "auto"
    exported: bool = False

    def label(self, dtype: torch.dtype) -> str:
        """`int8 compiled`; the dtype stands for weights that are not quantised."""
        plain = str(dtype).removeprefix("torch.")
        weights = plain if self.quantize == "none" else self.quantize
        return weights + _COMPILED[self.compile] + " exported" * self.exported


def run(
    loaders: Mapping[Variant, Callable[[], LoadedModel]],
    workloads: Sequence[Workload],
    say: Callable[[str], None],
    *,
    rounds: int,
    seconds: float,
) -> dict[str, Any]:
    """Time the variants, which `loaders` give, side by side by the wall clock.

    rounds: of each workload, as many as end within `seconds`, at least one. A workload that a
    variant does not take is left out. say: told what is being done.
    Raises MemoryError_, NumericalError and what `loaders` raise.
    """
    models: dict[str, LoadedModel] = {}
    for variant, load in loaders.items():
        loaded = load()
        ran = replace(variant, quantize=loaded.options.quantize)  # what auto became
        models[ran.label(loaded.dtype)] = loaded
    first = next(iter(models.values()))
    fitting = [w for w in workloads if all(w.fits(model) for model in models.values())]
    measured = []
    for workload in fitting:
        say(f"timing {workload.title}")
        runs = {name: partial(workload.time, loaded) for name, loaded in models.items()}
        with memory_errors():
            for warm_up in runs.values():
                warm_up(rounds)  # no round has this number; compiles, too
            measured += _rows(workload, interleave(runs, rounds=rounds, seconds=seconds))
    return {
        "schema": SCHEMA,
        "environment": {**environment(first.device, first.dtype), "kv": first.options.kv},
        "model": {"name": first.spec.name, "parameters": first.spec.parameters},
        "load_seconds": {name: rounded(model.load_seconds) for name, model in models.items()},
        "measured": measured,
        "left_out": [workload.title for workload in workloads if workload not in fitting],
        "peak_memory_bytes": first.peak_memory(),
    }


def _rows(
    workload: Workload, rounds: list[dict[str, dict[str, float]]]
) -> Iterator[dict[str, Any]]:
    """One record for each stage of the workload.

    times_as_fast: the ratio to the first variant in the same round. tokens_per_second: None for a
    stage that does not go from token to token.
    """
    names = list(rounds[0])
    first = names[0]
    for stage in rounds[0][first]:
        count = {"read": workload.tokens, "token": 1}.get(stage)
        variants = {}
        for name in names:
            seconds = [each[name][stage] for each in rounds]
            ratios = [each[first][stage] / each[name][stage] for each in rounds]
            variants[name] = {
                "milliseconds": spread([1000 * value for value in seconds]),
                "tokens_per_second": speeds(count, seconds) if count else None,
                "times_as_fast": None if name == first else spread(ratios),
            }
        yield {
            "prompt": workload.title,
            "stage": stage,
            "rounds": len(rounds),
            "variants": variants,
        }


def speeds(tokens: int, seconds: Sequence[float]) -> dict[str, float]:
    """Median, least and greatest tokens a second, each of the time that is shown beside it."""
    found = summary(seconds)
    taken = {"median": found.median, "low": found.high, "high": found.low}
    return {name: rounded(tokens / value) for name, value in taken.items()}
