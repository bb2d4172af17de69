"""A connection of the fast lane: what one client sends, in whose hands it is, and until when."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from enum import Enum, auto
from itertools import takewhile
from math import inf
from typing import TYPE_CHECKING, assert_never

import trio

from asapd.core.access import Caller
from asapd.core.errors import Refusal
from asapd.edge.connection import SocketTransport
from asapd.edge.direct import DirectStream
from asapd.edge.early import bare_response
from asapd.edge.ingest import FREE_BYTES, PushbackStream
from asapd.edge.lane_request import STARTS, Head, Outcome, Received, read_head
from asapd.edge.services import ASK_S
from asapd.edge.sockets import Peer
from asapd.edge.usage_request import UsageRequest

if TYPE_CHECKING:
    from asapd.edge.fastlane import FastLane

RECEIVE_BYTES = 65_536
SEND_BYTES = 65_536
# Requests of one connection in hand at once. They share commits; their answers keep their order.
PIPELINED = 64
# Heads that a connection remembers: those of one client differ in the length of the body. Behind a proxy they have some
# twenty fields, and take 5 KiB each.
HEADS = 8
HEAD_BYTES = 1_024
HEAD_FIELDS = 24
# For the answer to a request, of which actors are asked at most twice. Who has none by then is told that nobody knows.
ANSWER_S = ASK_S + 5.0

GONE = (OSError, trio.BrokenResourceError, trio.ClosedResourceError)
_NO_ROOM = Refusal(
    "overloaded",
    "other large bodies are being received and left no room for this one: try again, or send smaller ones",
    retry_after_s=5,
)
_TOO_LATE = Refusal(
    "outcome_unknown",
    "the request was not answered in time, and may still take effect: send it again, an event with an id is still "
    "counted once",
    retry_after_s=1,
)


class _Doing(Enum):
    """What a connection waits for, which says what it means when that takes too long."""

    IDLE = auto()
    READING = auto()
    WAITING = auto()
    ANSWERING = auto()
    SENDING = auto()


class LaneConnection:
    """One client: what has come is answered together, and only then is more read.

    One cancel scope bounds all its waits, and the lane looks whose time is up: a deadline for each, which moves with
    all that a connection does, would cost a tenth of a small request.
    """

    def __init__(self, lane: FastLane, stream: SocketTransport, peer: Peer | None) -> None:
        self._lane = lane
        self._stream = stream
        self._direct = DirectStream(stream)
        self._peer = peer
        self._limits = lane.limits
        self._buffer = bytearray()
        self._head: Head | None = None
        self._heads: dict[bytes, Head] = {}
        self._outcomes: list[Outcome] = []
        """Of pipelined requests in hand, in their order: too late, until it is there."""
        self._caller: Caller | Refusal
        """Who sent the head that was read last."""
        self._held_bytes = 0
        self._searched = 0
        self._since_s = trio.current_time()
        self._is_foreign = False
        self._doing = _Doing.ANSWERING
        self._waiting = trio.CancelScope()
        self._is_over = False
        """Whether `_waiting` was cancelled: to ask a scope takes the time, too."""
        self._due_s: float | None = inf
        self._wait_s = inf
        self._is_in_hand = False
        self._unsent = b""
        self._is_last = False
        self._is_needed = False
        self._error: Exception | None = None
        self._found: list[Received] = []
        self._task = trio.lowlevel.ParkingLot()

    def stop_if_idle(self) -> None:
        """Ends the connection unless a request has begun."""
        if self._doing is _Doing.IDLE:
            self._end_wait()

    async def run(self) -> None:
        try:
            with self._waiting:
                await self._talk()
        finally:
            self._give_back()
            self._is_in_hand = False
        if self._waiting.cancelled_caught:
            await self._too_slow()
        elif self._is_foreign:
            await self._lane.hand_over(PushbackStream(self._stream, bytes(self._buffer)), self._peer)

    async def _talk(self) -> None:
        """Serves requests until the connection ends or is to be handed over."""
        wait_s = self._limits.header_s
        while True:
            found = self._take()
            if self._begin(found):
                # The poller may serve the connection for hours, and this task is not to hold a body meanwhile.
                found.clear()
                found = await self._be_served()
                wait_s = self._limits.keep_alive_s
            if found:
                await self._answer(found)
                wait_s = self._limits.keep_alive_s
            if self._is_last:
                self._is_foreign = False
                self._doing_until(_Doing.ANSWERING, inf)
                await self._linger()
                return
            if self._is_foreign:
                return
            if not found and not await self._receive(wait_s):
                if self._buffer or self._head is not None:
                    await self._refuse_cut_off()
                return

    async def _refuse_cut_off(self) -> None:
        """Answers who ended their side within a request, as the HTTP door does: it will never be whole."""
        self._give_back()
        await self._send(bare_response(400))
        self._doing_until(_Doing.ANSWERING, inf)
        await self._linger()

    def end_if_due(self, now_s: float) -> None:
        """Ends the wait at hand if its time is up."""
        if self._due_s is None:
            self._due_s = now_s + self._wait_s
        elif self._due_s <= now_s:
            self._end_wait()

    def _end_wait(self) -> None:
        self._is_over = True
        self._waiting.cancel()

    def _doing_until(self, doing: _Doing, due_s: float) -> None:
        self._doing, self._due_s = doing, due_s

    def _doing_for(self, doing: _Doing, wait_s: float) -> None:
        """A wait that counts from the next look on: to ask for the time costs as much as to decode an event."""
        self._doing, self._due_s, self._wait_s = doing, None, wait_s

    async def _too_slow(self) -> None:
        match self._doing:
            case _Doing.IDLE:
                return
            case _Doing.SENDING:
                self._lane.cut_off()
                return
            case _Doing.READING:
                last = bare_response(408)
            case _Doing.WAITING:
                last = self._lane.respond(_NO_ROOM, keep_alive=False)
            case _Doing.ANSWERING:
                known = len(list(takewhile(lambda outcome: outcome is not _TOO_LATE, self._outcomes)))
                last = self._responses(self._outcomes[: known + 1] or [_TOO_LATE], is_last=True)
            case _:
                assert_never(self._doing)
        with trio.move_on_after(self._limits.send_s):
            await self._stream.send_all(last)
            await self._linger()

    def _requests_in(self, data: bytes) -> list[Received]:
        """The whole requests that have come with `data`; one like those before, and no more, is found at a glance."""
        if not self._buffer and self._head is None:
            end = data.find(b"\r\n\r\n") + 4
            head = self._heads.get(data[:end])
            if head is not None and len(data) - end == head.body_bytes:
                caller = self._lane.identify(head, self._peer)
                request = UsageRequest(head.path, head.query, head.fields, data[end:])
                return [Received(request, caller, head.keep_alive, head.is_plain)]
        self._buffer += data
        self._since_s = trio.current_time()
        return self._take()

    def _take(self) -> list[Received]:
        """The whole requests that have come, as many as may be in hand at once."""
        found: list[Received] = []
        while len(found) < PIPELINED and self._has_head():
            head = self._head
            assert head is not None, "has just been read"
            keep_alive = head.keep_alive
            is_refused = isinstance(self._caller, Refusal)
            if len(self._buffer) < head.body_bytes:
                if not is_refused:
                    break
                # The body of somebody who is not heard is not waited for.
                keep_alive = False
            body = bytes(self._buffer[: head.body_bytes])
            del self._buffer[: head.body_bytes]
            self._head = None
            if is_refused:
                # It may wait for its answer to be read, and fields take twenty times the memory that they cost to send.
                request = UsageRequest(head.path, b"", {}, b"")
            else:
                request = UsageRequest(head.path, head.query, head.fields, body)
            found.append(Received(request, self._caller, keep_alive, head.is_plain))
            if not keep_alive:
                break
        return found

    def _has_head(self) -> bool:
        """Whether the head of the next request has been read; sees to it if it has come."""
        if self._head is not None:
            return True
        buffer = self._buffer
        if not buffer or self._is_foreign:
            return False
        end = buffer.find(b"\r\n\r\n", max(0, self._searched - 3))
        if end < 0:
            self._searched = len(buffer)
            is_ours = any(buffer.startswith(start[: len(buffer)]) for start in STARTS)
            self._is_foreign = not is_ours or len(buffer) > self._limits.max_header_bytes or b"\n\n" in buffer
            return False
        self._searched = 0
        raw = bytes(buffer[: end + 4])
        head = self._heads.get(raw)
        if head is None and len(raw) <= self._limits.max_header_bytes:
            head = read_head(raw, self._limits.max_body_bytes)
        if head is None:
            self._is_foreign = True
            return False
        self._head = head
        self._caller = self._lane.identify(head, self._peer)
        if isinstance(self._caller, Caller):
            self._remember(raw, head)
        del buffer[: end + 4]
        return True

    def _remember(self, raw: bytes, head: Head) -> None:
        """Have a head read once however often it comes; not for who is not heard, whose memory costs them nothing."""
        if raw in self._heads or len(raw) > HEAD_BYTES or len(head.fields) > HEAD_FIELDS:
            return
        if len(self._heads) >= HEADS:
            self._heads.clear()
        self._heads[raw] = head

    def _begin(self, found: list[Received]) -> bool:
        """Whether all that has come is one request that is on its way, and whoever has its answer will send it."""
        if len(found) != 1 or self._buffer or not found[0].keep_alive:
            return False
        self._is_in_hand, self._is_needed = True, False
        self._doing_for(_Doing.ANSWERING, ANSWER_S)
        if self._lane.answer_nowait(found[0], self._told):
            return True
        self._is_in_hand = False
        return False

    def _told(self, outcome: Outcome) -> None:
        if not self._is_in_hand:
            return  # the client was told that nobody knows
        self._is_in_hand = False
        self._give_back()
        self._is_last = self._lane.is_stopping
        data = self._lane.respond(outcome, keep_alive=not self._is_last)
        try:
            sent = self._direct.send_nowait(data)
        except OSError:  # the task meets it too, and ends
            sent = 0
        self._unsent = data[sent:]
        if self._unsent:
            self._doing_for(_Doing.SENDING, self._limits.send_s)
        else:
            self._doing_for(_Doing.IDLE, self._limits.keep_alive_s)
        self._is_needed = self._is_needed or self._is_last or bool(self._unsent)
        if self._is_needed:
            self._task.unpark_all()

    def _ready(self) -> None:
        """Serve the request that has come, if nothing has to be waited for; else this connection's task is needed."""
        if self._is_over:
            return
        try:
            if not (self._is_in_hand or self._is_needed) and self._is_served():
                return
        except Exception as error:  # noqa: BLE001 -- it is raised in the task, and ends this connection only
            self._error = error
        self._is_needed = True
        self._lane.poller.forget(self._direct.fd)
        self._task.unpark_all()

    def _is_served(self) -> bool:
        data = self._direct.receive_nowait(RECEIVE_BYTES)
        if data is None:
            return True
        found = self._requests_in(data)
        if self._begin(found):
            return True
        self._found = found
        return False

    async def _be_served(self) -> list[Received]:
        """Leave the connection to the poller; return once there is something to do for this task, such as requests."""
        self._found = []
        self._lane.poller.watch(self._direct.fd, self._ready)
        try:
            while self._is_in_hand or not self._is_needed:
                await self._task.park()
        finally:
            self._lane.poller.forget(self._direct.fd)
        if self._error is not None:
            raise self._error
        if self._unsent:
            await self._send(self._unsent)
            self._unsent = b""
        found, self._found = self._found, []
        return found

    async def _answer(self, found: list[Received]) -> None:
        """Answers requests in their order."""
        if any(isinstance(sent.caller, Refusal) for sent in found):
            self._heads.clear()
        outcomes: list[Outcome] = [_TOO_LATE] * len(found)
        self._outcomes = outcomes
        self._doing_until(_Doing.ANSWERING, trio.current_time() + ANSWER_S)

        async def one(place: int, sent: Received) -> None:
            outcomes[place] = await self._lane.outcome(sent)

        if len(found) == 1:
            await one(0, found[0])
        else:
            async with trio.open_nursery() as nursery:
                for place, sent in enumerate(found):
                    nursery.start_soon(one, place, sent)
        self._give_back()
        self._outcomes = []
        self._is_last = not found[-1].keep_alive or self._lane.is_stopping
        await self._send(self._responses(outcomes, is_last=self._is_last))
        self._since_s = trio.current_time()

    def _responses(self, outcomes: Sequence[Outcome], *, is_last: bool) -> bytes:
        """The responses to pipelined requests: who is told to close by one reads none behind it (RFC 9112, 9.6)."""
        last = len(outcomes) - 1
        return b"".join(
            self._lane.respond(outcome, keep_alive=place < last or not is_last)
            for place, outcome in enumerate(outcomes)
        )

    def _give_back(self) -> None:
        """Leaves the room of a body that was answered; a client that does not read its answer must not hold it."""
        if self._held_bytes:
            self._lane.room.give_back(self._held_bytes)
            self._held_bytes = 0

    async def _receive(self, wait_s: float) -> bool:
        """Waits for more; False when none comes."""
        limits = self._limits
        is_idle = not self._buffer and self._head is None
        if is_idle:
            self._doing_for(_Doing.IDLE, wait_s)
        elif self._head is None:
            self._doing_until(_Doing.READING, self._since_s + limits.header_s)
        else:
            if self._head.body_bytes > FREE_BYTES and not self._held_bytes:
                self._doing_until(_Doing.WAITING, trio.current_time() + limits.room_s)
                self._held_bytes = await self._lane.room.take(self._head.body_bytes)
                self._since_s = trio.current_time()
            whole_s = self._since_s + limits.header_s + limits.body_s
            self._doing_until(_Doing.READING, min(whole_s, trio.current_time() + limits.body_idle_s))
        if is_idle and self._lane.is_stopping:
            return False
        data = await self._direct.receive_some(RECEIVE_BYTES)
        if self._is_over:
            # What came together with the deadline came too late; to begin on it would be to leave it unanswered.
            await trio.lowlevel.checkpoint()
        if is_idle:
            self._since_s = trio.current_time()
        self._buffer += data
        return bool(data)

    async def _send(self, data: bytes) -> None:
        for start in range(0, len(data), SEND_BYTES):
            self._doing_until(_Doing.SENDING, trio.current_time() + self._limits.send_s)
            await self._direct.send_all(data[start : start + SEND_BYTES])

    async def _linger(self) -> None:
        """Discards input for a while: closing on what is unread would reset the answer away."""
        left_bytes = self._limits.linger_bytes
        with trio.move_on_after(self._limits.linger_s), suppress(*GONE):
            await self._stream.send_eof()
            while left_bytes > 0:
                data: bytes | bytearray = b""
                with trio.move_on_after(self._limits.linger_idle_s):
                    data = await self._stream.receive_some(RECEIVE_BYTES)
                if not data:
                    return
                left_bytes -= len(data)
