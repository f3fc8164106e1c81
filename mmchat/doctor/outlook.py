"""What each known model would need on this machine in each scheme, and how fast it would write."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from mmchat.catalog.known import known_specs
from mmchat.catalog.spec import ModelSpec
from mmchat.doctor.machine import Machine
from mmchat.estimate.memory import OFFERED_SCHEMES, MemoryNeed, Setup
from mmchat.estimate.speed import tokens_per_second
from mmchat.hardware.placement import choose_placement
from mmchat.models.registry import FAMILIES

# Below this many parameters nobody quantises, and reading the weights is not what takes time.
_SMALL = 10**9


@dataclass(frozen=True)
class Outlook:
    """One model in one scheme on the first device.

    fits: None where the free memory is unknown. speeds: expected tokens a second, text only and
    after a picture of the largest size; None for a small model, or if nothing was measured.
    """

    spec: ModelSpec
    scheme: str
    need: MemoryNeed
    fits: bool | None
    speeds: tuple[float, float] | None

    @property
    def short(self) -> str:
        """The name that is typed."""
        is_known = self.spec.repo and self.spec.aliases
        return self.spec.aliases[0] if is_known else self.spec.name

    @property
    def is_chat(self) -> bool:
        """True for a model to talk with; guard models say only what is safe."""
        return self.spec.chat_format == "instruct" and "guard" not in self.spec.name.lower()

    def as_dict(self) -> dict[str, Any]:
        text, picture = self.speeds or (None, None)
        speeds = {"text": text, "picture": picture}
        return {"memory": self.need.as_dict(), "fits": self.fits, "tokens_per_second": speeds}


def outlooks(machine: Machine) -> Iterator[Outlook]:
    """Every known model in every scheme that is offered; of each family the smallest first."""
    order = list(FAMILIES)

    def place(spec: ModelSpec) -> tuple[int, int, str]:
        return order.index(spec.model_type), spec.parameters, spec.name

    for spec in sorted(known_specs(), key=place):
        for scheme in OFFERED_SCHEMES if spec.parameters > _SMALL else OFFERED_SCHEMES[:1]:
            yield _outlook(machine, spec, scheme)


def _outlook(machine: Machine, spec: ModelSpec, scheme: str) -> Outlook:
    released = spec.family.released_dtype
    placement = choose_placement(machine.device.name, "auto", spec.parameters, released)
    # the released weights are 16-bit
    setup = Setup.of(spec, placement, quantize=scheme, from_file=placement.dtype.itemsize == 2)
    need, free, reading = setup.need(), machine.device.available, machine.reading
    speeds = None
    if reading and spec.parameters > _SMALL:
        text, picture = (tokens_per_second(setup, reading, pictures=p) for p in (False, True))
        speeds = (text, picture)
    return Outlook(spec, scheme, need, None if free is None else need.total <= free, speeds)
