"""Fetcher against real servers on loopback: good, broken and hostile ones."""

from __future__ import annotations

import errno
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from asapd.runtime.fetch import LOOPBACK, Fetched, Fetcher, FetchFailed, host_networks, own_networks

Handler = Callable[[trio.SocketStream], Awaitable[None]]

OK = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\nX-Other: 1\r\n\r\n{}"

# A throwaway key and self-signed certificate for agent.test, made for these tests only.
CERTIFICATE = """\
-----BEGIN CERTIFICATE-----
MIIBYzCCAQqgAwIBAgIBATAKBggqhkjOPQQDAjAVMRMwEQYDVQQDDAphZ2VudC50
ZXN0MCAXDTIwMDEwMTAwMDAwMFoYDzIxMjAwMTAxMDAwMDAwWjAVMRMwEQYDVQQD
DAphZ2VudC50ZXN0MFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAEv59jyyM+OZWJ
mF9o43QkuypUphsFylEUmi4og58U3a6HSfcRFd3PtS9m58P5wlS9gdRuBiVQ4iQj
K5SS2mcbzaNJMEcwFQYDVR0RBA4wDIIKYWdlbnQudGVzdDAPBgNVHRMBAf8EBTAD
AQH/MB0GA1UdDgQWBBSpfszNlWhF3mAqGQ4LYrpizGvBOzAKBggqhkjOPQQDAgNH
ADBEAiA+/32xuOLNKXc90r0BVfN3ldLQLT17SLIpPoN+9+YlVQIgEbKyE25vP17f
McGTGebXW5l3aSsd7zm7vR2vKTujLMA=
-----END CERTIFICATE-----
"""
KEY = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgOfd6aN6/wNUjRGoW
1DSiN61BYdWAK+iL1M3xb7N0CzmhRANCAAS/n2PLIz45lYmYX2jjdCS7KlSmGwXK
URSaLiiDnxTdrodJ9xEV3c+1L2bnw/nCVL2B1G4GJVDiJCMrlJLaZxvN
-----END PRIVATE KEY-----
"""


class Resolver(trio.abc.HostnameResolver):
    """Answers names with the lists of addresses given, one list a question, and the last one for ever."""

    def __init__(self, *answers: list[str]) -> None:
        self.answers = answers
        self.asked = 0

    async def getaddrinfo(self, host: Any, port: Any, *rest: Any, **named: Any) -> Any:
        addresses = self.answers[min(self.asked, len(self.answers) - 1)]
        self.asked += 1
        return [entry for address in addresses for entry in await trio.socket.getaddrinfo(address, port, type=1)]

    async def getnameinfo(self, sockaddr: Any, flags: int) -> Any:
        raise NotImplementedError


@asynccontextmanager
async def serving(handler: Handler) -> AsyncIterator[int]:
    """A server on loopback; yields its port. A connection is closed when its handler returns."""

    async def guarded(stream: trio.SocketStream) -> None:
        with suppress(trio.BrokenResourceError):
            async with stream:
                await handler(stream)

    async with trio.open_nursery() as nursery:
        listeners: list[trio.SocketListener] = await nursery.start(
            partial(trio.serve_tcp, guarded, 0, host="127.0.0.1")
        )
        yield listeners[0].socket.getsockname()[1]
        nursery.cancel_scope.cancel()


async def request_head(stream: trio.abc.ReceiveStream) -> bytes:
    head = b""
    while b"\r\n\r\n" not in head:
        received = await stream.receive_some()
        if not received:
            return b""
        head += received
    return head


def reset_on_close(stream: trio.SocketStream) -> None:
    stream.setsockopt(trio.socket.SOL_SOCKET, trio.socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")


def answering(answer: bytes) -> Handler:
    async def handler(stream: trio.SocketStream) -> None:
        while await request_head(stream):
            await stream.send_all(answer)

    return handler


async def get(handler: Handler, *, deadline_s: float = 5, max_bytes: int = 1000) -> Fetched | FetchFailed:
    async with serving(handler) as port, Fetcher(LOOPBACK) as fetcher:
        return await fetcher.get(f"http://127.0.0.1:{port}/", deadline_s=deadline_s, max_bytes=max_bytes)


def reason(outcome: Fetched | FetchFailed) -> str:
    assert isinstance(outcome, FetchFailed), outcome
    assert outcome.detail
    return outcome.reason


async def test_a_good_answer_comes_with_body_time_and_the_kept_headers(autojump_clock: MockClock) -> None:
    async def slow(stream: trio.SocketStream) -> None:
        await request_head(stream)
        await trio.sleep(0.25)
        await stream.send_all(OK)

    assert await get(slow) == Fetched(200, b"{}", 250, {"content-type": "application/json"})


async def test_the_request_asks_for_what_was_wanted_and_nothing_compressed() -> None:
    seen = []

    async def handler(stream: trio.SocketStream) -> None:
        seen.append(await request_head(stream))
        await stream.send_all(OK)

    async with serving(handler) as port, Fetcher(LOOPBACK, user_agent="probe/1") as fetcher:
        await fetcher.get(f"http://127.0.0.1:{port}/a/b?c=d#e", deadline_s=5, max_bytes=10, accept="text/plain")
    lines = seen[0].decode().split("\r\n")
    assert lines[0] == "GET /a/b?c=d HTTP/1.1"
    wanted = {f"Host: 127.0.0.1:{port}", "User-Agent: probe/1", "Accept: text/plain", "Accept-Encoding: identity"}
    assert wanted < set(lines)


async def test_any_status_but_a_redirect_is_an_answer() -> None:
    outcome = await get(answering(b"HTTP/1.1 503 No\r\nRetry-After: 5\r\nContent-Length: 0\r\n\r\n"))
    assert isinstance(outcome, Fetched)
    assert (outcome.status, outcome.body, outcome.headers) == (503, b"", {"retry-after": "5"})


async def test_a_redirect_is_reported_and_not_followed() -> None:
    answer = b"HTTP/1.1 302 Found\r\nLocation: http://169.254.169.254/\r\nContent-Length: 0\r\n\r\n"
    assert reason(await get(answering(answer))) == "redirect"


async def test_a_compressed_body_is_refused() -> None:
    answer = b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 2\r\n\r\n{}"
    assert reason(await get(answering(answer))) == "protocol"


@pytest.mark.parametrize("length", [10, 11])
async def test_a_body_is_taken_up_to_the_bound(length: int) -> None:
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (length, b"x" * length)
    outcome = await get(answering(answer), max_bytes=10)
    if length == 10:
        assert isinstance(outcome, Fetched)
        assert outcome.body == b"x" * 10
    else:
        assert reason(outcome) == "too_large"


async def test_an_endless_body_is_cut_off() -> None:
    async def endless(stream: trio.SocketStream) -> None:
        await request_head(stream)
        await stream.send_all(b"HTTP/1.1 200 OK\r\n\r\n")
        while True:
            await stream.send_all(b"x" * 65536)

    assert reason(await get(endless, max_bytes=100_000)) == "too_large"


async def test_a_body_that_drips_meets_the_deadline(autojump_clock: MockClock) -> None:
    async def dripping(stream: trio.SocketStream) -> None:
        await request_head(stream)
        await stream.send_all(b"HTTP/1.1 200 OK\r\n\r\n")
        while True:
            await trio.sleep(0.9)
            await stream.send_all(b"x")

    started_s = trio.current_time()
    outcome = await get(dripping, deadline_s=5)
    assert outcome == FetchFailed("slow_body", "no whole answer within 5 s: reading the body took too long")
    assert trio.current_time() - started_s == pytest.approx(5)


async def test_a_server_that_never_answers_meets_the_deadline(autojump_clock: MockClock) -> None:
    async def silent(stream: trio.SocketStream) -> None:
        await trio.sleep_forever()

    outcome = await get(silent, deadline_s=2)
    assert outcome == FetchFailed("timeout", "no whole answer within 2 s: waiting for the answer took too long")


@pytest.mark.parametrize(
    "answer",
    [
        b"220 mail.example.org ESMTP\r\n",
        b"\x00\xff" * 500,
        b"",
        b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\nX: " + b"x" * 200_000,
    ],
    ids=["other-protocol", "garbage", "nothing", "cut-off", "endless-header"],
)
async def test_what_is_not_http_is_a_protocol_failure_and_asked_once(answer: bytes) -> None:
    asked = 0

    async def once(stream: trio.SocketStream) -> None:
        nonlocal asked
        asked += 1
        await request_head(stream)
        await stream.send_all(answer)

    assert reason(await get(once)) == "protocol"
    assert asked == 1


async def test_a_reset_instead_of_an_answer_is_a_protocol_failure() -> None:
    async def resetting(stream: trio.SocketStream) -> None:
        await request_head(stream)
        reset_on_close(stream)

    assert reason(await get(resetting)) == "protocol"


async def test_a_reset_in_the_middle_of_the_request_is_a_protocol_failure() -> None:
    async def resetting(stream: trio.SocketStream) -> None:
        await stream.receive_some(1)
        reset_on_close(stream)

    async with serving(resetting) as port, Fetcher(LOOPBACK) as fetcher:
        # More than the socket takes at once, so that the reset meets a writer.
        url = f"http://127.0.0.1:{port}/" + "x" * 20_000_000
        assert reason(await fetcher.get(url, deadline_s=5, max_bytes=10)) == "protocol"


async def test_a_closed_port_is_refused() -> None:
    async with serving(answering(OK)) as port:
        pass
    async with Fetcher(LOOPBACK) as fetcher:
        outcome = await fetcher.get(f"http://127.0.0.1:{port}/", deadline_s=5, max_bytes=10)
    assert reason(outcome) == "refused"
    assert isinstance(outcome, FetchFailed)
    assert outcome.detail == f"127.0.0.1 port {port}: Connection refused"


async def test_connections_are_kept_and_reused() -> None:
    connections = 0

    async def counting(stream: trio.SocketStream) -> None:
        nonlocal connections
        connections += 1
        await answering(OK)(stream)

    async with serving(counting) as port, Fetcher(LOOPBACK) as fetcher:
        for _ in range(3):
            assert isinstance(await fetcher.get(f"http://127.0.0.1:{port}/", deadline_s=5, max_bytes=10), Fetched)
    assert connections == 1


async def test_a_connection_the_server_closed_while_idle_is_replaced() -> None:
    connections = 0

    async def one_each(stream: trio.SocketStream) -> None:
        nonlocal connections
        connections += 1
        await request_head(stream)
        await stream.send_all(OK)

    async with serving(one_each) as port, Fetcher(LOOPBACK) as fetcher:
        for _ in range(2):
            assert isinstance(await fetcher.get(f"http://127.0.0.1:{port}/", deadline_s=5, max_bytes=10), Fetched)
            await wait_all_tasks_blocked(0.01)
    assert connections == 2


@pytest.mark.parametrize("reset", [False, True])
async def test_a_connection_closed_in_the_moment_of_reuse_is_retried(reset: bool) -> None:
    connections = 0

    async def leaving(stream: trio.SocketStream) -> None:
        nonlocal connections
        connections += 1
        await request_head(stream)
        await stream.send_all(OK)
        await request_head(stream)  # taken, and never answered
        if reset:
            reset_on_close(stream)

    async with serving(leaving) as port, Fetcher(LOOPBACK) as fetcher:
        for _ in range(2):
            assert isinstance(await fetcher.get(f"http://127.0.0.1:{port}/", deadline_s=5, max_bytes=10), Fetched)
    assert connections == 2


async def test_several_stale_connections_are_used_up_before_a_fresh_one(autojump_clock: MockClock) -> None:
    connections = 0

    async def leaving(stream: trio.SocketStream) -> None:
        nonlocal connections
        connections += 1
        await request_head(stream)
        await trio.sleep(1)  # so that three run at once, each on a connection of its own
        await stream.send_all(OK)
        await request_head(stream)

    async with serving(leaving) as port, Fetcher(LOOPBACK) as fetcher:

        async def good() -> None:
            assert isinstance(await fetcher.get(f"http://127.0.0.1:{port}/", deadline_s=5, max_bytes=10), Fetched)

        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(good)
        await good()
    assert connections == 4


async def test_cancelling_a_fetch_closes_its_connection() -> None:
    asked, closed = trio.Event(), trio.Event()

    async def handler(stream: trio.SocketStream) -> None:
        await request_head(stream)
        asked.set()
        await request_head(stream)
        closed.set()

    returned = []
    async with serving(handler) as port, Fetcher(LOOPBACK) as fetcher:

        async def fetch() -> None:
            returned.append(await fetcher.get(f"http://127.0.0.1:{port}/", deadline_s=60, max_bytes=10))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(fetch)
            await asked.wait()
            nursery.cancel_scope.cancel()
        with trio.fail_after(5):
            await closed.wait()
    assert returned == []


@pytest.mark.parametrize(
    "url",
    [
        "http://169.254.169.254/latest/meta-data",
        "http://[fe80::1]/",
        "http://[::ffff:169.254.169.254]/",
        "http://192.0.2.1/",
        "http://0.0.0.0/",
    ],
)
async def test_an_address_outside_the_allowed_networks_is_not_connected_to(url: str) -> None:
    async with Fetcher(LOOPBACK) as fetcher:
        assert reason(await fetcher.get(url, deadline_s=5, max_bytes=10)) == "not_allowed"


@pytest.mark.parametrize("url", ["http://169.254.169.254/", "http://[fe80::1]/", "http://[::ffff:169.254.1.1]/"])
async def test_link_local_is_refused_even_when_everything_is_allowed(url: str) -> None:
    async with Fetcher([ip_network("0.0.0.0/0"), ip_network("::/0")]) as fetcher:
        assert reason(await fetcher.get(url, deadline_s=5, max_bytes=10)) == "not_allowed"


@pytest.mark.parametrize(
    "url",
    ["ftp://127.0.0.1/", "127.0.0.1", "http://", "http://u:p@127.0.0.1/", "http://127.0.0.1:99999/", "http://a b/", ""],
)
async def test_an_address_that_is_no_plain_http_url_is_not_allowed(url: str) -> None:
    async with Fetcher(LOOPBACK) as fetcher:
        assert reason(await fetcher.get(url, deadline_s=5, max_bytes=10)) == "not_allowed"


async def test_a_name_that_resolves_outside_the_allowed_networks_is_refused() -> None:
    trio.socket.set_custom_hostname_resolver(Resolver(["192.0.2.7", "169.254.169.254"]))
    async with Fetcher(LOOPBACK) as fetcher:
        outcome = await fetcher.get("http://agent.test/", deadline_s=5, max_bytes=10)
    detail = "agent.test is at 192.0.2.7, 169.254.169.254, outside the allowed networks"
    assert outcome == FetchFailed("not_allowed", detail)


async def test_a_name_that_changes_its_answer_is_connected_to_where_it_was_checked() -> None:
    resolver = Resolver(["127.0.0.1"], ["192.0.2.7"])
    trio.socket.set_custom_hostname_resolver(resolver)
    seen = []

    async def handler(stream: trio.SocketStream) -> None:
        seen.append(await request_head(stream))
        await stream.send_all(OK)

    async with serving(handler) as port, Fetcher(LOOPBACK) as fetcher:
        assert isinstance(await fetcher.get(f"http://agent.test:{port}/", deadline_s=5, max_bytes=10), Fetched)
    assert resolver.asked == 1
    assert f"Host: agent.test:{port}".encode() in seen[0]


async def test_of_several_addresses_the_allowed_ones_are_tried_in_turn() -> None:
    trio.socket.set_custom_hostname_resolver(Resolver(["192.0.2.7", "127.0.0.99", "127.0.0.1"]))
    async with serving(answering(OK)) as port, Fetcher(LOOPBACK) as fetcher:
        assert isinstance(await fetcher.get(f"http://agent.test:{port}/", deadline_s=5, max_bytes=10), Fetched)


async def test_an_address_that_swallows_packets_leaves_time_for_the_next(autojump_clock: MockClock) -> None:
    fillers = [trio.socket.socket() for _ in range(3)]
    async with serving(answering(OK)) as port, Fetcher(LOOPBACK) as fetcher, trio.open_nursery() as nursery:
        # A listener whose queue is full drops what knocks: a black hole made of loopback.
        hole = trio.socket.socket()
        await hole.bind(("127.0.0.99", port))
        hole.listen(0)
        for filler in fillers:
            nursery.start_soon(filler.connect, ("127.0.0.99", port))
        await wait_all_tasks_blocked(0.01)
        trio.socket.set_custom_hostname_resolver(Resolver(["127.0.0.99", "127.0.0.1"], ["127.0.0.99"]))
        outcome = await fetcher.get(f"http://agent.test:{port}/", deadline_s=8, max_bytes=10)
        assert isinstance(outcome, Fetched)
        assert outcome.elapsed_ms == 4000
        outcome = await fetcher.get(f"http://other.test:{port}/", deadline_s=3, max_bytes=10)
        assert outcome == FetchFailed("timeout", "no whole answer within 3 s: connecting took too long")
        nursery.cancel_scope.cancel()
    for each in (hole, *fillers):
        each.close()


async def test_a_name_without_an_address_is_a_dns_failure() -> None:
    class Nowhere(Resolver):
        async def getaddrinfo(self, *args: Any, **named: Any) -> Any:
            raise trio.socket.gaierror(trio.socket.EAI_NONAME, "Name or service not known")

    trio.socket.set_custom_hostname_resolver(Nowhere())
    async with Fetcher(LOOPBACK) as fetcher:
        assert reason(await fetcher.get("http://agent.test/", deadline_s=5, max_bytes=10)) == "dns"
        assert reason(await fetcher.get(f"http://{'a' * 70}.test/", deadline_s=5, max_bytes=10)) == "dns"


@pytest.mark.parametrize("code", [socket.EAI_AGAIN, socket.EAI_FAIL])
async def test_a_resolver_that_does_not_answer_is_no_name_without_an_address(code: int) -> None:
    class Away(Resolver):
        async def getaddrinfo(self, *args: Any, **named: Any) -> Any:
            raise trio.socket.gaierror(code, "Temporary failure in name resolution")

    trio.socket.set_custom_hostname_resolver(Away())
    async with Fetcher(LOOPBACK) as fetcher:
        outcome = await fetcher.get("http://agent.test/", deadline_s=5, max_bytes=10)
    assert isinstance(outcome, FetchFailed)
    assert (outcome.reason, outcome.doubt) == ("dns", "resolver")


async def test_a_resolver_that_hangs_is_told_from_an_agent_that_does(autojump_clock: MockClock) -> None:
    class Hanging(Resolver):
        async def getaddrinfo(self, *args: Any, **named: Any) -> Any:
            await trio.sleep_forever()

    trio.socket.set_custom_hostname_resolver(Hanging())
    async with Fetcher(LOOPBACK) as fetcher:
        outcome = await fetcher.get("http://agent.test/", deadline_s=5, max_bytes=10)
    detail = "no whole answer within 5 s: looking up the name took too long"
    assert outcome == FetchFailed("timeout", detail, "resolver")


class Silent:
    """Sockets to machines that answer nothing: how a kernel says so, or None where it says nothing."""

    def __init__(self, code: int | None) -> None:
        self.code = code

    def socket(self, family: int = -1, kind: int = -1, proto: int = -1) -> Any:
        code = self.code

        class Unconnectable:
            async def connect(self, where: tuple[Any, ...]) -> None:
                if code is None:
                    await trio.sleep_forever()
                raise OSError(code, "silence")

            def close(self) -> None:
                pass

        return Unconnectable()


@pytest.mark.parametrize(
    ("address", "code", "doubt"),
    [
        ("192.0.2.7", errno.EHOSTUNREACH, "network"),
        ("192.0.2.7", None, "network"),
        ("192.0.2.7", errno.ECONNREFUSED, None),
        ("127.0.0.9", errno.EHOSTUNREACH, None),
        ("127.0.0.9", None, None),
    ],
)
async def test_silence_from_afar_may_be_this_hosts(
    address: str, code: int | None, doubt: str | None, autojump_clock: MockClock
) -> None:
    trio.socket.set_custom_socket_factory(Silent(code))  # type: ignore[arg-type]  # as much of one as is used
    async with Fetcher([*LOOPBACK, ip_network("192.0.2.0/24")]) as fetcher:
        outcome = await fetcher.get(f"http://{address}/", deadline_s=5, max_bytes=10)
    assert isinstance(outcome, FetchFailed)
    assert outcome.doubt == doubt


async def test_silence_on_a_connection_from_before_may_be_the_networks(autojump_clock: MockClock) -> None:
    """And on a fresh one it is the server's, which was there a moment ago."""

    async def once(stream: trio.SocketStream) -> None:
        await request_head(stream)
        await stream.send_all(OK)
        await trio.sleep_forever()

    async with serving(once) as port, Fetcher(LOOPBACK) as fetcher:
        assert isinstance(await fetcher.get(f"http://127.0.0.1:{port}/", deadline_s=5, max_bytes=10), Fetched)
        outcome = await fetcher.get(f"http://127.0.0.1:{port}/", deadline_s=5, max_bytes=10)
        assert isinstance(outcome, FetchFailed)
        assert outcome.doubt == "network"


