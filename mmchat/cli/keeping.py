"""`mmchat where`, `mmchat remove`: find a model's folder, and take it off this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mmchat.cli import console, options
from mmchat.errors import CheckpointError, MmchatError, UsageError, quoted
from mmchat.words import size

if TYPE_CHECKING:
    from mmchat.hub.holdings import Removal


def where(model: options.ModelOrFolder, as_json: options.Json = False) -> None:
    """Print the folder that a model is in.

    Of a model in GGUF it is the file: others share its folder.
    """
    folder = model_folder(model, or_gguf=True)
    if as_json:
        console.print_json({"model": model, "path": str(folder)})
    else:
        console.print_path(folder)


def model_folder(model: str, *, or_gguf: bool = False) -> Path:
    """The folder of a model by name, repository or path; raises CheckpointError, ParamsError.

    or_gguf: a file in that format, which has no folder of its own, will do as well.
    """
    from mmchat.catalog.find import find_model
    from mmchat.catalog.known import find_spec
    from mmchat.checkpoints.hub_cache import cached_snapshot, is_repo_id

    path = Path(model).expanduser()
    if find_spec(model) is None:
        if path.is_dir():
            return path.resolve()
        if not path.exists() and is_repo_id(model) and (snapshot := cached_snapshot(model)):
            return snapshot
    source = find_model(model, adapter="none")
    found = source.checkpoint
    if or_gguf and found is not None and source.format == "gguf":
        return found
    if found is None or not found.is_dir():
        raise CheckpointError(f"{quoted(model, 300)}: not the folder of a model but a single file")
    return found


def remove(
    model: options.ModelOrFolder,
    yes: Annotated[bool, typer.Option("-y", "--yes", help="Do not ask.")] = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Remove what mmchat downloaded or exported of a model.

    Lists the files first, with rounded weights that are kept of it. Those that another tool put
    there, or that another revision shares, stay.
    """
    from mmchat.catalog.find import companion_of
    from mmchat.catalog.kept import kept_below
    from mmchat.hub import holdings

    removal = _removal(model)
    rounded = [holdings.folder_removal(found.path) for found in kept_below(removal.root)]
    freed = removal.freed + sum(one.freed for one in rounded)
    config = next((path for path in removal.files if path.name == "config.json"), removal.root)
    companion = companion_of(model, config)
    listed = [str(path.relative_to(removal.root)) for path in removal.files]
    listed += (str(path.relative_to(one.root.parent)) for one in rounded for path in one.files)
    (console.note if yes else console.say)(*(f"  {name}" for name in listed))
    if not yes:
        console.agree(f"remove {model}, {size(freed)}, from {removal.root}?", "remove")
    with console.interrupt_says("stopped; run the same command to go on"):
        for one in (*rounded, removal):  # the model last, by which the others are found
            holdings.remove(one)
    if as_json:
        console.print_json(
            {
                "model": model,
                "removed_files": len(removal.files) + sum(len(one.files) for one in rounded),
                "freed_bytes": freed,
                "kept": [str(path) for path in removal.kept],
            }
        )
    else:
        console.note(f"removed {model}: {size(freed)} freed")
        if removal.kept:
            console.note(f"{len(removal.kept)} other files stay in {removal.root}")
        if companion:
            console.note(f"its vision encoder stays; 'mmchat remove {companion}' removes it")


def _removal(model: str) -> Removal:
    """Raises UsageError for what mmchat did not put there, as it deletes nothing of others."""
    from mmchat.catalog.kept import kept_by
    from mmchat.catalog.known import data_path, repo_of
    from mmchat.checkpoints.gguf_file import is_gguf
    from mmchat.hub import holdings

    folder = Path(model).expanduser()
    is_path = model.startswith((".", "/", "~")) or (folder.is_dir() and model.count("/") != 1)
    if not is_path:
        if kept := kept_by(model):
            return holdings.folder_removal(kept.path)
        try:
            return holdings.repo_removal(repo_of(model))
        except MmchatError:
            from mmchat.checkpoints.ollama_folder import ollama_model

            if found := ollama_model(model):
                raise UsageError(
                    f"{found.name} is Ollama's, and mmchat deletes nothing of it;"
                    f" 'ollama rm {found.name}' does"
                ) from None
            raise
    if is_gguf(folder):
        raise UsageError(f"{quoted(model, 300)}: mmchat did not put it there, and leaves it")
    if not folder.is_dir():
        raise CheckpointError(f"{quoted(model, 300)}: no such folder")
    if folder.resolve().is_relative_to(data_path("assets").resolve()):
        raise UsageError("the built-in model is a part of mmchat and stays")
    return holdings.folder_removal(folder.resolve())
