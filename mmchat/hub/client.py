"""Ask the Hub which commit, which files, and for their bytes. The only place that talks to it.

huggingface_hub does the requests, with its settings: HF_ENDPOINT, HF_TOKEN, proxies, time limits.
Its faults become errors that say what to do.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from mmchat.checkpoints.names import COMMIT, ETAG, is_path
from mmchat.errors import (
    DiskError,
    GatedError,
    MmchatError,
    NetworkError,
    NotFoundError,
    quoted,
    without_password,
)
from mmchat.offline import is_hub_offline

T = TypeVar("T")

_BUSY = frozenset({408, 429, 500, 502, 503, 504})
_WAITS = (1.0, 2.0)  # seconds between questions to a busy server
LONGEST_WAIT = 60.0


@dataclass(frozen=True)
class HubFile:
    """A file of a repository. etag: sha256 of its bytes, or git's id of it if it is small."""

    path: str
    size: int
    etag: str


class TransientError(NetworkError):
    """A fault that may be gone soon. wait: seconds that a busy server asks for; else None."""

    def __init__(self, message: str, wait: float | None = None) -> None:
        super().__init__(message)
        self.wait = wait


def _library() -> Any:
    """huggingface_hub, silent and without telemetry; it reads these variables when imported."""
    for name in ("HF_HUB_DISABLE_TELEMETRY", "HF_HUB_DISABLE_UPDATE_CHECK", "HF_HUB_DISABLE_XET"):
        os.environ[name] = "1"
    import huggingface_hub
    from huggingface_hub.utils import logging as library_log

    library_log.set_verbosity(logging.CRITICAL)
    return huggingface_hub


