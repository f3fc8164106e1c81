"""Find a model by alias, Hub repository or path, and say where its files are."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from mmchat import words
from mmchat.catalog import adapters
from mmchat.catalog.adapters import AdapterSource
from mmchat.catalog.spec import ModelSpec, gguf_spec, load_spec
from mmchat.checkpoints.adapter import Adapters, open_adapters
from mmchat.checkpoints.checkpoint import (
    Checkpoint,
    MergeRules,
    StoredAs,
    is_stored_in_gguf,
    open_checkpoint,
    with_companion,
)
from mmchat.checkpoints.exported_folder import ExportedFolder, exported_folder
from mmchat.checkpoints.foreign import explain_foreign
from mmchat.checkpoints.gguf_checkpoint import open_gguf
from mmchat.checkpoints.gguf_file import is_gguf
from mmchat.checkpoints.hub_cache import cached_snapshot, is_repo_id, weight_files
from mmchat.checkpoints.ollama_folder import (
    OllamaModel,
    ollama_folders,
    ollama_model,
    unreadable_folder,
)
from mmchat.errors import CheckpointError, ParamsError, UsageError, permission_errors, quoted
from mmchat.models.family import COMPANION, Config
from mmchat.offline import is_hub_offline
from mmchat.spelling import closest
from mmchat.strict_json import escaped
from mmchat.tokenizers import name_as_found, tokenizer_in

# x:latest, x:11b, x:11b-instruct, x:11b-instruct-q4_K_M
_TAG = re.compile(r"([\w.-]+)(?::latest|(:\d+b))(?:-instruct(?:-\w+)?)?", re.ASCII)


@dataclass(frozen=True)
class ModelSource:
    """A model and its files. checkpoint, companion: folder or file; tokenizer: file; None where not
    found. companion: weights of another repository that belong to the model. adapters: to be merged
    into them."""

    spec: ModelSpec
    checkpoint: Path | None
    tokenizer: Path | None
    companion: Path | None = None
    adapters: tuple[AdapterSource, ...] = ()

    def open_adapters(self) -> Adapters:
        """What is merged into the weights, compared with the model. Raises CheckpointError."""
        given = [(adapter.folder, adapter.scale) for adapter in self.adapters]
        family = self.spec.family
        return open_adapters(given, family.shapes(self.spec.config), family.hub_name)

    def open_weights(self) -> Checkpoint:
        """The checkpoint, with that of the companion, unpacked. Raises CheckpointError."""
        if self.checkpoint is None:
            raise CheckpointError(
                f"no weights of {self.spec.name} are here; give --checkpoint-path"
            )
        if self.format == "gguf":
            return open_gguf(self.checkpoint, self.companion)
        own = open_checkpoint(self.checkpoint, merge_rules=self._shard_rules)
        if self.companion is not None:
            try:
                other = open_checkpoint(self.companion)
            except BaseException:
                own.close()
                raise
            own = with_companion(own, other, COMPANION)
        return self.spec.packing.unpacked(own) if self.spec.packing else own

    @property
    def format(self) -> StoredAs:
        """The format of the weights, as loading will find it; "hf" where there are none."""
        if self.checkpoint and is_stored_in_gguf(self.checkpoint):
            return "gguf"
        with suppress(CheckpointError):  # loading says what is wrong
            if self.checkpoint:
                with open_checkpoint(self.checkpoint, merge_rules=self._shard_rules) as files:
                    return files.format
        return "hf"

    @property
    def _shard_rules(self) -> MergeRules | None:
        return None if self.exported else self.spec.family.shard_axis

    @cached_property
    def exported(self) -> ExportedFolder | None:
        """What `mmchat export` made the folder for, if it did. Raises CheckpointError."""
        return exported_folder(self.checkpoint)

    def tokenizer_file(self) -> Path:
        """The tokenizer. Raises CheckpointError, with the folder that it was looked for in."""
        if self.tokenizer is not None:
            return self.tokenizer
        if self.checkpoint is None:
            raise CheckpointError(f"no tokenizer of {self.spec.name} here; give --tokenizer-path")
        folder = quoted(str(_folder_of(self.checkpoint)), 300)
        raise CheckpointError(
            f"no tokenizer.model, tokenizer.json or qwen.tiktoken in {folder};"
            " copy the one that came with the weights there, or give it with --tokenizer-path"
        )

    def copy_papers(self, folder: Path) -> None:
        """Put tokenizer, licence and use policy into a new folder, under names that it is read by.

        Raises CheckpointError, DiskError.
        """
        from mmchat import limits
        from mmchat.checkpoints.writers import copy_into, papers_beside, write_json
        from mmchat.tokenizers.gguf_tokenizer import tokenizer_document

        tokenizer = self.tokenizer_file()
        if is_gguf(tokenizer):
            write_json(folder / "tokenizer.json", tokenizer_document(tokenizer))
        else:
            name = name_as_found(tokenizer)
            copy_into(folder, tokenizer, limits.TOKENIZER_JSON_BYTES, name)
        for paper in papers_beside(self.checkpoint) if self.checkpoint else ():
            copy_into(folder, paper, limits.LICENCE_BYTES)


@dataclass(frozen=True)
class KnownModel:
    """A model with a params file. path: where its weights lie, or None; size: their bytes."""

    spec: ModelSpec
    path: Path | None
    size: int


def data_path(*parts: str) -> Path:
    """A file of ours: inside the wheel, or in the checkout that an editable install points to."""
    package = Path(__file__).parents[1]
    packaged = package / "_data"
    return (packaged if packaged.is_dir() else package.parent).joinpath(*parts)


@cache
def known_specs() -> tuple[ModelSpec, ...]:
    """The models with a params file, the built-in one first."""
    found = [load_spec(path) for path in sorted(data_path("model_params").glob("*.json"))]
    return tuple(sorted(found, key=lambda spec: (spec.packaged is None, spec.name)))


def known_models() -> list[KnownModel]:
    """The known models, and which of them are on this machine."""
    models = []
    for spec in known_specs():
        folder = _folder_on_disk(spec)
        size = sum(file.stat().st_size for file in weight_files(folder)) if folder else 0
        models.append(KnownModel(spec, folder, size))
    return models


def find_spec(name: str) -> ModelSpec | None:
    """The known model with this name, alias or Hub repository, in any case, or None.

    Tags of Ollama are read as far as they name a model: `x:11b-instruct-q4_K_M` is `x:11b`.
    """
    wanted = name.casefold()
    if tag := _TAG.fullmatch(wanted):
        wanted = tag[1] + (tag[2] or "")
    for spec in known_specs():
        names = (spec.name, spec.repo or "", *spec.aliases)
        if wanted in map(str.casefold, names):
            return spec
    return None


def answering_sibling(base: ModelSpec) -> str:
    """What is typed for the model that answers questions where `base` continues text; "" if none.

    Meta calls the base models by the shorter names, which are typed by mistake.
    """
    if base.chat_format != "base":
        return ""
    sibling = find_spec(f"{base.name}-Instruct") or find_spec(f"{base.name}-Chat")
    return sibling.aliases[0] if sibling else ""


def params_file_for(config: Config, like: ModelSpec) -> str | None:
    """The params file of the known model that has this config, a chat model if `like` is one."""
    fitting = [spec for spec in known_specs() if spec.config == config]
    fitting.sort(key=lambda spec: spec.chat_format != like.chat_format)
    return fitting[0].source.name if fitting else None


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
    known = None if name is None else find_spec(name)
    place = checkpoint if name is None or known else _place_of(name)
    merged = adapters.find_adapters(adapter)
    if isinstance(place, Path) and adapters.is_alone(place):
        source = _with_base(
            place,
            checkpoint_path=checkpoint,
            tokenizer_path=tokenizer or tokenizer_in(_folder_of(place)),
            params_path=params_path,
            vision_tower=vision_tower,
            adapter=adapter,
            checkpoint_required=checkpoint_required,
            companion_required=companion_required,
        )
        return replace(source, adapters=(AdapterSource(_folder_of(place)), *merged))
    if known and checkpoint is None and _folder_on_disk(known) is None:
        found = ollama_model(str(name))  # of another architecture it is no model of ours
        place = found if found and found.family in ("", known.model_type) else None
    stored = place if isinstance(place, OllamaModel) and checkpoint is None else None
    if isinstance(place, OllamaModel):
        place = place.weights
    if (weights := checkpoint or place) and is_stored_in_gguf(weights):
        spec = load_spec(_params_file(params_path)) if params_path else None
        source = _gguf_source(spec, known, stored or weights, tokenizer, vision_tower)
        return replace(source, adapters=merged)
    if params_path is not None:
        spec = load_spec(_params_file(params_path))
    elif place is not None and known is None:
        spec = _params_beside(place)
    else:
        spec = known or known_specs()[0]
    checkpoint = checkpoint or place or _folder_on_disk(spec)
    if checkpoint is None and checkpoint_required:
        raise CheckpointError(_how_to_get(spec) + _ollama_lacks(name, spec))
    if checkpoint is not None and not adapter:
        adapters.refuse_beside(_folder_of(checkpoint))
    if tokenizer is None and checkpoint is not None:
        tokenizer = tokenizer_in(_folder_of(checkpoint))
    companion = _companion(spec, checkpoint, vision_tower)
    source = ModelSource(spec, checkpoint, tokenizer, companion, merged)
    if companion is None and companion_required and checkpoint_required and not source.exported:
        _refuse_without_companion(spec)
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


def base_spec(name: str | Path) -> ModelSpec | None:
    """The known model that an adapter was made of; None for what is no adapter, or not known."""
    place = adapters.alone_at(str(name))
    if place is None:
        return None
    full, plain = adapters.base_names(place)
    if not plain:
        return None
    if known := find_spec(full):
        return known
    for spec in known_specs():
        names = (spec.name, (spec.repo or "").rpartition("/")[2], *spec.aliases)
        if plain in {adapters.plain_name(name) for name in names}:
            return spec
    return None


def _base_of(place: Path) -> str:
    """The name of an adapter's base, by which it is found. Raises CheckpointError.

    The repository itself comes first; a known model whose weights it holds rounded comes next.
    """
    full, _ = adapters.base_names(_folder_of(place))
    folder = cached_snapshot(full) if is_repo_id(full) else None
    if folder and weight_files(folder):
        return full
    spec = base_spec(place)
    if spec is None:
        fetch = f"'mmchat download {full}' fetches it, or " if is_repo_id(full) else ""
        shown = quoted(str(place), 300)
        raise CheckpointError(
            f"{shown} is an adapter of {quoted(full, 200)}, which is not on this machine; {fetch}"
            f"give the base as the model, and --adapter {shown}"
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
        found, name = _expanded(given), str(given)
        if _exists(found):
            return found
        if not is_repo_id(name):
            raise CheckpointError(f"--vision-tower {quoted(name, 200)}: no such file or folder")
        repo = name
    folder = cached_snapshot(repo)
    if folder and weight_files(folder):
        return folder
    if given is not None:
        raise CheckpointError(
            f"--vision-tower {quoted(repo)} is not on this machine; 'mmchat download {repo}'"
        )
    return None


def _refuse_without_companion(spec: ModelSpec) -> None:
    if repo := spec.family.companion(spec.config):
        raise CheckpointError(
            f"{spec.name} needs the vision encoder {repo}, which is not on this machine; 'mmchat"
            f" download {repo}' fetches it, or give --vision-tower PATH"
        )


def _expanded(path: str | Path) -> Path:
    try:
        return Path(path).expanduser()
    except RuntimeError:  # no such user
        return Path(path)


def _existing(path: str | Path | None, option: str) -> Path | None:
    if path is None:
        return None
    found = _expanded(path)
    if not _exists(found):
        raise CheckpointError(f"{option} {quoted(str(path), 200)}: no such file or folder")
    return found


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # too long, or a NUL
        return False


def _params_file(path: str | Path) -> Path:
    """The file, a folder's file, or ours of that name if there is no such `model_params/…` here."""
    found = _expanded(path)
    if _exists(found):
        return _params_beside_file(found) if found.is_dir() else found
    packaged = data_path("model_params", found.name)
    is_ours = found.parent.name in ("", "model_params") and not found.is_absolute()
    return packaged if is_ours and _exists(packaged) else found


