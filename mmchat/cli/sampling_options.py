"""How tokens are chosen and where the answer ends: the options that generate and chat share."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmchat import limits
from mmchat.engine import grammar, schema
from mmchat.engine.drafts import LONGEST_DRAFT
from mmchat.input_text import checked

if TYPE_CHECKING:
    from mmchat.catalog.spec import ModelSpec
    from mmchat.engine.sampling import SamplingParams


def _not_empty(values: list[str] | None) -> list[str]:
    if values and "" in values:
        raise typer.BadParameter("an empty string would stop at once")
    return [checked(value, "--stop") for value in values or []]


def _speculate(value: str) -> str:
    if value in ("auto", "off") or (value.isdecimal() and int(value) <= LONGEST_DRAFT):
        return value
    raise typer.BadParameter(f"{value!r} is not auto, off or a number from 0 to {LONGEST_DRAFT}")


def _schema(value: str | None) -> str | None:
    """Refused before a model is loaded, if it is."""
    if value is None:
        return None
    grammar.check(schema.read(value))
    return value


def _option(*names: str, **settings: Any) -> Any:
    """With the range of the setting of that name; Typer refuses NaN as too large."""
    low, high = limits.SAMPLING.get(names[-1][2:].replace("-", "_"), (None, math.inf))
    most = None if math.isinf(high) else high
    return typer.Option(*names, min=low, max=most, rich_help_panel="Sampling", **settings)


@dataclass(frozen=True)
class SamplingOptions:
    """What was asked for; None leaves it to the model."""

    max_new_tokens: Annotated[
        int | None,
        _option("-n", "--max-new-tokens", help="Longest answer, tokens.", show_default="1024"),
    ] = None
    temperature: Annotated[
        float | None,
        _option(
            "-t", "--temperature", help="0 takes the likeliest token; the model's own if left out."
        ),
    ] = None
    top_k: Annotated[int | None, _option("--top-k", help="Only the N likeliest; 0 is all.")] = None
    top_p: Annotated[
        float | None, _option("--top-p", help="Only the likeliest that hold this probability.")
    ] = None
    min_p: Annotated[
        float | None,
        _option("--min-p", help="Only those with this share of the likeliest one's probability."),
    ] = None
    repetition_penalty: Annotated[
        float | None,
        _option("--repetition-penalty", help="Above 1 discourages tokens seen before."),
    ] = None
    frequency_penalty: Annotated[
        float | None, _option("--frequency-penalty", help="Per earlier occurrence in the answer.")
    ] = None
    presence_penalty: Annotated[
        float | None, _option("--presence-penalty", help="Once for tokens already in the answer.")
    ] = None
    seed: Annotated[int | None, _option("--seed", help="Same seed, same answer; 0 counts.")] = None
    stop: Annotated[
        list[str] | None,
        _option(
            "--stop", metavar="TEXT", callback=_not_empty, help="Stop before this text; repeatable."
        ),
    ] = None
    speculate: Annotated[
        str,
        _option(
            "--speculate",
            metavar="auto|off|N",
            callback=_speculate,
            help=f"Guess the next N tokens (at most {LONGEST_DRAFT}) from the text so far, to be"
            " faster where it repeats.",
        ),
    ] = "auto"
    schema: Annotated[
        str | None,
        _option(
            "--schema",
            metavar="FILE|JSON",
            callback=_schema,
            help="Answer in JSON that obeys this JSON schema (needs mmchat[server]).",
        ),
    ] = None

    def chosen(self) -> dict[str, Any]:
        """Those that were given, by the names of SamplingParams."""
        given = {name: value for name, value in asdict(self).items() if value not in (None, [])}
        if "stop" in given:
            given["stop"] = tuple(given["stop"])
        if self.schema is not None:
            given["schema"] = schema.read(self.schema)
        if self.speculate.isdecimal():
            given["speculate"] = int(self.speculate)
        return given

    def for_model(self, spec: ModelSpec, **more: Any) -> SamplingParams:
        """What was asked for and `more`; the rest as the makers of the model recommend."""
        from mmchat.engine.sampling import SamplingParams

        return SamplingParams(**{**asdict(spec.generation), **self.chosen(), **more})
