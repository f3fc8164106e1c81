"""`mmchat tiles`: how a picture is laid on its canvas of tiles, as facts and as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmchat import atomic_file
from mmchat.cli import answer, console, options
from mmchat.cli.model_choice import BUILT_IN, ModelChoice, alpha_rule, check_name, family_module
from mmchat.cli.prompt_input import PromptInput, load_images, read_image_bytes
from mmchat.cli.units import grid, pixels

if TYPE_CHECKING:
    from mmchat.messages import Image
    from mmchat.params import ModelParams

Preview = Annotated[
    Path | None,
    typer.Option("-o", "--output", metavar="FILE.png", help="Write a preview as PNG."),
]


def tiles(
    image: Annotated[str, typer.Argument(metavar="IMAGE", help="PATH, URL, or - for stdin.")],
    output: Preview = None,
    model: Annotated[
        str, typer.Option("--model", metavar="MODEL", help="Whose tile size to use.")
    ] = BUILT_IN,
    alpha: options.Alpha = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    color: options.Color = "auto",
    debug: options.Debug = False,
) -> None:
    """Show how a picture is cut into tiles: its canvas, grid, size on it and token count."""
    check_name(model)
    if output is not None:
        atomic_file.check_writable(output)
    choice = ModelChoice(name=model, alpha=alpha)
    source = choice.find(checkpoint_required=False)
    data = read_image_bytes() if image == "-" else None
    given = PromptInput("", (image,), data)
    [picture] = load_images(given, alpha_rule(choice, source))
    facts = {"model": source.params.name, **picture_facts(picture, source.params)}
    if output is not None:
        preview = family_module(source.params, "tile_preview")
        atomic_file.write_bytes(output, preview.preview_png(picture, source.params.config))
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
    layout = family_module(params, "tiling").choose_layout(
        picture.height, picture.width, vision.image_size, vision.max_num_tiles
    )
    tokens = layout.num_tiles * vision.tokens_per_tile
    return answer.image_facts(picture.source, layout, tokens)


def fact_lines(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """(label, value) lines of `picture_facts`."""
    lines = [("picture", facts["source"]), ("model", facts["model"])] if "model" in facts else []
    tile = facts["tile_size"]
    return [
        *lines,
        ("size", pixels(facts["size"])),
        ("canvas", f"{pixels(facts['canvas'])}, {grid(facts['tile_grid'])} of {tile} px"),
        ("on the canvas", f"{pixels(facts['resized'])}, top left, the rest black"),
        ("tokens", f"{facts['tokens']:,} to attend to"),
    ]
