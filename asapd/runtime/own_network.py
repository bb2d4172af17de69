"""This host's own way to an address: whether its interface has a link, and whether the gateway on it answers.

The way is what the main table of routes says. Of a neighbour of IPv4 `/proc/net/arp` says whether it answers, of one of
IPv6 only the kernel's word to whoever connects to it.
"""

from __future__ import annotations

import errno
import fcntl
import socket
import struct
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from pathlib import Path
from typing import Literal

import msgspec
import trio

PROC_NET = Path("/proc/net")
GIVEN_UP_S = 9.0
"""A neighbour that was known is asked again 5 s after the last word from it, three times, a second each."""
UNREACHABLE_S = 4.0
"""One that is not known is asked for three times, a second each, before a connection to it is told."""
_ROUTES = {4: "route", 6: "ipv6_route"}
_RTF_UP, _RTF_REJECT = 0x1, 0x200  # linux/route.h
_ATF_COM = 0x2  # linux/if_arp.h: the neighbour has answered
_SIOCGIFFLAGS, _IFF_RUNNING = 0x8913, 0x40  # linux/sockios.h, linux/if.h
_DISCARD_PORT = 9

Address = IPv4Address | IPv6Address
_Route = tuple[str, Address | None, IPv4Network | IPv6Network, int]


class Way(msgspec.Struct, frozen=True):
    """The interface by which an address is reached, and the nearest machine that should answer on it."""

    interface: str
    gateway: Address | None


def way_to(address: Address, route_text: str, *, byteorder: Literal["little", "big"] = sys.byteorder) -> Way | None:
    """The way that /proc/net/route, or ipv6_route, has for an address: the longest prefix, then the least metric.

    What is on a network of this host has no gateway on its way: then it is the one that others are reached by there.
    """
    is_v4 = isinstance(address, IPv4Address)
    routes = list(_ipv4_routes(route_text, byteorder) if is_v4 else _ipv6_routes(route_text))
    fitting = [route for route in routes if address in route[2]]
    if not fitting:
        return None
    way = max(fitting, key=lambda route: (route[2].prefixlen, -route[3]))[:2]
    beside = (gateway for interface, gateway, *_ in routes if interface == way[0] and gateway is not None)
    return Way(way[0], way[1] or next(beside, None))


def _ipv4_routes(text: str, byteorder: Literal["little", "big"]) -> Iterator[_Route]:
    for line in text.splitlines()[1:]:
        interface, destination, gateway, flags, _refs, _use, metric, mask, *_rest = line.split()
        if int(flags, 16) & (_RTF_UP | _RTF_REJECT) == _RTF_UP:
            first, via, bits = (
                IPv4Address(int(part, 16).to_bytes(4, byteorder)) for part in (destination, gateway, mask)
            )
            yield interface, via if int(via) else None, IPv4Network((int(first), str(bits))), int(metric)


def _ipv6_routes(text: str) -> Iterator[_Route]:
    for line in text.splitlines():
        destination, prefix, _source, _its_prefix, gateway, metric, _refs, _use, flags, interface = line.split()
        if int(flags, 16) & (_RTF_UP | _RTF_REJECT) == _RTF_UP:
            via = IPv6Address(int(gateway, 16))
            network = IPv6Network((int(destination, 16), int(prefix, 16)))
            yield interface, via if int(via) else None, network, int(metric, 16)


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

    Of a host with several addresses every way has to be away. Takes up to 22 s, in which gateways are sent the
    beginning of connections that nobody needs.
    """
    reasons: list[str | None] = []

    async def look_at(way: Way) -> None:
        reasons.append(await _why(way, proc_net, links))

    async with trio.open_nursery() as nursery:
        for way in await _ways_to(host, proc_net):
            nursery.start_soon(look_at, way)
    return reasons[0] if reasons and None not in reasons else None


async def _ways_to(host: str, proc_net: Path) -> list[Way]:
    found: list[Way | None] = []
    with trio.move_on_after(GIVEN_UP_S), suppress(OSError):
        for *_, where in await trio.socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM):
            address = ip_address(str(where[0]).partition("%")[0])
            found.append(way_to(address, _text(proc_net / _ROUTES[address.version])))
    return list(dict.fromkeys(way for way in found if way is not None))


async def _why(way: Way, proc_net: Path, links: Callable[[str], bool]) -> str | None:
    if not links(way.interface):
        return f"the interface {way.interface} of this host has no link"
    match way.gateway:
        case None:
            is_away = False
        case IPv4Address() as gateway:
            is_away = await _knock(gateway, way.interface, GIVEN_UP_S) != "answers" and is_mute(
                gateway, way.interface, _text(proc_net / "arp")
            )
        case gateway:
            said = await _knock(gateway, way.interface, GIVEN_UP_S)
            if said == "silent":
                # By now the kernel has given it up, if it was known before, and a new connection is told so.
                said = await _knock(gateway, way.interface, UNREACHABLE_S)
            is_away = said == "unreachable"
    return f"the gateway {way.gateway} on {way.interface} does not answer this host" if is_away else None


async def _knock(gateway: Address, interface: str, wait_s: float) -> Literal["answers", "unreachable", "silent"]:
    """Whether anything comes back, be it a no. That nothing does may be a firewall's doing.

    `unreachable` is what the kernel says of a machine on its own network that it cannot find; of IPv4 also a firewall
    may say so.
    """
    is_v4 = isinstance(gateway, IPv4Address)
    with trio.move_on_after(wait_s), trio.socket.socket(socket.AF_INET if is_v4 else socket.AF_INET6) as knocking:
        try:
            if is_v4:
                await knocking.connect((str(gateway), _DISCARD_PORT))
            else:
                await knocking.connect((str(gateway), _DISCARD_PORT, 0, socket.if_nametoindex(interface)))
        except ConnectionRefusedError:
            return "answers"
        except OSError as error:
            return "unreachable" if error.errno == errno.EHOSTUNREACH else "silent"
        return "answers"
    return "silent"


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii")
    except OSError:
        return ""
