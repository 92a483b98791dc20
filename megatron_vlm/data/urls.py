"""Fetch images and audio from http(s) URLs that stand in data, which may not be ours to trust.

One deadline holds for all of it, redirects included, but for looking up a name, which nothing ends. Addresses inside
the machine's own network are refused, also behind a public name or a redirect: whoever writes the data must not reach
what only this machine can. The address that is checked is the one that is connected to. A proxy that the environment
names does its own looking up.
"""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import socket
import threading
import time
import urllib.error
import urllib.request
from enum import IntEnum
from typing import Any

from megatron_vlm.errors import DataError

DEADLINE_SECONDS = 20.0
LONGEST_URL_SHOWN = 200
_BLOCK_BYTES = 2**16


class UrlAccess(IntEnum):
    """Which URLs are fetched."""

    NONE = 0
    PUBLIC = 1
    ALL = 2


def fetch(url: str, kind: str, row_name: str, access: UrlAccess, most_bytes: int) -> bytes:
    """Download a URL.

    Args:
        url: http or https.
        kind: what is fetched, for error messages.
        row_name: file and line of the row, for error messages.
        access: `PUBLIC` or `ALL`.
        most_bytes: largest body.

    Raises:
        DataError: that fails in any way, takes longer than `DEADLINE_SECONDS`, or leads to a private address.
    """
    fetching = _Fetching(access)
    watchdog = threading.Timer(DEADLINE_SECONDS, fetching.end)
    watchdog.daemon = True
    watchdog.start()
    try:
        return fetching.body(url, most_bytes)
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = _reason(error, fetching.is_ended)
    finally:
        watchdog.cancel()
        fetching.close()
    fix = "download it and name the file"
    if fetching.is_refused:
        fix += ", or set data.allow_private_urls to true"
    raise DataError(f"{kind} {shown(url)} cannot be fetched ({reason})", row_name, fix)


def shown(url: str) -> str:
    """Shorten a URL for messages."""
    return url if len(url) <= LONGEST_URL_SHOWN else f"{url[:LONGEST_URL_SHOWN]}..."


class _Fetching:
    """One download: its sockets, so that it can be ended, and whether an address was refused."""

    def __init__(self, access: UrlAccess) -> None:
        self.access = access
        self.end_time = time.monotonic() + DEADLINE_SECONDS
        self.is_ended = self.is_refused = False
        self._sockets: list[socket.socket] = []

    def body(self, url: str, most_bytes: int) -> bytes:
        opener = urllib.request.OpenerDirector()
        for handler in (
            urllib.request.ProxyHandler(),
            _Handler(self),
            urllib.request.HTTPDefaultErrorHandler(),
            urllib.request.HTTPRedirectHandler(),
            urllib.request.HTTPErrorProcessor(),
            urllib.request.UnknownHandler(),
        ):
            opener.add_handler(handler)
        response = opener.open(url, timeout=DEADLINE_SECONDS)
        if response is None:
            raise ValueError("it is no http(s) URL")
        with response:
            blocks, left = [], most_bytes + 1
            while left > 0 and (block := response.read(min(left, _BLOCK_BYTES))):
                blocks.append(block)
                left -= len(block)
        if left and response.length:
            raise ValueError("it ends early")
        if left == 0:
            raise ValueError(f"it has more than {most_bytes} bytes")
        return b"".join(blocks)

    def connect(self, address: tuple[str, int], timeout: Any = None, source: Any = None) -> socket.socket:
        """`socket.create_connection` to the first address that answers, of which none may be private."""
        found = socket.getaddrinfo(*address, type=socket.SOCK_STREAM)
        private = next((entry[4][0] for entry in found if _is_private(str(entry[4][0]))), None)
        if private is not None and self.access < UrlAccess.ALL:
            self.is_refused = True
            raise OSError(f"{address[0]} is the private address {private}")
        return self._connect_to_any([entry[4][:2] for entry in found])

    def connect_to_proxy(self, address: tuple[str, int], timeout: Any = None, source: Any = None) -> socket.socket:
        return self._connect_to_any([address])

    def _connect_to_any(self, addresses: list[Any]) -> socket.socket:
        last = OSError("the name has no address")
        for address in addresses:
            try:
                connection = socket.create_connection(address, max(0.1, self.end_time - time.monotonic()))
            except OSError as error:
                last = error
                continue
            self._sockets.append(connection.dup())  # TLS takes the connection itself away
            if self.is_ended:  # while it was made
                self.end()
            return connection
        raise last

    def close(self) -> None:
        for connection in self._sockets:
            connection.close()

    def end(self) -> None:
        """Make whatever waits for a socket return."""
        self.is_ended = True
        for connection in self._sockets:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


class _Handler(urllib.request.AbstractHTTPHandler):
    """Opens http and https URLs by connections of a `_Fetching`."""

    def __init__(self, fetching: _Fetching) -> None:
        super().__init__()
        self.fetching = fetching

    def http_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(self._maker(http.client.HTTPConnection, request), request)

    def https_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(self._maker(http.client.HTTPSConnection, request), request)

    def _maker(self, kind: Any, request: urllib.request.Request) -> Any:
        # Of an https URL behind a proxy, the host is the proxy's and the target is asked of it by CONNECT.
        is_proxied = request.has_proxy() or getattr(request, "_tunnel_host", None) is not None
        connect = self.fetching.connect_to_proxy if is_proxied else self.fetching.connect

        def make(host: str, **options: Any) -> Any:
            connection = kind(host, **options)
            connection._create_connection = connect
            return connection

        return make

    http_request = urllib.request.AbstractHTTPHandler.do_request_
    https_request = urllib.request.AbstractHTTPHandler.do_request_


def _is_private(address: str) -> bool:
    ip = ipaddress.ip_address(address.partition("%")[0])
    inner = getattr(ip, "ipv4_mapped", None) or getattr(ip, "sixtofour", None) or ip
    return not inner.is_global or inner.is_multicast


def _reason(error: Exception, is_ended: bool) -> str:
    """Return why, on one line of bounded length."""
    if isinstance(error, urllib.error.URLError) and isinstance(error.reason, Exception):
        error = error.reason
    if is_ended or isinstance(error, TimeoutError):  # the sockets' own time-outs end with the deadline too
        return f"it takes longer than {DEADLINE_SECONDS:g} s"
    text = " ".join(str(error).split()) or type(error).__name__
    return text[:LONGEST_URL_SHOWN]
