"""Sends each request of a fetch to an address that was looked up once and checked."""

from __future__ import annotations

import ipaddress
import re
import socket
import ssl
import threading
import time
import urllib.request
from collections.abc import Collection
from contextlib import suppress
from functools import cached_property
from typing import Any

import httpx2

from mmchat import limits
from mmchat.errors import MissingExtra, NetworkError, quoted
from mmchat.images.web import shown
from mmchat.images.web.ip_rules import IPAddress, is_metadata, is_public

_BAD_HOST = re.compile(r"[%/?#@\[\]\s]")
_PORTS = {"http": 80, "https": 443}
_HEADERS = ("User-Agent", "Accept", "Accept-Encoding", "Connection")


def invalid_part(url: httpx2.URL) -> str:
    """What is wrong with `url` as a web address, as the end of a sentence; empty if nothing is."""
    if url.scheme not in _PORTS:
        return "is not an http or https address"
    if (url.port or 0) > 65_535:
        return "names no valid port"
    if not url.host or _BAD_HOST.search(url.host) or len(url.raw_host) > 253:
        return "names no valid host"
    return ""


class CheckedTransport(httpx2.BaseTransport):
    """One fetch: its requests, their connections, and the time that all of them have together.

    A host is looked up once, its addresses are checked, and the connection goes to one of these.
    Through a proxy the proxy looks it up; what is checked then is what the name means here.
    hosts: the only ones that are asked, if there are any. url, proxy: of the last request, for
    messages.
    """

    def __init__(self, allow_private: bool, hosts: Collection[str], seconds: float) -> None:
        self.seconds = seconds
        self._hosts = {host.lower() for host in hosts}
        self.url: httpx2.URL | None = None
        self.proxy: str | None = None
        self._may_be_private = allow_private
        self._allow_private = allow_private
        self._end = time.monotonic() + seconds
        self._transports: list[httpx2.HTTPTransport] = []
        self._sockets: list[socket.socket] = []
        self._watch = threading.Timer(seconds, self._cut)
        self._watch.daemon = True
        self._watch.start()

    @cached_property
    def _tls(self) -> ssl.SSLContext:
        """Whom to trust; reading the list takes long enough to do it for https alone."""
        return httpx2.create_ssl_context()

    def start_chain(self) -> None:
        """Forget the redirects so far: the next request is for what the user asked for."""
        self.url = None
        self._allow_private = self._may_be_private

    def remaining(self) -> float:
        """Seconds that are left for the fetch."""
        return self._end - time.monotonic()

    def check_time(self) -> None:
        """Raise HTTPError if the time is over: what was read then may have been cut."""
        if self.remaining() <= 0:
            raise httpx2.ReadTimeout("the time is over")

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        """Check where the request leads and send it there. Raises NetworkError, HTTPError."""
        url, before = request.url, self.url
        if before is not None:
            if url.userinfo or invalid_part(url):
                raise NetworkError(f"{shown(before)} redirects to an invalid address")
            if (before.scheme, url.scheme) == ("https", "http"):
                raise NetworkError(
                    f"{shown(before)} redirects from https to http; that is not followed"
                )
        self.url = url
        if self._hosts and url.host.lower() not in self._hosts:
            raise NetworkError(f"{shown(url)} is on a host that is not allowed")
        proxy = _proxy_for(url)
        self.proxy = proxy and re.sub(r"//.*@", "//", proxy)
        # a proxy may find what is not found here, which is then not known to be public
        must_be_found = proxy is None or not self._may_be_private
        addresses = self._look_up(url, must_be_found=must_be_found)
        self._check(url, addresses)
        if proxy is not None:
            return self._send(request, url, proxy)
        for address in addresses[:-1]:
            with suppress(httpx2.ConnectError, httpx2.ConnectTimeout):
                return self._send(request, url.copy_with(host=str(address)))
        return self._send(request, url.copy_with(host=str(addresses[-1])))

    def close(self) -> None:
        """Close the connections."""
        self._watch.cancel()
        for transport in self._transports:
            transport.close()
        for connection in self._sockets:
            connection.close()

    def _send(
        self, request: httpx2.Request, url: httpx2.URL, proxy: str | None = None
    ) -> httpx2.Response:
        """Send the request to `url`, whose host may be an address, under its own host's name."""
        is_plain = url.scheme == "http" and not (proxy and proxy.startswith("https:"))
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT) if is_plain else self._tls
        transport = _open(tls, proxy)
        self._transports.append(transport)
        headers = {"Host": request.url.netloc.decode("ascii")}
        headers |= {name: request.headers[name] for name in _HEADERS}
        timeout: dict[str, Any] = dict(request.extensions["timeout"])
        timeout["connect"] = max(min(timeout["connect"], self.remaining()), 0.001)
        extensions = {
            "timeout": timeout,
            "sni_hostname": request.url.raw_host.decode("ascii"),
            "trace": self._trace,
        }
        return transport.handle_request(
            httpx2.Request("GET", url, headers=headers, extensions=extensions)
        )

    def _trace(self, event: str, info: dict[str, Any]) -> None:
        """Keep a handle of each connection, with which it can be cut while it is read."""
        if event.endswith("connect_tcp.complete"):
            self._sockets.append(info["return_value"].get_extra_info("socket").dup())

    def _cut(self) -> None:
        """End what is being read: the time is over, however often a byte still comes."""
        for connection in self._sockets:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def _look_up(self, url: httpx2.URL, *, must_be_found: bool) -> list[IPAddress]:
        """The addresses of the host. Raises NetworkError."""
        found: list[IPAddress] = []
        host, port = url.raw_host.decode("ascii"), url.port or _PORTS[url.scheme]

        def look_up() -> None:
            with suppress(OSError, UnicodeError):
                for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
                    found.append(ipaddress.ip_address(info[4][0]))

        # getaddrinfo knows no time limit; a thread that hangs in it is left behind.
        thread = threading.Thread(target=look_up, daemon=True)
        thread.start()
        thread.join(max(min(limits.FETCH_CONNECT_SECONDS, self.remaining()), 0))
        if must_be_found and thread.is_alive():
            raise NetworkError(f"looking up the host of {shown(url)} took too long; try again")
        if must_be_found and not found:
            raise NetworkError(f"the host of {shown(url)} cannot be found; is it spelled right?")
        return list(found)

    def _check(self, url: httpx2.URL, addresses: list[IPAddress]) -> None:
        """Refuse addresses that a picture must not be fetched from. Raises NetworkError."""
        if any(map(is_metadata, addresses)):
            raise NetworkError(f"{shown(url)} leads to a cloud metadata service; it is not fetched")
        are_public = all(map(is_public, addresses))
        if not are_public and not self._allow_private:
            raise NetworkError(f"{shown(url)} leads to a private network; it is not fetched")
        self._allow_private = self._allow_private and not are_public


