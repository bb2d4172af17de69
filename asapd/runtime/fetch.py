"""Outbound GET and POST with every bound that a hostile or broken server makes necessary.

A name is resolved here, its addresses are held against the allowed networks, and exactly a checked
address is connected to: a name that answers differently the second time gains nothing. TLS and the
Host header keep the name.
"""

from __future__ import annotations

import errno
import math
import os
import re
import socket
import ssl
import sys
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from pathlib import Path
from typing import Literal, Self
from urllib.parse import SplitResult, urlsplit

import h11
import msgspec
import trio

from asapd.runtime.http1 import BrokenExchangeError, ServerConnection
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
        self._user_agent = user_agent.encode()
        self._allowed = tuple(allowed_networks)
        # Made once: it loads all authorities.
        self._tls = ssl.create_default_context() if ssl_context is None else ssl_context
        self._tls.set_alpn_protocols(["http/1.1"])
        self._idle = IdleConnections(max_origins=max_idle, keepalive_s=keepalive_s)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close the idle connections."""
        self._idle.close()
        await trio.lowlevel.cancel_shielded_checkpoint()

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
            b"GET", url, headers, None, deadline_s, lambda *answer: _read(*answer, max_bytes=max_bytes)
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
        read: Callable[[ServerConnection, h11.Response, float], Awaitable[Fetched | FetchFailed]],
    ) -> Fetched | FetchFailed:
        target = _target(url)
        if isinstance(target, FetchFailed):
            return target
        path = (target.path or "/") + (f"?{target.query}" if target.query else "")
        sent = [
            (b"Host", target.netloc.encode()),
            (b"User-Agent", self._user_agent),
            # Without it a few compressed bytes could stand for gigabytes.
            (b"Accept-Encoding", b"identity"),
            *headers,
        ]
        started_s = trio.current_time()
        attempt = _Attempt()
        with trio.move_on_after(deadline_s):
            while True:
                attempt = _Attempt()
                with self._idle.using(f"{target.scheme}://{target.netloc}") as place:
                    connection = place.take() or await self._connect(target, attempt)
                    if isinstance(connection, FetchFailed):
                        return connection
                    try:
                        await connection.send(method, path.encode(), sent, body)
                        attempt.phase = "waiting for the answer"
                        response = await connection.receive_head()
                        attempt.answered, attempt.phase = True, _BODY
                        return await read(connection, response, started_s)
                    except BrokenExchangeError as error:
                        if not attempt.may_repeat:
                            return FetchFailed("protocol", f"{attempt.phase} failed: {error}")
                    finally:
                        place.give(connection)
        # A server that answers and then drips is another trouble than one that does not answer.
        reason: Reason = "slow_body" if attempt.phase == _BODY else "timeout"
        detail = f"no whole answer within {deadline_s:g} s: {attempt.phase} took too long"
        return FetchFailed(reason, detail, attempt.doubt)

    async def _connect(self, target: SplitResult, attempt: _Attempt) -> ServerConnection | FetchFailed:
        """A fresh connection to one of the allowed addresses of a server."""
        attempt.reused = False
        host, is_tls = target.hostname or "", target.scheme == "https"
        stream = await _open(host, target.port or (443 if is_tls else 80), self._allowed, attempt)
        if isinstance(stream, FetchFailed):
            return stream
        if is_tls:
            attempt.phase = "the TLS handshake"
            secure = trio.SSLStream(stream, self._tls, server_hostname=host, https_compatible=True)
            try:
                await secure.do_handshake()
            except trio.BrokenResourceError as error:
                stream.socket.close()
                return FetchFailed("tls", str(error.__cause__ or "the connection was closed in the handshake"))
            except trio.Cancelled:
                stream.socket.close()
                raise
            attempt.phase = _SENDING
            return ServerConnection(secure)
        attempt.phase = _SENDING
        return ServerConnection(stream)


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


async def _open(host: str, port: int, allowed: Sequence[Network], attempt: _Attempt) -> trio.SocketStream | FetchFailed:
    """Connect to one of the addresses of a host, in turn.

    Raises:
        OSError: it is this host that cannot reach any.
    """
    attempt.phase = _LOOKING_UP
    try:
        found = await trio.socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        if error.errno in _ANSWERS:
            return FetchFailed("dns", f"{host} has no address: {error}")
        detail = f"no resolver answers for {host}: {error}"
        return FetchFailed("dns", detail, "resolver")
    except UnicodeError as error:
        return FetchFailed("dns", f"{host} has no address: {error}")
    attempt.phase = _CONNECTING
    usable = [(family, where) for family, _, _, _, where in found if _is_allowed(str(where[0]), allowed)]
    if not usable:
        addresses = ", ".join(dict.fromkeys(str(where[0]) for *_, where in found))
        detail = f"{host} is at {addresses}, outside the allowed networks"
        return FetchFailed("not_allowed", detail)
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
                # Trio's own text repeats the address.
                failure = f"{where[0]} port {port}: {os.strerror(error.errno) if error.errno else error}"
                if error.errno in _OWN_FAILURES:
                    own_failures.append(error)
                elif error.errno not in _SILENCES:
                    is_silent = False
                continue
            attempt.phase = _SENDING
            return trio.SocketStream(connection)
        failure = f"{where[0]} port {port}: no answer"
    if len(own_failures) == len(usable):
        raise own_failures[0]
    return FetchFailed("refused", failure, "network" if is_silent else None)


def _is_allowed(address: str, allowed: Sequence[Network]) -> bool:
    ip: IPv4Address | IPv6Address = ip_address(address)
    if isinstance(ip, IPv6Address) and ip.ipv4_mapped is not None:
        ip = ip.ipv4_mapped
    return not ip.is_link_local and any(ip in network for network in allowed)


def _target(url: str) -> SplitResult | FetchFailed:
    try:
        parts = urlsplit(url)
        usable = bool(_URL_CHARACTERS.match(url) and parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    if not usable or parts.scheme not in ("http", "https") or "@" in parts.netloc:
        return FetchFailed("not_allowed", "only http and https addresses, without user name or password, are fetched")
    return parts


async def _read(
    connection: ServerConnection, response: h11.Response, started_s: float, *, max_bytes: int
) -> Fetched | FetchFailed:
    if 300 <= response.status_code < 400:
        return _redirected(response)
    coding = next((value for name, value in response.headers if name == b"content-encoding"), b"identity")
    if coding.lower() != b"identity":
        return FetchFailed("protocol", "answered with a compressed body, which was not asked for")
    parts: list[bytes] = []
    size = 0
    while (part := await connection.receive_part()) is not None:
        size += len(part)
        if size > max_bytes:
            return FetchFailed("too_large", f"the body is larger than {max_bytes} bytes")
        parts.append(part)
    return _fetched(response, b"".join(parts), started_s)


async def _read_status(connection: ServerConnection, response: h11.Response, started_s: float) -> Fetched | FetchFailed:
    """The answer without its body: a short one is read, so that the connection can be kept, and any other let go."""
    if 300 <= response.status_code < 400:
        return _redirected(response)
    answer = _fetched(response, b"", started_s)
    size = 0
    # What breaks off now has said what it had to say.
    with trio.move_on_after(_DRAIN_S), suppress(BrokenExchangeError):
        while size <= _DRAIN_BYTES and (part := await connection.receive_part()) is not None:
            size += len(part)
    return answer


def _redirected(response: h11.Response) -> FetchFailed:
    return FetchFailed("redirect", f"answered with status {response.status_code}; redirects are not followed")


def _fetched(response: h11.Response, body: bytes, started_s: float) -> Fetched:
    headers = {
        name.decode("ascii"): value.decode("latin-1") for name, value in response.headers if name in _KEPT_HEADERS
    }
    return Fetched(response.status_code, body, math.ceil((trio.current_time() - started_s) * 1000), headers)


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
