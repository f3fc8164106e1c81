"""`mmchat tiles`: how a picture is laid on its canvas of tiles, as facts and as a picture."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmchat.cli import answer, console, options
from mmchat.cli.model_choice import BUILT_IN, alpha_rule, family_module
from mmchat.cli.option_groups import Only, with_option_groups
from mmchat.cli.prompt_input import (
    PromptInput,
    expect_pictures,
    load_pictures,
    read_image_bytes,
)
from mmchat.cli.wrong_names import model_name
from mmchat.errors import UsageError
from mmchat.loading.options import LoadOptions
from mmchat.storage import atomic_file
from mmchat.words import grid, pixels

if TYPE_CHECKING:
    from mmchat.catalog.find import ModelParams
    from mmchat.conversation import Image
    from mmchat.models.mllama.tiling import TileLayout

Preview = Annotated[
    Path | None,
    typer.Option(
        "-o",
        "--output",
        metavar="FILE.png",
        help="Write a preview as PNG.",
        rich_help_panel=options.OUTPUT,
    ),
]


@with_option_groups
def tiles(
    image: Annotated[str, typer.Argument(metavar="IMAGE", help="PATH, URL, or - for stdin.")],
    output: Preview = None,
    model: Annotated[
        str,
        typer.Option(
            "--model",
            callback=model_name,
            metavar="MODEL",
            help="Whose tile size to use.",
            rich_help_panel=options.MODEL,
        ),
    ] = BUILT_IN,
    *,
    given: Annotated[LoadOptions, Only("alpha")],
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    color: options.Color = "auto",
    debug: options.Debug = False,
) -> None:
    """Show how a picture is cut into tiles: its canvas, grid, size on it and token count."""
    if output is not None:
        if output.suffix.lower() != ".png":
            raise UsageError(
                f"--output {str(output)!r}: the preview is a PNG; end the name in .png"
            )
        atomic_file.check_writable(output)
    expect_pictures()
    source = replace(given, name=model).find(checkpoint_required=False)
    data = read_image_bytes() if image == "-" else None
    [picture] = load_pictures(PromptInput("", (image,), data), alpha_rule(given, source))
    facts = {"model": source.params.name, **picture_facts(picture, source.params)}
    if output is not None:
        atomic_file.write_bytes(output, _preview_png(picture, source.params))
    if not quiet:
        for notice in picture.notices:
            console.note(f"{picture.source}: {notice}")
    if as_json:
        console.print_json(facts)
    else:
        console.print_facts(fact_lines(facts))


def picture_facts(picture: Image, params: ModelParams) -> dict[str, Any]:
    """Sizes (height, width), grid (rows, columns) and tokens of a picture for one model."""
    vision = params.config.vision_config
    facts = family_module(params, "tiling").facts(vision, picture.height, picture.width)
    return answer.image_facts(picture.source, facts)


def _layout(picture: Image, params: ModelParams) -> TileLayout:
    vision = params.config.vision_config
    return family_module(params, "tiling").choose_layout(
        picture.height, picture.width, vision.image_size, vision.max_num_tiles
    )


def _preview_png(picture: Image, params: ModelParams) -> bytes:
    from mmchat.images.png import png_bytes

    preview = family_module(params, "tile_preview")
    layout = _layout(picture, params)
    facts = preview.tile_facts(layout, params.config.vision_config)
    return png_bytes(preview.draw_tile_preview(picture, layout, facts))


def fact_lines(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """(label, value) lines of a picture's facts; sizes are width x height."""
    padding = 1 - math.prod(facts["resized"]) / math.prod(facts["canvas"])
    return [
        ("picture", f"{facts['source']}, {pixels(facts['size'])}"),
        ("model", f"{facts['model']}, tiles of {facts['tile_size']} px"),
        ("canvas", f"{pixels(facts['canvas'])}, {grid(facts['tile_grid'])}"),
        ("on the canvas", f"{pixels(facts['resized'])} at the top left, {padding:.0%} padding"),
        ("tokens", f"{facts['tokens']:,} to attend to"),
    ]