@pytest.fixture
def server_tls(tmp_path: Path) -> ssl.SSLContext:
    (tmp_path / "cert.pem").write_text(CERTIFICATE)
    (tmp_path / "key.pem").write_text(KEY)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")
    return context


def over_tls(context: ssl.SSLContext) -> Handler:
    async def handler(stream: trio.SocketStream) -> None:
        secure = trio.SSLStream(stream, context, server_side=True, https_compatible=True)
        while await request_head(secure):
            await secure.send_all(OK)

    return handler


async def test_tls_keeps_the_name_and_verifies_it(server_tls: ssl.SSLContext) -> None:
    trio.socket.set_custom_hostname_resolver(Resolver(["127.0.0.1"]))
    names: list[str | None] = []
    server_tls.sni_callback = lambda _socket, name, _context: names.append(name)
    trusting = ssl.create_default_context(cadata=CERTIFICATE)
    async with serving(over_tls(server_tls)) as port, Fetcher(LOOPBACK, ssl_context=trusting) as fetcher:
        for _ in range(2):
            outcome = await fetcher.get(f"https://agent.test:{port}/", deadline_s=5, max_bytes=10)
            assert isinstance(outcome, Fetched), outcome
        assert names == ["agent.test"]
        assert reason(await fetcher.get(f"https://other.test:{port}/", deadline_s=5, max_bytes=10)) == "tls"


