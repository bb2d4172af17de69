"""Outbound GET and POST with every bound that a hostile or broken server makes necessary.

A name is resolved here, its addresses are held against the allowed networks, and exactly a checked
address is connected to: a name that answers differently the second time gains nothing. TLS and the
Host header keep the name.
"""

from __future__ import annotations

import errno
import math
import re
import socket
import ssl
import sys
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import aclosing
from contextvars import ContextVar
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from pathlib import Path
from typing import Any, Literal, Self
from urllib.parse import SplitResult, urlsplit

import httpcore2
import msgspec
import trio

from asapd.runtime.idle import IdleConnections

Network = IPv4Network | IPv6Network
Reason = Literal["timeout", "slow_body", "refused", "dns", "not_allowed", "too_large", "tls", "redirect", "protocol"]

Doubt = Literal["resolver", "network"]

LOOPBACK: tuple[Network, ...] = (ip_network("127.0.0.0/8"), ip_network("::1/128"))

_DRAIN_BYTES = 4096
_DRAIN_S = 1.0
_KEPT_HEADERS = frozenset({b"content-type", b"date", b"etag", b"retry-after"})
_RTF_UP, _RTF_GATEWAY, _RTF_REJECT = 0x1, 0x2, 0x200  # linux/route.h
_LOOKING_UP, _CONNECTING, _SENDING = "looking up the name", "connecting", "sending the request"
_BODY = "reading the body"
_URL_CHARACTERS = re.compile(r"[!-~]+\Z")


class Fetched(msgspec.Struct, frozen=True):
    """A whole answer, of any status but 3xx.

    `elapsed_ms` counts from the call to the last byte, connecting included, rounded up. `headers` has
    lower-case names and only content-type, date, etag and retry-after.
    """

    status: int
    body: bytes
    elapsed_ms: int
    headers: dict[str, str]


class FetchFailed(msgspec.Struct, frozen=True):
    """No whole answer. `reason` is stable, `detail` is for people.

    `doubt` is what of this host may have failed instead of the other: its resolver gave no answer, or nothing came back
    over its network.
    """

    reason: Reason
    detail: str
    doubt: Doubt | None = None


class _UnreachableError(Exception):
    """The way to the server ended before HTTP began; carries the outcome through the HTTP library."""

    def __init__(self, failed: FetchFailed) -> None:
        super().__init__(failed.detail)
        self.failed = failed


# What the kernel says before a packet has left the host.
_OWN_FAILURES = frozenset({errno.ENETDOWN, errno.ENETUNREACH, errno.EADDRNOTAVAIL, errno.ENOBUFS})
# What it says when nothing answered, next door or farther off.
_SILENCES = frozenset({errno.EHOSTUNREACH, errno.EHOSTDOWN, errno.ETIMEDOUT})
# A resolver that says that there is no such name, or none of its addresses, has answered.
_ANSWERS = frozenset({socket.EAI_NONAME, socket.EAI_NODATA, socket.EAI_ADDRFAMILY})