def _place_of(name: str) -> Path | OllamaModel:
    """The folder or file, or Ollama's model, that a MODEL which is no known name means."""
    path = _expanded(name)
    if _exists(path):
        return path
    if is_repo_id(name) and (snapshot := cached_snapshot(name)):
        return snapshot
    if found := ollama_model(name):
        return found
    if any(char.isspace() for char in name) or name.endswith("?"):
        raise ParamsError(
            f"{quoted(name)} is not a model; to ask this, put it after --prompt "
            f"(mmchat generate --prompt {quoted(name)})"
        )
    if name.startswith((".", "/", "~")) or path.suffix in (".pth", ".safetensors", ".gguf"):
        raise CheckpointError(f"{quoted(name, 200)}: no such file or folder")
    raise _unknown(name)


def repo_of(name: str) -> str:
    """The Hub repository that a name, alias or repository means.

    Raises UsageError for the built-in model, ParamsError for an unknown name.
    """
    known = find_spec(name)
    if known is None:
        if is_repo_id(name):
            return name
        raise _unknown(name)
    if known.repo is None:
        raise UsageError(f"{known.name} is built in: there is nothing to download or remove")
    return known.repo


def nearest_names(name: str) -> list[str]:
    """Names and aliases of known models that are spelt nearly so, the nearest first."""
    names = (n for spec in known_specs() for n in (spec.name, *spec.aliases))
    return closest(name, names, cutoff=0.5, count=3)


