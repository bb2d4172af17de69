"""A socket that is read and written at once where that can be, for doors that serve many small requests."""

from __future__ import annotations

import os

import trio

from asapd.edge.connection import SocketTransport


class DirectStream:
    """A connected stream that yields to other tasks once for each read, and waits only for what is not there.

    `trio.SocketStream` yields at least once for each operation, and a fifth of what a small request costs goes into
    that. The first read is the stream's own, which may hold bytes that came before, no more than `max_bytes` of them.
    """

    def __init__(self, stream: SocketTransport) -> None:
        self._stream = stream
        self.fd = stream.socket.fileno()
        self._began = False

    async def receive_some(self, max_bytes: int) -> bytes:
        """What has come, at most `max_bytes`; empty at the end. Raises OSError when the connection broke."""
        if not self._began:
            self._began = True
            return bytes(await self._stream.receive_some(max_bytes))
        # The turn of the others is mostly as long as a client needs for its next request.
        await trio.lowlevel.checkpoint()
        while (data := self.receive_nowait(max_bytes)) is None:
            await trio.lowlevel.wait_readable(self.fd)
        return data

    def receive_nowait(self, max_bytes: int) -> bytes | None:
        """What has come, or None. Not for the first read. Raises OSError when the connection broke."""
        try:
            return os.read(self.fd, max_bytes)
        except BlockingIOError:
            return None

    def send_nowait(self, data: bytes) -> int:
        """How many bytes of it the kernel takes now. Raises OSError when the connection broke."""
        try:
            return os.write(self.fd, data)
        except BlockingIOError:
            return 0

    async def send_all(self, data: bytes) -> None:
        """Sends all of it, without a turn for others where the kernel takes it whole. Raises as the stream does."""
        sent = self.send_nowait(data)
        if sent < len(data):
            await self._stream.send_all(data[sent:])
