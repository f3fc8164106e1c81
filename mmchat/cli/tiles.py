"""`mmchat tiles`: what a model makes of a picture, as facts and as a picture."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from mmchat.cli import answer, console, model_choice, options, prompt_input
from mmchat.cli.option_groups import Only
from mmchat.errors import ImageError, quoted
from mmchat.loading.options import LoadOptions
from mmchat.storage import atomic_file
from mmchat.words import pixels


def tiles(
    image: Annotated[str, typer.Argument(metavar="IMAGE", help="PATH, URL, or - for stdin.")],
    output: Annotated[Path | None, options.to_file("FILE.png", "Write a preview as PNG.")] = None,
    *,
    given: Annotated[LoadOptions, Only("name", "alpha")],
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Show how a picture is cut into tiles: its canvas, grid, size on it and token count."""
    prompt_input.check_output(output, "--output", [image], [".png"])
    prompt_input.expect_pictures()
    source = replace(given, adapter="none").find(checkpoint_required=False)
    piped = prompt_input.read_image_bytes() if image == "-" else None
    shown = prompt_input.PromptInput("", (image,), piped)
    picture, *others = prompt_input.load_pictures(shown, model_choice.alpha_rule(given, source))
    if others:
        document = "a document on stdin" if image == "-" else quoted(image)
        raise ImageError(
            f"{document} is {len(others) + 1} pictures, and tiles shows one; name a page, as in"
            " 'paper.pdf#1'"
        )
    spec = source.spec
    family, config = spec.family, spec.config
    facts = spec.facts(picture)
    if output is not None:
        from mmchat.images.png import png_bytes

        atomic_file.write_bytes(output, png_bytes(family.draw(config, picture)))
    if as_json:
        console.print_json({"model": spec.name, **answer.image_facts(picture.source, facts)})
    else:
        console.print_facts(  # sizes are width x height
            [
                ("picture", f"{picture.source}, {pixels(facts.size)}"),
                ("model", f"{spec.name}, {family.describe(config).pictures}"),
                *facts.lines,
                ("tokens", f"{facts.tokens:,} to attend to"),
            ]
        )
