"""Exchanges on one connection, with what servers do between them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio

from asapd.runtime.fetch import LOOPBACK, Fetched, Fetcher
from asapd.runtime.http1 import BrokenExchangeError, ServerConnection

HOST = [(b"Host", b"a.test")]
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


@asynccontextmanager
async def connected() -> AsyncIterator[tuple[ServerConnection, trio.SocketStream]]:
    """A connection, and the server's end of it."""
    ours, theirs = trio.socket.socketpair()
    connection = ServerConnection(trio.SocketStream(ours))
    async with trio.SocketStream(theirs) as server:
        yield connection, server
        connection.close()


async def body_of(connection: ServerConnection) -> bytes:
    parts = []
    while (part := await connection.receive_part()) is not None:
        parts.append(part)
    return b"".join(parts)


async def test_exchanges_follow_each_other() -> None:
    async with connected() as (connection, server):
        for target, body in ((b"/one", None), (b"/two?x=1", b"text")):
            method = b"POST" if body else b"GET"
            length = [(b"Content-Length", b"4")] if body else []
            await connection.send(method, target, [*HOST, *length], body)
            request = bytes(await server.receive_some())
            assert request.startswith(method + b" " + target + b" HTTP/1.1\r\nHost: a.test\r\n")
            assert request.endswith(b"\r\n\r\n" + (body or b""))
            await server.send_all(b"HTTP/1.1 103 Early Hints\r\nLink: <a>\r\n\r\n" + OK)
            assert (await connection.receive_head()).status_code == 200
            assert await body_of(connection) == b"ok"
            assert not connection.is_gone
            assert connection.renew()


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok",
        b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok",
        OK + OK,
    ],
    ids=["closing", "old", "unasked"],
)
async def test_behind_an_answer_that_is_the_last_there_is_no_other(answer: bytes) -> None:
    """What a server says unasked would be taken for the answer to the next request."""
    async with connected() as (connection, server):
        await connection.send(b"GET", b"/", HOST, None)
        await server.send_all(answer)
        await connection.receive_head()
        assert await body_of(connection) == b"ok"
        assert not connection.renew()


async def test_an_answer_that_nobody_asked_for_is_given_to_nobody() -> None:
    async def serve(stream: trio.SocketStream) -> None:
        async with stream:
            while await stream.receive_some():
                await stream.send_all(OK + OK.replace(b"ok", b"no"))

    async with trio.open_nursery() as nursery, Fetcher(LOOPBACK) as fetcher:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, serve, listeners)
        url = f"http://127.0.0.1:{listeners[0].socket.getsockname()[1]}/"
        for _ in range(3):
            answer = await fetcher.get(url, deadline_s=5, max_bytes=10)
            assert isinstance(answer, Fetched)
            assert answer.body == b"ok"
        nursery.cancel_scope.cancel()


async def test_a_request_that_is_none_is_not_sent() -> None:
    async with connected() as (connection, _):
        with pytest.raises(BrokenExchangeError):
            await connection.send(b"POST", b"/", [*HOST, (b"X-Note", b"two\r\nlines")], b"text")
        assert not connection.renew()


async def test_a_server_that_went_away_has_closed_an_idle_connection() -> None:
    async with connected() as (connection, server):
        await server.aclose()
        assert connection.is_gone
