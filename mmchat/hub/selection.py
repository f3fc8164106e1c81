"""Which files of a repository are fetched: the weights in one form, with what they need."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Literal

from mmchat.checkpoints.foreign import explain_foreign
from mmchat.errors import NotFoundError, UsageError, quoted
from mmchat.hub.client import HubFile

WeightsFormat = Literal["safetensors", "original"]

_PAPERS = ("LICENSE*", "USE_POLICY*")
_HF_FILES = (
    "model.safetensors", "model-?????-of-?????.safetensors", "model.safetensors.index.json",
    "config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json",
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
    "chat_template.json", "chat_template.jinja", *_PAPERS,
)  # fmt: skip
# Fetched where a repository has no safetensors; they are read without being unpickled.
_BIN_FILES = (
    "pytorch_model.bin", "pytorch_model-?????-of-?????.bin", "pytorch_model.bin.index.json",
)  # fmt: skip
_META_FILES = ("consolidated*.pth", "params.json", "tokenizer.model", "checklist.chk")


def select(
    files: Sequence[HubFile],
    repo: str,
    weights_format: WeightsFormat = "safetensors",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> list[HubFile]:
    """The files to fetch: those of one format, or those that `include` names, less `exclude`.

    A pattern is matched against the whole path; `*` also matches `/`. Raises UsageError for a
    pattern that matches no file, NotFoundError if the repository lacks the format.
    """
    if include:
        chosen = [file for file in files if _matches(file.path, include)]
        _check_used(include, files, "--include")
    else:
        chosen = _of_format(files, repo, weights_format)
    _check_used(exclude, chosen, "--exclude")
    chosen = [file for file in chosen if not _matches(file.path, exclude)]
    if not chosen:
        raise UsageError("--exclude leaves nothing to fetch")
    return chosen


def _of_format(files: Sequence[HubFile], repo: str, weights_format: WeightsFormat) -> list[HubFile]:
    if weights_format == "original":  # Meta's files, in original/ or else at the top
        folder = "original/" if _named(files, ["consolidated*.pth"], "original/") else ""
        chosen = [*_named(files, _META_FILES, folder), *_named(files, _PAPERS)]
        weights, other = "*consolidated*.pth", "safetensors"
    else:
        chosen = _named(files, _HF_FILES)
        if not any(file.path.startswith("tokenizer.") for file in chosen):
            chosen += _named(files, ["tokenizer.model"], "original/")
        weights, other = "*.safetensors", "original"
        if not _named(files, ["*.safetensors"]) and (found := _named(files, _BIN_FILES)):
            return [*found, *chosen]
    if any(fnmatchcase(file.path, weights) for file in chosen):
        return chosen
    if foreign := explain_foreign(file.path for file in files):
        raise NotFoundError(f"{repo}: {foreign}")
    raise NotFoundError(
        f"{repo} holds no weights in the {weights_format} format; try --format {other}, or name the"
        " files with --include"
    )


def _named(files: Sequence[HubFile], patterns: Sequence[str], folder: str = "") -> list[HubFile]:
    """The files of one folder itself whose names match."""
    found = [file for file in files if _matches(file.path, [folder + name for name in patterns])]
    return [file for file in found if "/" not in file.path.removeprefix(folder)]


def _matches(path: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(path, pattern) for pattern in patterns)


def _check_used(patterns: Sequence[str], files: Sequence[HubFile], option: str) -> None:
    for pattern in patterns:
        if not any(fnmatchcase(file.path, pattern) for file in files):
            raise UsageError(
                f"{option} {quoted(pattern)} matches no file; --dry-run lists what would be fetched"
            )
