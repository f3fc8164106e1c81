"""The one line that says what to run here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
    """The largest chat model that writes pleasantly, in its most exact scheme that does.

    If none does, the smallest, in the most exact scheme of those that are nearly its fastest. Only
    models from the Hub count.
    """
    chat = [outlook for outlook in outlooks if outlook.spec.repo and outlook.is_chat]
    fitting = [outlook for outlook in chat if outlook.fits is not False]
    if not fitting:
        return _too_little(machine, chat)
    pleasant = [o for o in fitting if o.speeds and o.speeds[1] >= PLEASANT]
    if pleasant:
        best = max(pleasant, key=lambda o: o.spec.parameters)  # the first is the most exact
    else:
        least = min(o.spec.parameters for o in fitting)
        smallest = [o for o in fitting if o.spec.parameters == least]
        fastest = max(o.speeds[1] if o.speeds else 0.0 for o in smallest)
        best = next(o for o in smallest if not o.speeds or o.speeds[1] >= NEARLY * fastest)
    return _recommended(best)


def _recommended(best: Outlook) -> Verdict:
    flag = "" if best.scheme == "none" else f" --quantize {best.scheme}"
    scheme = "unquantised" if best.scheme == "none" else f"in {best.scheme}"
    speed = best.speeds[1] if best.speeds else None
    about = f": about {pace(speed)} tokens/s with a picture" if speed else ""
    commands = [f"mmchat chat {best.short}{flag}"]
    if holding(best.spec.repo or "").state in ("absent", "incomplete"):
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