async def test_an_unknown_authority_is_a_tls_failure(server_tls: ssl.SSLContext) -> None:
    trio.socket.set_custom_hostname_resolver(Resolver(["127.0.0.1"]))
    async with serving(over_tls(server_tls)) as port, Fetcher(LOOPBACK) as fetcher:
        outcome = await fetcher.get(f"https://agent.test:{port}/", deadline_s=5, max_bytes=10)
    assert reason(outcome) == "tls"
    assert "certificate" in str(outcome)


async def test_plain_http_where_tls_was_expected_is_a_tls_failure() -> None:
    async def plain(stream: trio.SocketStream) -> None:
        await stream.receive_some()
        await stream.send_all(OK)

    async with serving(plain) as port, Fetcher(LOOPBACK) as fetcher:
        assert reason(await fetcher.get(f"https://127.0.0.1:{port}/", deadline_s=5, max_bytes=10)) == "tls"


async def test_a_tls_handshake_that_stalls_meets_the_deadline_and_is_closed(autojump_clock: MockClock) -> None:
    closed = trio.Event()

    async def stalling(stream: trio.SocketStream) -> None:
        while await stream.receive_some():
            pass
        closed.set()

    async with serving(stalling) as port, Fetcher(LOOPBACK) as fetcher:
        outcome = await fetcher.get(f"https://127.0.0.1:{port}/", deadline_s=2, max_bytes=10)
        assert outcome == FetchFailed("timeout", "no whole answer within 2 s: the TLS handshake took too long")
        with trio.fail_after(5):
            await closed.wait()


