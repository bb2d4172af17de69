"""What the kernel says of this host's own way to an address."""

from __future__ import annotations

import errno
import socket
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from asapd.runtime import own_network
from asapd.runtime.own_network import Way, has_link, is_mute, way_to, why_away

HEAD = "Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\tMTU\tWindow\tIRTT\n"
ROUTES = HEAD + "".join(
    f"{line}\t0\t0\t0\n"
    for line in (
        "eth0\t00000000\t0100000A\t0003\t0\t0\t100\t00000000",  # default by 10.0.0.1
        "wlan0\t00000000\t0102000A\t0003\t0\t0\t600\t00000000",  # default by 10.0.2.1, dearer
        "eth0\t0000000A\t00000000\t0001\t0\t0\t100\t00FFFFFF",  # 10.0.0.0/24
        "eth1\t0000000B\t00000000\t0001\t0\t0\t0\t000000FF",  # 11.0.0.0/8
        "eth0\t0000000C\t0500000A\t0003\t0\t0\t0\t000000FF",  # 12.0.0.0/8 by 10.0.0.5
        "*\t0000000D\t00000000\t0200\t0\t0\t0\t000000FF",  # 13.0.0.0/8 is unreachable: 0x200
        "lo\t0000007F\t00000000\t0001\t0\t0\t0\t000000FF",
    )
)
ARP = """IP address       HW type     Flags       HW address            Mask     Device
10.0.0.1         0x1         0x0         00:00:00:00:00:00     *        eth0
10.0.0.1         0x1         0x2         02:00:00:00:00:01     *        eth1
10.0.0.5         0x1         0x2         02:00:00:00:00:05     *        eth0
"""


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("8.8.8.8", Way("eth0", IPv4Address("10.0.0.1"))),
        ("12.1.1.1", Way("eth0", IPv4Address("10.0.0.5"))),
        # Beside this host: the gateway of the same wire, if there is one.
        ("10.0.0.7", Way("eth0", IPv4Address("10.0.0.1"))),
        ("11.0.0.7", Way("eth1", None)),
        ("13.0.0.1", Way("eth0", IPv4Address("10.0.0.1"))),
    ],
)
def test_the_way_is_that_of_the_longest_prefix_and_the_least_metric(address: str, expected: Way) -> None:
    assert way_to(IPv4Address(address), ROUTES, byteorder="little") == expected


def test_without_a_route_there_is_no_way() -> None:
    assert way_to(IPv4Address("8.8.8.8"), "", byteorder="little") is None
    big = HEAD + "eth0\t0A000000\t00000000\t0001\t0\t0\t0\tFFFFFF00\t0\t0\t0\n"
    assert way_to(IPv4Address("10.0.0.9"), big, byteorder="big") == Way("eth0", None)


NO_SOURCE = f"{'0' * 32} 00"
ROUTES_6 = "".join(
    f"{line}\n"
    for line in (
        f"20010db8{'0' * 24} 20 {NO_SOURCE} {'0' * 32} 00000100 00000001 00000000 00000001     eth0",
        f"{'0' * 32} 00 {NO_SOURCE} fe800000000000000000000000000001 00000400 00000003 00000000 00000003     eth0",
        f"{'0' * 32} 00 {NO_SOURCE} fe800000000000000000000000000002 00000200 00000003 00000000 00000003    wlan0",
        f"{'0' * 32} 00 {NO_SOURCE} {'0' * 32} ffffffff 00000001 00000000 00200200       lo",
        f"fd{'0' * 30} 40 {NO_SOURCE} {'0' * 32} 00000100 00000001 00000000 00000001     eth1",
    )
)


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("2001:db8::7", Way("eth0", IPv6Address("fe80::1"))),
        ("2001:4860::8", Way("wlan0", IPv6Address("fe80::2"))),
        ("fd00::7", Way("eth1", None)),
    ],
)
def test_the_way_by_ipv6_is_found_alike(address: str, expected: Way) -> None:
    assert way_to(IPv6Address(address), ROUTES_6) == expected


def test_a_neighbour_that_was_asked_and_is_silent_is_mute() -> None:
    assert is_mute(IPv4Address("10.0.0.1"), "eth0", ARP)
    assert not is_mute(IPv4Address("10.0.0.1"), "eth1", ARP)
    assert not is_mute(IPv4Address("10.0.0.5"), "eth0", ARP)
    assert not is_mute(IPv4Address("10.0.0.6"), "eth0", ARP)
    assert not is_mute(IPv4Address("10.0.0.1"), "eth0", "")


def test_loopback_has_a_link_and_what_nobody_knows_is_taken_to() -> None:
    assert has_link("lo")
    assert has_link("none-such")


def proc_net(tmp_path: Path, gateway: str, flags: str, interface: str = "lo") -> Path:
    """A host whose default route goes by a gateway, on loopback so that the test can be that gateway."""
    via = "00000000" if not gateway else IPv4Address(gateway).packed[::-1].hex().upper()
    route = f"{interface}\t00000000\t{via}\t0003\t0\t0\t0\t00000000\t0\t0\t0\n"
    (tmp_path / "route").write_text(HEAD + route, encoding="ascii")
    entry = f"{gateway} 0x1 {flags} 00:00:00:00:00:00 * {interface}\n"
    (tmp_path / "arp").write_text(f"head\n{entry}", encoding="ascii")
    return tmp_path


