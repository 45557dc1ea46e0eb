"""Bodies of HTTP responses, read as streams, without trust in the server.

A redirect is followed to the same host, or to a host whose addresses are all public. So a server cannot make this
machine send requests to itself, to its network or to a cloud's metadata service. A redirect from https to http is
refused.
"""

import asyncio
import ipaddress
import socket
from typing import Any

from aiohttp import ClientResponse, ClientSession, ClientTimeout, TCPConnector, ThreadedResolver
from aiohttp.abc import ResolveResult
from fsspec.asyn import sync
from yarl import URL

MAX_REDIRECTS = 5
REDIRECTS = (301, 302, 303, 307, 308)
NAT64 = ipaddress.ip_network("64:ff9b::/96")  # IPv4 addresses as IPv6-only networks reach them
AS_IT_IS = {"Accept-Encoding": "identity"}


class RefusedRedirect(ValueError):
    """A redirect that is not followed."""


class HttpBody:
    """The body of one response. Close it after use.

    files: fsspec's file system for http, which has the session, with the user's settings.
    stall_s: seconds to connect and to wait for more bytes. The headers must arrive within twice as many.

    Raises FileNotFoundError (status 404), RefusedRedirect, OSError (no answer in time), aiohttp's ClientError.
    """

    def __init__(self, files: Any, url: str, stall_s: float) -> None:
        self._loop = files.loop
        self._response: ClientResponse | None = None
        self._strangers: ClientSession | None = None
        self._limits = ClientTimeout(total=None, sock_connect=stall_s, sock_read=stall_s)
        try:
            sync(self._loop, self._respond, files, url, 2 * stall_s)
        except BaseException:
            self.close()
            raise

    def read(self, size: int) -> bytes:
        """Return at most `size` bytes, as soon as there are some; b"" at the end."""
        assert self._response is not None, "it was refused"
        return sync(self._loop, self._response.content.read, size)

    def close(self) -> None:
        sync(self._loop, self._close)

    def __enter__(self) -> "HttpBody":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def _close(self) -> None:
        if self._response is not None:
            self._response.close()
        if self._strangers is not None:
            await self._strangers.close()

    async def _respond(self, files: Any, url: str, limit_s: float) -> None:
        try:
            await asyncio.wait_for(self._follow(files, files.encode_url(url)), limit_s)
        except TimeoutError:
            raise OSError(f"no answer within {limit_s:g} s") from None

    async def _follow(self, files: Any, start: URL) -> None:
        """Set the response to `start`, or to the last of its redirects. Raises as the class does."""
        url = start
        for _ in range(MAX_REDIRECTS + 1):
            if _is_same_host(start, url):
                session, options = await files.set_session(), dict(files.kwargs)
            else:
                self._strangers = self._strangers or ClientSession(connector=_public_connector())
                session, options = self._strangers, {}  # the user's headers are for the first host only
            options["headers"] = {**options.get("headers", {}), **AS_IT_IS}
            self._response = response = await session.get(url, allow_redirects=False, timeout=self._limits, **options)
            if response.status == 404:
                raise FileNotFoundError(str(start))
            response.raise_for_status()
            if response.status not in REDIRECTS:
                return
            place = response.headers.get("Location", "")
            response.close()
            url = _next_url(start, url, place)
        raise RefusedRedirect(f"it redirects more than {MAX_REDIRECTS} times")


def _next_url(start: URL, url: URL, place: str) -> URL:
    """Return the URL that a redirect from `url` names. Raises RefusedRedirect: it is not followed."""
    try:
        following = url.join(URL(place))
        host = following.host or ""
    except ValueError:
        raise RefusedRedirect(f"it redirects to {place[:200]!r}, which is not a valid URL") from None
    if not place or following.scheme not in ("http", "https") or not host:
        raise RefusedRedirect(f"it redirects to {place[:200]!r}, which is not a URL of http or https")
    if start.scheme == "https" and following.scheme == "http":
        raise RefusedRedirect(f"it redirects from https to {str(following)[:200]!r}")
    if not _is_same_host(start, following) and _is_literal(host) and not is_public(host):
        raise _refused(host)
    return following


def _refused(host: str, address: str = "") -> RefusedRedirect:
    named = f"{host!r} ({address})" if address else repr(host)
    return RefusedRedirect(
        f"it redirects to {named}, another host, which is not public: if you trust it, give its URL instead"
    )


def _is_same_host(start: URL, url: URL) -> bool:
    """Return whether a URL has the host and port of the first one, or https on the same host."""
    return url.host == start.host and (url.port == start.port or url.scheme == "https")


def _is_literal(host: str) -> bool:
    """Return whether a host is an address (127.0.0.1, 0x7f.1, 2130706433, ::1), which is not resolved, not a name."""
    return ":" in host or host.rstrip(".").rpartition(".")[2][:1].isdigit()


def is_public(address: str) -> bool:
    """Return whether an IP address belongs to the public internet; False for text that is not a plain address."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv6Address):
        embedded = ip.ipv4_mapped or ip.sixtofour or (ipaddress.IPv4Address(int(ip) % 2**32) if ip in NAT64 else None)
        ip = embedded or ip
    return ip.is_global and not ip.is_multicast


class _PublicResolver(ThreadedResolver):
    """A resolver that refuses names with an address that is not public."""

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        found = await super().resolve(host, port, family)
        for result in found:
            if not is_public(result["host"]):
                raise _refused(host, result["host"])
        return found


def _public_connector() -> TCPConnector:
    return TCPConnector(resolver=_PublicResolver())
