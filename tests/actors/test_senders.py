"""Pushing to real receivers and programs on this host."""

from __future__ import annotations

import errno
import hashlib
import hmac
import json
import sys
from base64 import b64encode
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from asapd.actors.senders import CommandSender, WebhookSender
from asapd.core.pushing import Failed
from asapd.core.types import SECOND_US
from asapd.runtime.fetch import LOOPBACK, Fetcher, FetchFailed
from asapd.store.breaches import Alert

NOW = 1_800_000_000 * SECOND_US
SECRET = b"0123456789abcdef"
OK = b"HTTP/1.1 204 No Content\r\n\r\n"
BREACH = {
    "id": "brc_1",
    "agent_id": "urn:asap:agent:a",
    "budget": None,
    "breach_type": "latency",
    "window": "1h",
    "threshold": "500ms",
    "actual": "900ms",
    "severity": "warning",
    "detected_at": "2027-01-15T08:00:00.000000Z",
    "resolved_at": None,
}


def alert(seq: int) -> Alert:
    params = {"event": "opened", "seq": seq, "breach": BREACH}
    return Alert(seq, "opened", "urn:asap:agent:a", "warning", "default", params, None, NOW)


Request = tuple[dict[str, str], bytes]
Behaviour = Callable[[trio.SocketStream], Awaitable[None]]


async def read_request(stream: trio.SocketStream) -> Request | None:
    raw = b""
    while b"\r\n\r\n" not in raw:
        part = await stream.receive_some()
        if not part:
            return None
        raw += part
    head, _, body = raw.partition(b"\r\n\r\n")
    fields = dict(line.split(": ", 1) for line in head.decode().split("\r\n")[1:])
    headers = {name.lower(): value for name, value in fields.items()}
    while len(body) < int(headers["content-length"]):
        body += await stream.receive_some()
    return headers, body


@asynccontextmanager
async def receiving(answer: bytes, *, then: Behaviour | None = None) -> AsyncIterator[tuple[int, list[Request]]]:
    """A receiver that gives one answer to every request, and goes on as told."""
    got: list[Request] = []

    async def serve(stream: trio.SocketStream) -> None:
        while (request := await read_request(stream)) is not None:
            got.append(request)
            await stream.send_all(answer)
            if then is not None:
                await then(stream)

    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(trio.serve_tcp, serve, 0)
        yield listeners[0].socket.getsockname()[1], got
        nursery.cancel_scope.cancel()


def hook(port: int, fetcher: Fetcher, *, secret: bytes | None = SECRET, is_alertmanager: bool = False) -> WebhookSender:
    url = f"http://127.0.0.1:{port}/in/token?x=1"
    return WebhookSender(url, secret, "pager", is_alertmanager, "asapd-0123", fetcher)


async def test_a_webhook_gets_a_signed_post_and_repeats_bear_the_same_id() -> None:
    async with receiving(OK) as (port, got), Fetcher(LOOPBACK) as fetcher:
        send = hook(port, fetcher)
        assert await send([alert(7)], NOW) is None
        assert await send([alert(7)], NOW + 5 * SECOND_US) is None
    (headers, body), (again, _) = got
    assert headers["content-type"] == "application/json"
    assert headers["webhook-id"] == again["webhook-id"] == "asapd-0123-7"
    assert (headers["webhook-timestamp"], again["webhook-timestamp"]) == ("1800000000", "1800000005")
    signed = f"asapd-0123-7.1800000000.{body.decode()}".encode()
    assert headers["webhook-signature"] == "v1," + b64encode(hmac.digest(SECRET, signed, hashlib.sha256)).decode()
    assert json.loads(body)["data"]["seq"] == 7


async def test_alertmanagers_shape_takes_several_at_once_and_without_a_secret_nothing_is_signed() -> None:
    async with receiving(OK) as (port, got), Fetcher(LOOPBACK) as fetcher:
        assert await hook(port, fetcher, secret=None, is_alertmanager=True)([alert(7), alert(8)], NOW) is None
    ((headers, body),) = got
    assert headers["webhook-id"] == "asapd-0123-7-8"
    assert "webhook-signature" not in headers
    assert json.loads(body)["version"] == "4"