ROUTES = """\
Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT
eth0\t00000000\t010200C0\t0003\t0\t0\t0\t00000000\t0\t0\t0
eth0\t000200C0\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0
eth0\t0000FEA9\t00000000\t0001\t0\t0\t0\t0000FFFF\t0\t0\t0
eth0\t0000000A\t010200C0\t0003\t0\t0\t0\t000000FF\t0\t0\t0
lo\t006433C6\t00000000\t0201\t0\t0\t0\t00FFFFFF\t0\t0\t0
tun0\t00000000\t00000000\t0001\t0\t0\t0\t00000000\t0\t0\t0
eth1\t000010AC\t00000000\t0000\t0\t0\t0\t0000F0FF\t0\t0\t0
docker0\t000011AC\t00000000\t0001\t0\t0\t0\t0000FFFF\t0\t0\t0
"""

ADDRESSES = """\
fd000000000000000000000000000002 04 40 00 82     eth0
fe8000000000000000fc00fffe000001 04 40 20 80     eth0
00000000000000000000000000000001 01 80 10 80       lo
20010db8000000000000000000000001 05 00 00 80     tun0
"""


def test_host_networks_are_loopback_and_the_connected_ones() -> None:
    networks = host_networks(ROUTES, ADDRESSES, byteorder="little")
    assert [str(network) for network in networks] == [
        "127.0.0.0/8",
        "::1/128",
        "192.0.2.0/24",
        "172.17.0.0/16",
        "fd00::/64",
    ]