def _proxy_for(url: httpx2.URL) -> str | None:
    """The proxy that the environment, or the system's settings, name for `url`."""
    proxies = urllib.request.getproxies()
    proxy = proxies.get(url.scheme) or proxies.get("all")
    if not proxy or urllib.request.proxy_bypass(f"{url.host}:{url.port or _PORTS[url.scheme]}"):
        return None
    with suppress(ValueError):  # a name; the networks of NO_PROXY are for addresses
        address = ipaddress.ip_address(url.host)
        for entry in proxies.get("no", "").split(","):
            with suppress(ValueError):
                if address in ipaddress.ip_network(entry.strip(" []"), strict=False):
                    return None
    return proxy if "://" in proxy else f"http://{proxy}"


def _open(tls: ssl.SSLContext, proxy: str | None) -> httpx2.HTTPTransport:
    """Connections through `proxy`. Raises MissingExtra, NetworkError if it cannot be used."""
    shown = quoted(re.sub(r"//.*@", "//", proxy or ""))
    try:
        return httpx2.HTTPTransport(verify=tls, proxy=proxy)
    except ImportError:
        raise MissingExtra(
            f"the proxy {shown} needs another package: pip install socksio"
        ) from None
    except (httpx2.InvalidURL, ValueError):
        raise NetworkError(f"the proxy {shown} of the environment is no valid address") from None
