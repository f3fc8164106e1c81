"""What a model is, read from JSON: our params files, the Hub's config.json, the makers' own."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mmchat import limits
from mmchat.checkpoints.checkpoint import open_checkpoint
from mmchat.checkpoints.packed import Packing
from mmchat.errors import CheckpointError, UsageError
from mmchat.models.family import Config, Translated, parameter_count
from mmchat.models.registry import AnyFamily, families, get_family, packing_for
from mmchat.strict_json import (
    Where,
    as_object,
    check_keys,
    escaped,
    parse_dataclass,
    quoted,
    read_bounded,
    read_json,
)
from mmchat.words import TEXT_ALONE

if TYPE_CHECKING:
    from mmchat.conversation import Image
    from mmchat.models.prompt import MediaFacts

ChatFormat = Literal["instruct", "base"]


@dataclass(frozen=True)
class GenerationDefaults:
    """Sampling that the makers of the model recommend."""

    temperature: float
    top_p: float


@dataclass(frozen=True)
class _Header:
    """The keys of a params file that are the same for every family.

    parameters: count in the Hub's format. repo: Hub repository, or None. packaged: folder of the
    checkpoint among our own files, or None.
    """

    name: str
    model_type: str
    description: str
    aliases: tuple[str, ...]
    repo: str | None
    chat_format: ChatFormat
    parameters: int
    generation: GenerationDefaults
    packaged: str | None = None


@dataclass(frozen=True, kw_only=True)
class ModelSpec(_Header):
    """Everything about a model but its weights and tokenizer.

    config belongs to the family. source: the file this was read from. notices: what the user should
    know about how it was read. text_only: the checkpoint holds the language model alone. packing:
    how another program quantised its weights.
    """

    config: Config
    source: Path
    notices: tuple[str, ...] = ()
    text_only: bool = False
    packing: Packing | None = None

    @property
    def family(self) -> AnyFamily:
        return get_family(self.model_type, Where(str(self.source)))

    def facts(self, image: Image) -> MediaFacts:
        """What people are told about a picture."""
        return self.family.facts(self.config, image.height, image.width)

    def context_limit(self, asked: int | None) -> int:
        """Positions to use, all that the model has unless fewer are asked. Raises UsageError."""
        most = self.config.max_position_embeddings
        if asked is None:
            return most
        if not 1 <= asked <= most:
            raise UsageError(
                f"--max-seq-len {asked} is out of range; {self.name} takes 1 to {most:,} positions"
            )
        return asked


_OWN_TEMPLATE = (
    "the checkpoint brings a chat template of its own, which is never run; the format of the model"
    " that it was made from is used"
)
# Chat templates that say what our own code does, by _fingerprint: that of Llama 3.2 Vision.
_KNOWN_TEMPLATES = {"019eea0ec865797f997dd942fbf0b83babb6c90ef3fe8d511d570786a2e7eb90"}
_BOUNDS = {
    GenerationDefaults: limits.SAMPLING,
    _Header: {"parameters": (1, 10**13)},
}
_WORD = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
_PATTERNS = {
    "name": _WORD,
    "repo": f"{_WORD}/{_WORD}",
    "packaged": r"[a-z0-9_]+(/[a-z0-9_]+)*",
    "description": r"[^\x00-\x1f\x7f-\x9f]{1,200}",
}


def load_spec(path: Path | str) -> ModelSpec:
    """Read one JSON file: ours, the Hub's config.json or that of a model's makers.

    Raises ParamsError that names the file, the key path and the nearest valid key.
    """
    path = Path(path)
    where = Where(str(path))
    found = as_object(read_json(path, where), where)
    if "model_type" in found:
        is_ours = {"name", "chat_format", "parameters", "generation"} & found.keys()
        return (_from_ours if is_ours else _from_hf)(found, path, where)
    return _from_makers(found, path, where)


def params_document(spec: ModelSpec) -> dict[str, Any]:
    """The content of a params file of ours that says the same; without names of other places."""
    return {
        "name": spec.name,
        "model_type": spec.model_type,
        "description": spec.description,
        "aliases": [],
        "repo": None,
        "chat_format": spec.chat_format,
        "parameters": spec.parameters,
        "generation": asdict(spec.generation),
        **spec.family.to_sections(spec.config),
    }


def _from_ours(found: Mapping[str, Any], path: Path, where: Where) -> ModelSpec:
    own = [field.name for field in fields(_Header)]
    family = get_family(found["model_type"], where)
    check_keys(found, [*own[:-1], *family.sections], own[-1:], where)
    own_part = {key: value for key, value in found.items() if key in own}
    header = parse_dataclass(_Header, own_part, where, _BOUNDS)
    _check_patterns(header, where)
    family_part = {key: found[key] for key in family.sections}
    config = family.parse(family_part, where)
    count = parameter_count(family.shapes(config))
    if count != header.parameters:
        raise where.child("parameters").fail(
            f"{header.parameters:,}, but a model of these sizes has {count:,}"
        )
    return ModelSpec(**vars(header), config=config, source=path)


def _check_patterns(header: _Header, where: Where) -> None:
    for key, pattern in _PATTERNS.items():
        value = getattr(header, key)
        if value is not None and not re.fullmatch(pattern, value):
            raise where.child(key).fail(f"{quoted(value)} is not a possible {key}")
    for index, alias in enumerate(header.aliases):
        if not re.fullmatch(rf"{_WORD}(:[\w.]+)?", alias, re.ASCII):
            raise where.child("aliases").child(index).fail(f"{quoted(alias)} is no possible name")


def _from_hf(found: Mapping[str, Any], path: Path, where: Where) -> ModelSpec:
    family = get_family(found.get("model_type"), where)
    packing = packing_for(found, where)
    says = family.from_hub(found, *_hf_preprocessor(path.parent, where))
    place = path.with_name("generation_config.json")
    generation = _optional_json(place) or {}
    template, notices = None, list[str]()
    if says.is_chat is None:
        template = _chat_template(path.parent)
        is_chatml = generation.get("chat_format") == "chatml"
        is_chat = template is not None or is_chatml or _has_several_stops(generation, found)
        says = replace(says, is_chat=is_chat)
    if template and _fingerprint(template) not in _KNOWN_TEMPLATES:
        notices.append(_OWN_TEMPLATE)
    if says.fit:
        with suppress(CheckpointError), open_checkpoint(path.parent) as files:  # or loading says so
            shapes = {name: entry.shape for name, entry in files.entries.items()}
            says = replace(says, config=says.fit(shapes))
    given = {key: generation[key] for key in family.generation if generation.get(key) is not None}
    spec = _translated(family, says, path, given, Where(str(place)))
    notices = (*spec.notices, *notices, *([TEXT_ALONE] if says.text_only else []))
    return replace(spec, text_only=says.text_only, packing=packing, notices=notices)


def _from_makers(found: Mapping[str, Any], path: Path, where: Where) -> ModelSpec:
    """A file that names no model type: of the family that knows it, or else one of ours."""
    folders = "/".join(path.resolve().parts[-4:-1]).lower()
    for family in families():
        if says := family.from_makers(found, folders, where):
            return _translated(family, says, path, {}, where)
    raise where.fail("missing key 'model_type'")


def gguf_spec(
    found: Mapping[str, Any], path: Path, name: str, sampling: Mapping[str, Any]
) -> ModelSpec:
    """A model from the metadata of its GGUF file. name: as its makers or its file have it.

    Raises ParamsError.
    """
    where = Where(str(path))
    for family in families():
        if says := family.from_gguf(found, where):
            spec = _translated(family, says, path, sampling, where)
            name = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("._-")[:96] or "model"
            return replace(spec, name=name, description="Translated from GGUF.")
    architecture = quoted(found.get("general.architecture"))
    raise where.fail(f"a GGUF file of {architecture}, an architecture that mmchat does not run")


def _translated(
    family: AnyFamily,
    says: Translated[Config],
    path: Path,
    generation: Mapping[str, Any],
    generation_where: Where,
) -> ModelSpec:
    folder = path.resolve().parent
    notice = (
        f"{escaped(str(path))} does not say whether this is a chat model; taken for one "
        "(--raw if it is a base model)"
    )
    return ModelSpec(
        name=escaped((folder.parent if folder.name == "original" else folder).name or "model"),
        model_type=family.model_type,
        description=f"Translated from {path.name}.",
        aliases=(),
        repo=None,
        chat_format="base" if says.is_chat is False else "instruct",
        parameters=parameter_count(family.shapes(says.config)),
        generation=parse_dataclass(
            GenerationDefaults, {**family.generation, **generation}, generation_where, _BOUNDS
        ),
        config=says.config,
        source=path,
        notices=(notice,) if says.is_chat is None else (),
    )


def _optional_json(path: Path) -> dict[str, Any] | None:
    """The object in a file that need not be there."""
    where = Where(str(path))
    return as_object(read_json(path, where), where) if path.exists() else None


def _hf_preprocessor(folder: Path, where: Where) -> tuple[dict[str, Any] | None, Where, Where]:
    """How pictures are prepared, `where`, and where that stands: transformers 5 nests it."""
    own, outer = folder / "preprocessor_config.json", folder / "processor_config.json"
    nested = (_optional_json(outer) or {}).get("image_processor")
    if nested is not None:
        place = Where(str(outer)).child("image_processor")
        return as_object(nested, place), where, place
    return _optional_json(own), where, Where(str(own))


def _chat_template(folder: Path) -> str | None:
    """The chat template of a folder, "" where it is no text; None if there is none.

    It is never run: it tells chat from base, and whether it is one that is known.
    """
    plain = folder / "chat_template.jinja"
    if plain.is_file():
        where = Where(str(plain))
        return read_bounded(plain, limits.CONFIG_JSON_BYTES, where).decode("utf-8", "replace")
    own = _optional_json(folder / "chat_template.json")
    found = (own or _optional_json(folder / "tokenizer_config.json") or {}).get("chat_template")
    return found if isinstance(found, str) else "" if found or own is not None else None


def _fingerprint(template: str) -> str:
    """Of a template, however its lines end and are indented."""
    return hashlib.sha256(" ".join(template.split()).encode()).hexdigest()


def _has_several_stops(generation: Mapping[str, Any], config: Mapping[str, Any]) -> bool:
    """Chat models list several end tokens, base models one."""
    text = config.get("text_config")
    eos = generation.get("eos_token_id") or (text or {}).get("eos_token_id")
    return isinstance(eos, list) and len(eos) > 1
