"""Where the Hugging Face cache keeps a repository, by path arithmetic: no network, no import."""

from __future__ import annotations

import os
import re
from pathlib import Path

_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{7,64}")


def is_repo_id(name: str) -> bool:
    """Whether `name` has the form "owner/name" of a Hub repository."""
    return bool(_REPO_ID.fullmatch(name)) and ".." not in name


def cache_folder() -> Path:
    """The cache where huggingface_hub has it: HF_HUB_CACHE, HF_HOME/hub or ~/.cache."""
    environment = os.environ
    for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if environment.get(variable):
            return _expanded(environment[variable])
    if environment.get("HF_HOME"):
        return _expanded(environment["HF_HOME"]) / "hub"
    caches = _expanded(environment.get("XDG_CACHE_HOME") or "~/.cache")
    return caches / "huggingface" / "hub"


def _expanded(text: str) -> Path:
    return Path(os.path.expandvars(text.replace("\0", ""))).expanduser()


def repo_folder(repo: str) -> Path:
    """The folder of a repository ("owner/name") in the cache."""
    return cache_folder() / f"models--{repo.replace('/', '--')}"


def commit_of(ref: Path) -> str | None:
    """The commit that a file below refs/ names; None if there is no such file, or it names none."""
    try:
        commit = ref.read_bytes()[:80].decode("ascii", "replace").strip()
    except (OSError, ValueError):
        return None
    return commit if _COMMIT.fullmatch(commit) else None


def cached_snapshot(repo: str) -> Path | None:
    """The folder of the cached revision of `repo` ("owner/name"), or None.

    The revision is the one that refs/main names; without it, the newest snapshot.
    """
    if not is_repo_id(repo):
        return None
    snapshots = repo_folder(repo) / "snapshots"
    commit = commit_of(repo_folder(repo) / "refs" / "main")
    if commit and (snapshots / commit).is_dir():
        return snapshots / commit
    try:
        folders = [folder for folder in snapshots.iterdir() if folder.is_dir()]
    except OSError:
        return None
    return max(folders, key=lambda folder: folder.stat().st_mtime, default=None)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors, else Meta's .pth, else .bin files in `folder` or its "original" folder."""
    for place in (folder, folder / "original"):
        for pattern in ("*.safetensors", "consolidated*.pth", "pytorch_model*.bin"):
            if found := sorted(path for path in place.glob(pattern) if path.is_file()):
                return found
    return []
