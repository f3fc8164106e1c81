"""Find a model by alias, Hub repository or path, and say where its files are."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from mmchat.catalog import adapters
from mmchat.catalog.adapters import AdapterSource, existing
from mmchat.catalog.kept import kept_by
from mmchat.catalog.known import (
    base_spec,
    data_path,
    find_spec,
    folder_on_disk,
    how_to_get,
    known_specs,
    unknown,
)
from mmchat.catalog.source import ModelSource, folder_of
from mmchat.catalog.spec import ModelSpec, gguf_spec, load_spec
from mmchat.checkpoints.checkpoint import is_stored_in_gguf
from mmchat.checkpoints.exported_folder import exported_folder
from mmchat.checkpoints.foreign import explain_foreign
from mmchat.checkpoints.gguf_checkpoint import open_gguf
from mmchat.checkpoints.hub_cache import cached_snapshot, is_repo_id, weight_files
from mmchat.checkpoints.ollama_folder import (
    OllamaModel,
    ollama_folders,
    ollama_model,
    unreadable_folder,
)
from mmchat.checkpoints.packed import Packing
from mmchat.errors import (
    CheckpointError,
    MmchatError,
    ParamsError,
    UsageError,
    permission_errors,
    quoted,
)
from mmchat.models.registry import packing_for
from mmchat.strict_json import Where, as_object, escaped, read_json
from mmchat.tokenizers import tokenizer_in
from mmchat.words import PICTURE_ENDINGS


@permission_errors(CheckpointError)
def find_model(
    name_or_path: str | Path | None = None,
    *,
    checkpoint_path: str | Path | None = None,
    tokenizer_path: str | Path | None = None,
    params_path: str | Path | None = None,
    vision_tower: str | Path | None = None,
    adapter: str | Path | Sequence[str | Path] = (),
    checkpoint_required: bool = True,
    companion_required: bool = True,
) -> ModelSource:
    """Find params, weights and tokenizer.

    name_or_path: name, alias, Hub repository, folder or weights file, or the name of a model in
    Ollama's folder; None takes what the paths say, or the built-in model. The other paths overrule
    what it leads to; vision_tower, a path or a Hub repository, where the companion is. adapter: as
    find_adapters takes them; a name that leads to an adapter alone is the first of them, with the
    base that its config names. With
    checkpoint_required False, a model whose weights are not on this machine is returned without
    them; companion_required the same of those.

    Raises ParamsError for an unknown name or bad params, CheckpointError for missing files.
    """
    name = None if name_or_path is None else str(name_or_path)
    checkpoint = _existing(checkpoint_path, "--checkpoint-path")
    tokenizer = _existing(tokenizer_path, "--tokenizer-path")
    params = None if params_path is None else load_spec(_params_file(params_path))
    known = None if name is None else find_spec(name)
    place = checkpoint if name is None or known else _place_of(name)
    merged = adapters.find_adapters(adapter)
    if isinstance(place, Path) and adapters.is_alone(place):
        source = _with_base(
            place,
            checkpoint_path=checkpoint,
            tokenizer_path=tokenizer or tokenizer_in(folder_of(place)),
            params_path=params_path,
            vision_tower=vision_tower,
            adapter=adapter,
            checkpoint_required=checkpoint_required,
            companion_required=companion_required,
        )
        return replace(source, adapters=(AdapterSource(folder_of(place)), *merged))
    if known and checkpoint is None and folder_on_disk(known) is None:
        found = ollama_model(str(name))  # of another architecture it is no model of ours
        place = found if found and found.family in ("", known.model_type) else None
    stored = checkpoint or place
    if stored and is_stored_in_gguf(stored if isinstance(stored, Path) else stored.weights):
        # Ollama's folder holds the files of all its models
        if not adapter and isinstance(stored, Path):
            adapters.refuse_beside(folder_of(stored))
        source = _gguf_source(params, known, stored, tokenizer, vision_tower)
        return replace(source, adapters=merged)
    if isinstance(place, OllamaModel):
        place = place.weights
    spec = params or known or (known_specs()[0] if place is None else _params_beside(place))
    checkpoint = checkpoint or place or folder_on_disk(spec)
    if checkpoint is None and checkpoint_required:
        raise CheckpointError(how_to_get(spec) + _ollama_lacks(name, spec))
    if checkpoint is not None and not adapter:
        adapters.refuse_beside(folder_of(checkpoint))
    if checkpoint is not None and spec.packing is None:
        spec = replace(spec, packing=_packing_beside(checkpoint, spec))
    if tokenizer is None and checkpoint is not None:
        tokenizer = tokenizer_in(folder_of(checkpoint))
    companion = _companion(spec, checkpoint, vision_tower)
    source = ModelSource(spec, checkpoint, tokenizer, companion, merged)
    if companion_required and checkpoint_required:
        check_companion(source)
    return source


def _with_base(place: Path, **given: Any) -> ModelSource:
    """The base of the adapter at `place`, by what is given or else by the adapter's config."""
    shown = quoted(str(place), 300)
    if given["checkpoint_path"] == place:
        raise CheckpointError(f"--checkpoint-path {shown} is an adapter; give --adapter {shown}")
    is_given = given["checkpoint_path"] or given["params_path"]
    name = None if is_given else _base_of(place)
    try:
        source = find_model(name, **given)
    except CheckpointError as error:
        raise CheckpointError(f"{error} (the base of the adapter {shown})") from None
    notice = f"{source.spec.name} is taken as the base of the adapter {shown}"
    return replace(source, spec=replace(source.spec, notices=(*source.spec.notices, notice)))