@pytest.fixture(name="port")
def port_fixture(monkeypatch: pytest.MonkeyPatch) -> int:
    """One at which nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        number: int = server.getsockname()[1]
    monkeypatch.setattr(own_network, "_DISCARD_PORT", number)
    return number


async def test_a_gateway_that_says_anything_answers(tmp_path: Path, port: int) -> None:
    where = proc_net(tmp_path, "127.0.0.1", "0x0")
    assert await why_away("192.0.2.1", proc_net=where) is None  # it refused
    with socket.create_server(("127.0.0.1", port)):
        assert await why_away("192.0.2.1", proc_net=where) is None


async def silence(*_: object) -> None:
    await trio.sleep_forever()


async def unreachable(*_: object) -> None:
    raise OSError("no route to host")


@pytest.mark.parametrize("outcome", [silence, unreachable])
async def test_a_gateway_that_the_kernel_gave_up_is_away(
    autojump_clock: MockClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, outcome: object
) -> None:
    with trio.socket.socket() as any_socket:
        monkeypatch.setattr(type(any_socket), "connect", outcome)
    away = await why_away("192.0.2.1", proc_net=proc_net(tmp_path, "127.0.0.1", "0x0"))
    assert away == "the gateway 127.0.0.1 on lo does not answer this host"
    # It is there, and drops what comes to it.
    assert await why_away("192.0.2.1", proc_net=proc_net(tmp_path, "127.0.0.1", "0x2")) is None


async def test_an_interface_without_a_link_is_away(tmp_path: Path) -> None:
    where = proc_net(tmp_path, "127.0.0.1", "0x2", "eth7")
    away = await why_away("192.0.2.1", proc_net=where, links=lambda interface: interface != "eth7")
    assert away == "the interface eth7 of this host has no link"


def by_ipv6(tmp_path: Path) -> Path:
    """A host whose only way to addresses of IPv6 is a gateway on loopback."""
    route = f"{'0' * 32} 00 {NO_SOURCE} {IPv6Address('fe80::1').packed.hex()} 00000400 00000003 00000000 00000003 lo\n"
    (tmp_path / "ipv6_route").write_text(route, encoding="ascii")
    return tmp_path


@pytest.mark.parametrize(
    ("knocks", "is_away"),
    [
        (["refused"], False),
        (["taken"], False),
        (["unreachable"], True),
        # It was known before: what the first connection does not hear, the second does.
        (["silence", "unreachable"], True),
        (["silence", "silence"], False),
        (["forbidden", "silence"], False),
    ],
)
async def test_a_gateway_of_ipv6_is_away_when_the_kernel_says_so_to_who_connects(
    autojump_clock: MockClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, knocks: list[str], is_away: bool
) -> None:
    asked: list[tuple[object, ...]] = []
    left = list(knocks)

    async def connect(_: object, where: tuple[object, ...]) -> None:
        asked.append(where)
        match left.pop(0):
            case "silence":
                await trio.sleep_forever()
            case "refused":
                raise ConnectionRefusedError
            case "unreachable":
                raise OSError(errno.EHOSTUNREACH, "no route to host")
            case "forbidden":
                raise OSError(errno.EACCES, "not allowed")

    with trio.socket.socket() as any_socket:
        monkeypatch.setattr(type(any_socket), "connect", connect)
    away = await why_away("2001:db8::1", proc_net=by_ipv6(tmp_path))
    assert away == ("the gateway fe80::1 on lo does not answer this host" if is_away else None)
    assert asked == [("fe80::1", 9, 0, socket.if_nametoindex("lo"))] * len(knocks)


async def test_of_a_host_with_two_addresses_both_ways_have_to_be_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def look_up(*_: object, **__: object) -> list[tuple[object, ...]]:
        return [(*[None] * 4, (address, 0)) for address in ("192.0.2.1", "2001:db8::1", "192.0.2.1")]

    monkeypatch.setattr(trio.socket, "getaddrinfo", look_up)
    where = by_ipv6(proc_net(tmp_path, "127.0.0.1", "0x0", "eth7"))
    away = await why_away("both.test", proc_net=where, links=lambda _: False)
    assert away is not None
    assert away.endswith("of this host has no link")

    async def is_taken(*_: object) -> None:
        pass

    with trio.socket.socket() as any_socket:
        monkeypatch.setattr(type(any_socket), "connect", is_taken)
    assert await why_away("both.test", proc_net=where, links=lambda interface: interface != "eth7") is None


async def test_where_nothing_can_be_known_nothing_is_said(tmp_path: Path) -> None:
    assert await why_away("192.0.2.1", proc_net=tmp_path / "none") is None
    assert await why_away("2001:db8::1", proc_net=proc_net(tmp_path, "127.0.0.1", "0x0")) is None
    assert await why_away("192.0.2.1", proc_net=proc_net(tmp_path, "", "0x0")) is None
