"""Clients that send nonsense, too much, too little, too slowly, or never listen."""

from __future__ import annotations

import itertools
import json
import random
import socket
import struct
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from functools import partial
from typing import Any

import pytest
import trio

from tests.e2e.daemon import PATIENCE_S, QUICK, Daemon, check_problem, running, until

pytestmark = pytest.mark.load

GONE = (OSError, trio.BrokenResourceError, trio.ClosedResourceError)
_numbers = itertools.count(1)


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    with running() as started:
        yield started


def event(**more: Any) -> dict[str, Any]:
    number = next(_numbers)
    return {
        "id": f"event-{number}",
        "task_id": f"task-{number}",
        "agent": "urn:asap:agent:worker",
        "consumer": "urn:asap:agent:desk",
        "timestamp": time.time(),
        **more,
    }


# --- bodies

MALFORMED = [b"", b"{", b"nul", b"[1,", b'{"a":1}{', b"\xff\xfe", b"[" * 100_000, b'"' + b"a" * 100, b"{'a': 1}", b"\0"]


@pytest.mark.parametrize("body", MALFORMED, ids=range(len(MALFORMED)))
async def test_malformed_json_is_400(daemon: Daemon, body: bytes) -> None:
    async with daemon.client() as client:
        for path in ("/usage", "/usage/batch", "/tasks", "/delegations", "/delegations/authorize", "/agents", "/keys"):
            answer = await client.post(path, content=body, headers={"Content-Type": "application/json"})
            assert answer.status_code == 400, (path, answer.text)
            check_problem(answer, 400, "malformed")


INVALID: list[tuple[Any, str]] = [
    (event(tokens_in=-1), "tokens_in"),
    (event(metrics={"tokens_in": -1}), "metrics.tokens_in"),
    (event(metrics={"tokens_in": 2**53}), "metrics.tokens_in"),
    (event(metrics={"tokens_in": 10**30}), "metrics.tokens_in"),
    (event(metrics={"tokens_in": 1.5}), "metrics.tokens_in"),
    (event(metrics={"tokens_in": "1"}), "metrics.tokens_in"),
    (event(metrics={"tokens_in": True}), "metrics.tokens_in"),
    (event(metrics={"tokens": 1}), "metrics.tokens"),
    (event(metrics=[]), "metrics"),
    (event(token_in=1), "token_in"),
    (event(agent="worker"), "agent"),
    (event(agent=""), "agent"),
    (event(agent=None), "agent"),
    (event(task_id=5), "task_id"),
    (event(task_id="x" * 300), "task_id"),
    (event(task_id="a\0b"), "task_id"),
    (event(id="x" * 129), "id"),
    (event(id=""), "id"),
    (event(outcome="fine"), "outcome"),
    (event(timestamp="yesterday"), "timestamp"),
    (event(timestamp=-1), "timestamp"),
    (event(timestamp="2001-01-01T00:00:00Z"), "timestamp"),
    (event(timestamp=time.time() + 3600), "timestamp"),
    (event(cost_usd=-0.1), "cost_usd"),
    (event(cost_usd=1e300), "cost_usd"),
    (event(cost_usd="much"), "cost_usd"),
    (event(labels={str(number): "x" for number in range(17)}), "labels"),
    (event(labels={"a": 1}), "labels.a"),
    (event(partial="yes"), "partial"),
    ({"usage": {}}, "task_id"),
    ({"usage": 1}, "usage"),
    ({"events": {}}, "events"),
    ({"events": [], "more": 1}, "more"),
    (5, "event"),
    ([5], "event"),
    ([[]], "event"),
]


@pytest.mark.parametrize(("body", "field"), INVALID, ids=range(len(INVALID)))
async def test_an_invalid_event_is_422_and_names_the_field(daemon: Daemon, body: Any, field: str) -> None:
    async with daemon.client() as client:
        before = (await client.get("/usage/summary")).json()["total_events"]
        document = check_problem(await client.post("/usage", json=body), 422, "invalid")
        assert field in {error["field"] for error in document["errors"]}, document
        if isinstance(body, dict) and "task_id" in body:
            document = check_problem(await client.post("/usage", json=[event(), event(), body]), 422, "invalid")
            assert (document["errors"][0]["index"], document["errors"][0]["field"]) == (2, field)
            assert (await client.post("/usage/validate", json=body)).json()["valid"] is False
        assert (await client.get("/usage/summary")).json()["total_events"] == before


