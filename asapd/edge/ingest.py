"""The ingest socket: many frames in flight on a connection, answered in order; HTTP is passed on."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from math import inf

import msgspec
import trio

from asapd.core.errors import Refusal
from asapd.edge.connection import SocketTransport
from asapd.edge.early import bare_response
from asapd.edge.sockets import Peer, peer_credentials
from asapd.runtime.room import Room
from asapd.wire.frames import FrameDecoder, Oversized, encode
from asapd.wire.problem import refused_frame

RECEIVE_BYTES = 65_536
ACCEPT_PAUSE_S = 0.1
# Answers are joined into one write up to this size.
ANSWER_BYTES = 65_536
# What is larger needs room among all that is being received; up to this a connection holds as much in any case.
FREE_BYTES = 65_536

Take = Callable[[bytes, Peer, Callable[[bytes], None]], Awaitable[None]]
"""Takes a frame, waiting only for room; the answer is given to the callable, once, then or later."""

_GONE = (OSError, trio.BrokenResourceError, trio.ClosedResourceError)


class PushbackStream:
    """A stream whose first bytes, already received, come first; for the rest like `trio.SocketStream`."""

    def __init__(self, stream: SocketTransport, first: bytes) -> None:
        self._stream = stream
        self._first = first
        self.socket = stream.socket

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """Like `trio.abc.ReceiveStream.receive_some`."""
        if not self._first:
            return bytes(await self._stream.receive_some(max_bytes))
        await trio.lowlevel.checkpoint()
        head, self._first = self._first[:max_bytes], self._first[max_bytes:] if max_bytes else b""
        return head

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Like `trio.abc.SendStream.send_all`."""
        await self._stream.send_all(data)

    async def send_eof(self) -> None:
        """Like `trio.abc.HalfCloseableStream.send_eof`."""
        await self._stream.send_eof()

    async def aclose(self) -> None:
        """Closes the stream."""
        await self._stream.aclose()


Http = Callable[[PushbackStream, Peer], Awaitable[None]]