class HubClient:
    """One repository on the Hub. token: None takes HF_TOKEN or the one that was logged in with."""

    def __init__(self, repo: str, token: str | None = None) -> None:
        if is_hub_offline():
            raise _offline(repo)
        self.repo = repo
        self._token = token
        self._hub = _library()
        self._api = self._hub.HfApi(token=token)
        self._endpoint = without_password(self._hub.constants.ENDPOINT).rstrip("/")
        self._timeout: float = self._hub.constants.HF_HUB_DOWNLOAD_TIMEOUT
        self._hub.get_session().timeout = self._timeout

    def look(self, revision: str) -> tuple[str, list[HubFile]]:
        """The commit that a branch, tag or commit names, and its files with well-formed names."""
        info = self._ask(
            lambda: self._api.model_info(
                self.repo, revision=revision, files_metadata=True, timeout=self._timeout
            ),
            revision,
        )
        if not COMMIT.fullmatch(str(info.sha)):
            raise NetworkError(f"{self._endpoint} named no commit of {self.repo}")
        found = []
        for entry in info.siblings or ():
            large = entry.lfs
            etag, size = (large.sha256, large.size) if large else (entry.blob_id, entry.size)
            if is_path(entry.rfilename) and ETAG.fullmatch(str(etag)) and type(size) is int:
                found.append(HubFile(entry.rfilename, size, etag))
        return info.sha, sorted(found, key=lambda file: file.path)

    def content(self, commit: str, file: HubFile) -> bytes:
        """All of a small file."""

        def read() -> bytes:
            with self.reading(commit, file, 0) as (_, chunks):
                return b"".join(chunks)

        return self._ask(read, commit)

    def check_access(self, commit: str, file: HubFile) -> None:
        """Raise GatedError or another NetworkError unless `file` may be fetched as listed."""
        url = self._hub.hf_hub_url(self.repo, file.path, revision=commit)
        found = self._ask(
            lambda: self._hub.get_hf_file_metadata(url, token=self._token, timeout=self._timeout),
            commit,
        )
        if found.etag not in (None, file.etag):
            raise NetworkError(
                f"{quoted(file.path)}: the server offers another version than its list says;"
                " try again later"
            )

    @contextmanager
    def reading(self, commit: str, file: HubFile, offset: int) -> Iterator[tuple[int, Any]]:
        """(position, chunks): the bytes of `file` from `offset`, or from 0 if the server so wills.

        A token goes to the Hub alone; a redirect to another host is followed without it.
        """
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

        url = self._hub.hf_hub_url(self.repo, file.path, revision=commit)
        headers = {**build_hf_headers(token=self._token), "Accept-Encoding": "identity"}
        if offset:
            headers["Range"] = f"bytes={offset}-"
        stream = self._hub.get_session().stream
        with self._explained(commit), stream("GET", url, headers=headers) as response:
            if response.status_code == 416:  # nothing of it from there on
                yield 0, iter(())
                return
            hf_raise_for_status(response)
            span = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
            is_part = response.status_code == 206 and span is not None
            yield (int(span[1]) if is_part and span else 0), response.iter_raw()

    def _ask(self, question: Callable[[], T], revision: str) -> T:
        """The answer to `question`, asked again while the server is busy."""
        waits = iter(_WAITS)
        while True:
            try:
                with self._explained(revision):
                    return question()
            except TransientError as error:
                wait = next(waits, None)
                if wait is None or error.wait is None:
                    raise
                time.sleep(min(error.wait or wait, LONGEST_WAIT))
            except OSError as error:  # such as a token file that cannot be read
                reason = error.strerror or error
                raise DiskError(f"{quoted(error.filename, 300)}: {reason}") from None

    # What its faults mean

    @contextmanager
    def _explained(self, revision: str) -> Iterator[None]:
        import httpx2
        from huggingface_hub import errors

        try:
            yield
        except errors.HfHubHTTPError as error:
            raise self._refusal(error, revision) from None
        except errors.OfflineModeIsEnabled:
            raise _offline(self.repo) from None
        except httpx2.TimeoutException:
            raise TransientError(
                f"{self._endpoint} did not answer within {self._timeout:g} s; try again, or set"
                " HF_HUB_DOWNLOAD_TIMEOUT to more seconds"
            ) from None
        except (httpx2.ConnectError, httpx2.ProxyError, httpx2.UnsupportedProtocol):
            raise TransientError(
                f"no connection to {self._endpoint}; is this machine online, and HF_ENDPOINT right?"
            ) from None
        except (httpx2.TransportError, httpx2.StreamError):
            raise TransientError(f"{self._endpoint} broke the connection; try again") from None
        except (httpx2.HTTPError, TypeError, KeyError, ValueError) as bad:
            kind = type(bad).__name__
            raise NetworkError(f"{self._endpoint} did not answer as a Hub does ({kind})") from None

    def _refusal(self, error: Any, revision: str) -> MmchatError:
        """What a status that is no success means."""
        from huggingface_hub import errors

        status, headers = error.response.status_code, error.response.headers
        if isinstance(error, errors.RevisionNotFoundError):
            page = f"{self._endpoint}/{self.repo}/tree/main"
            return NotFoundError(f"{self.repo} has no revision {quoted(revision)}; see {page}")
        if isinstance(error, errors.RemoteEntryNotFoundError):
            return NotFoundError(f"{self.repo}: a file that its list names is missing")
        is_gated = isinstance(error, errors.GatedRepoError)
        if isinstance(error, errors.RepositoryNotFoundError) and not is_gated:
            return self._no_repository(status)
        if is_gated or status in (401, 403):
            return self._no_access(is_gated)
        if status in _BUSY:
            after = headers.get("Retry-After", "")
            wait = float(after) if after.isdecimal() and len(after) < 6 else 0.0
            advice = f"try again in {after} s" if wait else "try again later"
            return TransientError(f"{self._endpoint} is busy (status {status}); {advice}", wait)
        return NetworkError(f"{self._endpoint} answered with status {status}")

    def _no_repository(self, status: int) -> MmchatError:
        token = self._known_token()
        if token and status == 401 and self._account(token) is None:
            return self._no_access(is_gated=False)
        step = "" if token else "; if it is private, log in with 'hf auth login' or set HF_TOKEN"
        return NotFoundError(
            f"no repository {quoted(self.repo)} at {self._endpoint}; is the name right?{step}"
        )

    def _no_access(self, is_gated: bool) -> MmchatError:
        """Why the Hub refuses: no token, a bad token, or an account without access."""
        page, token = f"{self._endpoint}/{self.repo}", self._known_token()
        if not token:
            step = f"accept its licence at {page}, then " if is_gated else ""
            kind = "gated" if is_gated else "not open to everyone"
            return GatedError(
                f"{self.repo} is {kind} and there is no token: {step}log in with"
                " 'hf auth login' or set HF_TOKEN"
            )
        account = self._account(token)
        if account is None:
            source = "--token" if self._token else "HF_TOKEN or 'hf auth login'"
            return GatedError(
                f"the Hub does not accept the token from {source}; make a new one at"
                f" {self._endpoint}/settings/tokens"
            )
        return GatedError(
            f"the account {quoted(account)} has no access to {self.repo}: ask for it at {page}, or"
            " wait until it is granted (a fine-grained token must allow gated repositories)"
        )

    def _known_token(self) -> str | None:
        return self._token or self._hub.get_token()

    def _account(self, token: str) -> str | None:
        """The account that a token belongs to; None if the Hub does not know the token."""
        try:
            return str(self._api.whoami(token=token).get("name") or "?")
        except Exception as error:  # the first refusal is the news; this question only explains it
            status = getattr(getattr(error, "response", None), "status_code", None)
            return None if status in (401, 403) else "?"


def _offline(repo: str) -> NetworkError:
    return NetworkError(f"{repo}: not asked for, because this run is offline")