@pytest.mark.parametrize("content_type", ["text/plain", "application/xml", "multipart/form-data", "application/x-tar"])
async def test_another_content_type_is_415(daemon: Daemon, content_type: str) -> None:
    async with daemon.client() as client:
        answer = await client.post("/usage", content=b"{}", headers={"Content-Type": content_type})
        check_problem(answer, 415, "unsupported_media_type")
        answer = await client.post("/usage", content=b"{}", headers={"Content-Encoding": "br"})
        check_problem(answer, 415, "unsupported_media_type")


async def test_more_events_than_a_commit_takes_are_413(daemon: Daemon) -> None:
    async with daemon.client() as client:
        check_problem(await client.post("/usage", json=[event()] * 5_001), 413, "too_many_events")


async def test_a_hundred_megabytes_are_413_long_before_they_are_sent(daemon: Daemon) -> None:
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        for _ in range(1_600):
            sent += 65_536
            yield bytes(65_536)

    async with daemon.client() as client:
        length = {"Content-Length": str(1_600 * 65_536), "Content-Type": "application/json"}
        for headers in (length, {"Content-Type": "application/json"}):
            answer = await client.post("/usage", content=endless(), headers=headers)
            check_problem(answer, 413, "too_large")
            verdict = await client.post("/usage/validate", content=endless(), headers=headers)
            assert (verdict.status_code, verdict.json()["code"]) == (200, "too_large")
            assert (await client.get("/healthz")).status_code == 200
    assert sent <= 4 * 1_600 * 65_536


async def test_a_bomb_is_413(daemon: Daemon) -> None:
    import gzip

    bomb = gzip.compress(b" " * 50_000_000)
    async with daemon.client() as client:
        answer = await client.post("/usage", content=bomb, headers={"Content-Encoding": "gzip"})
        check_problem(answer, 413, "too_large")
        for broken in (bomb[:100], b"no gzip"):
            answer = await client.post("/usage", content=broken, headers={"Content-Encoding": "gzip"})
            check_problem(answer, 400, "malformed")


@pytest.mark.parametrize(
    "query",
    [
        "limit=0",
        "limit=1001",
        "limit=-1",
        "limit=x",
        "limit=%D9%A3",
        "offset=-1",
        "cursor=%00",
        "cursor=AAAA",
        "start=never",
        "start=nan",
        "end=1e400",
        "outcome=fine",
        "surprise=1",
        "order=up",
    ],
)
async def test_a_bad_parameter_is_400_and_named(daemon: Daemon, query: str) -> None:
    async with daemon.client() as client:
        document = check_problem(await client.get(f"/usage?{query}"), 400, "bad_parameter")
        assert document["errors"][0]["field"] == query.partition("=")[0]


async def test_odd_addresses_are_problems_too(daemon: Daemon) -> None:
    async with daemon.client() as client:
        for path in (
            "/usage/nothing",
            "/agents/%00",
            "/agents/..%2f..%2fetc",
            "/web/..%2fapp.py",
            "/%ff",
            "/" + "a" * 5_000,
        ):
            answer = await client.get(path)
            assert answer.status_code == 404, (path, answer.status_code)
            assert answer.headers["content-type"] == "application/problem+json"


# --- connections


async def start_request(daemon: Daemon, stream: trio.SocketStream, length: int, body: bytes = b"") -> None:
    head = (
        f"POST /usage HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {daemon.admin_key}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {length}\r\n\r\n"
    )
    await stream.send_all(head.encode() + body)


def reset(stream: trio.SocketStream) -> None:
    """Close with RST instead of FIN."""
    stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    stream.socket.close()


async def resets_in_mid_response(daemon: Daemon, stream: trio.SocketStream) -> None:
    request = f"GET /usage?limit=1000 HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {daemon.admin_key}\r\n\r\n"
    await stream.send_all(request.encode() * 5)
    await stream.receive_some(100)
    reset(stream)


async def resets_at_once(daemon: Daemon, stream: trio.SocketStream) -> None:
    await stream.send_all(b"GET /healthz HTTP/1.1\r\n")
    reset(stream)


