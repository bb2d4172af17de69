"""What the daemon has for its writer on one of the sockets between them, in its order."""

from __future__ import annotations

import os
from collections import deque

import trio

SEND_BYTES = 64 << 10
"""Sent in one go: a third of what a socket holds, so that the writer never waits for more."""


class Outbox:
    """Frames on their way to the writer. What the socket takes at once is sent by who puts it: the writer waits for it.

    With a turn of the loop for its task, a single event would come behind all answers that had arrived by then, and
    then the writer and the daemon wait for each other in turns.
    """

    def __init__(self) -> None:
        self._frames: deque[bytes] = deque()
        self._stream: trio.SocketStream | None = None
        # Not a condition: between a look and a wait nothing else runs, and waking costs nobody a turn.
        self._idle = trio.lowlevel.ParkingLot()
        """Its task, while nothing is left to send."""
        self._closing = False

    def put(self, frame: bytes) -> None:
        """Send a frame behind those before it."""
        self._frames.append(frame)
        if not self._idle:
            return
        assert self._stream is not None, "its task has it"
        data = self._take()
        try:
            sent = os.write(self._stream.socket.fileno(), data)
        except OSError:  # no room; or the task meets it too, and ends
            sent = 0
        if sent < len(data):
            self._frames.appendleft(bytes(data[sent:]))
            self._idle.unpark_all()

    async def run(self, stream: trio.SocketStream) -> None:
        """Send over a stream, which nobody else sends on, until it breaks or all is sent and the box is closed."""
        self._stream = stream
        try:
            while True:
                if self._frames:
                    await stream.send_all(self._take())
                elif self._closing:
                    await stream.send_eof()
                    return
                else:
                    await self._idle.park()
        except trio.BrokenResourceError:
            return  # the receiving side learns of it too, and knows what to do

    def _take(self) -> bytearray:
        data = bytearray()
        while self._frames and len(data) < SEND_BYTES:
            data += self._frames.popleft()
        return data

    def clear(self) -> None:
        """Forget what was not sent."""
        self._frames.clear()

    def close(self) -> None:
        """Have `run` end once all is sent."""
        self._closing = True
        self._idle.unpark_all()
