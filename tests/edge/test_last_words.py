"""What is begun goes out whole, and a last word behind it, to who has stopped reading."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from asapd.edge.last_words import LastWords

PIECE = b"m" * 700
STUCK_S = 10.5


@asynccontextmanager
async def connected(path: Path | None) -> AsyncIterator[tuple[LastWords, trio.SocketStream]]:
    server, client = (trio.socket.socket(socket.AF_INET if path is None else socket.AF_UNIX) for _ in range(2))
    with server, client:
        await server.bind(("127.0.0.1", 0) if path is None else str(path))
        server.listen()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        await client.connect(server.getsockname())
        accepted, _ = await server.accept()
        async with trio.SocketStream(accepted) as stream, trio.SocketStream(client) as reader:
            yield LastWords(stream, stream.socket, STUCK_S), reader


async def fill(words: LastWords) -> int:
    """Send until nothing more is taken, and one piece more; how much that was."""
    sent = 0
    while True:
        began_s = trio.current_time()
        await words.send_all(PIECE)
        sent += len(PIECE)
        if trio.current_time() - began_s >= STUCK_S:
            return sent


@pytest.mark.parametrize("where", [lambda _: None, lambda path: path / "s.sock"])
async def test_what_was_begun_and_a_last_word_reach_who_reads_again(
    autojump_clock: MockClock, tmp_path: Path, where: Callable[[Path], Path | None]
) -> None:
    autojump_clock.autojump_threshold = 0.02
    async with connected(where(tmp_path)) as (words, reader):
        words.keep_room()
        words.keep_room()
        sent = await fill(words)
        began_s = trio.current_time()
        await words.send_all(b"goodbye")
        assert trio.current_time() == began_s
        await words.aclose()
        received = b"".join([bytes(part) async for part in reader])
        assert (len(received), received[-7:]) == (sent + 7, b"goodbye")


async def test_without_room_kept_it_sends_as_the_stream_does(autojump_clock: MockClock) -> None:
    autojump_clock.autojump_threshold = 0.02
    async with connected(None) as (words, reader):
        with trio.move_on_after(60) as patience:
            await fill(words)
        assert patience.cancelled_caught
        await reader.send_all(b"heard")
        assert await words.receive_some() == b"heard"
        await reader.aclose()
        with pytest.raises(trio.BrokenResourceError):
            await fill(words)
        await words.aclose()
        with pytest.raises(trio.ClosedResourceError):
            await words.send_all(PIECE)
        with pytest.raises(trio.ClosedResourceError):
            await words.wait_send_all_might_not_block()
