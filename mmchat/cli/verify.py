"""`mmchat verify`: compare a model's files with what was recorded of them; repair them."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmchat.cli import console, options
from mmchat.cli.download import carry_out, transfer_bars
from mmchat.cli.keeping import model_folder
from mmchat.errors import CheckpointError, MmchatError, UsageError, quoted
from mmchat.words import plural, size

if TYPE_CHECKING:
    from pathlib import Path

    from mmchat.hub.integrity import Fault, Verification

_check = partial(typer.Option, rich_help_panel="Checks")


def verify(
    model: options.ModelOrFolder,
    fast: Annotated[bool, _check(help="Compare sizes only.")] = False,
    values: Annotated[bool, _check(help="Look for NaN and infinity in the weights too.")] = False,
    repair: Annotated[
        bool,
        _check(help="Fetch damaged or missing files again; of an export, name the command."),
    ] = False,
    offline: options.Offline = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Check that a model's files are what the Hub, Meta or mmchat recorded, bit for bit.

    Compares with the hashes kept at the download, and with Meta's checklist.chk; a vision encoder
    in a repository of its own too. Asks no network unless --repair does.
    """
    from mmchat.catalog.find import companion_of
    from mmchat.checkpoints.hub_cache import cached_snapshot

    if fast and repair:
        raise UsageError("--repair must read the files; leave --fast out")
    folder = model_folder(model)
    beside = companion_of(model, folder / "config.json")
    places = [folder, beside and cached_snapshot(beside)]
    with console.interrupt_says("stopped"):
        checks = [_checked(place, fast, repair) for place in places if place]
        if values:
            checks[0]["faults"] += map(asdict, _scan(model, folder))
    if as_json:
        console.print_json(checks[0] | ({"companion": checks[1]} if checks[1:] else {}))
    else:
        for check in checks:
            _print(check, fast)
    if faults := [fault["file"] for check in checks for fault in check["faults"]]:
        named = ", ".join(sorted(set(faults))[:5])
        advice = _made_anew(folder) or f"'mmchat verify {model} --repair' fetches them again"
        raise CheckpointError(f"{model}: {plural(len(faults), 'fault')}, in {named}; {advice}")


def _checked(folder: Path, fast: bool, repair: bool) -> dict[str, Any]:
    """What is as recorded there, what is not, and what was fetched again."""
    result, repaired = _verify(folder, fast), []
    if repair and result.faults and not _made_anew(folder):
        from mmchat.hub.download import repair_plan

        repaired = [fault.file for fault in result.faults]
        plan = repair_plan(folder, repaired)
        console.note(f"fetching {', '.join(repaired)} again, {size(plan.fetch_bytes)}")
        carry_out(plan)
        result = _verify(folder, fast)
    return {
        "path": str(folder),
        "records": list(result.records),
        "files": list(result.files),
        "bytes": result.bytes,
        "faults": [asdict(fault) for fault in result.faults],
        "repaired": repaired,
    }


def _verify(folder: Path, fast: bool) -> Verification:
    from mmchat.hub.integrity import recorded_sizes, verify_folder

    sizes = {} if fast else recorded_sizes(folder)
    with transfer_bars(sizes, sum(sizes.values())) as bars:
        return verify_folder(folder, fast=fast, progress=bars.report)


def _made_anew(folder: Path) -> str:
    """How to make a folder again that mmchat wrote; empty if it was downloaded."""
    from mmchat.catalog.known import data_path, known_specs
    from mmchat.checkpoints.exported_folder import exported_folder
    from mmchat.checkpoints.manifest import MANIFEST_NAME, read_manifest

    if exported := exported_folder(folder):
        return f"export it again: {exported.again()} --force"
    manifest = read_manifest(folder / MANIFEST_NAME)
    for spec in known_specs():
        built_in = data_path(spec.packaged) if spec.packaged else folder
        if built_in != folder and manifest == read_manifest(built_in / MANIFEST_NAME):
            return f"copy it again from {quoted(built_in, 300)}"
    if manifest and manifest.source and manifest.repo is None:
        return f"export {quoted(manifest.source, 300)} again with --format hf --force"
    return ""


def _scan(model: str, folder: Path) -> list[Fault]:
    from mmchat.catalog.find import find_model
    from mmchat.checkpoints.checkpoint import open_checkpoint
    from mmchat.hub.integrity import Fault, non_finite

    try:
        rules = find_model(model, adapter="none").spec.family.shard_axis
        with console.Stages() as stages, open_checkpoint(folder, merge_rules=rules) as opened:
            stages.show("looking for NaN and infinity")
            return list(non_finite(opened))
    except MmchatError as error:
        return [Fault("weights", str(error))]


def _print(check: dict[str, Any], fast: bool) -> None:
    for name in check["repaired"]:
        console.write_safely(f"{name}: fetched again\n")
    for fault in check["faults"]:
        console.write_safely(f"{fault['file']}: {fault['reason']}\n")
    if not check["faults"]:
        how = "sizes" if fast else "every bit"
        records = " and ".join(check["records"])
        console.write_safely(
            f"{len(check['files'])} files, {size(check['bytes'])}: {how} as recorded ({records})\n"
        )