def _base_of(place: Path) -> str:
    """The name of an adapter's base, by which it is found. Raises CheckpointError.

    The repository itself comes first; a known model whose weights it holds rounded comes next.
    """
    full, _ = adapters.base_names(folder_of(place))
    folder = cached_snapshot(full) if is_repo_id(full) else None
    if folder and adapters.is_alone(folder):
        raise CheckpointError(
            f"{quoted(str(place), 300)} is an adapter of {quoted(full, 200)}, which is an adapter"
            " too; name the model that both change, with --adapter for each"
        )
    if folder and weight_files(folder):
        return full
    spec = base_spec(place)
    if spec is None:
        fetch = f"'mmchat download {full}' fetches it, or " if is_repo_id(full) else ""
        shown = quoted(str(place), 300)
        known = (
            f"of {quoted(full, 200)}, which is not on this machine" if full else "of no named base"
        )
        raise CheckpointError(
            f"{shown} is an adapter {known}; {fetch}give the base as the model, and --adapter"
            f" {shown}"
        )
    return spec.name


def _gguf_source(
    given: ModelSpec | None,
    known: ModelSpec | None,
    place: Path | OllamaModel,
    tokenizer: Path | None,
    vision_tower: str | Path | None,
) -> ModelSource:
    """A model whose params, weights and tokenizer are in GGUF files. given: its params all the
    same; known: the model that was named."""
    vision, sampling = _existing(vision_tower, "--vision-tower"), {}
    name = place.stem if isinstance(place, Path) else place.name
    if isinstance(place, OllamaModel):
        vision, sampling, place = vision or place.projector, place.sampling, place.weights
    with open_gguf(place, vision) as files:
        weights, *companions = files.files
        spec = given or gguf_spec(files.metadata, weights, name, sampling)
        spec = replace(spec, packing=files.packing)
    if given is None and known and known.config == spec.config:
        spec = replace(spec, name=known.name)
    return ModelSource(spec, weights, tokenizer or weights, next(iter(companions), None))


def _companion(spec: ModelSpec, checkpoint: Path | None, given: str | Path | None) -> Path | None:
    """Where the companion's weights are; None where there are none, or none are needed."""
    repo = spec.family.companion(spec.config)
    if given is not None and repo is None:
        raise UsageError(
            f"--vision-tower does not fit {spec.name}: its vision encoder is among its own weights"
        )
    if repo is None or exported_folder(checkpoint):
        return None
    if given is not None:
        if found := existing(given):
            return found
        repo = str(given)
        if not is_repo_id(repo):
            raise CheckpointError(f"--vision-tower {quoted(repo, 200)}: no such file or folder")
    folder = cached_snapshot(repo)
    if folder and weight_files(folder):
        return folder
    if given is not None:
        raise CheckpointError(
            f"--vision-tower {quoted(repo)} is not on this machine; 'mmchat download {repo}'"
        )
    return None


def companion_of(name: str, config: Path) -> str | None:
    """The repository of what a model's weights lack, by its name or else its config.json; or None.

    Also where there is no such file, or it is of no model of ours.
    """
    with suppress(MmchatError):
        spec = find_spec(name) or load_spec(config)
        return spec.family.companion(spec.config)
    return None


