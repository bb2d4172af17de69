"""A POST is answered whole, or says why not."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
import trio

from asapd.runtime.posting import Posted, PostFailed, post_text


@asynccontextmanager
async def answering(reply: Callable[[trio.SocketStream, bytes], object]) -> AsyncIterator[str]:
    """A server that has each connection's request answered by a function."""
    got: list[bytes] = []

    async def handle(stream: trio.SocketStream) -> None:
        request = b""
        while b"\r\n\r\n" not in request or not request.endswith(b"text"):
            request += await stream.receive_some(65_536)
        got.append(request)
        await reply(stream, request)  # type: ignore[misc]  # all replies here are coroutines

    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(trio.serve_tcp, handle, 0)
        port = listeners[0].socket.getsockname()[1]
        yield f"http://127.0.0.1:{port}/x"
        nursery.cancel_scope.cancel()


async def echo(stream: trio.SocketStream, request: bytes) -> None:
    assert request.startswith(b"POST /x HTTP/1.1\r\n")
    assert b"Content-Type: text/plain" in request
    await stream.send_all(b"HTTP/1.1 409 Conflict\r\nContent-Length: 2\r\n\r\n7\n")


async def slow(stream: trio.SocketStream, request: bytes) -> None:
    await trio.sleep_forever()


async def gone(stream: trio.SocketStream, request: bytes) -> None:
    await stream.aclose()


async def test_any_status_is_an_answer() -> None:
    async with answering(echo) as url:
        assert await post_text(url, b"text", deadline_s=5, max_bytes=2) == Posted(409, b"7\n")


async def test_an_answer_that_is_too_long_is_none() -> None:
    async with answering(echo) as url:
        found = await post_text(url, b"text", deadline_s=5, max_bytes=1)
        assert found == PostFailed("the answer is longer than 1 bytes")


@pytest.mark.parametrize(
    ("reply", "deadline_s", "said"), [(slow, 0.2, "no answer within 0.2 s"), (gone, 30, "cannot be reached")]
)
async def test_no_answer_says_why(
    reply: Callable[[trio.SocketStream, bytes], object], deadline_s: float, said: str
) -> None:
    async with answering(reply) as url:
        found = await post_text(url, b"text", deadline_s=deadline_s, max_bytes=100)
        assert isinstance(found, PostFailed)
        assert said in found.detail


async def test_nobody_there_says_so() -> None:
    found = await post_text("http://127.0.0.1:1/", b"text", deadline_s=5, max_bytes=100)
    assert isinstance(found, PostFailed)
    assert found.detail.startswith("cannot be reached")
