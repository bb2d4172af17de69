"""What goes between the daemon and its writer process: length-prefixed msgpack over blocking sockets."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from functools import partial

import msgspec

from asapd.store.beside import Beside
from asapd.store.units.exchange import Answer, Envelope

HEADER = struct.Struct(">I")

RECEIVE_BYTES = 1 << 20
"""Decoded in one go. The sender lets decisions overtake what it has not sent, so they are never far behind."""

AHEAD_BYTES = 4 << 20
"""Read ahead at most: some two of the largest commits."""


class Frames:
    """The writer's end: answered on the first socket, decisions come on the last."""

    def __init__(self, socks: Sequence[socket.socket]) -> None:
        self._bulk, self._decisions = socks[0], socks[-1]
        self._open = {sock: bytearray() for sock in socks}
        self._chunk = memoryview(bytearray(RECEIVE_BYTES))
        self._reading = threading.Lock()
        """Held by who takes from the bulk socket, or from what was read of it."""
        self._beside = Beside()
        self._decoder = msgspec.msgpack.Decoder(Envelope)
        self._encoder = msgspec.msgpack.Encoder()

    @property
    def ended(self) -> bool:
        """Whether nothing more will come."""
        return not self._open

    def receive(self, timeout_s: float | None, *, decisions_only: bool = False) -> list[Envelope]:
        """What has arrived, or some of much; None waits for at least one envelope, or until the peer is gone.

        With `decisions_only` bulk stays where it is: a decision would wait until it is decoded.
        """
        received: list[Envelope] = []
        left_bytes = RECEIVE_BYTES
        watched = [sock for sock in self._open if sock is self._decisions or not decisions_only]
        for sock in watched:
            left_bytes -= self._decode(sock, received)  # what was read ahead, or was more than is decoded at once
        while left_bytes > 0 or not received:
            ready = select.select(watched, [], [], 0 if received else timeout_s)[0] if watched else []
            if not ready:
                break
            for sock in ready:
                is_there = self._read(sock)
                size = self._decode(sock, received)
                if not is_there and not size:
                    del self._open[sock]
                    watched.remove(sock)
                left_bytes -= size
        return received

    def _read(self, sock: socket.socket) -> bool:
        """Keep what a socket has, if anything; False says that its peer is gone."""
        with self._reading:
            try:
                count = sock.recv_into(self._chunk, 0, socket.MSG_DONTWAIT)
            except BlockingIOError:  # whoever else reads it was first
                return True
            except ConnectionResetError:
                return False
            if count:
                self._open[sock] += self._chunk[:count]
        return count > 0

    def _decode(self, sock: socket.socket, received: list[Envelope]) -> int:
        """Add the next envelopes that are here whole, and return how long they were."""
        start = 0
        with self._reading:
            buffer = self._open[sock]
            while len(buffer) - start >= HEADER.size and start < RECEIVE_BYTES:
                (length,) = HEADER.unpack_from(buffer, start)
                begin = start + HEADER.size
                if len(buffer) - begin < length:
                    break
                with memoryview(buffer) as view:
                    received.append(self._decoder.decode(view[begin : begin + length]))
                start = begin + length
            del buffer[:start]
        return start

    @contextlib.contextmanager
    def reading_ahead(self) -> Iterator[None]:
        """Read bulk beside the block, as it comes.

        A socket holds one array of a thousand events. Without, the sender waits for the end of a long commit, and then
        the writer for the sender; and what is read then is all that the next commit gets.
        """
        with contextlib.ExitStack() as entered:
            # Without a descriptor or a thread to be had it is read afterwards.
            with contextlib.suppress(OSError, RuntimeError):
                buffer = self._open.get(self._bulk)
                if buffer is not None:
                    woken, wake = os.pipe()
                    reading: Future[None] | None = None
                    entered.callback(os.close, woken)
                    entered.callback(lambda: reading and reading.result())
                    entered.callback(os.close, wake)
                    reading = self._beside.begin(partial(self._read_ahead, buffer, woken))
            yield

    def _read_ahead(self, buffer: bytearray, woken: int) -> None:
        while len(buffer) < AHEAD_BYTES:
            if woken in select.select([self._bulk.fileno(), woken], [], [])[0] or not self._read(self._bulk):
                return

    def send(self, answers: Sequence[Answer]) -> None:
        """Answer envelopes."""
        bodies = [self._encoder.encode(answer) for answer in answers]
        self._bulk.sendall(b"".join(part for body in bodies for part in (HEADER.pack(len(body)), body)))
