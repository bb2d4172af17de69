"""Idle connections by origin: whoever came first keeps its place, whoever is gone gives it up."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

import pytest
import trio
from trio.testing import MockClock

from asapd.runtime.fetch import LOOPBACK, Fetched, Fetcher
from asapd.runtime.http1 import ServerConnection
from asapd.runtime.idle import IdleConnections, Place

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


class Server:
    """A server that counts its connections, open and ever."""

    def __init__(self) -> None:
        self.ever = self.open = 0

    async def serve(self, stream: trio.SocketStream) -> None:
        self.ever += 1
        self.open += 1
        async with stream:
            received = b""
            while data := await stream.receive_some():
                received += data
                while b"\r\n\r\n" in received:
                    _, _, received = received.partition(b"\r\n\r\n")
                    await stream.send_all(OK)
        self.open -= 1


@asynccontextmanager
async def serving(*servers: Server) -> AsyncIterator[list[str]]:
    async with trio.open_nursery() as nursery:
        urls = []
        for server in servers:
            listeners: list[trio.SocketListener] = await nursery.start(
                partial(trio.serve_tcp, server.serve, 0, host="127.0.0.1")
            )
            urls.append(f"http://127.0.0.1:{listeners[0].socket.getsockname()[1]}/")
        yield urls
        nursery.cancel_scope.cancel()


async def ask(fetcher: Fetcher, url: str) -> None:
    assert isinstance(await fetcher.get(url, deadline_s=5, max_bytes=10), Fetched)


async def test_each_server_keeps_its_connection_up_to_the_bound_and_none_is_pushed_out() -> None:
    servers = [Server(), Server(), Server()]
    async with serving(*servers) as urls, Fetcher(LOOPBACK, max_idle=2) as fetcher:
        for _ in range(3):
            for url in urls:
                await ask(fetcher, url)
    assert [server.ever for server in servers] == [1, 1, 3]


async def test_a_server_that_closes_its_connections_gives_up_its_place() -> None:
    """The one behind it then has a place, and keeps its connection."""

    async def closing(stream: trio.SocketStream) -> None:
        async with stream:
            await stream.receive_some()
            await stream.send_all(OK.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))

    server = Server()
    async with serving(server) as urls, trio.open_nursery() as nursery, Fetcher(LOOPBACK, max_idle=1) as fetcher:
        listeners: list[trio.SocketListener] = await nursery.start(
            partial(trio.serve_tcp, closing, 0, host="127.0.0.1")
        )
        await ask(fetcher, f"http://127.0.0.1:{listeners[0].socket.getsockname()[1]}/")
        for _ in range(3):
            await ask(fetcher, urls[0])
        nursery.cancel_scope.cancel()
    assert server.ever == 1


async def test_what_was_not_used_for_long_is_closed_and_gives_up_its_place(autojump_clock: MockClock) -> None:
    old, new = Server(), Server()
    async with serving(old, new) as urls, Fetcher(LOOPBACK, max_idle=1, keepalive_s=10) as fetcher:
        await ask(fetcher, urls[0])
        assert old.open == 1
        await trio.sleep(20)
        for _ in range(2):
            await ask(fetcher, urls[1])
        await trio.sleep(0.1)
        assert (old.open, new.ever) == (0, 1)


async def test_a_place_in_use_is_not_swept(autojump_clock: MockClock) -> None:
    idle = IdleConnections(max_origins=2, keepalive_s=10)
    with idle.using("a") as first:
        await trio.sleep(25)
        with idle.using("b"), idle.using("a") as second:
            assert second is first
    idle.close()


async def test_closing_while_a_place_is_in_use_forgets_it() -> None:
    idle = IdleConnections(max_origins=1, keepalive_s=10)
    ours, theirs = await stream_pair()
    with idle.using("a") as first:
        idle.close()
        with idle.using("a") as second:
            assert first is not second
        first.give(ServerConnection(ours))
        assert first.is_empty
    async with theirs:
        assert await theirs.receive_some() == b""
    idle.close()


async def test_of_several_the_one_used_last_is_taken_and_old_ones_are_closed(autojump_clock: MockClock) -> None:
    place = Place(2, 10)
    pairs = [await stream_pair() for _ in range(3)]
    connections = [ServerConnection(ours) for ours, _ in pairs]
    for connection in connections:
        place.give(await used(connection, pairs))
        await trio.sleep(4)
    assert await pairs[2][1].receive_some() == b""
    assert place.take() is connections[1]
    place.give(await used(connections[1], pairs))
    await trio.sleep(4)
    assert place.take() is connections[1]
    assert await pairs[0][1].receive_some() == b""
    assert place.take() is None
    connections[1].close()
    for _, theirs in pairs:
        await theirs.aclose()


async def stream_pair() -> tuple[trio.SocketStream, trio.SocketStream]:
    ours, theirs = trio.socket.socketpair()
    return trio.SocketStream(ours), trio.SocketStream(theirs)


async def used(
    connection: ServerConnection, pairs: list[tuple[trio.SocketStream, trio.SocketStream]]
) -> ServerConnection:
    """A connection behind an exchange."""
    await connection.send(b"GET", b"/", [(b"Host", b"a")], None)
    theirs = next(theirs for ours, theirs in pairs if ours is connection._stream)
    await theirs.receive_some()
    await theirs.send_all(OK)
    assert (await connection.receive_head()).status_code == 200
    while await connection.receive_part() is not None:
        pass
    return connection


@pytest.mark.parametrize("most", [0, 1])
async def test_without_a_place_a_connection_is_used_once(most: int) -> None:
    server = Server()
    async with serving(server) as urls, Fetcher(LOOPBACK, max_idle=most) as fetcher:
        for _ in range(2):
            await ask(fetcher, urls[0])
    assert server.ever == 2 - most