class IngestLimits(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds to wait for a client."""

    frame_s: float = 30.0
    """A whole frame, from its first byte on, however steadily it comes."""
    room_s: float = 15.0
    """For room for a large frame, which others hold."""
    idle_s: float = 10.0
    """When the door is full: for so long nobody is closed between frames to let another in."""
    send_s: float = 30.0
    """For up to 64 KiB of answers to be taken."""
    first_byte_s: float = 30.0
    answer_s: float = 35.0
    """For the answer to a frame: longer than whoever answers waits for its own sources."""
    linger_s: float = 2.0
    """After a last answer: how long unread input is discarded, so that the client comes to read the answer."""


DEFAULT_LIMITS = IngestLimits()


async def run_ingest(
    listener: trio.SocketListener,
    take: Take,
    *,
    max_frame_bytes: int,
    max_connections: int,
    room: Room,
    log: logging.Logger,
    in_flight_per_connection: int = 64,
    http: Http | None = None,
    grace_s: float = 5.0,
    limits: IngestLimits = DEFAULT_LIMITS,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serves the ingest socket until cancelled; frames that `take` has by then are still answered within `grace_s`.

    Of a connection up to `in_flight_per_connection` frames wait for their answers, which may come in any order and keep
    the frames' order. At that bound, and for as long as the client does not read, nothing more is read.
    Large frames take `room` until they are answered; who finds none waits, and is refused in the end.
    At `max_connections` clients wait in the backlog, until one leaves, or the one that has been idle longest can be
    closed. A connection whose first byte is a letter is given to `http`, or answered 501. Closes `listener`.

    Raises: ValueError for a `max_frame_bytes` that frames cannot have.
    """
    if in_flight_per_connection < 1 or max_connections < 1:
        raise ValueError("in_flight_per_connection and max_connections must be at least 1")
    FrameDecoder(max_frame_bytes)
    shared = _Shared(
        take=take,
        http=http,
        max_frame_bytes=max_frame_bytes,
        room=room,
        in_flight=in_flight_per_connection,
        limits=limits,
        log=log,
        places=trio.Semaphore(max_connections),
        stopping=trio.Event(),
    )
    async with trio.open_nursery() as outside:
        outside.start_soon(_set_when_cancelled, shared.stopping)
        async with trio.open_nursery() as connections:
            # Cancellation is turned into a stop, which sets the deadline of this shield.
            connections.cancel_scope.shield = True
            async with trio.open_nursery() as accepting:
                accepting.start_soon(_accept, listener, shared, connections)
                task_status.started()
                await shared.stopping.wait()
                accepting.cancel_scope.cancel()
            connections.cancel_scope.deadline = trio.current_time() + grace_s
            for reading in list(shared.readers):
                reading.cancel()
        outside.cancel_scope.cancel()


class _Shared(msgspec.Struct, frozen=True, kw_only=True):
    """What all connections of a listener have in common."""

    take: Take
    http: Http | None
    max_frame_bytes: int
    room: Room
    in_flight: int
    limits: IngestLimits
    log: logging.Logger
    places: trio.Semaphore
    stopping: trio.Event
    readers: dict[trio.CancelScope, Callable[[], float]] = msgspec.field(default_factory=dict)

    @contextmanager
    def reading(self, idle_since: Callable[[], float] | None = None) -> Iterator[trio.CancelScope]:
        """Waiting for a client, which a stop ends at once; so does a full door if it is idle, since when is asked."""
        with trio.CancelScope() as scope:
            self.readers[scope] = idle_since or _never
            if self.stopping.is_set():
                scope.cancel()
            try:
                yield scope
            finally:
                del self.readers[scope]

    def close_idle(self) -> float:
        """Close whoever is idle longest, if that is long; for how many seconds to wait before another try."""
        scope, since_s = min(
            ((scope, idle_since()) for scope, idle_since in self.readers.items() if not scope.cancel_called),
            key=lambda pair: pair[1],
            default=(None, inf),
        )
        left_s = min(since_s + self.limits.idle_s - trio.current_time(), self.limits.idle_s)
        if scope is None or left_s > 0:
            return left_s
        self.log.debug("an idle ingest connection was closed, because others wait for its place")
        scope.cancel()
        return self.limits.idle_s


async def _set_when_cancelled(event: trio.Event) -> None:
    try:
        await trio.sleep_forever()
    finally:
        event.set()


async def _accept(listener: trio.SocketListener, shared: _Shared, connections: trio.Nursery) -> None:
    async with listener:
        while True:
            await _place(listener, shared)
            try:
                stream = await listener.accept()
            except OSError as error:
                shared.places.release()
                shared.log.warning("cannot accept an ingest connection: %s", error)
                await trio.sleep(ACCEPT_PAUSE_S)
            else:
                connections.start_soon(_serve, stream, shared)


async def _place(listener: trio.SocketListener, shared: _Shared) -> None:
    """A place for one more connection. Without one, whoever waits in the backlog gets that of an idle one."""
    while True:
        try:
            shared.places.acquire_nowait()
        except trio.WouldBlock:
            await trio.lowlevel.wait_readable(listener.socket)
            with trio.move_on_after(shared.close_idle()):
                await shared.places.acquire()
                return
        else:
            return


async def _serve(stream: trio.SocketStream, shared: _Shared) -> None:
    try:
        await _talk(stream, peer_credentials(stream), shared)
    except* _GONE as group:
        shared.log.debug("an ingest connection broke: %r", group.exceptions[0])
    except* Exception:
        shared.log.warning("an ingest connection ended in an error", exc_info=True)
    finally:
        stream.socket.close()
        shared.places.release()


async def _talk(stream: trio.SocketStream, peer: Peer, shared: _Shared) -> None:
    first = b""
    since_s = trio.current_time()
    with trio.move_on_after(shared.limits.first_byte_s), shared.reading(lambda: since_s):
        first = await stream.receive_some(RECEIVE_BYTES)
    if not first:
        return
    if not first[:1].isalpha():
        await _Frames(stream, peer, shared).run(first)
    elif shared.http is not None:
        await shared.http(PushbackStream(stream, first), peer)
    else:
        with trio.move_on_after(shared.limits.send_s):
            await stream.send_all(bare_response(501))
        await _linger(stream, shared.limits.linger_s)


async def _linger(stream: trio.SocketStream, linger_s: float) -> None:
    """Lets a client that is still sending finish, so that it comes to read its answer."""
    with trio.move_on_after(linger_s):
        await stream.send_eof()
        while await stream.receive_some(RECEIVE_BYTES):
            pass


class _Answer:
    """The place of one frame's answer in the order of answers; only the first answer counts."""

    __slots__ = ("_told", "body", "held_bytes")

    def __init__(self, told: Callable[[_Answer], None], held_bytes: int = 0) -> None:
        self.body: bytes | None = None
        self.held_bytes = held_bytes
        self._told = told

    def set(self, body: bytes) -> None:
        if self.body is None:
            self.body = body
            self._told(self)


class _Frames:
    """A connection that speaks frames: one task reads and hands on, one writes the answers in order."""

    def __init__(self, stream: trio.SocketStream, peer: Peer, shared: _Shared) -> None:
        self._stream = stream
        self._peer = peer
        self._shared = shared
        # A frame's place is free again when its answer is written, so a client that does not read is not read.
        self._places = trio.Semaphore(shared.in_flight)
        self._answers: deque[_Answer] = deque()
        self._writer = trio.lowlevel.ParkingLot()
        self._ended = False
        self._is_refused = False
        self._held_bytes = 0
        self._active_s = trio.current_time()

    async def run(self, first: bytes) -> None:
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._write, nursery.cancel_scope)
                await self._read(first)
                self._ended = True
                self._writer.unpark_all()
        finally:
            for answer in self._answers:
                self._give_back(answer)
            self._shared.room.give_back(self._held_bytes)
        if self._is_refused:
            await _linger(self._stream, self._shared.limits.linger_s)

    async def _read(self, data: bytes) -> None:
        decoder = FrameDecoder(self._shared.max_frame_bytes)
        began_s = trio.current_time()
        while data:
            is_new = not decoder.partial
            for item in decoder.feed(data):
                is_new = True
                if not await self._has_place():
                    return
                # The frame that was waited for is the first to be whole.
                answer, self._held_bytes = _Answer(self._told, self._held_bytes), 0
                self._answers.append(answer)
                if isinstance(item, Oversized):
                    self._refuse(answer, _too_large(item, self._shared.max_frame_bytes))
                    return
                try:
                    await self._shared.take(item, self._peer, answer.set)
                except* Exception:
                    self._shared.log.exception("an ingest frame failed")
                    answer.set(_INTERNAL)
            if decoder.announced_bytes > FREE_BYTES and not self._held_bytes:
                if not await self._has_room(decoder.announced_bytes):
                    return
                is_new = True
            if is_new:
                began_s = trio.current_time()
            data = b""
            with (
                trio.CancelScope(deadline=began_s + self._shared.limits.frame_s if decoder.partial else inf),
                self._shared.reading(None if decoder.partial else self._idle_since),
            ):
                data = await self._stream.receive_some(RECEIVE_BYTES)
            self._active_s = trio.current_time()

    def _idle_since(self) -> float:
        return inf if self._answers else self._active_s

    def _refuse(self, answer: _Answer, body: bytes) -> None:
        """A last answer: what comes behind it is not read."""
        self._is_refused = True
        answer.set(body)

    async def _has_room(self, wanted_bytes: int) -> bool:
        """Whether a large frame may be received; one that finds no room in time is refused."""
        with trio.move_on_after(self._shared.limits.room_s) as waiting, self._shared.reading():
            self._held_bytes = await self._shared.room.take(wanted_bytes)
        if waiting.cancelled_caught and await self._has_place():
            answer = _Answer(self._told)
            self._answers.append(answer)
            self._refuse(answer, _NO_ROOM)
        return self._held_bytes > 0

    def _give_back(self, answer: _Answer) -> None:
        held_bytes, answer.held_bytes = answer.held_bytes, 0
        if held_bytes:
            self._shared.room.give_back(held_bytes)

    def _told(self, answer: _Answer) -> None:
        self._give_back(answer)
        if self._answers and self._answers[0] is answer:
            self._writer.unpark_all()

    async def _has_place(self) -> bool:
        """Whether a frame may be handed on; waits for a place, unless the door closes."""
        try:
            self._places.acquire_nowait()
        except trio.WouldBlock:
            with self._shared.reading() as waiting:
                await self._places.acquire()
            return not waiting.cancelled_caught
        return True

    async def _write(self, connection: trio.CancelScope) -> None:
        answers = self._answers
        while True:
            while not (answers and answers[0].body is not None):
                if self._ended and not answers:
                    return
                oldest = answers[0] if answers else None
                with trio.move_on_after(self._shared.limits.answer_s) as waiting:
                    await self._writer.park()
                if waiting.cancelled_caught and oldest is not None and oldest.body is None:
                    self._shared.log.warning("an ingest frame was not answered in time")
                    oldest.set(_TOO_LATE)
            out = bytearray()
            written = 0
            while answers and len(out) < ANSWER_BYTES and (body := answers[0].body) is not None:
                out += encode(body)
                answers.popleft()
                written += 1
            with trio.move_on_after(self._shared.limits.send_s) as sending:
                await self._stream.send_all(out)
            if sending.cancelled_caught:
                self._shared.log.debug("an ingest client did not read its answers and was cut off")
                connection.cancel()
                return
            self._active_s = trio.current_time()
            for _ in range(written):
                self._places.release()


_INTERNAL = refused_frame(Refusal("internal", "The frame failed inside the daemon; its log says why. Send it again."))

_NO_ROOM = refused_frame(
    Refusal(
        "overloaded",
        "Other large frames are being received and left no room for this one: send it again, in parts.",
        retry_after_s=1,
    )
)

_TOO_LATE = refused_frame(
    Refusal(
        "outcome_unknown",
        "The frame was not answered in time; it may still take effect. Send it again: an event with an id is counted "
        "once.",
        retry_after_s=1,
    )
)


def _never() -> float:
    return inf


def _too_large(item: Oversized, max_frame_bytes: int) -> bytes:
    detail = f"A frame of {item.announced_bytes} bytes is over the limit of {max_frame_bytes}: send smaller batches."
    return refused_frame(Refusal("too_large", detail))
