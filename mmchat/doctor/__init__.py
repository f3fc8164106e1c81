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
    """Everything that `mmchat doctor` knows."""

    verdict: Verdict
    machine: Machine
    outlooks: tuple[Outlook, ...]
    problems: tuple[Problem, ...]

    def as_dict(self) -> dict[str, Any]:
        """For JSON: sizes in bytes, speeds a second."""
        models: dict[str, Any] = {}
        for outlook in self.outlooks:
            schemes = models.setdefault(outlook.spec.name, {})
            schemes[outlook.scheme] = outlook.as_dict()
        return {
            "verdict": asdict(self.verdict),
            "problems": [asdict(problem) for problem in self.problems],
            **asdict(self.machine),
            "models": models,
        }


def diagnose(progress: Callable[[str], None] = lambda _: None) -> Diagnosis:
    """Look and measure; takes some seconds. progress(stage) is told what is being done."""
    machine = examine(progress)
    progress("comparing the models with the machine")
    found = tuple(outlooks(machine))
    return Diagnosis(recommend(machine, found), machine, found, tuple(find_problems(machine)))
