"""This host's own way to an address: whether its interface has a link, and whether the gateway on it answers.

Of gateways only those of IPv4 are looked at, in the main table of routes: `/proc/net` has no others.
"""

from __future__ import annotations

import fcntl
import socket
import struct
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Literal

import msgspec
import trio

PROC_NET = Path("/proc/net")
GIVEN_UP_S = 9.0
"""A neighbour that was known is asked again 5 s after the last word from it, three times, a second each."""
_RTF_UP, _RTF_REJECT = 0x1, 0x200  # linux/route.h
_ATF_COM = 0x2  # linux/if_arp.h: the neighbour has answered
_SIOCGIFFLAGS, _IFF_RUNNING = 0x8913, 0x40  # linux/sockios.h, linux/if.h
_DISCARD_PORT = 9


class Way(msgspec.Struct, frozen=True):
    """The interface by which an address is reached, and the nearest machine that should answer on it."""

    interface: str
    gateway: IPv4Address | None


def way_to(address: IPv4Address, route_text: str, *, byteorder: Literal["little", "big"] = sys.byteorder) -> Way | None:
    """The way that /proc/net/route has for an address: the longest prefix, then the least metric.

    What is on a network of this host has no gateway on its way: then it is the one that others are reached by there.
    """
    routes = list(_routes(route_text, byteorder))
    fitting = [route for route in routes if address in route[2]]
    if not fitting:
        return None
    way = max(fitting, key=lambda route: (route[2].prefixlen, -route[3]))[:2]
    beside = (gateway for interface, gateway, *_ in routes if interface == way[0] and gateway is not None)
    return Way(way[0], way[1] or next(beside, None))


def _routes(
    text: str, byteorder: Literal["little", "big"]
) -> Iterator[tuple[str, IPv4Address | None, IPv4Network, int]]:
    for line in text.splitlines()[1:]:
        interface, destination, gateway, flags, _refs, _use, metric, mask, *_rest = line.split()
        if int(flags, 16) & (_RTF_UP | _RTF_REJECT) == _RTF_UP:
            first, via, bits = (
                IPv4Address(int(part, 16).to_bytes(4, byteorder)) for part in (destination, gateway, mask)
            )
            yield interface, via if int(via) else None, IPv4Network((int(first), str(bits))), int(metric)


def is_mute(gateway: IPv4Address, interface: str, arp_text: str) -> bool:
    """Whether /proc/net/arp says that a neighbour was asked for and has not answered."""
    entries = (line.split() for line in arp_text.splitlines()[1:])
    return any(
        (entry[0], entry[-1]) == (str(gateway), interface) and not int(entry[2], 16) & _ATF_COM for entry in entries
    )


def has_link(interface: str) -> bool:
    """Whether an interface is up and has a carrier; True where nobody can tell."""
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        answer = fcntl.ioctl(asking, _SIOCGIFFLAGS, struct.pack("16sH22x", interface.encode(), 0))
        return bool(struct.unpack_from("H", answer, 16)[0] & _IFF_RUNNING)
    return True


async def why_away(host: str, *, proc_net: Path = PROC_NET, links: Callable[[str], bool] = has_link) -> str | None:
    """What of this host's own network keeps a host from being reached; None when nothing says that it does.

    Takes up to `GIVEN_UP_S`, in which the gateway is sent the beginning of a connection that nobody needs.
    """
    way = await _way_of(host, proc_net)
    if way is None:
        return None
    if not links(way.interface):
        return f"the interface {way.interface} of this host has no link"
    if way.gateway is None or await _is_answering(way.gateway):
        return None
    if is_mute(way.gateway, way.interface, _text(proc_net / "arp")):
        return f"the gateway {way.gateway} on {way.interface} does not answer this host"
    return None


async def _way_of(host: str, proc_net: Path) -> Way | None:
    with trio.move_on_after(GIVEN_UP_S), suppress(OSError):
        for *_, address in await trio.socket.getaddrinfo(host, 0, family=socket.AF_INET, type=socket.SOCK_STREAM):
            return way_to(IPv4Address(address[0]), _text(proc_net / "route"))
    return None


async def _is_answering(gateway: IPv4Address) -> bool:
    """Whether anything came back, be it a no. That nothing did may be a firewall's doing."""
    with trio.move_on_after(GIVEN_UP_S), trio.socket.socket(socket.AF_INET, socket.SOCK_STREAM) as knocking:
        try:
            await knocking.connect((str(gateway), _DISCARD_PORT))
        except ConnectionRefusedError:
            return True
        except OSError:
            return False
        return True
    return False


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii")
    except OSError:
        return ""
