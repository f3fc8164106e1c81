"""`mmchat inspect`: what a model is made of and what it needs, from headers and params alone."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmchat.cli import console, options
from mmchat.cli.model_choice import family_module
from mmchat.cli.option_groups import Only, with_option_groups
from mmchat.cli.units import count, size
from mmchat.cli.wrong_names import model_name
from mmchat.loading.options import LoadOptions

if TYPE_CHECKING:
    from pathlib import Path

    from mmchat.catalog.find import ModelParams
    from mmchat.checkpoints.exported_folder import ExportedFolder

ESTIMATED_SCHEMES = ("none", "int8", "int4")


@with_option_groups
def inspect(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL|PATH",
            help="Name, alias, folder or weights file.",
            autocompletion=options.complete_model,
            callback=model_name,
        ),
    ],
    *,
    given: Annotated[LoadOptions, Only("params_path")],
    as_json: options.Json = False,
    color: options.Color = "auto",
    debug: options.Debug = False,
) -> None:
    """Show a model's architecture, sizes and memory needs; loads no weights.

    The estimates are of bfloat16, and of schemes that leave the rest in bfloat16.
    """
    source = replace(given, name=model).find(checkpoint_required=False)
    facts = _facts(source.params)
    if source.checkpoint is not None:
        exported = source.exported
        facts["export"] = exported and _export_facts(exported)
        in_programs = exported is not None and exported.record.format == "executorch"
        if not in_programs:
            facts["checkpoint"] = _checkpoint_facts(source.checkpoint, source.params)
    if as_json:
        console.print_json(facts)
        return
    console.print_facts(_lines(facts))


def _facts(params: ModelParams) -> dict[str, Any]:
    sizes = family_module(params, "footprint").footprint(params.config)
    vision, text = params.config.vision_config, params.config.text_config
    return {
        "name": params.name,
        "model_type": params.model_type,
        "chat_format": params.chat_format,
        "params_file": str(params.source),
        "vision": {
            "layers": vision.num_hidden_layers,
            "global_layers": vision.num_global_layers,
            "hidden_size": vision.hidden_size,
            "tile_size": vision.image_size,
            "patch_size": vision.patch_size,
            "max_num_tiles": vision.max_num_tiles,
            "tokens_per_tile": vision.tokens_per_tile,
        },
        "text": {
            "self_attention_layers": len(text.self_attention_layers),
            "cross_attention_layers": len(text.cross_attention_layers),
            "hidden_size": text.hidden_size,
            "vocab_size": text.vocab_size,
            "context": text.max_position_embeddings,
        },
        "parameters": sizes.parameters,
        "parameters_by_part": {part.name: part.parameters for part in sizes.parts},
        "weight_bytes": {
            "bfloat16" if scheme == "none" else scheme: _weight_bytes(params, scheme)
            for scheme in ESTIMATED_SCHEMES
        },
        "cache_bytes_per_token": 2 * sizes.cache_per_token,
        "cache_bytes_per_tile": 2 * sizes.cache_per_tile,
        "checkpoint": None,
        "export": None,
    }


def _export_facts(folder: ExportedFolder) -> dict[str, Any]:
    """What a folder was exported for, and the bytes of its files."""
    sizes = {name: record.size for name, record in folder.files.items()}
    return {**asdict(folder.record), "source": folder.source, "files": sizes}


def _weight_bytes(params: ModelParams, scheme: str) -> int:
    """Bytes of the weights in 16 bits, or what `scheme` makes of them."""
    from mmchat.estimate.memory import Setup

    return Setup(params, "cuda", 2, scheme).need().weights


def _checkpoint_facts(path: Path, params: ModelParams) -> dict[str, Any]:
    """Formats, tensors and bytes by dtype, from the headers of the files."""
    from mmchat.checkpoints.checkpoint import open_checkpoint

    with open_checkpoint(path, merge_rules=family_module(params, "weights").shard_dims) as opened:
        by_dtype: Counter[str] = Counter()
        for entry in opened.entries.values():
            by_dtype[entry.dtype] += entry.num_bytes
        return {
            "path": str(path),
            "format": opened.format,
            "files": len(opened.files),
            "tensors": len(opened.entries),
            "bytes": opened.total_bytes,
            "bytes_by_dtype": dict(by_dtype),
        }


def _lines(facts: dict[str, Any]) -> list[tuple[str, str]]:
    vision, text = facts["vision"], facts["text"]
    lines = [
        ("model", f"{facts['name']} ({facts['model_type']}, {facts['chat_format']})"),
        ("params", facts["params_file"]),
        (
            "vision",
            f"{vision['layers']} + {vision['global_layers']} layers of {vision['hidden_size']:,};"
            f" up to {vision['max_num_tiles']} tiles of {vision['tile_size']} px,"
            f" {vision['tokens_per_tile']:,} tokens each",
        ),
        (
            "text",
            f"{text['self_attention_layers']} self- and {text['cross_attention_layers']}"
            f" cross-attention layers of {text['hidden_size']:,};"
            f" {text['vocab_size']:,} tokens, context {text['context']:,}",
        ),
        ("parameters", f"{facts['parameters']:,} ({count(facts['parameters'])})"),
        *((f"  {name}", f"{number:,}") for name, number in facts["parameters_by_part"].items()),
        ("memory, about", ""),
        *((f"  {dtype}", size(number)) for dtype, number in facts["weight_bytes"].items()),
        ("  cache", f"{size(facts['cache_bytes_per_token'])} a token in bfloat16"),
        ("  pictures", f"{size(facts['cache_bytes_per_tile'])} a tile in bfloat16"),
    ]
    if facts["checkpoint"] or not facts["export"]:
        lines += _checkpoint_lines(facts["checkpoint"])
    return [*lines, *_export_lines(facts["export"])]


def _export_lines(found: dict[str, Any] | None) -> list[tuple[str, str]]:
    if found is None:
        return []
    lines = [
        ("exported", f"{found['format']}, {found['dtype']}, quantised: {found['scheme']}"),
        ("  from", found["source"]),
    ]
    if found["programs"]:
        lines += [
            ("  programs", ", ".join(found["programs"])),
            ("  for", _made_for(found)),
            ("  at most", f"{found['max_seq_len']:,} positions, {found['max_images']} pictures"),
        ]
    return [*lines, *((f"  {name}", size(number)) for name, number in found["files"].items())]


def _made_for(found: dict[str, Any]) -> str:
    if found["executorch"]:
        return f"executorch {found['executorch']}, {found['device']}, XNNPACK"
    return f"torch {found['torch']}, {found['device']}, {found['processor']}"


def _checkpoint_lines(found: dict[str, Any] | None) -> list[tuple[str, str]]:
    if found is None:
        return [("checkpoint", "not on this machine")]
    files = f"{found['files']} file{'s' * (found['files'] > 1)}"
    return [
        ("checkpoint", found["path"]),
        ("  format", f"{found['format']}, {files}, {found['tensors']:,} tensors"),
        *((f"  {dtype}", size(number)) for dtype, number in found["bytes_by_dtype"].items()),
    ]
