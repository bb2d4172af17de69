"""A connection to a server, and HTTP/1.1 on it: one exchange after the other."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import h11
import trio

_READ_BYTES = 64 << 10
_MOST_HEAD_BYTES = 100 << 10


class BrokenExchangeError(Exception):
    """The other side does not speak HTTP/1.1, or went away in the middle of it. Its fault, or the way's."""


class ServerConnection:
    """For each exchange, in this order: `send`, `receive_head`, `receive_part` until None, `renew`."""

    __slots__ = ("_http", "_stream")

    def __init__(self, stream: trio.SocketStream | trio.SSLStream[trio.SocketStream]) -> None:
        self._stream = stream
        self._http = h11.Connection(h11.CLIENT, max_incomplete_event_size=_MOST_HEAD_BYTES)

    @property
    def _socket(self) -> trio.socket.SocketType:
        stream = self._stream
        return (stream.transport_stream if isinstance(stream, trio.SSLStream) else stream).socket

    @property
    def is_gone(self) -> bool:
        """Of an idle connection: whether it can be read, which means that the server closed it, or talks unasked."""
        return self._socket.is_readable()

    async def send(
        self, method: bytes, target: bytes, headers: Sequence[tuple[bytes, bytes]], body: bytes | None
    ) -> None:
        """Send a request; a server that went away meanwhile may have answered before, so that is no error yet.

        Raises:
            BrokenExchangeError: it is not a request that HTTP allows.
        """
        try:
            data = self._http.send(h11.Request(method=method, target=target, headers=list(headers))) or b""
            if body:
                data += self._http.send(h11.Data(data=body)) or b""
            data += self._http.send(h11.EndOfMessage()) or b""
        except h11.LocalProtocolError as error:
            raise BrokenExchangeError(str(error)) from error
        with contextlib.suppress(trio.BrokenResourceError):
            await self._stream.send_all(data)

    async def receive_head(self) -> h11.Response:
        """The status and headers of the answer.

        Raises:
            BrokenExchangeError: there was none.
        """
        while True:
            event = await self._receive()
            if isinstance(event, h11.Response):
                return event

    async def receive_part(self) -> bytes | None:
        """The next part of the answer's body; None behind the last.

        Raises:
            BrokenExchangeError: it was cut off.
        """
        event = await self._receive()
        return bytes(event.data) if isinstance(event, h11.Data) else None

    async def _receive(self) -> h11.Event | type[h11.PAUSED]:
        try:
            while True:
                event = self._http.next_event()
                if not isinstance(event, type) or event is h11.PAUSED:
                    return event
                data = await self._stream.receive_some(_READ_BYTES)
                if not data and self._http.their_state is h11.SEND_RESPONSE:
                    raise BrokenExchangeError("Server disconnected without sending a response.")
                self._http.receive_data(bytes(data))
        except h11.RemoteProtocolError as error:
            raise BrokenExchangeError(str(error)) from error
        except trio.BrokenResourceError as error:
            raise BrokenExchangeError("the connection was reset") from error

    def renew(self) -> bool:
        """Make ready for the next exchange; False when there cannot be one."""
        http = self._http
        if http.our_state is not h11.DONE or http.their_state is not h11.DONE or http.trailing_data != (b"", False):
            return False
        http.start_next_cycle()
        return True

    def close(self) -> None:
        """Close it at once: nothing of worth is under way."""
        self._socket.close()
