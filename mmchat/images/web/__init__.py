"""Fetches a picture from a web address. The only place that makes such requests.

The request goes through the proxy that the environment names, if any. Redirects are followed, each
with all checks again (`transport`). No cookies, no tokens, no .netrc.
"""

from __future__ import annotations

import os
import re
import ssl
import time
from contextlib import contextmanager, suppress
from http import HTTPStatus
from importlib import metadata
from typing import TYPE_CHECKING

from mmchat import limits
from mmchat.errors import ImageError, NetworkError, NotFoundError, quoted
from mmchat.offline import is_offline

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    import httpx2

    from mmchat.images.web.transport import CheckedTransport

CONTACT_VARIABLE = "MMCHAT_CONTACT"
_FORBIDDEN = re.compile(r"[\x00-\x1f\x7f-\x9f\\]")
_CODINGS = ("identity", "gzip", "deflate")  # one alone: several multiply what a small body becomes
_REDIRECTS = (301, 302, 303, 307, 308)
_RETRIED = (429, 503)


def fetch(
    url: str,
    *,
    max_bytes: int = limits.IMAGE_BYTES,
    allow_private: bool = True,
    hosts: Collection[str] = (),
    seconds: float = limits.FETCH_TOTAL_SECONDS,
) -> bytes:
    """Return the body behind an http or https address.

    allow_private: whether the address itself may lead to this machine or a private network; a
    redirect never may, unless the address did. hosts: the only ones that are asked, redirects
    included; empty: all. Raises ImageError for an address that is no valid web address or a body
    over `max_bytes`, NetworkError for everything that the server or the network does.
    """
    address = _parse(url)
    if is_offline():
        raise NetworkError(f"{_shown(address)} is not fetched, because this run is offline")
    import httpx2

    from mmchat.images.web.transport import CheckedTransport

    with (
        CheckedTransport(allow_private, hosts, seconds) as transport,
        _explained(address, transport),
        httpx2.Client(
            transport=transport,
            headers=_headers(),
            timeout=httpx2.Timeout(limits.FETCH_IDLE_SECONDS, connect=limits.FETCH_CONNECT_SECONDS),
            follow_redirects=True,
            max_redirects=limits.FETCH_REDIRECTS,
            trust_env=False,
        ) as client,
    ):
        for is_last in (False, False, True):
            transport.start_chain()
            with client.stream("GET", address) as response:
                wait = _wait(response)
                if wait is None or is_last or wait > limits.FETCH_WAIT_SECONDS:
                    body = _body(response, max_bytes)
                    transport.check_time()
                    return body
            time.sleep(wait)
    raise AssertionError("the last attempt returns or raises")


def _shown(url: httpx2.URL) -> str:
    """For messages: without the query, which may hold a secret."""
    return quoted(str(url).partition("?")[0])


def _parse(url: str) -> httpx2.URL:
    """Take `url` apart. Raises ImageError."""
    import httpx2

    from mmchat.images.web.transport import invalid_part

    shown = quoted(url.partition("?")[0])
    if len(url) > limits.URL_LENGTH:
        raise ImageError(f"the address {shown} is longer than {limits.URL_LENGTH} characters")
    if _FORBIDDEN.search(url):
        raise ImageError(f"the address {shown} holds a backslash or a control character")
    try:
        address = httpx2.URL(url)
    except (httpx2.InvalidURL, ValueError):
        raise ImageError(f"{shown} is not a valid web address") from None
    if address.userinfo:
        raise ImageError("the address holds a user name or password; write it without")
    if wrong := invalid_part(address):
        raise ImageError(f"{shown} {wrong}")
    return address


def _headers() -> dict[str, str]:
    """What every request says about this program, and nothing about its user."""
    name = f"mmchat/{metadata.version('mmchat')}"
    contact = os.environ.get(CONTACT_VARIABLE, "")
    for line in metadata.metadata("mmchat").get_all("Project-URL") or []:
        contact = contact or line.partition(", ")[2]
    if contact and contact.isascii() and contact.isprintable():
        name += f" (+{contact})"
    return {
        "User-Agent": name,
        "Accept": "image/*,*/*;q=0.5",
        "Accept-Encoding": "identity",
        "Connection": "close",
    }


