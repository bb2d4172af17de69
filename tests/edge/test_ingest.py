from __future__ import annotations

import logging
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from asapd.edge.early import bare_response
from asapd.edge.ingest import IngestLimits, PushbackStream, Take, run_ingest
from asapd.edge.sockets import Peer, open_unix
from asapd.runtime.room import Room
from asapd.wire.frames import FrameDecoder, encode

LOG = logging.getLogger("test.ingest")
ME = Peer(pid=os.getpid(), uid=os.getuid(), gid=os.getgid(), groups=tuple(os.getgroups()))


async def echo(body: bytes, peer: Peer) -> bytes:
    assert peer == ME
    await trio.lowlevel.checkpoint()
    return b"re:" + body


def taking(handle: Callable[[bytes, Peer], Awaitable[bytes]], nursery: trio.Nursery) -> Take:
    """Answers each frame by a task of its own, in whatever order they end; what raises at once was not taken."""

    async def answer_later(body: bytes, peer: Peer, answer: Callable[[bytes], None]) -> None:
        answer(await handle(body, peer))

    async def take(body: bytes, peer: Peer, answer: Callable[[bytes], None]) -> None:
        nursery.start_soon(answer_later, body, peer, answer)

    return take


async def refuse(body: bytes, peer: Peer, answer: Callable[[bytes], None]) -> None:
    raise AssertionError("no frame is taken")


@asynccontextmanager
async def serving(
    path: Path, handle: Callable[[bytes, Peer], Awaitable[bytes]] = echo, take: Take | None = None, **options: Any
) -> AsyncIterator[Callable[[], Awaitable[trio.SocketStream]]]:
    options = {"max_frame_bytes": 1000, "max_connections": 10, "room": Room(1 << 20), "log": LOG, **options}
    listener = open_unix(path / "i.sock", 0o600, None)
    async with trio.open_nursery() as nursery:
        await nursery.start(partial(run_ingest, listener, take or taking(handle, nursery), **options))
        yield partial(trio.open_unix_socket, path / "i.sock")
        nursery.cancel_scope.cancel()


async def answers(stream: trio.SocketStream, count: int) -> list[Any]:
    decoder = FrameDecoder(1_000_000)
    found: list[Any] = []
    while len(found) < count:
        data = await stream.receive_some()
        assert data, f"closed after {found}"
        found += decoder.feed(data)
    return found


async def until_closed(stream: trio.SocketStream) -> bytes:
    data = b""
    while piece := await stream.receive_some():
        data += piece
    return data


async def test_every_frame_is_answered_with_a_frame(tmp_path: Path) -> None:
    async with serving(tmp_path) as connect, await connect() as stream:
        await stream.send_all(encode(b"one"))
        assert await answers(stream, 1) == [b"re:one"]
        for byte in encode(b"two") + encode(b""):
            await stream.send_all(bytes([byte]))
        assert await answers(stream, 2) == [b"re:two", b"re:"]


async def test_answers_keep_the_order_of_frames_whatever_finishes_first(tmp_path: Path) -> None:
    gates = {b"%d" % n: trio.Event() for n in range(20)}

    async def handle(body: bytes, peer: Peer) -> bytes:
        await gates[body].wait()
        return body

    async with serving(tmp_path, handle) as connect, await connect() as stream:
        await stream.send_all(b"".join(map(encode, gates)))
        for gate in reversed(gates.values()):
            await wait_all_tasks_blocked()
            gate.set()
        assert await answers(stream, 20) == list(gates)


