"""Sending on a socket with room kept back for a last word, which thus reaches also who has long stopped reading.

What is sent waits in the kernel, whose buffer for a socket grows when asked. Kept small, it has room to grow into once
the other side takes nothing: what was begun goes in whole then, and a close behind it, and both are there for whoever
reads again. Without that a close can never follow half a message.
"""

from __future__ import annotations

import socket
from contextlib import suppress
from math import inf

import trio

# The kernel takes twice as much, its own records included, and at most twice `net.core.wmem_max`: with the
# default of 208 KiB three times as much as kept, so that a piece of 64 KiB that was begun fits, and a close.
_KEPT_BYTES = 65_536
_GROWN_BYTES = 262_144
# Trio has the kernel take no more while so little of it was sent.
_ANY_UNSENT_BYTES = (1 << 31) - 1


class LastWords(trio.abc.Stream):
    """A stream over a socket; `stuck_s` without taking what is sent makes the room kept back available, once."""

    def __init__(self, stream: trio.abc.Stream, sock: trio.socket.SocketType, stuck_s: float) -> None:
        self._stream = stream
        self._sock = sock
        self._stuck_s = stuck_s
        self._is_kept = False
        self._is_given = False

    def keep_room(self) -> None:
        """Keep room back from now on."""
        if not self._is_kept:
            self._is_kept = True
            self._set(socket.SOL_SOCKET, socket.SO_SNDBUF, _KEPT_BYTES)

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Send all of it, as `trio.SocketStream` does.

        Raises:
            trio.BrokenResourceError: the connection is gone.
            trio.ClosedResourceError: it was closed on this side.
        """
        has_room = self._is_kept and not self._is_given
        deadline_s = trio.current_time() + self._stuck_s if has_room else inf
        try:
            with memoryview(data) as view:
                sent = 0
                while sent < len(view):
                    with trio.move_on_at(deadline_s) as patience:
                        sent += await self._sock.send(view[sent:])
                    if patience.cancelled_caught:
                        self._is_given = True
                        self._set(socket.SOL_SOCKET, socket.SO_SNDBUF, _GROWN_BYTES)
                        self._set(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, _ANY_UNSENT_BYTES)
                        deadline_s = inf
        except OSError as error:
            if self._sock.fileno() < 0:
                raise trio.ClosedResourceError("this socket was already closed") from None
            raise trio.BrokenResourceError(f"socket connection broken: {error}") from error

    async def wait_send_all_might_not_block(self) -> None:
        """As the stream does."""
        await self._stream.wait_send_all_might_not_block()

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        """As the stream does."""
        return await self._stream.receive_some(max_bytes)

    async def aclose(self) -> None:
        """As the stream does."""
        await self._stream.aclose()

    def _set(self, level: int, option: int, size_bytes: int) -> None:
        with suppress(OSError):  # it is gone, which whoever sends next is told, or no TCP
            self._sock.setsockopt(level, option, size_bytes)