async def cuts_its_body(daemon: Daemon, stream: trio.SocketStream) -> None:
    await start_request(daemon, stream, 1_000, b"[" + b" " * 500)
    await trio.sleep(random.random() / 10)
    reset(stream)


async def cuts_a_body_that_is_answered_early(daemon: Daemon, stream: trio.SocketStream) -> None:
    await stream.send_all(b"POST /usage HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\nhalf")
    await stream.receive_some(10)


async def upgrades_to_h2c(daemon: Daemon, stream: trio.SocketStream) -> None:
    await stream.send_all(
        b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n"
        b"HTTP2-Settings: AAMAAABkAAQAoAAAAAIAAAAA\r\n\r\n"
    )
    await stream.receive_some(1_000)
    await stream.send_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")


async def knows_h2c(daemon: Daemon, stream: trio.SocketStream) -> None:
    await stream.send_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00")
    await stream.receive_some(1_000)
    reset(stream)


async def talks_garbage(daemon: Daemon, stream: trio.SocketStream) -> None:
    await stream.send_all(random.randbytes(4_000))
    await stream.receive_some(1_000)


async def talks_tls(daemon: Daemon, stream: trio.SocketStream) -> None:
    await stream.send_all(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + random.randbytes(500))
    await stream.receive_some(1_000)


async def is_slow(daemon: Daemon, stream: trio.SocketStream) -> None:
    for byte in b"GET /healthz HTTP/1.1\r\nHost: localh":
        await stream.send_all(bytes([byte]))
        await trio.sleep(0.05)