async def test_a_frame_that_fails_is_answered_and_the_connection_stays(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def take(body: bytes, peer: Peer, answer: Callable[[bytes], None]) -> None:
        if body == b"bad":
            raise KeyError("boom")
        if body == b"group":
            async with trio.open_nursery():
                raise ValueError("boom")
        answer(body)

    async with serving(tmp_path, take=take) as connect, await connect() as stream:
        await stream.send_all(encode(b"bad") + encode(b"group") + encode(b"good"))
        *failed, good = await answers(stream, 3)
        assert good == b"good"
        for answer in failed:
            assert msgspec.json.decode(answer)["ok"] is False
            assert msgspec.json.decode(answer)["code"] == "internal"
    assert "an ingest frame failed" in caplog.text


async def test_an_oversized_frame_is_answered_after_the_others_and_closes(tmp_path: Path) -> None:
    async with serving(tmp_path) as connect, await connect() as stream:
        body = bytes(5_000_000)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream.send_all, encode(b"fine") + encode(body))
            fine, refused = await answers(stream, 2)
            assert fine == b"re:fine"
            problem = msgspec.json.decode(refused)
            assert (problem["ok"], problem["code"], problem["status"]) == (False, "too_large", 413)
            assert problem["type"] == "urn:asapd:problem:too_large"
            assert problem["title"]
            assert await until_closed(stream) == b""


@pytest.mark.parametrize("first", [b"\x01\0\0\0", b'{"id": 1}', b"\xff\xff\xff\xff"])
async def test_what_is_neither_frame_nor_http_is_refused_as_too_large(tmp_path: Path, first: bytes) -> None:
    async with serving(tmp_path) as connect, await connect() as stream:
        await stream.send_all(first)
        (refused,) = await answers(stream, 1)
        assert msgspec.json.decode(refused)["code"] == "too_large"


async def test_at_the_bound_in_flight_nothing_more_is_handed_over(tmp_path: Path) -> None:
    begun = 0
    gate = trio.Event()

    async def handle(body: bytes, peer: Peer) -> bytes:
        nonlocal begun
        begun += 1
        await gate.wait()
        return body

    async with serving(tmp_path, handle, in_flight_per_connection=3) as connect, await connect() as stream:
        await stream.send_all(encode(b"x") * 10)
        await wait_all_tasks_blocked(0.01)
        assert begun == 3
        gate.set()
        assert await answers(stream, 10) == [b"x"] * 10


