"""The outbox to the writer: everything arrives, in its order, whoever sends it."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from asapd.store.outbox import SEND_BYTES, Outbox


@asynccontextmanager
async def sending(outbox: Outbox) -> AsyncIterator[socket.socket]:
    """A running box; the other end of its socket, which does not block."""
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    stream = trio.SocketStream(trio.socket.from_stdlib_socket(ours))
    with theirs:
        async with stream, trio.open_nursery() as nursery:
            nursery.start_soon(outbox.run, stream)
            await wait_all_tasks_blocked()
            yield theirs
            nursery.cancel_scope.cancel()


async def test_a_frame_is_sent_by_who_puts_it_where_there_is_room() -> None:
    outbox = Outbox()
    async with sending(outbox) as peer:
        outbox.put(b"one")
        outbox.put(b"two")
        assert peer.recv(100) == b"onetwo"


async def test_what_was_put_before_the_writer_was_there_goes_first() -> None:
    outbox = Outbox()
    outbox.put(b"early")
    async with sending(outbox) as peer:
        outbox.put(b"late")
        await wait_all_tasks_blocked()
        assert peer.recv(100) == b"earlylate"


async def test_what_the_socket_does_not_take_at_once_comes_whole_and_in_order() -> None:
    outbox, received = Outbox(), bytearray()
    frames = [bytes([number]) * (SEND_BYTES * 3) for number in range(8)]
    async with sending(outbox) as peer:
        for frame in frames:
            outbox.put(frame)
        while len(received) < sum(map(len, frames)):
            await wait_all_tasks_blocked()
            received += peer.recv(1 << 20)
            outbox.put(b"")
    assert received == b"".join(frames)


async def test_it_ends_its_side_once_all_is_sent_and_it_is_closed() -> None:
    outbox, received = Outbox(), bytearray()
    async with sending(outbox) as peer:
        outbox.put(b"x" * (1 << 20))
        outbox.close()
        while len(received) < 1 << 20:
            await wait_all_tasks_blocked()
            received += peer.recv(1 << 20)
        await wait_all_tasks_blocked()
        assert peer.recv(1) == b""


async def test_a_peer_that_is_gone_ends_it_and_what_was_not_sent_can_be_forgotten() -> None:
    outbox = Outbox()
    async with sending(outbox) as peer:
        peer.close()
        outbox.put(b"lost")
        await wait_all_tasks_blocked()
        outbox.put(b"kept")
    outbox.clear()
    async with sending(outbox) as peer:
        await wait_all_tasks_blocked()
        with pytest.raises(BlockingIOError):
            peer.recv(1)
        outbox.put(b"new")
        assert peer.recv(100) == b"new"
