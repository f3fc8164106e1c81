"""What this machine can do with the known models, and what stands in the way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from mmchat.doctor.machine import Machine, examine
from mmchat.doctor.outlook import Outlook, outlooks
from mmchat.doctor.problems import Problem, find_problems
from mmchat.doctor.verdict import Verdict, recommend


@dataclass(frozen=True)
class Diagnosis:
    """Everything that `mmchat doctor` knows. shared: by several ranks, what each of them needs."""

    verdict: Verdict
    machine: Machine
    outlooks: tuple[Outlook, ...]
    problems: tuple[Problem, ...]
    shared: tuple[Outlook, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """For JSON: sizes in bytes, speeds a second."""

        def by_model(outlooks: tuple[Outlook, ...]) -> dict[str, Any]:
            models: dict[str, Any] = {}
            for outlook in outlooks:
                models.setdefault(outlook.spec.name, {})[outlook.scheme] = outlook.as_dict()
            return models

        return {
            "verdict": asdict(self.verdict),
            "problems": [asdict(problem) for problem in self.problems],
            **asdict(self.machine),
            "models": by_model(self.outlooks),
            **({"each_rank": by_model(self.shared)} if self.shared else {}),
        }


def diagnose(progress: Callable[[str], None] = lambda _: None, ranks: int = 1) -> Diagnosis:
    """Look and measure; takes some seconds. progress(stage) is told what is being done.

    ranks: how many processes are to share a model.
    """
    machine = examine(progress)
    progress("comparing the models with the machine")
    found = tuple(outlooks(machine))
    shared = tuple(outlooks(machine, ranks)) if ranks > 1 else ()
    verdict, problems = recommend(machine, found), tuple(find_problems(machine))
    return Diagnosis(verdict, machine, found, problems, shared)
