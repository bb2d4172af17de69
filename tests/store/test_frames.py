"""What comes to the writer: in its order, decisions apart, and bulk also while a commit is under way."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import msgspec
import pytest

from asapd.store import frames
from asapd.store.frames import HEADER, RECEIVE_BYTES, Frames
from asapd.store.units.exchange import Answer, Envelope
from asapd.store.units.house import Note
from asapd.store.units.unit import RowWritten

SOCKET_BYTES = 1 << 18
"""More than a socket holds by default."""


def envelope(number: int, size: int = 0, *, urgent: bool = False) -> Envelope:
    return Envelope(number, Note("noted", "x", "y" * size, {}, 1), urgent)


def framed(envelopes: Sequence[Envelope]) -> bytes:
    bodies = [msgspec.msgpack.encode(envelope) for envelope in envelopes]
    return b"".join(HEADER.pack(len(body)) + body for body in bodies)


class Line:
    """Both ends of the sockets between a daemon and its writer."""

    def __init__(self) -> None:
        self.bulk, theirs = socket.socketpair()
        self.decisions, theirs_urgent = socket.socketpair()
        self._ends = self.bulk, self.decisions, theirs, theirs_urgent
        self.frames = Frames([theirs, theirs_urgent])

    def received(self, count: int) -> list[int]:
        numbers: list[int] = []
        while len(numbers) < count:
            numbers += [envelope.number for envelope in self.frames.receive(10)]
        return numbers

    def close(self) -> None:
        for sock in self._ends:
            sock.close()


@pytest.fixture
def line() -> Iterator[Line]:
    opened = Line()
    yield opened
    opened.close()


@contextmanager
def sending(sock: socket.socket, data: bytes) -> Iterator[threading.Thread]:
    thread = threading.Thread(target=sock.sendall, args=(data,))
    thread.start()
    yield thread
    thread.join(10)
    assert not thread.is_alive()


def test_bulk_is_not_decoded_ahead_of_the_decisions_that_wait(line: Line) -> None:
    line.bulk.sendall(framed([envelope(1)]))
    line.decisions.sendall(framed([envelope(2, urgent=True)]))
    with line.frames.reading_ahead():
        assert [envelope.number for envelope in line.frames.receive(0, decisions_only=True)] == [2]
    line.decisions.close()
    assert line.frames.receive(0, decisions_only=True) == []
    assert line.received(1) == [1]
    assert not line.frames.ended


def test_a_sender_of_more_than_a_socket_holds_waits_for_nobody_while_a_commit_is_under_way(line: Line) -> None:
    sent = [envelope(number, SOCKET_BYTES) for number in range(6)]
    with sending(line.bulk, framed(sent)) as sender:
        with line.frames.reading_ahead():
            sender.join(10)
            assert not sender.is_alive()
        first = line.frames.receive(0)
        assert len(first) == RECEIVE_BYTES // SOCKET_BYTES, "no more is decoded at once, though all is here"
        assert [envelope.number for envelope in first] + line.received(2) == list(range(6))


def test_what_is_received_while_it_is_read_ahead_keeps_its_order(line: Line) -> None:
    sent = [envelope(number, number % 17 * 1_000) for number in range(3_000)]
    with sending(line.bulk, framed(sent)):
        numbers: list[int] = []
        while len(numbers) < len(sent):
            with line.frames.reading_ahead():
                numbers += line.received(1)
            numbers += [envelope.number for envelope in line.frames.receive(0)]
    assert numbers == list(range(len(sent)))


def test_decisions_behind_a_very_large_one_are_received_without_another(line: Line) -> None:
    sent = [envelope(1, RECEIVE_BYTES + 1, urgent=True), *(envelope(number, urgent=True) for number in range(2, 9))]
    with sending(line.decisions, framed(sent)) as sender:
        first = line.frames.receive(10, decisions_only=True)
        sender.join(10)
        numbers = [envelope.number for envelope in first]
        while further := line.frames.receive(0, decisions_only=True):
            numbers += [envelope.number for envelope in further]
    assert numbers == list(range(1, 9))


@pytest.mark.parametrize("missing", ["os.pipe", "threading.Thread.start"])
def test_without_a_descriptor_or_a_thread_bulk_is_read_afterwards(
    line: Line, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    def none(*_: object) -> None:
        raise OSError(24, "Too many open files") if missing == "os.pipe" else RuntimeError("can't start new thread")

    line.bulk.sendall(framed([envelope(1)]))
    with monkeypatch.context() as without:
        without.setattr(missing, none)
        with line.frames.reading_ahead():
            pass
    assert line.received(1) == [1]


def test_a_peer_that_leaves_while_both_read_is_noticed_by_both() -> None:
    for _ in range(200):
        line = Line()
        with line.frames.reading_ahead():
            line.bulk.close()
            line.decisions.close()
            while not line.frames.ended:
                assert line.frames.receive(0) == []
        line.close()


def test_no_more_than_so_much_is_read_ahead(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frames, "AHEAD_BYTES", SOCKET_BYTES)
    sent = [envelope(number, SOCKET_BYTES) for number in range(20)]
    with sending(line.bulk, framed(sent)) as sender:
        with line.frames.reading_ahead():
            sender.join(0.2)
            assert sender.is_alive()
        assert line.received(20) == list(range(20))


@pytest.mark.parametrize("is_reset", [False, True])
def test_what_was_read_ahead_of_a_peer_that_left_is_still_received(line: Line, *, is_reset: bool) -> None:
    sent = [envelope(number, SOCKET_BYTES) for number in range(9)]
    if is_reset:  # an answer that nobody read is why
        line.frames.send([Answer(1, RowWritten(1))])
    with line.frames.reading_ahead():
        line.bulk.sendall(framed(sent))
        line.bulk.close()
        line.decisions.close()
    assert line.received(9) == list(range(9))
    assert line.frames.receive(None) == []
    assert line.frames.ended
    with line.frames.reading_ahead():
        assert line.frames.receive(0) == []
