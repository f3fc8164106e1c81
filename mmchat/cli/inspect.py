"""`mmchat inspect`: what a model is made of and what it needs, from headers and params alone."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

from mmchat.cli import console, options
from mmchat.cli.option_groups import Only
from mmchat.loading.options import LoadOptions
from mmchat.words import count, plural, size

if TYPE_CHECKING:
    from mmchat.catalog.source import ModelSource
    from mmchat.catalog.spec import ModelSpec
    from mmchat.models.family import Description

ESTIMATED_SCHEMES = ("none", "int8", "int4")


def inspect(
    model: options.ModelOrFolder,
    *,
    given: Annotated[LoadOptions, Only("params_path", "vision_tower", "adapter")],
    as_json: options.Json = False,
) -> None:
    """Show a model's architecture, sizes and memory needs; loads no weights.

    The estimates are of bfloat16, and of schemes that leave the rest in bfloat16.
    """
    source = replace(given, name=model).find(checkpoint_required=False)
    spec = source.spec
    words = spec.family.describe(spec.config)
    facts = _facts(spec, words)
    facts["adapters"] = _adapter_facts(source)
    if source.checkpoint is not None:
        exported = source.exported
        facts["export"] = exported and {
            **asdict(exported.record),
            "source": exported.source,
            "files": {name: record.size for name, record in exported.files.items()},
        }
        in_programs = exported is not None and exported.record.format == "executorch"
        if not in_programs:
            facts["checkpoint"] = _checkpoint_facts(source)
    if as_json:
        console.print_json(facts)
        return
    console.print_facts(_lines(facts, words))


def _facts(spec: ModelSpec, words: Description) -> dict[str, Any]:
    from mmchat.estimate.memory import Setup

    sizes = spec.family.sizes(spec.config)
    setup = partial(Setup, spec, "cuda", 2, text_only=spec.text_only)  # 16 bits, or a scheme
    parts = sizes.loaded_parts(text_only=True) if spec.text_only else sizes.parts
    return {
        "name": spec.name,
        "model_type": spec.model_type,
        "chat_format": spec.chat_format,
        "params_file": str(spec.source),
        **words.details,
        "parameters": sum(part.parameters for part in parts),
        "parameters_by_part": {part.name: part.parameters for part in parts},
        "weight_bytes": {
            "bfloat16" if scheme == "none" else scheme: setup(scheme).need().weights
            for scheme in ESTIMATED_SCHEMES
        },
        "cache_bytes_per_token": 2 * sizes.cache_per_token,
        **words.cache_details,
        "checkpoint": None,
        "export": None,
        "adapters": [],
    }


def _adapter_facts(source: ModelSource) -> list[dict[str, Any]]:
    """What adapters change, compared with the model; raises CheckpointError if it does not fit."""
    if not source.adapters:
        return []
    from mmchat.nn.shapes_only import shapes_only

    with shapes_only():
        parts = source.spec.family.build().model(source.spec.config).linear_parts()
    with source.open_adapters() as opened:
        return [
            {
                "path": str(adapter.folder),
                "base": adapter.config.base,
                "kind": adapter.kind,
                "ranks": sorted({low.rank for low in adapter.low_rank.values()}),
                "scales": sorted({low.scale for low in adapter.low_rank.values()}),
                "modules_by_part": dict(
                    Counter(parts.get(n.removesuffix(".weight"), "other") for n in adapter.low_rank)
                ),
                "replaced": sorted(adapter.whole),
            }
            for adapter in opened.all
        ]


def _checkpoint_facts(source: ModelSource) -> dict[str, Any]:
    """Formats, tensors and bytes by dtype, from the headers of the files.

    Raises CheckpointError where loading would, for names, shapes and dtypes.
    """
    from mmchat.catalog.find import check_companion
    from mmchat.loading.weights import check_fit

    spec = source.spec
    check_companion(source)
    with source.open_weights() as opened:
        if source.exported is None:
            check_fit(opened, spec)
        return {
            "path": str(source.checkpoint),
            "vision_tower": source.companion and str(source.companion),
            "format": opened.format,
            "packed": spec.packing.label if spec.packing else None,
            "files": len(opened.files),
            "tensors": len(opened.entries),
            "bytes": opened.total_bytes,
            "bytes_by_dtype": opened.bytes_by_kind(),
        }


def _lines(facts: dict[str, Any], words: Description) -> list[tuple[str, str]]:
    lines = [
        ("model", f"{facts['name']} ({facts['model_type']}, {facts['chat_format']})"),
        ("params", facts["params_file"]),
        *words.lines,
        ("parameters", f"{facts['parameters']:,} ({count(facts['parameters'])})"),
        *((f"  {name}", f"{number:,}") for name, number in facts["parameters_by_part"].items()),
        ("memory, about", ""),
        *((f"  {dtype}", size(number)) for dtype, number in facts["weight_bytes"].items()),
        ("  cache", f"{size(facts['cache_bytes_per_token'])} a token in bfloat16"),
        *((f"  {label}", value) for label, value in words.cache_lines),
    ]
    if facts["checkpoint"] or not facts["export"]:
        lines += _checkpoint_lines(facts["checkpoint"])
    for adapter in facts["adapters"]:
        lines += _adapter_lines(adapter)
    return [*lines, *_export_lines(facts["export"])]


def _adapter_lines(found: dict[str, Any]) -> list[tuple[str, str]]:
    listed = {key: ", ".join(f"{value:g}" for value in found[key]) for key in ("ranks", "scales")}
    lines = [("adapter", found["path"]), ("  of", found["base"] or "a model that it does not name")]
    if found["ranks"]:
        lines.append(("  " + found["kind"], f"rank {listed['ranks']}, scale {listed['scales']}"))
    lines += [(f"  {part}", plural(n, "module")) for part, n in found["modules_by_part"].items()]
    if names := found["replaced"]:
        lines.append(("  replaced", ", ".join(names[:5]) + (", …" if len(names) > 5 else "")))
    return lines


def _export_lines(found: dict[str, Any] | None) -> list[tuple[str, str]]:
    if found is None:
        return []
    lines = [
        ("exported", f"{found['format']}, {found['dtype']}, quantised: {found['scheme']}"),
        ("  from", found["source"]),
    ]
    if found["calibrate"]:
        lines.append(("  by samples of", found["calibrate"]))
    if found["programs"]:
        made_for = f"torch {found['torch']}, {found['device']}, {found['processor']}"
        if found["executorch"]:
            made_for = f"executorch {found['executorch']}, {found['device']}, XNNPACK"
        lines += [
            ("  programs", ", ".join(found["programs"])),
            ("  for", made_for),
            ("  at most", f"{found['max_seq_len']:,} positions, {found['max_images']} pictures"),
        ]
    return [*lines, *((f"  {name}", size(number)) for name, number in found["files"].items())]


def _checkpoint_lines(found: dict[str, Any] | None) -> list[tuple[str, str]]:
    if found is None:
        return [("checkpoint", "not on this machine")]
    files = plural(found["files"], "file")
    packed, tower = found["packed"], found["vision_tower"]
    return [
        ("checkpoint", found["path"]),
        *([("  vision encoder", tower)] if tower else []),
        ("  format", f"{found['format']}, {files}, {plural(found['tensors'], 'tensor')}"),
        *([("  packed", f"{packed}; unpacked it is")] if packed else []),
        *((f"  {dtype}", size(number)) for dtype, number in found["bytes_by_dtype"].items()),
    ]
