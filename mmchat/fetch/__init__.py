"""Fetches a picture from a web address. The only place that makes such requests.

The address is taken apart once, its host is looked up once, and the connection goes to an address
that was checked. Redirects are followed by hand, each with all checks again. Nothing of the
environment takes part: no proxy variables, no .netrc, no cookies, no tokens.
"""

from __future__ import annotations

import http.client
import ipaddress
import re
import socket
import ssl
import threading
import time
from dataclasses import dataclass
from http import HTTPStatus
from urllib.parse import quote, urljoin, urlsplit

from mmchat import limits
from mmchat.errors import ImageError, NetworkError, NotFoundError, quoted
from mmchat.fetch.deadline_socket import DeadlineSocket
from mmchat.fetch.ip_rules import is_metadata, is_public
from mmchat.offline import is_offline

_FORBIDDEN = re.compile(r"[\x00-\x20\x7f-\x9f\\]")
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_CHUNK = 64 * limits.KIB


@dataclass(frozen=True)
class _Address:
    """A web address taken apart: exactly what is connected to and asked for."""

    scheme: str
    host: str  # ASCII, without brackets
    port: int
    target: str  # path and query, ASCII

    @property
    def host_header(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _default_port(self.scheme) else f"{host}:{self.port}"

    @property
    def url(self) -> str:
        return f"{self.scheme}://{self.host_header}{self.target}"

    @property
    def shown(self) -> str:
        """For messages: without the query, which may hold a secret."""
        return quoted(self.url.partition("?")[0])


def fetch(url: str, *, max_bytes: int = limits.IMAGE_BYTES, allow_private: bool = True) -> bytes:
    """Return the body behind an http or https address.

    allow_private: whether the address itself may lead to this machine or a private network; a
    redirect never may, unless the address did. Raises ImageError for an address that is no valid
    web address or a body over `max_bytes`, NetworkError for everything that the server or the
    network does.
    """
    deadline = time.monotonic() + limits.FETCH_TOTAL_SECONDS
    address = _parse(url)
    if is_offline():
        raise NetworkError(f"{address.shown} is not fetched, because this run is offline")
    for _ in range(limits.FETCH_REDIRECTS + 1):
        sockaddrs = _resolve(address, deadline)
        are_public = all(is_public(ipaddress.ip_address(where[0])) for _, where in sockaddrs)
        if not are_public and not allow_private:
            raise NetworkError(f"{address.shown} leads to a private network; it is not fetched")
        allow_private = allow_private and not are_public
        answer = _request(address, sockaddrs, deadline, max_bytes)
        if isinstance(answer, bytes):
            return answer
        address = _redirected(address, answer)
    raise NetworkError(
        f"{quoted(url.partition('?')[0])} redirects more than {limits.FETCH_REDIRECTS} times"
    )


def _default_port(scheme: str) -> int:
    return 443 if scheme == "https" else 80


def _parse(url: str) -> _Address:
    """Take `url` apart, strictly. Raises ImageError."""
    shown = quoted(url.partition("?")[0])
    if len(url) > limits.URL_LENGTH:
        raise ImageError(f"the address {shown} is longer than {limits.URL_LENGTH} characters")
    if _FORBIDDEN.search(url):
        raise ImageError(
            f"the address {shown} holds a space, a backslash or a control character; "
            "write a space as %20"
        )
    try:
        parts = urlsplit(url)
        scheme, host, port = parts.scheme.lower(), parts.hostname or "", parts.port
        if ":" in host or "[" in parts.netloc:
            host = str(ipaddress.IPv6Address(host))
        elif not host.isascii():
            host = host.encode("idna").decode("ascii")
    except ValueError:  # UnicodeError is one
        raise ImageError(f"{shown} is not a valid web address") from None
    if scheme not in ("http", "https"):
        raise ImageError(f"{shown} is not an http or https address")
    if "@" in parts.netloc:
        raise ImageError("the address holds a user name or password; write it without")
    if not host or re.search(r"[%/?#@\[\]]", host) or len(host) > 253:
        raise ImageError(f"{shown} names no valid host")
    target = quote(parts.path or "/", safe="/%:@!$&'()*+,;=~-._")
    if parts.query:
        target += "?" + quote(parts.query, safe="/%:@!$&'()*+,;=~-._?[]|^`{}")
    return _Address(scheme, host, _default_port(scheme) if port is None else port, target)


def _redirected(address: _Address, location: str) -> _Address:
    """The address that a redirect leads to. Raises NetworkError."""
    if _FORBIDDEN.search(location):
        raise NetworkError(f"{address.shown} redirects to an invalid address")
    try:
        target = _parse(urljoin(address.url, location))
    except (ImageError, ValueError):
        raise NetworkError(f"{address.shown} redirects to an invalid address") from None
    if address.scheme == "https" and target.scheme != "https":
        raise NetworkError(f"{address.shown} redirects from https to http; that is not followed")
    return target


def _resolve(address: _Address, deadline: float) -> list[tuple[int, tuple]]:
    """Look the host up: (family, socket address) pairs. Raises NetworkError."""
    found: list[tuple[int, tuple]] = []

    def look_up() -> None:
        try:
            infos = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError):
            return
        found.extend((info[0], info[4]) for info in infos)

    # getaddrinfo knows no time limit; a thread that hangs in it is left behind.
    thread = threading.Thread(target=look_up, daemon=True)
    thread.start()
    limit = min(limits.FETCH_CONNECT_SECONDS, deadline - time.monotonic())
    thread.join(max(limit, 0))
    if thread.is_alive():
        raise NetworkError(f"looking up the host of {address.shown} took too long; try again")
    if not found:
        raise NetworkError(f"the host of {address.shown} cannot be found; is it spelled right?")
    if any(is_metadata(ipaddress.ip_address(where[0])) for _, where in found):
        raise NetworkError(f"{address.shown} leads to a cloud metadata service; it is not fetched")
    return found