async def test_what_is_no_2xx_is_a_failure_that_names_no_path() -> None:
    answer = b"HTTP/1.1 503 Busy\r\nRetry-After: 30\r\nContent-Length: 2\r\n\r\nno"
    async with receiving(answer) as (port, _), Fetcher(LOOPBACK) as fetcher:
        assert await hook(port, fetcher)([alert(1)], NOW) == Failed("answered with status 503", False, 30.0)
    async with Fetcher(LOOPBACK) as fetcher:
        failed = await hook(port, fetcher)([alert(1)], NOW)
        assert failed is not None
        assert failed.error.startswith("refused: ")
        assert "token" not in failed.error
    async with receiving(OK) as (port, got), Fetcher([]) as fetcher:
        failed = await hook(port, fetcher)([alert(1)], NOW)
        assert failed is not None
        assert failed.error.startswith("not_allowed: ")
        assert got == []
    moved = b"HTTP/1.1 307 Moved\r\nLocation: http://127.0.0.1/\r\nContent-Length: 0\r\n\r\n"
    async with receiving(moved) as (port, _), Fetcher(LOOPBACK) as fetcher:
        failed = await hook(port, fetcher)([alert(1)], NOW)
        assert failed is not None
        assert failed.error.startswith("redirect: ")


async def test_a_host_without_a_way_out_gives_nothing_up_for_that() -> None:
    class NoWay:
        async def post(self, url: str, body: bytes, *, headers: Mapping[str, str], deadline_s: float) -> FetchFailed:
            raise OSError(errno.ENETUNREACH, "Network is unreachable")

    sender = WebhookSender("http://192.0.2.7/x", None, "hook", False, "asapd-1", NoWay())
    assert await sender([alert(1)], NOW) == Failed("this host could not post: Network is unreachable")


async def test_a_receiver_that_drips_is_cut_off(autojump_clock: trio.testing.MockClock) -> None:
    autojump_clock.autojump_threshold = 0.05

    async def silent(stream: trio.SocketStream) -> None:
        await trio.sleep_forever()

    async with receiving(b"HTTP/1.1 20", then=silent) as (port, _), Fetcher(LOOPBACK) as fetcher:
        started_s = trio.current_time()
        failed = await hook(port, fetcher)([alert(1)], NOW)
        assert failed is not None
        assert failed.error.startswith("timeout: ")
        assert trio.current_time() - started_s < 11


async def test_the_status_counts_and_a_body_without_end_is_let_go(autojump_clock: trio.testing.MockClock) -> None:
    autojump_clock.autojump_threshold = 0.05

    async def endless(stream: trio.SocketStream) -> None:
        while True:
            await stream.send_all(b"x" * 65_536)

    async def slow(stream: trio.SocketStream) -> None:
        await trio.sleep_forever()

    async def reset(stream: trio.SocketStream) -> None:
        await stream.aclose()

    head = b"HTTP/1.1 200 OK\r\nContent-Length: 99999999\r\n\r\n"
    for behaviour in (endless, slow, reset):
        async with Fetcher(LOOPBACK) as fetcher, receiving_roughly(head, behaviour) as port:
            assert await hook(port, fetcher)([alert(1)], NOW) is None


@asynccontextmanager
async def receiving_roughly(answer: bytes, then: Behaviour) -> AsyncIterator[int]:
    async def serve(stream: trio.SocketStream) -> None:
        try:
            await read_request(stream)
            await stream.send_all(answer)
            await then(stream)
        except trio.BrokenResourceError:
            pass

    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(trio.serve_tcp, serve, 0)
        yield listeners[0].socket.getsockname()[1]
        nursery.cancel_scope.cancel()


async def test_a_command_reads_the_alert_and_its_exit_code_decides(tmp_path: Path) -> None:
    copy = f"import sys; open({str(tmp_path / 'alert')!r}, 'w').write(sys.stdin.read())"
    limiter = trio.CapacityLimiter(1)
    taken = CommandSender((sys.executable, "-S", "-c", copy), 20.0, limiter)
    assert await taken([alert(3)], NOW) is None
    assert json.loads((tmp_path / "alert").read_text())["data"]["seq"] == 3
    for program, why in (
        ("import sys; sys.exit(3)", f"{sys.executable} ended with 3"),
        ("import sys; sys.exit('line\\nno pager')", f"{sys.executable} ended with 1: no pager"),
    ):
        failing = CommandSender((sys.executable, "-S", "-c", program), 20.0, limiter)
        assert await failing([alert(3)], NOW) == Failed(why)
    failed = await CommandSender(("no-such-program",), 1.0, limiter)([alert(3)], NOW)
    assert failed is not None
    assert "cannot be run" in failed.error
