"""Download a model: choose the files, say what it takes, fetch them, record what came."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from mmchat import limits
from mmchat.checkpoints.hub_cache import commit_of, repo_folder
from mmchat.checkpoints.manifest import Manifest, is_whole, read_manifest
from mmchat.checkpoints.names import COMMIT, REVISION
from mmchat.checkpoints.packed import Packing, packing_of
from mmchat.errors import CheckpointError, NetworkError, UsageError, disk_errors, quoted
from mmchat.hub.client import HubClient, HubFile
from mmchat.hub.places import CachePlace, FolderPlace, Place, old_manifest, place_at
from mmchat.hub.selection import WeightsFormat, select
from mmchat.hub.transfer import fetch_part
from mmchat.offline import is_hub_offline
from mmchat.progress import BytesCallback
from mmchat.storage import space
from mmchat.storage.safe_files import alone_in
from mmchat.strict_json import Where, as_object, parse_json

ReadPacking = Callable[[Mapping[str, Any], Where], Packing | None]


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

    def place(self, commit: str) -> Place:
        """Where the files of a commit go."""
        if self.local_dir is not None:
            return FolderPlace(self.local_dir)
        return CachePlace(repo_folder(self.repo), commit)


@dataclass(frozen=True)
class Plan:
    """What a request takes. missing: those of `files` to be fetched; kept_bytes: of them on disk.

    free_bytes: on the file system of `folder`. packing: how weights that are to come are quantised.
    """

    request: Request
    commit: str
    place: Place
    files: tuple[HubFile, ...]
    missing: tuple[HubFile, ...]
    kept_bytes: int
    free_bytes: int
    packing: Packing | None = None

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
        option = "HF_HOME or --local-dir"
        space.check_space(self.folder, self.fetch_bytes, self.request.repo, option)


def plan(request: Request, packing: ReadPacking = packing_of) -> Plan:
    """Ask the Hub what `request` means and compare with the disk; fetches nothing.

    packing: says of config.json how the weights are packed, or refuses it.

    Raises NetworkError (GatedError, NotFoundError), UsageError, CheckpointError, DiskError.
    """
    if is_hub_offline() or COMMIT.fullmatch(request.revision):  # needs no question, or may not ask
        commit = _cached_commit(request)
        if done := _finished(request, request.place(commit or ""), commit):
            return done
    if is_hub_offline():
        raise NetworkError(
            f"{request.repo} is not complete on this machine, and this run may not fetch it"
            " (--offline or HF_HUB_OFFLINE); 'mmchat list' shows what is here"
        )
    client = HubClient(request.repo, request.token)
    commit, listed = client.look(request.revision)
    place = request.place(commit)
    if done := _finished(request, place, commit):
        return done
    files = select(listed, request.repo, request.weights_format, request.include, request.exclude)
    by_part = {place.part(file): file for file in files if not place.has(file)}
    missing = by_part.values()  # of equal files in the cache, only one
    if missing:
        client.check_access(commit, max(missing, key=lambda file: file.size))
    made = _plan(request, commit, place, files, missing)
    config = next((file for file in files if file.path == "config.json"), None)
    if config is None or not missing or not request.selections:
        return made
    return replace(made, packing=_packing(client, commit, config, packing))


def _packing(client: HubClient, commit: str, config: HubFile, read: ReadPacking) -> Packing | None:
    """Read config.json ahead of the weights. Raises ParamsError for what could not be loaded."""
    if config.size > limits.CONFIG_JSON_BYTES:
        return None
    where = Where(f"{client.repo}: config.json")
    return read(as_object(parse_json(client.content(commit, config), where), where), where)


def _plan(
    request: Request,
    commit: str,
    place: Place,
    files: Iterable[HubFile],
    missing: Iterable[HubFile] = (),
) -> Plan:
    missing = tuple(missing)
    kept = sum(min(space.size_of(place.part(file)) or 0, file.size) for file in missing)
    free = space.free_bytes(place.folder)
    return Plan(request, commit, place, tuple(files), missing, kept, free)


def _cached_commit(request: Request) -> str | None:
    """The commit that the revision names, as far as the cache knows."""
    if request.local_dir is not None:
        return None
    if COMMIT.fullmatch(request.revision):
        return request.revision
    return commit_of(repo_folder(request.repo) / "refs" / request.revision)


def _finished(request: Request, place: Place, commit: str | None) -> Plan | None:
    """A plan without missing files, if the place holds all of `request` by its record.

    Asks no network. commit: what the revision names, if that is known.
    """
    done = old_manifest(place.manifest_path)
    if done is None or done.commit is None or done.repo != request.repo:
        return None
    has_all = request.selections and set(request.selections) <= set(done.selections)
    is_meant = (commit or request.revision) in (done.commit, done.revision)
    if not has_all or not is_meant or not is_whole(place.folder, done.files):
        return None
    return _plan(request, done.commit, place, _recorded(done, done.files))


def _recorded(manifest: Manifest, names: Iterable[str]) -> list[HubFile]:
    records = {name: manifest.files[name] for name in names if name in manifest.files}
    return [HubFile(name, r.size, r.etag or r.sha256) for name, r in records.items()]


def repair_plan(folder: Path, names: Sequence[str]) -> Plan:
    """Fetch these files of a folder again, from the commit it was downloaded from.

    Raises CheckpointError if the folder was not downloaded by mmchat.
    """
    place = place_at(folder)
    manifest = read_manifest(place.manifest_path)  # a damaged one cannot say what to fetch
    if manifest is None:
        raise CheckpointError(
            f"{folder}: mmchat has no record of it; 'mmchat download' makes one and fetches what is"
            " damaged"
        )
    if manifest.repo is None or manifest.commit is None:
        raise CheckpointError(
            f"{quoted(folder, 300)} was not downloaded from the Hub; make it again instead"
        )
    request = Request(manifest.repo, manifest.commit, include=tuple(names))
    files = _recorded(manifest, names)
    return _plan(request, manifest.commit, place, files, files)


def carry_out(
    plan: Plan,
    workers: int = 4,
    report: BytesCallback = lambda *_: None,
    waiting: Callable[[], None] = lambda: None,
) -> Path:
    """Fetch what is missing and return the folder. May be interrupted anywhere, and run again.

    While another process fetches into the same place it waits, after calling `waiting`, and then
    fetches what is missing still. Raises NetworkError, DiskError.
    """
    plan.check_space()
    request, place = plan.request, plan.place
    manifest = Manifest({}, request.repo, request.revision, plan.commit, request.selections)
    cannot = f"{quoted(plan.folder, 300)}: cannot be written"
    with disk_errors(cannot), alone_in(place.work, waiting) as has_waited:
        if has_waited:
            plan = replace(plan, missing=tuple(f for f in plan.missing if not place.has(f)))
        if plan.missing:
            _fetch_all(HubClient(request.repo, request.token), plan, max(1, workers), report)
        place.finish(plan.files, manifest)
    return plan.folder


def _fetch_all(client: HubClient, plan: Plan, workers: int, report: BytesCallback) -> None:
    """Fetch the missing files, the small ones first, in threads that end with the process."""
    jobs: queue.SimpleQueue[HubFile] = queue.SimpleQueue()
    outcomes: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
    cancelled = threading.Event()
    for file in sorted(plan.missing, key=lambda file: file.size):
        jobs.put(file)

    def fetch(file: HubFile) -> BaseException | None:
        read, told = partial(client.reading, plan.commit, file), partial(report, file.path)
        try:
            fetch_part(read, file, plan.place.part(file), told, cancelled)
            plan.place.put(file)
        except BaseException as error:  # handed to the caller's thread
            return error
        return None

    def work() -> None:
        with suppress(queue.Empty):
            while not cancelled.is_set():
                outcomes.put(fetch(jobs.get_nowait()))

    threads = [threading.Thread(target=work, daemon=True) for _ in range(workers)]
    for thread in threads:
        thread.start()
    try:
        for _ in plan.missing:
            if problem := outcomes.get():
                raise problem
    finally:
        cancelled.set()
        for thread in threads:
            thread.join(0.2 / workers)