def _connect(
    address: _Address, sockaddrs: list[tuple[int, tuple]], deadline: float
) -> socket.socket:
    """Connect to the first of the checked addresses that answers. Raises OSError, NetworkError."""
    end = min(deadline, time.monotonic() + limits.FETCH_CONNECT_SECONDS)
    error: OSError = TimeoutError()
    for family, where in sockaddrs:
        remaining = end - time.monotonic()
        if remaining <= 0:
            break
        connection = socket.socket(family, socket.SOCK_STREAM)
        try:
            connection.settimeout(remaining)
            connection.connect(where)
            if address.scheme == "https":
                return _tls_context().wrap_socket(connection, server_hostname=address.host)
            return connection
        except OSError as problem:
            connection.close()
            error = problem
    raise error


def _tls_context() -> ssl.SSLContext:
    import truststore  # knows the system's certificates on macOS

    return truststore.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


def _request(
    address: _Address, sockaddrs: list[tuple[int, tuple]], deadline: float, max_bytes: int
) -> bytes | str:
    """Ask once: the body, or the location of a redirect. Raises NetworkError, ImageError."""
    try:
        connection = _connect(address, sockaddrs, deadline)
    except ssl.SSLCertVerificationError:
        raise NetworkError(f"the certificate of {address.shown} is not valid") from None
    except TimeoutError:
        raise NetworkError(
            f"{address.shown} did not accept a connection within {limits.FETCH_CONNECT_SECONDS:g} s"
        ) from None
    except OSError:
        raise NetworkError(f"no connection to {address.shown} could be made") from None
    try:
        with connection:
            return _exchange(address, DeadlineSocket(connection, deadline), max_bytes)
    except TimeoutError:
        if time.monotonic() >= deadline:
            limit = f"took longer than {limits.FETCH_TOTAL_SECONDS:g} s"
        else:
            limit = f"sent nothing for {limits.FETCH_IDLE_SECONDS:g} s"
        raise NetworkError(f"{address.shown} {limit}; download it and give the file") from None
    except (OSError, http.client.HTTPException, ValueError):
        raise NetworkError(f"{address.shown} broke off or did not speak HTTP; try again") from None


def _exchange(address: _Address, connection: DeadlineSocket, max_bytes: int) -> bytes | str:
    client = http.client.HTTPConnection(address.host, address.port)
    client.sock = connection  # pyright: ignore[reportAttributeAccessIssue]
    headers = {
        "Host": address.host_header,
        "User-Agent": "mmchat",
        "Accept": "image/*,*/*;q=0.5",
        "Accept-Encoding": "identity",
        "Connection": "close",
    }
    client.request("GET", address.target, headers=headers)
    response = client.getresponse()
    if response.status in _REDIRECTS:
        return response.getheader("Location") or ""
    _check_status(address, response.status)
    if response.getheader("Content-Encoding", "identity").lower() != "identity":
        raise NetworkError(f"{address.shown} sent its answer compressed; that is not supported")
    return _body(address, response, max_bytes)


def _check_status(address: _Address, status: int) -> None:
    if status in (200, 203):
        return
    phrase = HTTPStatus(status).phrase if status in set(HTTPStatus) else "unknown status"
    error = NotFoundError if status in (404, 410) else NetworkError
    raise error(f"{address.shown} answered {status} ({phrase})")


def _body(address: _Address, response: http.client.HTTPResponse, max_bytes: int) -> bytes:
    """Read the body and stop at the cap. Raises ImageError, NetworkError, OSError."""
    chunks, size = [], response.length or 0
    if size <= max_bytes:
        size = 0
        while chunk := response.read1(_CHUNK):
            chunks.append(chunk)
            size += len(chunk)
            if size > max_bytes:
                break
    if size > max_bytes:
        raise ImageError(f"{address.shown} is larger than {max_bytes / limits.MIB:g} MiB")
    if response.length:
        raise NetworkError(f"{address.shown} broke off before the end; try again")
    return b"".join(chunks)