async def test_a_client_that_does_not_read_its_answers_is_cut_off(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async def handle(body: bytes, peer: Peer) -> bytes:
        return bytes(1_000_000)

    limits = IngestLimits(send_s=7)
    async with serving(tmp_path, handle, limits=limits) as connect, await connect() as stream, await connect() as other:
        began = trio.current_time()
        with pytest.raises(trio.BrokenResourceError):
            await stream.send_all(encode(bytes(1000)) * 10_000)
        assert trio.current_time() - began == pytest.approx(7, abs=0.1)
        await other.send_all(encode(b""))
        assert len((await answers(other, 1))[0]) == 1_000_000


async def test_half_a_frame_does_not_hold_its_connection_for_ever(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with serving(tmp_path) as connect, await connect() as stream, await connect() as silent:
        await stream.send_all(encode(b"whole") + b"\0\0\0\5ha")
        assert await answers(stream, 1) == [b"re:whole"]
        assert await until_closed(stream) == b""
        assert await until_closed(silent) == b""
        assert trio.current_time() < 70


async def test_an_idle_connection_between_frames_is_kept(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with serving(tmp_path) as connect, await connect() as stream:
        for _ in range(2):
            await stream.send_all(encode(b"a"))
            assert await answers(stream, 1) == [b"re:a"]
            await trio.sleep(80_000)


async def test_a_client_that_ends_its_side_still_gets_its_answers(tmp_path: Path) -> None:
    async with serving(tmp_path) as connect, await connect() as stream:
        await stream.send_all(encode(b"a") + encode(b"b"))
        await stream.send_eof()
        assert await until_closed(stream) == encode(b"re:a") + encode(b"re:b")


async def test_clients_that_leave_in_the_middle_disturb_nobody(tmp_path: Path) -> None:
    async def leave(connect: Callable[[], Awaitable[trio.SocketStream]], data: bytes) -> None:
        async with await connect() as stream:
            await stream.send_all(data)

    async with serving(tmp_path) as connect, await connect() as honest, trio.open_nursery() as nursery:
        for data in (b"", b"\0", b"\0\0\0\5ab", encode(b"a") * 200, b"\xff" * 9, b"GET /", b"P") * 10:
            nursery.start_soon(leave, connect, data)
            await honest.send_all(encode(b"me"))
            assert await answers(honest, 1) == [b"re:me"]


async def test_at_most_max_connections_are_served_and_the_rest_wait(tmp_path: Path) -> None:
    async with serving(tmp_path, max_connections=1) as connect:
        first, second = await connect(), await connect()
        await first.send_all(encode(b"1"))
        await second.send_all(encode(b"2"))
        assert await answers(first, 1) == [b"re:1"]
        with trio.move_on_after(0.02) as waited:
            await second.receive_some()
        assert waited.cancelled_caught
        await first.aclose()
        assert await answers(second, 1) == [b"re:2"]
        await second.aclose()


async def test_a_stop_answers_what_was_handed_over_and_nothing_more(tmp_path: Path) -> None:
    gate = trio.Event()

    async def handle(body: bytes, peer: Peer) -> bytes:
        await gate.wait()
        return body

    listener = open_unix(tmp_path / "i.sock", 0o600, None)
    async with trio.open_nursery() as nursery:
        ingest = trio.CancelScope()

        async def run(*, task_status: trio.TaskStatus[None]) -> None:
            with ingest:
                await run_ingest(
                    listener,
                    taking(handle, nursery),
                    max_frame_bytes=10,
                    max_connections=5,
                    room=Room(1000),
                    log=LOG,
                    task_status=task_status,
                )

        await nursery.start(run)
        stream = await trio.open_unix_socket(tmp_path / "i.sock")
        idle = await trio.open_unix_socket(tmp_path / "i.sock")
        await stream.send_all(encode(b"a") + encode(b"b"))
        await wait_all_tasks_blocked(0.01)
        ingest.cancel()
        assert await until_closed(idle) == b""
        await stream.send_all(encode(b"late"))
        await wait_all_tasks_blocked(0.01)
        gate.set()
        with pytest.raises(OSError, match="refused"):
            await trio.open_unix_socket(tmp_path / "i.sock")
        assert await answers(stream, 2) == [b"a", b"b"]
        await stream.aclose()
        await idle.aclose()


async def test_a_stop_does_not_wait_longer_than_its_grace(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async def handle(body: bytes, peer: Peer) -> bytes:
        await trio.sleep_forever()
        raise AssertionError

    async with serving(tmp_path, handle, grace_s=3) as connect:
        stream = await connect()
        await stream.send_all(encode(b"a"))
        await wait_all_tasks_blocked(0.01)
        began = trio.current_time()
    assert trio.current_time() - began == pytest.approx(3)
    assert await until_closed(stream) == b""
    await stream.aclose()


async def test_http_is_answered_501_where_it_is_not_served(tmp_path: Path) -> None:
    async with serving(tmp_path) as connect, await connect() as stream:
        await stream.send_all(b"POST /usage HTTP/1.1\r\nhost: a\r\ncontent-length: 0\r\n\r\n")
        answer = bytearray()
        while not answer.endswith(bare_response(501)):
            answer += await stream.receive_some()
        assert answer.startswith(b"HTTP/1.1 501 Not Implemented\r\ncontent-type: application/problem+json")


async def test_http_is_passed_on_with_its_first_bytes(tmp_path: Path) -> None:
    async def http(stream: PushbackStream, peer: Peer) -> None:
        assert peer == ME
        request = b""
        while len(request) < 12:
            request += await stream.receive_some(5)
        await stream.send_all(b"got " + request)
        await stream.send_eof()
        await stream.aclose()

    async with serving(tmp_path, http=http) as connect, await connect() as stream:
        await stream.send_all(b"GET / HT")
        await stream.send_all(b"TP/1")
        assert await until_closed(stream) == b"got GET / HTTP/1"


async def test_a_failure_in_http_ends_only_its_connection(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def http(stream: PushbackStream, peer: Peer) -> None:
        raise KeyError("boom")

    async with serving(tmp_path, http=http) as connect:
        async with await connect() as stream:
            await stream.send_all(b"GET")
            assert await until_closed(stream) == b""
        async with await connect() as stream:
            await stream.send_all(encode(b"a"))
            assert await answers(stream, 1) == [b"re:a"]
    assert "an ingest connection ended in an error" in caplog.text


async def test_running_out_of_descriptors_is_survived(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    accept = trio.SocketListener.accept
    failures = iter([OSError(24, "Too many open files")] * 3)

    async def sometimes(listener: trio.SocketListener) -> trio.SocketStream:
        for failure in failures:
            raise failure
        return await accept(listener)

    monkeypatch.setattr(trio.SocketListener, "accept", sometimes)
    async with serving(tmp_path) as connect, await connect() as stream:
        await stream.send_all(encode(b"a"))
        assert await answers(stream, 1) == [b"re:a"]


@pytest.mark.parametrize(
    "options", [{"max_frame_bytes": 1 << 24}, {"in_flight_per_connection": 0}, {"max_connections": 0}]
)
async def test_bounds_that_cannot_be_are_a_bug(tmp_path: Path, options: dict[str, int]) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(os.fspath(tmp_path / "s"))
        sock.listen()
        async with trio.SocketListener(trio.socket.from_stdlib_socket(sock)) as listener:
            given = {"max_frame_bytes": 10, "max_connections": 1, "room": Room(1), "log": LOG}
            arguments: dict[str, Any] = {**given, **options}
            with pytest.raises(ValueError, match="must be"):
                await run_ingest(listener, refuse, **arguments)


async def test_a_frame_that_nobody_answers_is_answered_in_the_end_and_the_next_ones_too(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    late: list[Callable[[bytes], None]] = []

    async def take(body: bytes, peer: Peer, answer: Callable[[bytes], None]) -> None:
        if body == b"lost":
            late.append(answer)
        else:
            answer(body)

    limits = IngestLimits(answer_s=5)
    async with serving(tmp_path, take=take, limits=limits) as connect, await connect() as stream:
        await stream.send_all(encode(b"lost") + encode(b"good"))
        lost, good = await answers(stream, 2)
        assert msgspec.json.decode(lost)["code"] == "outcome_unknown"
        assert good == b"good"
        late[0](b"too late")
        await stream.send_all(encode(b"more"))
        assert await answers(stream, 1) == [b"more"]


async def test_a_frame_that_comes_byte_by_byte_has_no_longer_than_any_other(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with serving(tmp_path) as connect, await connect() as stream:
        await stream.send_all(encode(b"whole"))
        assert await answers(stream, 1) == [b"re:whole"]
        await trio.sleep(3600)
        began_s = trio.current_time()
        with pytest.raises(trio.BrokenResourceError):  # noqa: PT012 -- it breaks when it breaks
            for byte in encode(bytes(500)):
                await stream.send_all(bytes([byte]))
                await trio.sleep(1)
        assert trio.current_time() - began_s == pytest.approx(30, abs=2)


async def test_each_of_many_frames_has_its_own_time(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    """Pieces that each end one frame and begin the next leave the decoder with an unfinished frame at all times."""
    async with serving(tmp_path) as connect, await connect() as stream:
        whole = encode(b"x" * 10)
        await stream.send_all(whole[:5])
        for _ in range(10):
            await trio.sleep(20)
            await stream.send_all(whole[5:] + whole[:5])
            assert await answers(stream, 1) == [b"re:" + b"x" * 10]


async def test_a_full_door_closes_whoever_is_idle_longest_for_a_newcomer(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with serving(tmp_path, max_connections=3) as connect:
        silent = await connect()
        await trio.sleep(2)
        older, newer = await connect(), await connect()
        for stream in (older, newer):
            await stream.send_all(encode(b"a"))
            assert await answers(stream, 1) == [b"re:a"]
        # Nobody waits, so nobody is closed, however idle.
        await trio.sleep(20)
        for stream in (newer, older):
            await stream.send_all(encode(b"b"))
            assert await answers(stream, 1) == [b"re:b"]
        began_s = trio.current_time()
        newcomer = await connect()
        await newcomer.send_all(encode(b"c"))
        assert await answers(newcomer, 1) == [b"re:c"]
        assert trio.current_time() - began_s == 0
        assert await until_closed(silent) == b""
        another = await connect()
        await another.send_all(encode(b"d"))
        assert await answers(another, 1) == [b"re:d"]
        assert trio.current_time() - began_s == pytest.approx(10, abs=1)
        assert await until_closed(newer) == b""
        await older.send_all(encode(b"e"))
        assert await answers(older, 1) == [b"re:e"]
        for stream in (silent, older, newer, newcomer, another):
            await stream.aclose()


async def test_a_full_door_closes_nobody_who_waits_for_an_answer_or_is_sending(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    gate = trio.Event()

    async def handle(body: bytes, peer: Peer) -> bytes:
        await gate.wait()
        return body

    limits = IngestLimits(answer_s=1000, frame_s=1000)
    async with serving(tmp_path, handle, max_connections=2, limits=limits) as connect:
        waiting, sending = await connect(), await connect()
        await waiting.send_all(encode(b"w"))
        await sending.send_all(encode(b"s")[:4])
        newcomer = await connect()
        await newcomer.send_all(encode(b"n"))
        with trio.move_on_after(100) as patience:
            await answers(newcomer, 1)
        assert patience.cancelled_caught
        await waiting.aclose()
        gate.set()
        assert await answers(newcomer, 1) == [b"n"]
        await sending.send_all(b"s")
        assert await answers(sending, 1) == [b"s"]
        for stream in (sending, newcomer):
            await stream.aclose()


LARGE = 200_000


async def test_large_frames_take_turns_for_room_and_small_ones_pass(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    room = Room(300_000)
    async with serving(tmp_path, max_frame_bytes=LARGE, room=room) as connect:
        first, second, small = await connect(), await connect(), await connect()
        large = encode(b"x" * LARGE)
        await first.send_all(large[:100])
        await wait_all_tasks_blocked()
        assert room.free_bytes == 100_000
        await second.send_all(large[:100])
        await small.send_all(encode(b"s"))
        assert await answers(small, 1) == [b"re:s"]
        await first.send_all(large[100:])
        assert len((await answers(first, 1))[0]) == LARGE + 3
        await second.send_all(large[100:])
        assert len((await answers(second, 1))[0]) == LARGE + 3
        await wait_all_tasks_blocked()
        assert room.free_bytes == 300_000
        for stream in (first, second, small):
            await stream.aclose()


async def test_a_large_frame_that_finds_no_room_is_refused_and_closed(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    room = Room(300_000)
    async with serving(tmp_path, max_frame_bytes=LARGE, room=room) as connect:
        first, second = await connect(), await connect()
        large = encode(b"x" * LARGE)
        await first.send_all(large[:100])
        await wait_all_tasks_blocked()
        await second.send_all(encode(b"small") + large[:100])
        small, refused = await answers(second, 2)
        assert small == b"re:small"
        told = msgspec.json.decode(refused)
        assert (told["code"], told["retry_after_seconds"]) == ("overloaded", 1)
        await until_closed(second)
        await first.aclose()
        await second.aclose()
        await wait_all_tasks_blocked()
        assert room.free_bytes == 300_000


async def test_a_door_that_closes_leaves_nobody_waiting_for_room(tmp_path: Path) -> None:
    room = Room(300_000)
    async with serving(tmp_path, max_frame_bytes=LARGE, room=room, grace_s=0.1) as connect:
        streams = [await connect() for _ in range(2)]
        for stream in streams:
            await stream.send_all(encode(b"x" * LARGE)[:100])
        await wait_all_tasks_blocked()
    for stream in streams:
        assert await until_closed(stream) == b""
        await stream.aclose()
    assert room.free_bytes == 300_000


async def test_a_frame_in_hand_keeps_its_room_until_its_connection_ends(tmp_path: Path) -> None:
    async def never(body: bytes, peer: Peer, answer: Callable[[bytes], None]) -> None:
        pass

    room = Room(300_000)
    async with (
        serving(tmp_path, max_frame_bytes=LARGE, room=room, take=never, grace_s=0.1) as connect,
        await connect() as stream,
    ):
        await stream.send_all(encode(b"x" * LARGE))
        await wait_all_tasks_blocked()
        assert room.free_bytes == 100_000
    assert room.free_bytes == 300_000
