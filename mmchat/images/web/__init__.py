"""Fetches a picture from a web address. The only place that makes such requests.

The request goes through the proxy that the environment names, if any. Redirects are followed, each
with all checks again (`transport`). No cookies, no tokens, no .netrc.
"""

from __future__ import annotations

import os
import re
import ssl
import time
from contextlib import suppress
from http.client import responses
from typing import TYPE_CHECKING

from mmchat import __version__, limits
from mmchat.errors import ImageError, NetworkError, NotFoundError, quoted
from mmchat.offline import is_offline

if TYPE_CHECKING:
    from collections.abc import Collection

    import httpx2

    from mmchat.images.web.transport import CheckedTransport

_FORBIDDEN = re.compile(r"[\x00-\x1f\x7f-\x9f\\]")
_CODINGS = ("identity", "gzip", "deflate")  # one alone: several multiply what a small body becomes
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
        raise NetworkError(f"{shown(address)} is not fetched, because this run is offline")
    import httpx2

    from mmchat.images.web.transport import CheckedTransport

    with (
        CheckedTransport(allow_private, hosts, seconds) as transport,
        httpx2.Client(
            transport=transport,
            headers=_headers(),
            timeout=httpx2.Timeout(limits.FETCH_IDLE_SECONDS, connect=limits.FETCH_CONNECT_SECONDS),
            follow_redirects=True,
            max_redirects=limits.FETCH_REDIRECTS,
            trust_env=False,
        ) as client,
    ):
        try:
            for is_last in (False, False, True):
                transport.start_chain()
                with client.stream("GET", address) as response:
                    wait = _wait(response)
                    if wait is None or is_last or wait > limits.FETCH_WAIT_SECONDS:
                        body = _body(response, max_bytes)
                        transport.check_time()
                        return body
                time.sleep(wait)
        except httpx2.HTTPError as problem:
            where = shown(transport.url or address)
            raise NetworkError(f"{where} {_reason(problem, transport)}") from None
    raise AssertionError("the last attempt returns or raises")


def shown(url: object) -> str:
    """An address for messages: without the query, which may hold a secret."""
    return quoted(str(url).partition("?")[0])


def _parse(url: str) -> httpx2.URL:
    """Take `url` apart. Raises ImageError."""
    import httpx2

    from mmchat.images.web.transport import invalid_part

    if len(url) > limits.URL_LENGTH:
        raise ImageError(f"the address {shown(url)} is longer than {limits.URL_LENGTH} characters")
    if _FORBIDDEN.search(url):
        raise ImageError(f"the address {shown(url)} holds a backslash or a control character")
    try:
        address = httpx2.URL(url)
    except (httpx2.InvalidURL, ValueError):
        raise ImageError(f"{shown(url)} is not a valid web address") from None
    if address.userinfo:
        raise ImageError("the address holds a user name or password; write it without")
    if wrong := invalid_part(address):
        raise ImageError(f"{shown(url)} {wrong}")
    return address


def _headers() -> dict[str, str]:
    """What every request says about this program, and nothing about its user."""
    name, contact = f"mmchat/{__version__}", os.environ.get("MMCHAT_CONTACT", "")
    if contact and contact.isascii() and contact.isprintable():
        name += f" (+{contact})"
    return {
        "User-Agent": name,
        "Accept": "image/*,*/*;q=0.5",
        "Accept-Encoding": "identity",
        "Connection": "close",
    }


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
    place, status = shown(response.url), response.status_code
    if status not in (200, 203):
        error = NotFoundError if status in (404, 410) else NetworkError
        later = "; try again later" if status in _RETRIED else ""
        raise error(f"{place} answered {status} ({responses.get(status, 'unknown status')}){later}")
    coding = response.headers.get("Content-Encoding", "identity").strip().lower()
    if coding not in _CODINGS:
        raise NetworkError(f"{place} sent its answer compressed as {quoted(coding)}")
    too_large = ImageError(f"{place} is larger than {max_bytes / limits.MIB:g} MiB")
    length = response.headers.get("Content-Length", "")
    if length.isdecimal() and int(length) > max_bytes:
        raise too_large
    chunks, size = [], 0
    for chunk in response.iter_bytes():
        chunks.append(chunk)
        size += len(chunk)
        if size > max_bytes:
            raise too_large
    return b"".join(chunks)