@contextmanager
def _explained(address: httpx2.URL, transport: CheckedTransport) -> Iterator[None]:
    """Turn what goes wrong inside into a NetworkError that says what it means."""
    import httpx2

    try:
        yield
    except httpx2.HTTPError as problem:
        where = _shown(transport.url or address)
        raise NetworkError(f"{where} {_reason(problem, transport)}") from None


def _reason(problem: httpx2.HTTPError, transport: CheckedTransport) -> str:
    import httpx2

    through = f" through the proxy {quoted(transport.proxy)}" if transport.proxy else ""
    if isinstance(problem, httpx2.TooManyRedirects):
        return f"is the end of {limits.FETCH_REDIRECTS} redirects, and redirects again"
    if "location header" in str(problem):
        return "redirects to an invalid address"
    if transport.remaining() <= 0:  # it was cut then, which looks like any other end
        limit = f"took longer than {transport.seconds:g} s"
        return f"{limit}{through}; download it and give the file"
    if isinstance(problem, httpx2.ConnectTimeout):
        return f"did not accept a connection within {limits.FETCH_CONNECT_SECONDS:g} s{through}"
    if isinstance(problem, httpx2.TimeoutException):
        limit = f"sent nothing for {limits.FETCH_IDLE_SECONDS:g} s"
        return f"{limit}{through}; download it and give the file"
    cause: BaseException | None = problem
    while cause is not None and not isinstance(cause, ssl.SSLCertVerificationError):
        cause = cause.__cause__ or cause.__context__
    if cause is not None:
        return f"has no valid certificate{through}"
    if isinstance(problem, httpx2.ProxyError):
        return f"was not reached: the proxy {quoted(transport.proxy)} says {quoted(problem)}"
    if isinstance(problem, httpx2.ConnectError):
        return f"cannot be reached: no connection could be made{through}"
    if isinstance(problem, httpx2.DecodingError):
        return "sent a damaged answer; try again"
    return f"broke off or did not speak HTTP{through}; try again"


def _wait(response: httpx2.Response) -> float | None:
    """The seconds after which a server that is busy wants to be asked again; None if it is not."""
    if response.status_code in _RETRIED:
        with suppress(ValueError):
            return max(0, int(response.headers.get("Retry-After", "")))
    return None


def _body(response: httpx2.Response, max_bytes: int) -> bytes:
    """Read the body and stop at the cap. Raises ImageError, NetworkError."""
    shown = _shown(response.url)
    _check_status(response, shown)
    coding = response.headers.get("Content-Encoding", "identity").strip().lower()
    if coding not in _CODINGS:
        raise NetworkError(f"{shown} sent its answer compressed as {quoted(coding)}")
    length = response.headers.get("Content-Length", "0")
    chunks, size = [], int(length) if length.isdecimal() and coding == "identity" else 0
    if size <= max_bytes:
        size = 0
        for chunk in response.iter_bytes():
            chunks.append(chunk)
            size += len(chunk)
            if size > max_bytes:
                break
    if size > max_bytes:
        raise ImageError(f"{shown} is larger than {max_bytes / limits.MIB:g} MiB")
    return b"".join(chunks)


def _check_status(response: httpx2.Response, shown: str) -> None:
    status = response.status_code
    if status in (200, 203):
        return
    if status in _REDIRECTS:
        raise NetworkError(f"{shown} answered {status}, a redirect that does not say where to")
    phrase = HTTPStatus(status).phrase if status in set(HTTPStatus) else "unknown status"
    error = NotFoundError if status in (404, 410) else NetworkError
    later = "; try again later" if status in _RETRIED else ""
    raise error(f"{shown} answered {status} ({phrase}){later}")