async def sends_endless_headers(daemon: Daemon, stream: trio.SocketStream) -> None:
    await stream.send_all(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n")
    for number in range(2_000):
        await stream.send_all(b"x-%d: %s\r\n" % (number, b"y" * 500))


async def smuggles(daemon: Daemon, stream: trio.SocketStream) -> None:
    await stream.send_all(
        b"POST /usage HTTP/1.1\r\nHost: localhost\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n"
        b"0\r\n\r\nGET /keys HTTP/1.1\r\n\r\n"
    )
    await stream.receive_some(1_000)


async def does_not_read(daemon: Daemon, stream: trio.SocketStream) -> None:
    request = f"GET /usage?limit=1000 HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {daemon.admin_key}\r\n\r\n"
    await stream.send_all(request.encode() * 20)
    await trio.sleep(1)


def websocket_request(daemon: Daemon) -> bytes:
    lines = [
        "GET /ws HTTP/1.1",
        "Host: localhost",
        "Connection: Upgrade",
        "Upgrade: websocket",
        "Sec-WebSocket-Version: 13",
        "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==",
        f"Authorization: Bearer {daemon.admin_key}",
    ]
    return "\r\n".join(lines).encode() + b"\r\n\r\n"


async def leaves_a_websocket(daemon: Daemon, stream: trio.SocketStream) -> None:
    await stream.send_all(websocket_request(daemon))
    await stream.receive_some(1_000)
    await stream.send_all(random.randbytes(500))
    reset(stream)


HOSTILE = [
    resets_in_mid_response,
    resets_at_once,
    cuts_its_body,
    cuts_a_body_that_is_answered_early,
    upgrades_to_h2c,
    knows_h2c,
    talks_garbage,
    talks_tls,
    is_slow,
    sends_endless_headers,
    smuggles,
    does_not_read,
    leaves_a_websocket,
]


async def test_three_hundred_hostile_connections_disturb_no_honest_client(daemon: Daemon) -> None:
    pid = daemon.pid
    async with daemon.client() as client:
        assert (await client.post("/usage", json=[event() for _ in range(1_000)])).status_code == 201
    before = daemon.status()
    hostile_left = 300
    posted = 0

    async def attack(number: int) -> None:
        nonlocal hostile_left
        stream = await trio.open_tcp_stream("127.0.0.1", daemon.port)
        with suppress(*GONE), trio.move_on_after(2):
            async with stream:
                await HOSTILE[number % len(HOSTILE)](daemon, stream)
        hostile_left -= 1

    async def be_honest() -> None:
        nonlocal posted
        async with daemon.client() as client:
            while hostile_left or posted < 20:
                with trio.fail_after(PATIENCE_S):
                    answer = await client.post("/usage", json=[event() for _ in range(5)])
                assert answer.status_code == 201, answer.text
                posted += 5

    async with trio.open_nursery() as nursery:
        nursery.start_soon(be_honest)
        for number in range(300):
            nursery.start_soon(attack, number)
            await trio.sleep(0.005)

    async def all_were_accepted() -> Any:
        # The admin socket answers while the other door still has some to accept.
        now = await trio.to_thread.run_sync(daemon.status)
        return now if now["http"]["connections_total"] - before["http"]["connections_total"] >= 300 else None

    after = await until(all_were_accepted)
    assert (daemon.pid, after["pid"]) == (pid, pid)
    assert all(actor["restarts"] == 0 for actor in after["actors"].values())
    async with daemon.client() as client:
        total = (await client.get("/usage/summary")).json()["total_events"]
        assert total >= posted + 1_000
    assert not [line for line in daemon.log() if line["level"] in {"error", "critical"}]


async def test_a_broken_request_is_answered_whole_even_while_it_is_being_answered_otherwise(daemon: Daemon) -> None:
    """The application's 401 and the protocol's 400 race; whichever wins has the body it promised."""
    for _ in range(20):
        _, received = await daemon.raw(
            b"POST /usage HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n"
        )
        head, _, body = received.partition(b"\r\n\r\n")
        assert f"content-length: {len(body)}".encode() in head.lower()
        assert json.loads(body)["code"] in {"malformed", "unauthorized"}


async def test_a_request_with_two_lengths_is_refused_and_the_connection_closed(daemon: Daemon) -> None:
    status, received = await daemon.raw(
        b"POST /usage HTTP/1.1\r\nHost: localhost\r\nContent-Length: 4\r\nContent-Length: 40\r\n\r\n"
        b"nullGET /keys HTTP/1.1\r\n\r\n"
    )
    assert status == 400
    assert received.count(b"HTTP/1.1 400") == 1


async def test_subscribers_that_never_read_hold_up_neither_others_nor_the_stop() -> None:
    config = QUICK.replace("[sla]", "[sla]\nmin_samples = 1") + '[[sla.tier]]\nname = "t"\nmax_latency_p95_ms = 1\n'
    agents = "".join(
        f'[[agents]]\nid = "urn:asap:agent:a{number}"\nurl = "http://127.0.0.1:9"\ntier = "t"\n' for number in range(40)
    )
    with running(config + agents) as daemon:
        call = json.dumps(
            {"jsonrpc": "2.0", "id": 1, "method": "sla.subscribe", "params": {"resume_after": 0}}
        ).encode()
        frame = bytes([0x81, 0x80 | len(call)]) + bytes(4) + call
        deaf = []
        for _ in range(20):
            sock = socket.socket()
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
            sock.connect(("127.0.0.1", daemon.port))
            sock.sendall(websocket_request(daemon) + frame)
            deaf.append(sock)
        try:
            async with (
                daemon.client() as client,
                daemon.websocket(extra_headers=[("Authorization", f"Bearer {daemon.admin_key}")]) as listening,
            ):
                await listening.send_message(call.decode())
                assert json.loads(await listening.get_message())["result"]["subscribed"] is True
                slow = [event(agent=f"urn:asap:agent:a{number}", metrics={"duration_ms": 9}) for number in range(40)]
                assert (await client.post("/usage", json=slow)).status_code == 201
                seen: list[int] = []
                with trio.fail_after(20):
                    while len(seen) < 40:
                        seen.append(json.loads(await listening.get_message())["params"]["seq"])
                assert seen == list(range(1, 41))
            begun_s = time.monotonic()
            await trio.to_thread.run_sync(daemon.stop)
            assert time.monotonic() - begun_s < 8
        finally:
            for sock in deaf:
                sock.close()


async def test_more_connections_than_are_allowed_are_told_so() -> None:
    with running(QUICK + "[limits]\nmax_connections = 20\n") as daemon:
        held: list[trio.SocketStream] = []
        try:
            held += [await trio.open_tcp_stream("127.0.0.1", daemon.port) for _ in range(25)]
            await until(partial(_is_answered, daemon, 503))
        finally:
            for stream in held:
                await stream.aclose()
        await until(partial(_is_answered, daemon, 200))


async def _is_answered(daemon: Daemon, status: int) -> bool:
    request = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    return (await daemon.raw(request))[0] == status
