"""An ASAP agent for the demo: a real HTTP server with a signed manifest that does tasks and reports what they used."""

from __future__ import annotations

import base64
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from enum import Enum, auto
from pathlib import Path
from random import Random
from typing import Any

import httpx2
import msgspec
import trio
from nacl.signing import SigningKey

from asapd.core.canonical import canonical
from asapd.core.types import format_us
from asapd.edge.serve import Door, HttpServer
from asapd.wire.frames import LENGTH_BYTES, FrameDecoder, encode
from asapd.wire.keys import public_base64

TASKS_PATH = "/asap/tasks"
ACTION = "task.execute"

# Often enough that a promise broken now is known at once, seldom enough that events travel in arrays.
REPORT_EVERY_S = 0.2
SLOW_MS = 900
FAILING_SHARE = 0.4
# The most one delegated task may cost: what is reserved before it begins.
ESTIMATE_USD = 0.5
_MAX_REPLY_BYTES = 1 << 20

Report = Callable[[list[dict[str, Any]]], Awaitable[None]]


class Mood(Enum):
    """How an agent works at the moment."""

    WELL = auto()
    SLOW = auto()
    FAILING = auto()


@dataclass(frozen=True)
class Part:
    """What an agent of the demo is, what it promises, and how it works while all is well."""

    name: str
    model: str
    usual_ms: int
    tokens: tuple[int, int]
    sla: dict[str, Any]
    workers: int
    by_socket: bool = False
    delegated: bool = False

    @property
    def urn(self) -> str:
        """The agent's name in the protocol."""
        return f"urn:asap:agent:{self.name}"


class ReportFailedError(Exception):
    """The daemon did not take a report; it is kept and sent again, which an event's id makes safe."""


