"""The one line that says what to run here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mmchat.catalog.known import find_spec
from mmchat.checkpoints.ollama_folder import ollama_models
from mmchat.doctor.machine import Machine
from mmchat.doctor.outlook import Outlook
from mmchat.hub.holdings import holding
from mmchat.words import pace, size

# Slower than this, an answer is waited for; a smaller model or scheme is better company.
PLEASANT = 5.0  # tokens a second
NEARLY = 0.9


@dataclass(frozen=True)
class Verdict:
    """model, scheme: what is recommended, None if only the built-in model runs.

    text: a sentence; commands: what to run next, in this order.
    """

    model: str | None
    scheme: str | None
    tokens_per_second: float | None
    text: str
    commands: tuple[str, ...]


def recommend(machine: Machine, outlooks: Sequence[Outlook]) -> Verdict:
    """The largest chat model that writes pleasantly, unquantised if it does so then.

    If none does, the smallest. They are all of the first family of which one fits: sizes of
    different families do not say which is better. Where weights have to be rounded, the scheme is
    the most exact of those that are nearly the fastest: int8 is hardly more exact than int4
    (docs/quantization.md), and larger. Only models from the Hub count.
    """
    chat = [outlook for outlook in outlooks if outlook.spec.repo and outlook.is_chat]
    fitting = _of_one_family([outlook for outlook in chat if outlook.fits is not False])
    if not fitting:
        return _too_little(machine, _of_one_family(chat))
    pleasant = [o.spec.parameters for o in fitting if _speed(o) >= PLEASANT]
    parameters = max(pleasant) if pleasant else min(o.spec.parameters for o in fitting)
    schemes = [o for o in fitting if o.spec.parameters == parameters]  # the most exact first
    nearly = NEARLY * max(map(_speed, schemes))
    best = next(
        o for o in schemes if _speed(o) >= (min(nearly, PLEASANT) if o.scheme == "none" else nearly)
    )
    return _recommended(best)


def _of_one_family(outlooks: Sequence[Outlook]) -> list[Outlook]:
    """Those of the first one's."""
    return [o for o in outlooks if o.spec.model_type == outlooks[0].spec.model_type]


def _speed(outlook: Outlook) -> float:
    """Tokens a second with a picture; 0 where nothing was measured."""
    return outlook.speeds[1] if outlook.speeds else 0.0


def _recommended(best: Outlook) -> Verdict:
    flag = "" if best.scheme == "none" else f" --quantize {best.scheme}"
    scheme = "unquantised" if best.scheme == "none" else f"in {best.scheme}"
    speed = _speed(best) or None
    about = (
        f": about {pace(speed)} tokens/s with a picture"
        if speed
        else "; its speed was not measured"
    )
    commands = [f"mmchat chat {best.short}{flag}"]
    if holding(best.spec.repo or "").state not in ("present", "unrecorded"):
        theirs = (model for model in ollama_models() if find_spec(model.name) is best.spec)
        if found := next(theirs, None):
            commands = [f"mmchat chat {found.name.removesuffix(':latest')}"]
        else:
            commands.insert(0, f"mmchat download {best.short}")
    text = f"This machine runs {best.short} {scheme}{about}."
    return Verdict(best.spec.name, best.scheme, speed, text, tuple(commands))


def _too_little(machine: Machine, chat: Sequence[Outlook]) -> Verdict:
    least = min(chat, key=lambda o: o.need.total)
    text = (
        f"This machine has too little free memory for {least.short}: even {least.scheme} needs"
        f" {size(least.need.total)} and {size(machine.device.available or 0)} are free."
        " The built-in model runs."
    )
    return Verdict(None, None, None, text, ("mmchat chat",))