class Fetcher:
    """GETs and POSTs with kept-alive connections; use as an async context manager, or call `aclose`.

    Redirects are not followed, cookies not kept, proxy settings not looked at, and certificates
    verified by `ssl_context` (default: the authorities OpenSSL finds on the host). Connections to up to
    `max_idle` servers stay open, each for `keepalive_s` at most.
    """

    def __init__(
        self,
        allowed_networks: Sequence[Network],
        *,
        ssl_context: ssl.SSLContext | None = None,
        user_agent: str = "asapd",
        max_idle: int = 64,
        keepalive_s: float = 75.0,
    ) -> None:
        self._user_agent = user_agent
        # Made once: a pool would load all authorities again for each connection.
        context = ssl.create_default_context() if ssl_context is None else ssl_context
        network = _GuardedNetwork(tuple(allowed_networks))

        def pool(idle: int) -> httpcore2.AsyncConnectionPool:
            return httpcore2.AsyncConnectionPool(
                ssl_context=context,
                max_connections=None,  # the caller bounds how many run at once; a queue here would eat their deadlines
                max_keepalive_connections=idle,
                keepalive_expiry=keepalive_s,
                network_backend=network,
            )

        self._idle = IdleConnections(pool, max_origins=max_idle, keepalive_s=keepalive_s)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close the idle connections."""
        await self._idle.aclose()

    async def get(
        self, url: str, *, deadline_s: float, max_bytes: int, accept: str = "application/json"
    ) -> Fetched | FetchFailed:
        """GET `url` within `deadline_s` seconds, everything included, and at most `max_bytes` of body.

        Cancellation passes through and closes the connection.

        Raises:
            OSError: this host failed, not the other: it has no descriptor left, or no route or interface to anywhere.
        """
        headers = [(b"Accept", accept.encode())]
        return await self._exchange(
            b"GET", url, headers, None, deadline_s, lambda response, started_s: _read(response, max_bytes, started_s)
        )

    async def post(
        self, url: str, body: bytes, *, headers: Mapping[str, str], deadline_s: float
    ) -> Fetched | FetchFailed:
        """POST `body` within `deadline_s` seconds; the answer counts by its status, and its body is not kept.

        On a kept-alive connection that the server closed unanswered it is sent once more, so a receiver tells repeats
        by an id. Cancellation passes through and closes the connection.

        Raises:
            OSError: as `get`.
        """
        given = [(name.encode(), value.encode()) for name, value in headers.items()]
        length = [(b"Content-Length", str(len(body)).encode())]
        return await self._exchange(b"POST", url, given + length, body, deadline_s, _read_status)

    async def _exchange(
        self,
        method: bytes,
        url: str,
        headers: list[tuple[bytes, bytes]],
        body: bytes | None,
        deadline_s: float,
        read: Callable[[httpcore2.Response, float], Awaitable[Fetched | FetchFailed]],
    ) -> Fetched | FetchFailed:
        target = _target(url)
        if isinstance(target, FetchFailed):
            return target
        sent = [
            (b"Host", target.netloc.encode()),
            (b"User-Agent", self._user_agent.encode()),
            # Without it a few compressed bytes could stand for gigabytes.
            (b"Accept-Encoding", b"identity"),
            *headers,
        ]
        started_s = trio.current_time()
        attempt = _Attempt()
        with trio.move_on_after(deadline_s):
            while True:
                attempt = _Attempt()
                _ATTEMPT.set(attempt)
                try:
                    async with (
                        self._idle.using(f"{target.scheme}://{target.netloc}") as pool,
                        pool.stream(
                            method,
                            url.partition("#")[0],
                            headers=sent,
                            content=body,
                            extensions={"trace": attempt.trace},
                        ) as response,
                    ):
                        return await read(response, started_s)
                except _UnreachableError as error:
                    return error.failed
                except (httpcore2.NetworkError, httpcore2.ProtocolError) as error:
                    if attempt.may_repeat:
                        continue
                    return FetchFailed("protocol", f"{attempt.phase} failed: {str(error) or type(error).__name__}")
        # A server that answers and then drips is another trouble than one that does not answer.
        reason: Reason = "slow_body" if attempt.phase == _BODY else "timeout"
        detail = f"no whole answer within {deadline_s:g} s: {attempt.phase} took too long"
        return FetchFailed(reason, detail, attempt.doubt)


class _Attempt:
    """How far one attempt came."""

    def __init__(self) -> None:
        self.phase = _SENDING
        self.reused = True
        self.answered = False
        self.is_near = False

    @property
    def may_repeat(self) -> bool:
        # RFC 9112 9.3.1: a server may close an idle connection in the moment it is used again. A GET may then be
        # repeated, and a POST whose receiver knows it by its id. Each failure takes one idle connection away and a
        # fresh one is not repeated, so this ends.
        return self.reused and not self.answered

    @property
    def doubt(self) -> Doubt | None:
        """What of this host may have failed when nothing more came."""
        if self.phase == _LOOKING_UP:
            return "resolver"
        # A connection from before tells nothing of now.
        is_silent = self.phase == _CONNECTING or (self.reused and not self.answered)
        return "network" if is_silent and not self.is_near else None

    async def trace(self, event: str, info: dict[str, Any]) -> None:  # noqa: ARG002 -- the library's signature
        match event:
            case "connection.connect_tcp.started":
                self.reused = False
            case "connection.start_tls.started":
                self.phase = "the TLS handshake"
            case "http11.receive_response_headers.started":
                self.phase = "waiting for the answer"
            case "http11.receive_response_headers.complete":
                self.answered = True
                self.phase = _BODY


_ATTEMPT: ContextVar[_Attempt] = ContextVar("attempt")
"""What connects does so in the task of the attempt, but the HTTP library passes nothing on to it."""


class _GuardedNetwork(httpcore2.AsyncNetworkBackend):
    def __init__(self, allowed: tuple[Network, ...]) -> None:
        self._allowed = allowed

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ARG002 -- the deadline around the whole operation bounds this
        local_address: str | None = None,  # noqa: ARG002 -- the library's signature
        socket_options: Iterable[httpcore2.SOCKET_OPTION] | None = None,  # noqa: ARG002 -- the library's signature
    ) -> httpcore2.AsyncNetworkStream:
        attempt = _ATTEMPT.get()
        attempt.phase = _LOOKING_UP
        try:
            found = await trio.socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except socket.gaierror as error:
            if error.errno in _ANSWERS:
                raise _UnreachableError(FetchFailed("dns", f"{host} has no address: {error}")) from None
            detail = f"no resolver answers for {host}: {error}"
            raise _UnreachableError(FetchFailed("dns", detail, "resolver")) from None
        except UnicodeError as error:
            raise _UnreachableError(FetchFailed("dns", f"{host} has no address: {error}")) from None
        attempt.phase = _CONNECTING
        usable = [(family, where) for family, _, _, _, where in found if self._is_allowed(str(where[0]))]
        if not usable:
            addresses = ", ".join(dict.fromkeys(str(where[0]) for *_, where in found))
            detail = f"{host} is at {addresses}, outside the allowed networks"
            raise _UnreachableError(FetchFailed("not_allowed", detail))
        attempt.is_near = any(ip_address(str(where[0])).is_loopback for _, where in usable)
        failure = ""
        is_silent = not attempt.is_near
        own_failures: list[OSError] = []
        for tried, (family, where) in enumerate(usable):
            # An address that swallows packets must leave time for those behind it; the last may use it all.
            left = len(usable) - tried
            share_s = (trio.current_effective_deadline() - trio.current_time()) / left if left > 1 else math.inf
            with trio.move_on_after(share_s):
                connection = trio.socket.socket(family, socket.SOCK_STREAM)
                try:
                    await connection.connect(where)
                except OSError as error:
                    connection.close()
                    failure = f"{where[0]} port {port}: {error.strerror or error}"
                    if error.errno in _OWN_FAILURES:
                        own_failures.append(error)
                    elif error.errno not in _SILENCES:
                        is_silent = False
                    continue
                attempt.phase = _SENDING
                return _Stream(trio.SocketStream(connection))
            failure = f"{where[0]} port {port}: no answer"
        if len(own_failures) == len(usable):
            raise own_failures[0]
        raise _UnreachableError(FetchFailed("refused", failure, "network" if is_silent else None))

    def _is_allowed(self, address: str) -> bool:
        ip: IPv4Address | IPv6Address = ip_address(address)
        if isinstance(ip, IPv6Address) and ip.ipv4_mapped is not None:
            ip = ip.ipv4_mapped
        return not ip.is_link_local and any(ip in network for network in self._allowed)


class _Stream(httpcore2.AsyncNetworkStream):
    def __init__(self, stream: trio.SocketStream | trio.SSLStream[trio.SocketStream]) -> None:
        self._stream = stream

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:  # noqa: ARG002 -- as above
        try:
            return bytes(await self._stream.receive_some(max_bytes))
        except trio.BrokenResourceError as error:
            raise httpcore2.ReadError("the connection was reset") from error

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:  # noqa: ARG002 -- as above
        try:
            await self._stream.send_all(buffer)
        except trio.BrokenResourceError as error:
            raise httpcore2.WriteError("the connection was reset") from error

    async def aclose(self) -> None:
        await self._stream.aclose()

    async def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,  # noqa: ARG002 -- as above
    ) -> httpcore2.AsyncNetworkStream:
        assert isinstance(self._stream, trio.SocketStream)
        secure = trio.SSLStream(self._stream, ssl_context, server_hostname=server_hostname, https_compatible=True)
        try:
            await secure.do_handshake()
        except trio.BrokenResourceError as error:
            self._stream.socket.close()
            detail = str(error.__cause__ or "the connection was closed in the handshake")
            raise _UnreachableError(FetchFailed("tls", detail)) from None
        except trio.Cancelled:
            # The library forgets a connection that is cancelled here, and leaves its socket open.
            self._stream.socket.close()
            raise
        return _Stream(secure)

    def get_extra_info(self, info: str) -> Any:
        if info == "is_readable":  # asked of an idle connection: readable means closed by the server
            stream = self._stream
            transport = stream.transport_stream if isinstance(stream, trio.SSLStream) else stream
            return transport.socket.is_readable()
        return None


def _target(url: str) -> SplitResult | FetchFailed:
    try:
        parts = urlsplit(url)
        usable = bool(_URL_CHARACTERS.match(url) and parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    if not usable or parts.scheme not in ("http", "https") or "@" in parts.netloc:
        return FetchFailed("not_allowed", "only http and https addresses, without user name or password, are fetched")
    return parts


async def _read(response: httpcore2.Response, max_bytes: int, started_s: float) -> Fetched | FetchFailed:
    if 300 <= response.status < 400:
        return FetchFailed("redirect", f"answered with status {response.status}; redirects are not followed")
    coding = next((value for name, value in response.headers if name.lower() == b"content-encoding"), b"identity")
    if coding.lower() != b"identity":
        return FetchFailed("protocol", "answered with a compressed body, which was not asked for")
    parts: list[bytes] = []
    size = 0
    async with aclosing(response.aiter_stream()) as chunks:
        async for chunk in chunks:
            size += len(chunk)
            if size > max_bytes:
                return FetchFailed("too_large", f"the body is larger than {max_bytes} bytes")
            parts.append(chunk)
    return _fetched(response, b"".join(parts), started_s)


async def _read_status(response: httpcore2.Response, started_s: float) -> Fetched | FetchFailed:
    """The answer without its body: a short one is read, so that the connection can be kept, and any other let go."""
    if 300 <= response.status < 400:
        return FetchFailed("redirect", f"answered with status {response.status}; redirects are not followed")
    answer = _fetched(response, b"", started_s)
    size = 0
    with trio.move_on_after(_DRAIN_S):
        try:
            async with aclosing(response.aiter_stream()) as chunks:
                async for chunk in chunks:
                    size += len(chunk)
                    if size > _DRAIN_BYTES:
                        break
        except (httpcore2.NetworkError, httpcore2.ProtocolError):
            pass  # it has said what it had to say
    return answer


def _fetched(response: httpcore2.Response, body: bytes, started_s: float) -> Fetched:
    headers = {
        name.lower().decode("ascii"): value.decode("latin-1")
        for name, value in response.headers
        if name.lower() in _KEPT_HEADERS
    }
    return Fetched(response.status, body, math.ceil((trio.current_time() - started_s) * 1000), headers)


def host_networks(
    route_text: str, if_inet6_text: str, *, byteorder: Literal["little", "big"] = sys.byteorder
) -> list[Network]:
    """Loopback and the networks the host is connected to, from /proc/net/route and /proc/net/if_inet6.

    What lies behind a gateway, default routes and link-local networks are left out. /proc/net/route
    writes addresses in the byte order of the machine.
    """
    return list(dict.fromkeys([*LOOPBACK, *_ipv4_networks(route_text, byteorder), *_ipv6_networks(if_inet6_text)]))


def own_networks(proc_net: Path = Path("/proc/net")) -> list[Network]:
    """`host_networks` of this host as it is now; what cannot be read counts as empty."""
    texts = []
    for name in ("route", "if_inet6"):
        try:
            texts.append((proc_net / name).read_text(encoding="ascii"))
        except OSError:  # if_inet6 is missing where IPv6 is switched off
            texts.append("")
    return host_networks(texts[0], texts[1])


def _ipv4_networks(text: str, byteorder: Literal["little", "big"]) -> Iterator[Network]:
    for line in text.splitlines()[1:]:
        _interface, destination, _gateway, flags, _refs, _use, _metric, mask, *_rest = line.split()
        wanted = int(flags, 16) & (_RTF_UP | _RTF_GATEWAY | _RTF_REJECT) == _RTF_UP
        if wanted and int(mask, 16):
            numbers = [int(part, 16).to_bytes(4, byteorder) for part in (destination, mask)]
            network = IPv4Network((numbers[0], str(IPv4Address(numbers[1]))))
            if not network.is_link_local:
                yield network


def _ipv6_networks(text: str) -> Iterator[Network]:
    for line in text.splitlines():
        address, _index, prefix, *_rest = line.split()
        network = IPv6Network((int(address, 16), int(prefix, 16)), strict=False)
        if network.prefixlen and not network.is_link_local:
            yield network
