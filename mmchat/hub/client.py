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
_LONGEST_WAIT = 60.0


@dataclass(frozen=True)
class HubFile:
    """A file of a repository. etag: sha256 of its bytes, or git's id of it if it is small."""

    path: str
    size: int
    etag: str


class TransientError(NetworkError):
    """A fault that may be gone soon. busy: the server answered, and asks for patience."""

    def __init__(self, message: str, *, busy: bool = False, wait: float | None = None) -> None:
        super().__init__(message)
        self.busy = busy
        self.wait = wait


def page_of(repo: str) -> str:
    """The web page of a repository."""
    endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    return f"{without_password(endpoint).rstrip('/')}/{repo}"


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
            raise NetworkError(f"{repo}: not asked for, because this run is offline")
        self.repo = repo
        self._token = token
        self._hub = _library()
        self._api = self._hub.HfApi(token=token)

    def resolve(self, revision: str) -> str:
        """The commit that a branch, tag or commit names."""
        if COMMIT.fullmatch(revision):
            return revision
        info = self._ask(
            lambda: self._api.repo_info(self.repo, revision=revision, timeout=self._timeout()),
            revision,
        )
        if not isinstance(info.sha, str) or not COMMIT.fullmatch(info.sha):
            raise NetworkError(f"{self._endpoint()} named no commit of {self.repo}")
        return info.sha

    def files(self, commit: str) -> list[HubFile]:
        """The files of a commit whose names and hashes are well formed."""
        entries = self._ask(
            lambda: list(self._api.list_repo_tree(self.repo, recursive=True, revision=commit)),
            commit,
        )
        found = []
        for entry in entries:
            if not isinstance(entry, self._hub.hf_api.RepoFile):
                continue
            large = entry.lfs
            etag = large.sha256 if large else entry.blob_id
            size = large.size if large else entry.size
            if is_path(entry.path) and ETAG.fullmatch(str(etag)) and type(size) is int:
                found.append(HubFile(entry.path, size, etag))
        return sorted(found, key=lambda file: file.path)

    def check_access(self, commit: str, file: HubFile) -> None:
        """Raise GatedError or another NetworkError unless `file` may be fetched."""
        url = self._url(commit, file)
        self._ask(
            lambda: self._hub.get_hf_file_metadata(url, token=self._token, timeout=self._timeout()),
            commit,
        )

    @contextmanager
    def reading(self, commit: str, file: HubFile, offset: int) -> Iterator[tuple[int, Any]]:
        """(position, chunks): the bytes of `file` from `offset`, or from 0 if the server so wills.

        A token goes to the Hub alone; a redirect to another host is followed without it.
        """
        from huggingface_hub.utils import hf_raise_for_status

        headers = {**self._hub.utils.build_hf_headers(token=self._token)}
        headers["Accept-Encoding"] = "identity"
        if offset:
            headers["Range"] = f"bytes={offset}-"
        with (
            self._explained(commit),
            self._session().stream("GET", self._url(commit, file), headers=headers) as response,
        ):
            if response.status_code == 416:  # nothing of it from there on
                yield 0, iter(())
                return
            hf_raise_for_status(response)
            self._check_etag(file, response)
            span = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
            is_part = response.status_code == 206 and span is not None
            yield (int(span[1]) if is_part and span else 0), response.iter_raw()

    def _check_etag(self, file: HubFile, response: Any) -> None:
        first = response.history[0] if response.history else response
        etag = first.headers.get("X-Linked-ETag")
        if etag is None and not response.history:
            etag = response.headers.get("ETag")
        if etag is not None and etag.removeprefix("W/").strip('"') != file.etag:
            raise NetworkError(
                f"{quoted(file.path)}: the server offers another version than its list says;"
                " try again later"
            )

    # How the library is asked

    def _url(self, commit: str, file: HubFile) -> str:
        return self._hub.hf_hub_url(self.repo, file.path, revision=commit)

    def _endpoint(self) -> str:
        return without_password(self._hub.constants.ENDPOINT)

    def _timeout(self) -> float:
        return self._hub.constants.HF_HUB_DOWNLOAD_TIMEOUT

    def _session(self) -> Any:
        session = self._hub.get_session()
        session.timeout = self._timeout()
        return session

    def _ask(self, question: Callable[[], T], revision: str) -> T:
        """The answer to `question`, asked again while the server is busy."""
        waits = iter(_WAITS)
        while True:
            try:
                with self._explained(revision):
                    self._session()
                    return question()
            except TransientError as error:
                wait = next(waits, None)
                if wait is None or not error.busy:
                    raise
                time.sleep(min(error.wait or wait, _LONGEST_WAIT))
            except OSError as error:  # such as a token file that cannot be read
                reason = error.strerror or error
                raise DiskError(f"{quoted(error.filename, 300)}: {reason}") from None

    # What its faults mean

    @contextmanager
    def _explained(self, revision: str) -> Iterator[None]:
        import httpx2
        from huggingface_hub import errors

        endpoint = self._endpoint()
        try:
            yield
        except errors.GatedRepoError as error:
            raise self._no_access(error) from None
        except errors.RevisionNotFoundError:
            raise NotFoundError(
                f"{self.repo} has no revision {quoted(revision)};"
                f" see {page_of(self.repo)}/tree/main"
            ) from None
        except errors.RepositoryNotFoundError as error:
            raise self._no_repository(error) from None
        except errors.RemoteEntryNotFoundError:
            raise NotFoundError(f"{self.repo}: a file that its list names is missing") from None
        except errors.HfHubHTTPError as error:
            raise self._bad_status(error) from None
        except errors.OfflineModeIsEnabled:
            raise NetworkError(f"{self.repo}: not asked for, because this run is offline") from None
        except httpx2.TimeoutException:
            raise TransientError(
                f"{endpoint} did not answer within {self._timeout():g} s; try again, or set"
                " HF_HUB_DOWNLOAD_TIMEOUT to more seconds"
            ) from None
        except (httpx2.ConnectError, httpx2.ProxyError, httpx2.UnsupportedProtocol):
            raise TransientError(
                f"no connection to {endpoint}; is this machine online, and HF_ENDPOINT right?"
            ) from None
        except (httpx2.TransportError, httpx2.StreamError):
            raise TransientError(f"{endpoint} broke the connection; try again") from None
        except (httpx2.HTTPError, TypeError, KeyError, ValueError) as bad:
            kind = type(bad).__name__
            raise NetworkError(f"{endpoint} did not answer as a Hub does ({kind})") from None

    def _bad_status(self, error: Any) -> MmchatError:
        status = error.response.status_code
        if status in (401, 403):
            return self._no_access(error)
        if status in _BUSY:
            after = error.response.headers.get("Retry-After", "")
            wait = float(after) if after.isdecimal() and len(after) < 6 else None
            advice = f"try again in {after} s" if wait else "try again later"
            message = f"{self._endpoint()} is busy (status {status}); {advice}"
            return TransientError(message, busy=True, wait=wait)
        return NetworkError(f"{self._endpoint()} answered with status {status}")

    def _no_access(self, error: Any) -> MmchatError:
        """Why the Hub refuses: no token, a bad token, or an account without access."""
        from huggingface_hub import get_token

        page = page_of(self.repo)
        is_gated = error.response.headers.get("X-Error-Code") == "GatedRepo"
        token = self._token or get_token()
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
                f" {page_of('settings/tokens')}"
            )
        return GatedError(
            f"the account {quoted(account)} has no access to {self.repo}: ask for it at {page}, or"
            " wait until it is granted (a fine-grained token must allow gated repositories)"
        )

    def _account(self, token: str) -> str | None:
        """The account that a token belongs to; None if the Hub does not know the token."""
        from huggingface_hub.errors import HfHubHTTPError

        try:
            return str(self._api.whoami(token=token).get("name") or "?")
        except HfHubHTTPError as error:
            return None if error.response.status_code in (401, 403) else "?"
        except Exception:  # the first refusal is the news; this question only explains it
            return "?"

    def _no_repository(self, error: Any) -> MmchatError:
        from huggingface_hub import get_token

        token = self._token or get_token()
        if token and error.response.status_code == 401 and self._account(token) is None:
            return self._no_access(error)
        step = "" if token else "; if it is private, log in with 'hf auth login' or set HF_TOKEN"
        return NotFoundError(
            f"no repository {quoted(self.repo)} at {self._endpoint()}; is the name right?{step}"
        )
