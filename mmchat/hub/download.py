"""Download a model: choose the files, say what it takes, fetch them, record what came."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mmchat.checkpoints.manifest import MANIFEST_NAME, Manifest
from mmchat.checkpoints.names import COMMIT, REVISION
from mmchat.errors import CheckpointError, DiskError, NetworkError, UsageError, quoted
from mmchat.hub.client import HubClient, HubFile
from mmchat.hub.places import (
    CachePlace,
    FolderPlace,
    Place,
    alone_in,
    free_bytes,
    old_manifest,
    repo_folder,
)
from mmchat.hub.selection import WeightsFormat, select
from mmchat.hub.transfer import CancelledError, fetch_part
from mmchat.offline import is_hub_offline

_SPARE = 0.01  # of the bytes to fetch, kept free beside them

# report(path of the file, bytes that arrived; negative when a start is made again)
Report = Callable[[str, int], None]


@dataclass(frozen=True)
class Request:
    """What to download. local_dir None: the Hugging Face cache."""

    repo: str
    revision: str = "main"
    weights_format: WeightsFormat = "safetensors"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    local_dir: Path | None = None
    token: str | None = None

    def __post_init__(self) -> None:
        if not REVISION.fullmatch(self.revision):
            raise UsageError(f"--revision {quoted(self.revision)} is no branch, tag or commit")

    @property
    def selections(self) -> tuple[str, ...]:
        """The forms of the weights that are there whole after it."""
        return () if self.include or self.exclude else (self.weights_format,)


@dataclass(frozen=True)
class Plan:
    """What a request takes. missing: those of `files` to be fetched; kept_bytes: of them on disk.

    free_bytes: on the file system of `folder`.
    """

    request: Request
    commit: str
    place: Place
    files: tuple[HubFile, ...]
    missing: tuple[HubFile, ...]
    kept_bytes: int
    free_bytes: int
    selections: tuple[str, ...]

    @property
    def folder(self) -> Path:
        return self.place.folder

    @property
    def total_bytes(self) -> int:
        return sum(file.size for file in self.files)

    @property
    def fetch_bytes(self) -> int:
        return sum(file.size for file in self.missing) - self.kept_bytes

    def check_space(self) -> None:
        """Raise DiskError when what is missing does not fit."""
        needed = int(self.fetch_bytes * (1 + _SPARE))
        if needed > self.free_bytes:
            raise DiskError(
                f"{self.request.repo} needs {needed:,} bytes more in {quoted(self.folder, 300)},"
                f" and {self.free_bytes:,} are free; free {needed - self.free_bytes:,}, or choose"
                " another disk with HF_HOME or --local-dir"
            )


def complete_folder(request: Request, commit: str | None = None) -> Manifest | None:
    """The manifest of what is there, if it holds all of `request` and the sizes are right.

    Asks no network. commit: what the revision names, if that is known.
    """
    folder = request.local_dir
    if folder is not None:
        manifest = old_manifest(folder / MANIFEST_NAME)
    else:
        commit = commit or _cached_commit(request)
        if commit is None:
            return None
        place = CachePlace(request.repo, commit)
        folder, manifest = place.folder, old_manifest(place.manifest_path)
    if manifest is None or manifest.repo != request.repo:
        return None
    wanted = {commit} if commit else {request.revision}
    has_all = set(request.selections) <= set(manifest.selections) and request.selections
    if not has_all or not wanted & {manifest.commit, manifest.revision}:
        return None
    records = manifest.files.items()
    return manifest if all(_size(folder / name) == r.size for name, r in records) else None


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


def _cached_commit(request: Request) -> str | None:
    if COMMIT.fullmatch(request.revision):
        return request.revision
    try:
        text = (repo_folder(request.repo) / "refs" / request.revision).read_bytes()[:80]
    except (OSError, ValueError):
        return None
    commit = text.decode("ascii", "replace").strip()
    return commit if COMMIT.fullmatch(commit) else None


def plan(request: Request) -> Plan:
    """Ask the Hub what `request` means and compare with the disk; fetches nothing.

    Raises NetworkError (GatedError, NotFoundError), UsageError, CheckpointError, DiskError.
    """
    if is_hub_offline():
        return _offline_plan(request)
    client = HubClient(request.repo, request.token)
    commit = client.resolve(request.revision)
    place = _place(request, commit)
    if done := complete_folder(request, commit):
        return _finished_plan(request, commit, place, done)
    listed = client.files(commit)
    files = select(listed, request.repo, request.weights_format, request.include, request.exclude)
    by_part = {place.part(file): file for file in files if not place.has(file)}
    missing = tuple(by_part.values())  # of equal files in the cache, only one
    if missing:
        client.check_access(commit, max(missing, key=lambda file: file.size))
    kept = sum(min(_size(part) or 0, file.size) for part, file in by_part.items())
    free = free_bytes(place.folder)
    return Plan(request, commit, place, tuple(files), missing, kept, free, request.selections)


def _place(request: Request, commit: str) -> Place:
    if request.local_dir is None:
        return CachePlace(request.repo, commit)
    return FolderPlace(request.local_dir)


def _offline_plan(request: Request) -> Plan:
    done = complete_folder(request)
    if done is None or done.commit is None:
        raise NetworkError(
            f"{request.repo} is not complete on this machine, and this run may not fetch it"
            " (--offline or HF_HUB_OFFLINE); 'mmchat list' shows what is here"
        )
    return _finished_plan(request, done.commit, _place(request, done.commit), done)


def _finished_plan(request: Request, commit: str, place: Place, manifest: Manifest) -> Plan:
    files = tuple(
        HubFile(name, record.size, record.etag or record.sha256)
        for name, record in manifest.files.items()
    )
    free = free_bytes(place.folder)
    return Plan(request, commit, place, files, (), 0, free, manifest.selections)


def repair_plan(
    folder: Path, manifest_path: Path, manifest: Manifest, names: Sequence[str]
) -> Plan:
    """Fetch these files of a folder again, from the commit it was downloaded from.

    Raises CheckpointError if the folder was not downloaded by mmchat.
    """
    if manifest.repo is None or manifest.commit is None:
        raise CheckpointError(
            f"{quoted(folder, 300)} was not downloaded from the Hub; make it again instead"
        )
    in_cache = manifest_path.name != MANIFEST_NAME
    request = Request(manifest.repo, manifest.commit, local_dir=None if in_cache else folder)
    place = CachePlace(manifest.repo, manifest.commit) if in_cache else FolderPlace(folder)
    files = tuple(
        HubFile(name, record.size, record.etag or record.sha256)
        for name in names
        if (record := manifest.files.get(name))
    )
    free, selections = free_bytes(folder), manifest.selections
    return Plan(request, manifest.commit, place, files, files, 0, free, selections)


def carry_out(
    plan: Plan,
    workers: int = 4,
    report: Report | None = None,
    waiting: Callable[[], None] = lambda: None,
) -> Path:
    """Fetch what is missing and return the folder. May be interrupted anywhere, and run again.

    While another process fetches into the same place it waits, after calling `waiting`, and then
    fetches what is missing still. Raises NetworkError, DiskError.
    """
    plan.check_space()
    request = plan.request
    manifest = Manifest({}, request.repo, request.revision, plan.commit, plan.selections)
    try:
        with alone_in(plan.place.work, waiting) as has_waited:
            if has_waited:
                absent = (file for file in plan.missing if not plan.place.has(file))
                plan = replace(plan, missing=tuple(absent))
            if plan.missing:
                client = HubClient(request.repo, request.token)
                _fetch_all(client, plan, max(1, workers), report or (lambda *_: None))
            plan.place.finish(plan.files, manifest)
    except OSError as error:
        raise DiskError(
            f"{quoted(plan.folder, 300)}: cannot be written: {error.strerror or error}"
        ) from None
    return plan.folder


def _fetch_all(client: HubClient, plan: Plan, workers: int, report: Report) -> None:
    """Fetch the missing files in threads that do not keep the process alive."""
    jobs: queue.SimpleQueue[HubFile] = queue.SimpleQueue()
    for file in sorted(plan.missing, key=lambda file: file.size):
        jobs.put(file)
    outcomes: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
    cancelled = threading.Event()

    def work() -> None:
        while not cancelled.is_set():
            try:
                file = jobs.get_nowait()
            except queue.Empty:
                return
            try:
                part = plan.place.part(file)
                told = lambda count, path=file.path: report(path, count)  # noqa: E731
                fetch_part(client, plan.commit, file, part, told, cancelled)
                plan.place.put(file)
                outcomes.put(None)
            except OSError as error:
                outcomes.put(DiskError(f"{quoted(file.path)}: {error.strerror or error}"))
                return
            except BaseException as error:  # handed to the caller's thread
                outcomes.put(error)
                return

    threads = [threading.Thread(target=work, daemon=True) for _ in range(workers)]
    for thread in threads:
        thread.start()
    try:
        for _ in plan.missing:
            problem = outcomes.get()
            if problem is not None and not isinstance(problem, CancelledError):
                raise problem
    finally:
        cancelled.set()
        for thread in threads:
            thread.join(0.2 / workers)