def _unknown(name: str) -> ParamsError:
    close = nearest_names(name)
    hint = "nearest: " + ", ".join(map(quoted, close)) + "; " if close else ""
    if is_repo_id(name):
        hint = f"to fetch it from the Hub: 'mmchat download {name}'; {hint}"
    return ParamsError(f"no model {quoted(name)} ({hint}'mmchat list' shows all, or give a path)")


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
    raise ParamsError(
        f"{escaped(str(folder))}: neither config.json nor params.json there; "
        "name the model or give --params-path"
    )


def _folder_on_disk(spec: ModelSpec) -> Path | None:
    if spec.packaged:
        folder = data_path(spec.packaged)
    else:
        folder = cached_snapshot(spec.repo) if spec.repo else None
    return folder if folder and weight_files(folder) else None


def _how_to_get(spec: ModelSpec) -> str:
    if spec.packaged:
        return f"the built-in model's weights are not in {escaped(str(data_path(spec.packaged)))}"
    if not spec.repo:
        return f"no weights given for {spec.name}; use --checkpoint-path"
    if is_hub_offline():
        return (
            f"{spec.name} is not on this machine, and this run is offline; "
            "copy its files here and give their folder as the model"
        )
    return (
        f"{spec.name} is not on this machine; accept its licence at "
        f"https://huggingface.co/{spec.repo}, then 'mmchat download {spec.name}' "
        f"(about {words.size(2 * spec.parameters)}), or give the folder that it is in"
    )


def _ollama_lacks(name: str | None, spec: ModelSpec) -> str:
    """That Ollama's files were looked for too, where the name is Ollama's."""
    if name is None or name.partition(":")[0].casefold() != spec.family.ollama_name:
        return ""
    if ollama_model(name):  # one that mmchat does not run
        return ""
    if folder := unreadable_folder():
        return f"; Ollama's folder {escaped(str(folder))} may not be read by this user"
    return f"; Ollama has no {quoted(name)} in {escaped(str(ollama_folders()[0]))} either"


def _folder_of(checkpoint: Path) -> Path:
    return checkpoint if checkpoint.is_dir() else checkpoint.parent
