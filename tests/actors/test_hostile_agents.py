"""Agents that misbehave, each a real server in real time: every fault has a reason of its own, and holds up nobody."""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from asapd.runtime.fetch import LOOPBACK, Fetcher
from asapd.store import agent_history, manifests
from asapd.store.visibility import EVERYTHING
from tests.actors.test_prober import A, B, Rig, agent, health, manifest, plain, reached, settings
from tests.runtime.test_fetch import CERTIFICATE, KEY

Stream = trio.abc.HalfCloseableStream
Behaviour = Callable[[Any], Awaitable[None]]


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    made = Rig(tmp_path / "asapd.db")
    made.settings.prober = settings(interval="20ms", timeout="1s", manifest_interval="20ms")
    yield made
    made.connection.close()


def answer(body: bytes, status: str = "200 OK", more: str = "") -> bytes:
    head = f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n{more}\r\n"
    return head.encode() + body


def saying(raw: bytes) -> Behaviour:
    async def behave(stream: Any) -> None:
        await stream.send_all(raw)

    return behave


async def drips(stream: Any) -> None:
    await stream.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
    while True:
        await stream.send_all(b" ")
        await trio.sleep(0.02)


async def floods(stream: Any) -> None:
    await stream.send_all(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    while True:
        await stream.send_all(b"1000\r\n" + b" " * 0x1000 + b"\r\n")


async def endless_head(stream: Any) -> None:
    await stream.send_all(b"HTTP/1.1 200 OK\r\n")
    while True:
        await stream.send_all(b"X: " + b"y" * 1000 + b"\r\n")


async def says_nothing(stream: Any) -> None:
    await trio.sleep_forever()


def serve_as(behaviour: Behaviour, manifest_raw: bytes) -> Callable[[Any], Awaitable[None]]:
    async def serve(stream: Any) -> None:
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            async with stream:
                head = b""
                while b"\r\n\r\n" not in head:
                    received = await stream.receive_some()
                    if not received:
                        return
                    head += received
                await (saying(manifest_raw) if b"manifest.json" in head else behaviour)(stream)

    return serve


@asynccontextmanager
async def listening(serve: Callable[[Any], Awaitable[None]]) -> AsyncIterator[int]:
    async with trio.open_nursery() as nursery:
        listeners: list[trio.SocketListener] = await nursery.start(partial(trio.serve_tcp, serve, 0, host="127.0.0.1"))
        port: int = listeners[0].socket.getsockname()[1]
        yield port
        nursery.cancel_scope.cancel()


def events(rig: Rig, kind: str) -> list[agent_history.AgentEvent]:
    return [event for event in agent_history.events(rig.connection, EVERYTHING, A, 20, None) if event.event == kind]


async def until(condition: Callable[[], bool]) -> None:
    """For what no commit tells of."""
    with trio.fail_after(30):
        while not condition():  # noqa: ASYNC110 -- what is waited for is in memory, and raises no event
            await trio.sleep(0.01)


HEALTHY = health(agent_id=A).body
GOOD = answer(plain(manifest(sla={"availability": "99.5%"})).body)


@pytest.mark.parametrize(
    ("behaviour", "reason"),
    [
        (drips, "slow_body"),
        (says_nothing, "timeout"),
        (floods, "too_large"),
        (saying(answer(b" " * 70_000)), "too_large"),
        (endless_head, "protocol"),
        (saying(answer(b"", "302 Found", "Location: http://198.51.100.1/\r\n")), "redirect"),
        (saying(answer(b"", "307 Temporary Redirect", "Location: http://169.254.169.254/\r\n")), "redirect"),
        (saying(answer(b"{'status': 'healthy'}")), "bad_json"),
        (saying(answer(b"\xff\xfe{}")), "bad_json"),
        (saying(answer(b"[" * 60_000)), "bad_json"),
        (saying(answer(b'["healthy"]')), "bad_json"),
        (saying(answer(b'{"status": "HEALTHY!"}')), "protocol"),
        (saying(answer(health(agent_id=B).body)), "wrong_agent"),
        (saying(answer(health("unhealthy", agent_id=A).body, "503 Service Unavailable")), "reports_unhealthy"),
        (saying(answer(health("unhealthy").body)), "reports_unhealthy"),
        (saying(answer(HEALTHY, "503 Service Unavailable")), "http_status"),
        (saying(answer(b"<h1>busy</h1>", "503 Service Unavailable")), "http_status"),
        (saying(answer(b"", "404 Not Found")), "http_status"),
        (saying(answer(b"x", more="Content-Encoding: gzip\r\n")), "protocol"),
        (saying(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{"), "protocol"),
        (saying(b"SSH-2.0-OpenSSH_9.6\r\n"), "protocol"),
        (saying(b""), "protocol"),
    ],
)
async def test_a_fault_has_its_reason_in_the_row_and_in_the_history(
    rig: Rig, behaviour: Behaviour, reason: str
) -> None:
    async with listening(serve_as(behaviour, GOOD)) as port, Fetcher(LOOPBACK) as fetcher:
        rig.fetcher = fetcher
        if behaviour not in (drips, says_nothing):
            rig.settings.prober = settings(interval="20ms", timeout="30s", manifest_interval="20ms")
        async with rig.running(agent(url=f"http://127.0.0.1:{port}")):
            await reached(rig, lambda: rig.row().state == "unhealthy")
    last = rig.row().last_probe
    assert last is not None
    assert (last.up, last.reason) == (False, reason)
    states = [
        event for event in agent_history.events(rig.connection, EVERYTHING, A, 10, None) if event.event == "state"
    ]
    assert [(event.old_state, event.new_state, event.reason) for event in states] == [("unknown", "unhealthy", reason)]


async def test_bad_tls_has_its_reason(rig: Rig, tmp_path: Path) -> None:
    """A certificate that nobody here vouches for, and a server that speaks no TLS at all."""
    (tmp_path / "cert.pem").write_text(CERTIFICATE)
    (tmp_path / "key.pem").write_text(KEY)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")
    inner = serve_as(saying(answer(HEALTHY)), GOOD)

    async def over_tls(stream: trio.SocketStream) -> None:
        await inner(trio.SSLStream(stream, context, server_side=True, https_compatible=True))

    async def over_nothing(stream: trio.SocketStream) -> None:
        with suppress(trio.BrokenResourceError):
            async with stream:
                await stream.receive_some()
                await stream.send_all(answer(b"", "400 Bad Request"))

    async with listening(over_tls) as secure, listening(over_nothing) as bare, Fetcher(LOOPBACK) as fetcher:
        rig.fetcher = fetcher
        async with rig.running(agent(url=f"https://127.0.0.1:{secure}"), agent(B, f"https://127.0.0.1:{bare}")):
            await reached(rig, lambda: {rig.row(A).state, rig.row(B).state} == {"unhealthy"})
    assert [probe.reason for name in (A, B) for probe in rig.probes(name)[:1]] == ["tls", "tls"]


async def test_who_is_not_there_and_who_has_no_address_have_theirs(rig: Rig) -> None:
    with trio.socket.socket() as unused:
        await unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    async with Fetcher(LOOPBACK) as fetcher:
        rig.fetcher = fetcher
        rig.settings.prober = settings(interval="20ms", timeout="5s")
        async with rig.running(agent(url=f"http://127.0.0.1:{port}"), agent(B, "http://nobody.invalid")):
            await reached(rig, lambda: {rig.row(A).state, rig.row(B).state} == {"unhealthy"})
    assert [probe.reason for name in (A, B) for probe in rig.probes(name)[:1]] == ["refused", "dns"]


async def test_what_may_not_be_reached_is_not_down_and_says_why(rig: Rig) -> None:
    """Link-local is where clouds keep their secrets: no setting lets a probe go there."""
    async with Fetcher(LOOPBACK) as fetcher:
        rig.fetcher = fetcher
        async with rig.running(agent(url="http://169.254.169.254"), agent(B, "http://198.51.100.1")):
            await until(lambda: all(rig.settings.unprobed.get(name) is not None for name in (A, B)))
    troubles = [rig.settings.unprobed.get(name) for name in (A, B)]
    assert [trouble.reason for trouble in troubles if trouble is not None] == ["not_allowed"] * 2
    assert (rig.probes(A), rig.row(A).state) == ([], "unknown")


async def test_hostile_agents_hold_up_no_other(rig: Rig) -> None:
    """A hundred that never answer, and one that does."""
    async with (
        listening(serve_as(says_nothing, b"")) as bad,
        listening(serve_as(saying(answer(HEALTHY)), GOOD)) as good,
        Fetcher(LOOPBACK) as fetcher,
    ):
        rig.fetcher = fetcher
        rig.settings.prober = settings(interval="100ms", timeout="60s", manifest_interval="1h")
        many = [agent(f"urn:asap:agent:bad{number}", f"http://127.0.0.1:{bad}") for number in range(100)]
        async with rig.running(*many, agent(url=f"http://127.0.0.1:{good}")):
            with trio.fail_after(30):
                await reached(rig, lambda: rig.row().ok_streak >= 5)


@pytest.mark.parametrize(
    ("block", "complaint"),
    [
        ({"availability": "99.5.5%"}, "sla.availability"),
        ({"availability": "-5%"}, "sla.availability"),
        ({"max_error_rate": "1000%"}, "sla.max_error_rate"),
        ({"max_error_rate": True}, "sla.max_error_rate"),
        ({"max_latency_p95_ms": "fast"}, "sla.max_latency_p95_ms"),
        ({"uptime": "99%"}, "unknown field"),
        ("99%", "must be an object"),
    ],
)
async def test_an_sla_that_cannot_be_read_is_told_and_kept_and_promises_nothing(
    rig: Rig, block: Any, complaint: str, caplog: pytest.LogCaptureFixture
) -> None:
    raw = answer(plain(manifest(sla=block)).body)
    async with listening(serve_as(saying(answer(HEALTHY)), raw)) as port, Fetcher(LOOPBACK) as fetcher:
        rig.fetcher = fetcher
        async with rig.running(agent(url=f"http://127.0.0.1:{port}")):
            await until(lambda: "the SLA in its manifest is not used" in caplog.text)
    found = rig.row().manifest
    assert found is not None
    assert found.sla is None
    assert complaint in (found.sla_error or "")
    told = [
        event
        for event in agent_history.events(rig.connection, EVERYTHING, A, 20, None)
        if event.event == "sla_rejected"
    ]
    assert [event.reason for event in told] == [found.sla_error]


@pytest.mark.parametrize("block", [{"availability": "99.5%"}, {"availability": 99.5}, {"max_error_rate": "1%"}])
async def test_an_sla_in_any_known_form_counts(rig: Rig, block: Any) -> None:
    raw = answer(plain(manifest(sla=block)).body)
    async with listening(serve_as(saying(answer(HEALTHY)), raw)) as port, Fetcher(LOOPBACK) as fetcher:
        rig.fetcher = fetcher
        async with rig.running(agent(url=f"http://127.0.0.1:{port}")):
            await reached(rig, lambda: rig.row().manifest is not None)
    found = rig.row().manifest
    assert found is not None
    assert (found.sla, found.sla_error) == (block, None)


@pytest.mark.parametrize(
    "raw", [b"", answer(b"x" * 300_000), answer(b"nonsense"), answer(plain(manifest(B)).body), answer(b"", "404 No")]
)
async def test_why_a_manifest_was_not_taken_is_known_until_one_is(rig: Rig, raw: bytes) -> None:
    shown = [raw]

    async def serve(stream: Any) -> None:
        await serve_as(saying(answer(HEALTHY)), shown[0])(stream)

    async with listening(serve) as port, Fetcher(LOOPBACK) as fetcher:
        rig.fetcher = fetcher
        async with rig.running(agent(url=f"http://127.0.0.1:{port}")):
            await until(lambda: rig.settings.without_manifest.get(A) is not None)
            shown[0] = GOOD
            await reached(rig, lambda: rig.row().manifest is not None)
            await until(lambda: rig.settings.without_manifest.get(A) is None)


async def test_every_version_of_a_manifest_is_kept_as_it_was_served(rig: Rig) -> None:
    bodies = [plain(manifest(version=str(number))).body for number in range(3)]
    shown = [bodies[0]]

    async def serve(stream: Any) -> None:
        await serve_as(saying(answer(HEALTHY)), answer(shown[0]))(stream)

    async with listening(serve) as port, Fetcher(LOOPBACK) as fetcher:
        rig.fetcher = fetcher
        async with rig.running(agent(url=f"http://127.0.0.1:{port}")):
            for number, body in enumerate(bodies):
                shown[0] = body
                await reached(rig, lambda least=number: len(rig.manifests()) > least)  # type: ignore[misc]  # bound now
    versions = manifests.versions(rig.connection, EVERYTHING, A, 10, None)
    assert len({kept.digest for _, kept in versions}) == 3
    kept = [manifests.body_of(rig.connection, EVERYTHING, A, version.digest) for _, version in reversed(versions)]
    assert [found[1] for found in kept if found is not None] == bodies
    page = manifests.versions(rig.connection, EVERYTHING, A, 2, None)
    assert page + manifests.versions(rig.connection, EVERYTHING, A, 2, page[-1][0]) == versions