@dataclass(eq=False)
class DemoAgent:
    """One agent. `listen` comes first, since the daemon's configuration names its address."""

    part: Part
    random: Random
    log: logging.Logger
    key: SigningKey = field(default_factory=SigningKey.generate)
    mood: Mood = Mood.WELL
    _port: int = 0
    _listeners: list[trio.SocketListener] = field(default_factory=list)
    _server: HttpServer | None = None
    _daemon: httpx2.AsyncClient | None = None
    _report: Report | None = None
    _outbox: list[dict[str, Any]] = field(default_factory=list)

    @property
    def url(self) -> str:
        """Where the agent answers."""
        return f"http://127.0.0.1:{self._port}"

    @property
    def public_key(self) -> str:
        """The key its manifest is signed with, as configurations carry it."""
        return public_base64(bytes(self.key.verify_key))

    async def listen(self) -> None:
        """Take a port; after a stop the same one again."""
        self._listeners = await trio.open_tcp_listeners(self._port, host="127.0.0.1")
        self._port = self._listeners[0].socket.getsockname()[1]

    async def serve(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Answer until `stop` or cancelled."""
        self._server = HttpServer(self._app, max_connections=256, grace_s=0.3, log=self.log)
        async with trio.open_nursery() as nursery:
            await nursery.start(self._server.run, [Door(listener, "agent") for listener in self._listeners])
            task_status.started()

    def stop(self) -> None:
        """Stop answering, as an agent does that crashed."""
        if self._server is not None:
            self._server.stop()

    async def report_to(self, daemon: httpx2.AsyncClient, report: Report) -> None:
        """Report to a daemon what tasks used, until cancelled. `daemon` carries the agent's own API key."""
        self._daemon, self._report = daemon, report
        while True:
            await trio.sleep(REPORT_EVERY_S)
            events, self._outbox = self._outbox, []
            if not events:
                continue
            try:
                await report(events)
            except (ReportFailedError, httpx2.HTTPError, OSError, trio.BrokenResourceError) as error:
                self.log.warning("%s keeps %d events: %s", self.part.name, len(events), error)
                self._outbox = events + self._outbox

    # --- answering

    async def _app(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        body = b""
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            more = message.get("more_body", False)
        match scope["method"], scope["path"]:
            case "GET", "/.well-known/asap/health":
                status, answer = 200, {"status": "healthy", "agent_id": self.part.urn, "version": "1.0.0"}
            case "GET", "/.well-known/asap/manifest.json":
                status, answer = 200, self._manifest()
            case "POST", path if path == TASKS_PATH:
                status, answer = await self._do(msgspec.json.decode(body))
            case _:
                status, answer = 404, {"error": "not found"}
        headers = [(b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": msgspec.json.encode(answer)})

    def _manifest(self) -> dict[str, Any]:
        manifest = {
            "id": self.part.urn,
            "name": self.part.name,
            "version": "1.0.0",
            "description": "An agent of asapd's demo",
            "endpoints": {"asap": f"{self.url}/asap"},
            "sla": self.part.sla,
            "ttl_seconds": 300,
        }
        signature = base64.b64encode(self.key.sign(canonical(manifest)).signature).decode()
        return {
            "manifest": manifest,
            "signature": {"alg": "ed25519", "signature": signature, "trust_level": "self-signed"},
            "public_key": self.public_key,
        }

    # --- tasks

    async def _do(self, task: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """Do a task, under the consumer's delegation when it comes with one."""
        started_s = time.monotonic()
        reservation, cost_usd = None, None
        if "delegation" in task:
            decision = await self._authorize(task, ESTIMATE_USD)
            if decision.get("code") == "insufficient_budget" and task.get("accept_short"):
                cost_usd = decision["remaining"]["cost_usd"]
                decision = await self._authorize(task, cost_usd)
            if decision.get("decision") != "allow":
                return 403, decision
            reservation = decision["reservation"]["id"]
        usual_ms = SLOW_MS if self.mood is Mood.SLOW else self.part.usual_ms * self.random.uniform(0.7, 1.3)
        await trio.sleep(usual_ms / 1000)
        failed = self.mood is Mood.FAILING and self.random.random() < FAILING_SHARE
        event = {
            "id": task["task_id"],
            "source": self.part.urn,
            "task_id": task["task_id"],
            "agent": self.part.urn,
            "consumer": task["consumer"],
            "timestamp": format_us(time.time_ns() // 1000),
            "metrics": {
                "tokens_in": self.random.randint(*self.part.tokens),
                "tokens_out": self.random.randint(*self.part.tokens),
                "duration_ms": round((time.monotonic() - started_s) * 1000),
                "api_calls": 1,
            },
            "outcome": "failed" if failed else "completed",
        }
        # A task that was cut to what the budget had left is paid by agreement, any other by the price of its model.
        event |= {"model": self.part.model} if cost_usd is None else {"cost_usd": cost_usd}
        if reservation is None:
            self._outbox.append(event)
        else:
            await self._settle(event | {"delegation": task["delegation"], "reservation": reservation}, reservation)
        answer = {"task_id": task["task_id"], "state": event["outcome"], "short": cost_usd is not None}
        return (500 if failed else 200), answer

    async def _authorize(self, task: dict[str, Any], estimate_usd: float) -> dict[str, Any]:
        assert self._daemon is not None
        wanted = {
            "delegation": task["delegation"],
            "delegate": self.part.urn,
            "action": ACTION,
            "task_id": task["task_id"],
            "consumer": task["consumer"],
            "estimate": {"cost_usd": estimate_usd},
        }
        answer: dict[str, Any] = (await self._daemon.post("/delegations/authorize", json=wanted)).json()
        return answer

    async def _settle(self, event: dict[str, Any], reservation: str) -> None:
        """Report a delegated task before answering, so that what it did not use is free for the next."""
        assert self._daemon is not None
        assert self._report is not None
        await self._report([event])
        await self._daemon.post(f"/reservations/{reservation}/settle")


def http_report(daemon: httpx2.AsyncClient) -> Report:
    """Reports as arrays to `POST /usage`."""

    async def report(events: list[dict[str, Any]]) -> None:
        answer = await daemon.post("/usage", json=events)
        if answer.status_code != 201:
            raise ReportFailedError(answer.text)

    return report


def socket_report(socket: Path) -> Report:
    """Reports as frames to the ingest socket, over one connection that is opened when it is needed."""
    stream: trio.SocketStream | None = None

    async def report(events: list[dict[str, Any]]) -> None:
        nonlocal stream
        try:
            if stream is None:
                stream = await trio.open_unix_socket(str(socket))
            await stream.send_all(encode(msgspec.json.encode(events)))
            answer = msgspec.json.decode(await _receive_frame(stream))
        except BaseException:
            # An answer that was not waited for must not be taken for the next one's.
            if stream is not None:
                stream.socket.close()
                stream = None
            raise
        if not answer["ok"]:
            raise ReportFailedError(answer["detail"])

    return report


async def _receive_frame(stream: trio.SocketStream) -> bytes:
    decoder = FrameDecoder(_MAX_REPLY_BYTES)
    while True:
        data = await stream.receive_some()
        if not data:
            raise ReportFailedError("the ingest socket was closed")
        for frame in decoder.feed(data):
            if isinstance(frame, bytes):
                return frame
            raise ReportFailedError(f"a reply of {frame.announced_bytes + LENGTH_BYTES} bytes")