def check_companion(source: ModelSource) -> None:
    """Raises CheckpointError where weights of another repository are needed and not here."""
    spec = source.spec
    repo = spec.family.companion(spec.config)
    if repo and source.companion is None and not source.exported:
        raise CheckpointError(
            f"{spec.name} needs the vision encoder {repo}, which is not on this machine; 'mmchat"
            f" download {repo}' fetches it, or give --vision-tower PATH"
        )


def _existing(path: str | Path | None, option: str) -> Path | None:
    if path is None:
        return None
    if found := existing(path):
        return found
    raise CheckpointError(f"{option} {quoted(str(path), 200)}: no such file or folder")


def _params_file(path: str | Path) -> Path:
    """The file, a folder's file, or ours of that name if there is no such `model_params/…` here."""
    if found := existing(path):
        return _params_beside_file(found) if found.is_dir() else found
    given = Path(path)
    packaged = existing(data_path("model_params", given.name))
    is_ours = given.parent.name in ("", "model_params") and not given.is_absolute()
    return packaged if is_ours and packaged else given


def _place_of(name: str) -> Path | OllamaModel:
    """The folder or file, or Ollama's model, that a MODEL which is no known name means."""
    if path := existing(name):
        return path
    if is_repo_id(name) and (snapshot := cached_snapshot(name)):
        return snapshot
    if kept := kept_by(name):
        return kept.path
    if found := ollama_model(name):
        return found
    if any(char.isspace() for char in name) or name.endswith("?"):
        raise ParamsError(
            f"{quoted(name)} is not a model; to ask this, put it after --prompt "
            f"(mmchat generate --prompt {quoted(name)})"
        )
    if name.startswith((".", "/", "~")) or name.endswith((".pth", ".safetensors", ".gguf")):
        raise CheckpointError(f"{quoted(name, 200)}: no such file or folder")
    raise unknown(name)


def _params_beside(checkpoint: Path) -> ModelSpec:
    for spec in known_specs():
        if spec.packaged and data_path(spec.packaged).resolve() == checkpoint.resolve():
            return spec
    return load_spec(_params_beside_file(checkpoint))


def _params_beside_file(checkpoint: Path) -> Path:
    """config.json or params.json of a checkpoint; beside a .pth file Meta's comes first."""
    folder = checkpoint if checkpoint.is_dir() else checkpoint.parent
    names = ["config.json", "params.json", "original/params.json"]
    if checkpoint.suffix == ".pth":
        names.insert(0, "params.json")
    for name in names:
        if (folder / name).is_file():
            return folder / name
    beside = [file.name for file in folder.iterdir()] if checkpoint.is_dir() else [checkpoint.name]
    if foreign := explain_foreign(beside):
        raise CheckpointError(f"{escaped(str(folder))}: {foreign}")
    what = f"{escaped(str(folder))}: neither config.json nor params.json there"
    if any(name.rpartition(".")[2].lower() in PICTURE_ENDINGS for name in beside):
        raise ParamsError(
            f"{what}, but pictures;"
            f" to ask about each: mmchat batch {quoted(folder, 300)} --prompt TEXT"
        )
    raise ParamsError(f"{what}; name the model or give --params-path")


def _packing_beside(checkpoint: Path, spec: ModelSpec) -> Packing | None:
    """What config.json says of weights whose params come from elsewhere. Raises ParamsError.

    One that is damaged is needed for nothing else then, and says nothing.
    """
    path = folder_of(checkpoint) / "config.json"
    if checkpoint.suffix == ".pth" or path == spec.source or not path.is_file():
        return None
    where = Where(str(path))
    try:
        found = as_object(read_json(path, where), where)
    except ParamsError:
        return None
    return packing_for(found, where)


def _ollama_lacks(name: str | None, spec: ModelSpec) -> str:
    """That Ollama's files were looked for too, where the name is Ollama's."""
    if name is None or name.partition(":")[0].casefold() != spec.family.ollama_name:
        return ""
    if ollama_model(name):  # one that mmchat does not run
        return ""
    if folder := unreadable_folder():
        return f"; Ollama's folder {escaped(str(folder))} may not be read by this user"
    return f"; Ollama has no {quoted(name)} in {escaped(str(ollama_folders()[0]))} either"
