"""`mmchat generate --dry-run`: what a question would cost, without loading weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmchat import atomic_file
from mmchat.cli import console
from mmchat.cli.model_choice import family_module
from mmchat.cli.tiles import picture_facts
from mmchat.cli.units import grid, pixels, size
from mmchat.messages import Image, Message, Text

if TYPE_CHECKING:
    from mmchat.cli.generate import Request
    from mmchat.params import ModelSource


def show_dry_run(
    request: Request, source: ModelSource, *, as_json: bool, output: Path | None
) -> None:
    """Print prompt tokens, tile grids and a memory estimate."""
    facts = _facts(request, source)
    text = console.to_json(facts) + "\n" if as_json else console.fact_text(_lines(facts))
    if output is None:
        console.write_safely(text)
    else:
        atomic_file.write_text(output, text)


def _facts(request: Request, source: ModelSource) -> dict[str, Any]:
    from mmchat.device import choose_placement
    from mmchat.machine.memory import available_memory

    params, choice = source.params, request.choice
    placement = choose_placement(choice.device, choice.dtype, params.parameters)
    dtype = str(placement.dtype).removeprefix("torch.")
    sizes = family_module(params, "footprint").footprint(params.config)
    images = [picture_facts(image, params) for image in request.images]
    prompt_tokens = _prompt_tokens(request, source)
    new_tokens = request.sampling.for_model(params).max_new_tokens
    limit = choice.max_seq_len or params.config.text_config.max_position_embeddings
    positions = min((prompt_tokens or 0) + new_tokens, limit)
    tiles = sum(facts["tile_grid"][0] * facts["tile_grid"][1] for facts in images)
    cache = sizes.cache_per_token * positions + sizes.cache_per_tile * tiles
    return {
        "model": params.name,
        "device": str(placement.device),
        "dtype": dtype,
        "prompt_tokens": prompt_tokens,
        "max_new_tokens": new_tokens,
        "context": limit,
        "images": images,
        "memory": {
            "weights": sizes.weight_bytes(dtype, text_only=choice.text_only),
            "cache": cache * placement.dtype.itemsize,
            "available": available_memory(placement.device),
        },
    }


def _prompt_tokens(request: Request, source: ModelSource) -> int | None:
    """Positions of the prompt; None if the tokenizer is not on this machine."""
    if source.tokenizer is None:
        return None
    from mmchat.tokenizers import open_tokenizer

    params = source.params
    tokenizer = open_tokenizer(source.tokenizer)
    prompt = family_module(params, "prompt")
    content: tuple[Text | Image, ...] = (*request.images, Text(request.text))
    message = Message("user", content)
    image_token = params.config.image_token_id
    if request.raw or params.chat_format == "base":
        return len(prompt.raw_ids(message, tokenizer, image_token).input_ids)
    messages = [message]
    if request.system:
        messages.insert(0, Message("system", (Text(request.system),)))
    return len(prompt.chat_ids(messages, tokenizer, image_token).input_ids)


def _lines(facts: dict[str, Any]) -> list[tuple[str, str]]:
    tokens, memory = facts["prompt_tokens"], facts["memory"]
    known = "unknown, the tokenizer is not here" if tokens is None else f"{tokens:,} tokens"
    free = "unknown" if memory["available"] is None else size(memory["available"])
    return [
        ("model", facts["model"]),
        ("device", f"{facts['device']}, {facts['dtype']}"),
        *(("picture", _picture(image)) for image in facts["images"]),
        ("prompt", known),
        ("answer", f"at most {facts['max_new_tokens']:,} tokens, context {facts['context']:,}"),
        (
            "memory, about",
            f"weights {size(memory['weights'])}, cache {size(memory['cache'])}; {free} are free",
        ),
    ]


def _picture(facts: dict[str, Any]) -> str:
    return (
        f"{facts['source']}: {pixels(facts['size'])}, {pixels(facts['resized'])} on a canvas of"
        f" {pixels(facts['canvas'])}, {grid(facts['tile_grid'])}, {facts['tokens']:,} tokens"
    )