def test_routes_are_read_in_the_byte_order_of_the_machine() -> None:
    text = "Iface\neth0\tC0000200\t00000000\t0001\t0\t0\t0\tFFFFFF00\t0\t0\t0\n"
    assert host_networks(text, "", byteorder="big") == [*LOOPBACK, ip_network("192.0.2.0/24")]


def test_own_networks_reads_this_host(tmp_path: Path) -> None:
    (tmp_path / "if_inet6").write_text(ADDRESSES)
    assert own_networks(tmp_path) == [*LOOPBACK, ip_network("fd00::/64")]
    assert set(LOOPBACK) <= set(own_networks())


class NoRoute:
    """Sockets of a host whose network is down, but for loopback over IPv4."""

    def socket(self, family: int = -1, kind: int = -1, proto: int = -1) -> Any:
        class Unconnectable:
            async def connect(self, where: tuple[Any, ...]) -> None:
                raise OSError(errno.ECONNREFUSED if "." in where[0] else errno.ENETUNREACH, "no way")

            def close(self) -> None:
                pass

        return Unconnectable()


async def test_a_host_without_a_way_out_says_nothing_of_the_other() -> None:
    trio.socket.set_custom_socket_factory(NoRoute())  # type: ignore[arg-type]  # as much of one as is used
    trio.socket.set_custom_hostname_resolver(Resolver(["::1"], ["::1", "127.0.0.1"]))
    async with Fetcher(LOOPBACK) as fetcher:
        with pytest.raises(OSError, match="no way"):
            await fetcher.get("http://agent.test:80/", deadline_s=1, max_bytes=9)
        answer = await fetcher.get("http://agent.test:80/", deadline_s=1, max_bytes=9)
    assert isinstance(answer, FetchFailed)
    assert answer.reason == "refused"
