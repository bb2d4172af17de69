"""Names: looked up in threads of their own, and told apart by who answers for them."""

from __future__ import annotations

import socket
from functools import partial
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import trio

# A resolver that is away keeps each for some ten seconds, whoever has given up waiting; other work has other threads.
LOOKUPS_AT_ONCE = 32
HOSTS = Path("/etc/hosts")


class Lookups(trio.abc.HostnameResolver):
    """Resolves for a whole run of Trio, see `trio.socket.set_custom_hostname_resolver`."""

    def __init__(self) -> None:
        self._limiter = trio.CapacityLimiter(LOOKUPS_AT_ONCE)

    async def getaddrinfo(
        self,
        host: bytes | None,
        port: bytes | str | int | None,
        family: int = 0,
        type: int = 0,  # noqa: A002 -- the interface's name
        proto: int = 0,
        flags: int = 0,
    ) -> list[Any]:
        """As the standard library's, abandoned when cancelled."""
        ask = partial(socket.getaddrinfo, host, port, family, type, proto, flags)
        return await trio.to_thread.run_sync(ask, abandon_on_cancel=True, limiter=self._limiter)

    async def getnameinfo(self, sockaddr: Any, flags: int) -> tuple[str, str]:
        """As the standard library's, abandoned when cancelled."""
        ask = partial(socket.getnameinfo, sockaddr, flags)
        return await trio.to_thread.run_sync(ask, abandon_on_cancel=True, limiter=self._limiter)


async def is_answered(name: str, deadline_s: float) -> bool:
    """Whether a resolver answers for a name within a time, be it that there is no such name."""
    with trio.move_on_after(deadline_s):
        try:
            await trio.socket.getaddrinfo(name, 80, type=socket.SOCK_STREAM)
        except socket.gaierror as error:
            return error.errno in (socket.EAI_NONAME, socket.EAI_NODATA, socket.EAI_ADDRFAMILY)
        return True
    return False


def is_own(host: str, hosts: Path = HOSTS) -> bool:
    """Whether no network is needed for a host: loopback, or a name in the hosts file."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        pass
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        lines = hosts.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return False
    return any(host in line.partition("#")[0].lower().split()[1:] for line in lines)


def is_address(host: str) -> bool:
    """Whether a host is an address, which nobody has to look up."""
    try:
        ip_address(host)
    except ValueError:
        return False
    return True
