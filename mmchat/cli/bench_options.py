"""The options of `mmchat bench`: what is measured, and how."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal

import typer

from mmchat.cli.sampling_options import number
from mmchat.quant.schemes import find_scheme

WHAT = "What to measure"
HOW = "How to measure"
ALL_PARTS = "decode,prefill,picture,turns,bandwidth,memory,startup"


def _numbers(low: int) -> Callable[[str], str]:
    """A callback that checks a list such as 64,1024; it may be empty."""

    def check(value: str) -> str:
        if any(
            not word.isascii() or not word.isdigit() or int(word) < low for word in words(value)
        ):
            raise typer.BadParameter(f"{value!r} is not a list of numbers from {low}, such as 1,4")
        return value

    return check


def _known_parts(value: str) -> str:
    for word in words(value):
        if word not in ALL_PARTS.split(","):
            raise typer.BadParameter(f"{word!r} is none of {ALL_PARTS}")
    return value


def _schemes(value: str) -> str:
    for word in words(value):
        find_scheme(word)
    return value


def _on_or_off(value: str) -> str:
    for word in words(value):
        if word not in ("off", "on"):
            raise typer.BadParameter(f"{word!r} is neither off nor on; off,on compares them")
    return value


def words(value: str) -> list[str]:
    return [word.strip() for word in value.split(",") if word.strip()]


@dataclass(frozen=True)
class What:
    """The model of random weights if any, who is compared, and in which workloads."""

    shapes: Annotated[
        str | None,
        typer.Option(
            metavar="11B|90B",
            help="Random weights of these widths in place of MODEL.",
            rich_help_panel=WHAT,
        ),
    ] = None
    layers: Annotated[
        int | None,
        typer.Option(metavar="N", help="With --shapes: text layers.", rich_help_panel=WHAT),
    ] = None
    vision_layers: Annotated[
        int | None,
        typer.Option(metavar="N", help="With --shapes: vision layers.", rich_help_panel=WHAT),
    ] = None
    vs: Annotated[
        Literal["transformers"] | None,
        typer.Option(
            "--vs", help="With --shapes: the same weights in transformers.", rich_help_panel=WHAT
        ),
    ] = None
    quantize: Annotated[
        str,
        typer.Option(
            metavar="LIST",
            callback=_schemes,
            help="Schemes to compare, such as none,int8,int4.",
            rich_help_panel=WHAT,
        ),
    ] = "none"
    compile: Annotated[
        str,
        typer.Option(
            metavar="LIST",
            callback=_on_or_off,
            help="Ways to run each scheme: off, on or off,on.",
            rich_help_panel=WHAT,
        ),
    ] = "off"
    measure: Annotated[
        str,
        typer.Option(
            metavar="LIST",
            callback=_known_parts,
            help=f"Any of {ALL_PARTS}.",
            rich_help_panel=WHAT,
        ),
    ] = "decode,prefill,picture,turns,bandwidth"
    context: Annotated[
        str,
        typer.Option(
            metavar="LIST",
            callback=_numbers(1),
            help="Decode after so many tokens.",
            rich_help_panel=WHAT,
        ),
    ] = "64,1024,4096"
    prompt_tokens: Annotated[
        str,
        typer.Option(
            metavar="LIST",
            callback=_numbers(1),
            help="Read prompts of so many tokens.",
            rich_help_panel=WHAT,
        ),
    ] = "64,512"
    vision: Annotated[
        str,
        typer.Option(
            metavar="LIST",
            callback=_numbers(1),
            help="Pictures of so many tiles; '' for none.",
            rich_help_panel=WHAT,
        ),
    ] = "1,4"


@dataclass(frozen=True)
class How:
    """How often, for how long, on how many threads."""

    rounds: Annotated[
        int, typer.Option(metavar="N", min=1, help="Rounds, interleaved.", rich_help_panel=HOW)
    ] = 5
    seconds: Annotated[
        float,
        typer.Option(
            metavar="S",
            callback=number(0, 1e6),
            help="Begin no round beyond this; one is always run.",
            rich_help_panel=HOW,
        ),
    ] = 60.0
    threads: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Processor threads; with 1, processor time is compared, not the wall clock's.",
            rich_help_panel=HOW,
        ),
    ] = None
    seed: Annotated[
        int, typer.Option(metavar="N", min=0, help="Of the random weights.", rich_help_panel=HOW)
    ] = 0
