"""How tokens are chosen and where the answer ends: the options that generate and chat share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmchat import limits
from mmchat.cli.wrong_values import numbers
from mmchat.engine.drafts import LONGEST_DRAFT
from mmchat.input_text import checked

if TYPE_CHECKING:
    from mmchat.catalog.find import ModelParams
    from mmchat.engine.sampling import SamplingParams

SAMPLING = "Sampling"


def number(low: float, high: float) -> Callable[[float | None], float | None]:
    """A callback that admits numbers from `low` to `high`."""
    allowed = numbers("a number", low, high)

    def check(value: float | None) -> float | None:
        if value is None:
            return None
        if not low <= value <= high:  # NaN neither
            raise typer.BadParameter(f"{value:g} is not {allowed}")
        return value

    check.allowed = allowed  # type: ignore[attr-defined] # for values that are no numbers
    return check


def _seed(value: int | None) -> int | None:
    low, high = limits.SAMPLING["seed"]
    if value is not None and not low <= value <= high:
        raise typer.BadParameter(f"{value} is not {_SEEDS}")
    return value


_SEEDS = _seed.allowed = "a whole number from 0 to 2**63 - 1"  # type: ignore[attr-defined]


def _not_empty(values: list[str] | None) -> list[str]:
    if values and "" in values:
        raise typer.BadParameter("an empty string would stop at once")
    return [checked(value, "--stop") for value in values or []]


def _speculate(value: str) -> str:
    if value in ("auto", "off") or (value.isdecimal() and int(value) <= LONGEST_DRAFT):
        return value
    raise typer.BadParameter(f"{value!r} is not auto, off or a number from 0 to {LONGEST_DRAFT}")


def _within(name: str) -> Callable[[float | None], float | None]:
    return number(*limits.SAMPLING[name])


def _least(name: str) -> int:
    return int(limits.SAMPLING[name][0])


def _option(*names: str, metavar: str = "X", **settings: Any) -> Any:
    return typer.Option(*names, metavar=metavar, rich_help_panel=SAMPLING, **settings)


MaxNewTokens = Annotated[
    int | None,
    _option(
        "-n",
        "--max-new-tokens",
        metavar="N",
        min=_least("max_new_tokens"),
        help="Longest answer, tokens.",
        show_default="1024",
    ),
]
Temperature = Annotated[
    float | None,
    _option(
        "-t",
        "--temperature",
        callback=_within("temperature"),
        help="0 takes the likeliest token; the model's own if left out.",
    ),
]
TopK = Annotated[
    int | None,
    _option("--top-k", metavar="N", min=_least("top_k"), help="Only the N likeliest; 0 is all."),
]
TopP = Annotated[
    float | None,
    _option(
        "--top-p",
        callback=_within("top_p"),
        help="Only the likeliest that hold this probability.",
    ),
]
MinP = Annotated[
    float | None,
    _option(
        "--min-p",
        callback=_within("min_p"),
        help="Only those with this share of the likeliest one's probability.",
    ),
]
RepetitionPenalty = Annotated[
    float | None,
    _option(
        "--repetition-penalty",
        callback=_within("repetition_penalty"),
        help="Above 1 discourages tokens seen before.",
    ),
]
FrequencyPenalty = Annotated[
    float | None,
    _option(
        "--frequency-penalty",
        callback=_within("frequency_penalty"),
        help="Per earlier occurrence in the answer.",
    ),
]
PresencePenalty = Annotated[
    float | None,
    _option(
        "--presence-penalty",
        callback=_within("presence_penalty"),
        help="Once for tokens already in the answer.",
    ),
]
Seed = Annotated[
    int | None,
    _option("--seed", metavar="N", callback=_seed, help="Same seed, same answer; 0 counts."),
]
Stop = Annotated[
    list[str] | None,
    _option(
        "--stop", metavar="TEXT", callback=_not_empty, help="Stop before this text; repeatable."
    ),
]
Speculate = Annotated[
    str,
    _option(
        "--speculate",
        metavar="auto|off|N",
        callback=_speculate,
        help=f"Guess the next N tokens (at most {LONGEST_DRAFT}) from the text so far, to be faster"
        " where it repeats.",
    ),
]


@dataclass(frozen=True)
class SamplingOptions:
    """What was asked for; None leaves it to the model."""

    max_new_tokens: MaxNewTokens = None
    temperature: Temperature = None
    top_k: TopK = None
    top_p: TopP = None
    min_p: MinP = None
    repetition_penalty: RepetitionPenalty = None
    frequency_penalty: FrequencyPenalty = None
    presence_penalty: PresencePenalty = None
    seed: Seed = None
    stop: Stop = None
    speculate: Speculate = "auto"

    def chosen(self) -> dict[str, Any]:
        """Those that were given, by the names of SamplingParams."""
        given = {name: value for name, value in asdict(self).items() if value not in (None, [])}
        if "stop" in given:
            given["stop"] = tuple(given["stop"])
        if self.speculate.isdecimal():
            given["speculate"] = int(self.speculate)
        return given

    def for_model(self, params: ModelParams, **more: Any) -> SamplingParams:
        """What was asked for and `more`; the rest as the makers of the model recommend."""
        from mmchat.engine.sampling import SamplingParams

        return SamplingParams(**{**asdict(params.generation), **self.chosen(), **more})
