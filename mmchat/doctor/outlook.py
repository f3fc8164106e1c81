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
from mmchat.parallel.slices import shared_counts

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
        speeds = dict(zip(("text", "picture"), self.speeds or (None, None), strict=True))
        return {"memory": self.need.as_dict(), "fits": self.fits, "tokens_per_second": speeds}


def outlooks(machine: Machine, ranks: int = 1) -> Iterator[Outlook]:
    """Every known model in every scheme that is offered; of each family the smallest first.

    ranks: how many processes share it, on as many devices or on the processor; a model that so many
    cannot share is left out, and speeds are not known.
    """
    order = list(FAMILIES)
    specs = sorted(
        known_specs(), key=lambda one: (order.index(one.model_type), one.parameters, one.name)
    )
    for spec in specs:
        if any(count % ranks for count in shared_counts(spec.family.cuts(spec.config)).values()):
            continue
        for scheme in OFFERED_SCHEMES if spec.parameters > _SMALL else OFFERED_SCHEMES[:1]:
            yield _outlook(machine, spec, scheme, ranks)


def _free(machine: Machine, ranks: int) -> int | None:
    """What each rank may take: of a card, or of the processor's memory; 0 if there are too few."""
    kind = machine.device.name.partition(":")[0]
    cards = [one for one in machine.devices if one.name.partition(":")[0] == kind]
    if ranks == 1 or kind == "cpu":
        free = machine.device.available
        return None if free is None else free // ranks
    free = [one.available or 0 for one in cards[:ranks]]
    return min(free) if len(free) == ranks else 0


def _outlook(machine: Machine, spec: ModelSpec, scheme: str, ranks: int) -> Outlook:
    released = spec.family.released_dtype
    placement = choose_placement(machine.device.name, "auto", spec.parameters, released)
    in_place = placement.dtype.itemsize == 2  # as the released weights are
    setup = Setup.of(spec, placement, quantize=scheme, from_file=in_place, ranks=ranks)
    need, free, reading = setup.need(), _free(machine, ranks), machine.reading
    speeds = None
    if ranks == 1 and reading and spec.parameters > _SMALL:
        text, picture = (tokens_per_second(setup, reading, pictures=p) for p in (False, True))
        speeds = (text, picture)
    return Outlook(spec, scheme, need, None if free is None else need.total <= free, speeds)
