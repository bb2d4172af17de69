"""Middleware for ASGI and WSGI: a request is a task, and may need a delegation."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from uuid import UUID
from wsgiref.util import setup_testing_defaults

import pytest
import trio

from asapd.client import AsgiMiddleware, AsyncMeter, Meter, Rules, WsgiMiddleware, current_task
from asapd.client.meter import Settings
from asapd.wire.usage import Events, decode_events
from tests.client.fake import PATIENCE_S, Fake
from tests.client.test_meter import AGENT, ALLOWED, CONSUMER, DENIED

Answer = tuple[int, dict[str, str], bytes]
Sent = dict[str, str]


@pytest.fixture
def meter(home: Path, fake: Fake) -> Iterator[Meter]:
    with Meter(home / "ingest.sock", agent=AGENT, spool=home / "spool", batch_age_s=0.01) as meter:
        yield meter


def asgi(app: Any, path: str = "/", headers: Sent | None = None, *, kind: str = "http", run: Any = None) -> Answer:
    """One request to an ASGI application."""
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return {"type": f"{kind}.connect" if kind == "websocket" else "http.request", "body": b""}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    async def main() -> None:
        pairs = [(name.encode(), value.encode()) for name, value in (headers or {}).items()]
        await app({"type": kind, "path": path, "headers": pairs}, receive, send)

    trio.run(main) if run is trio.run else asyncio.run(main())
    if not sent:
        return 0, {}, b""
    shown = {bytes(name).decode(): bytes(value).decode() for name, value in sent[0].get("headers", ())}
    body = b"".join(message.get("body", b"") for message in sent)
    return sent[0].get("status", 0) or sent[0].get("code", 101), shown, body


def wsgi(app: Any, path: str = "/", headers: Sent | None = None) -> Answer:
    """One request to a WSGI application."""
    environ: dict[str, Any] = {}
    setup_testing_defaults(environ)
    environ["PATH_INFO"] = path
    environ |= {f"HTTP_{name.upper().replace('-', '_')}": value for name, value in (headers or {}).items()}
    started: list[Any] = []

    def start_response(status: str, shown: list[tuple[str, str]], error: Any = None) -> Callable[[bytes], object]:
        started[:] = [int(status[:3]), dict(shown)]
        return lambda data: None

    parts = app(environ, start_response)
    try:
        body = b"".join(parts)
    finally:
        if hasattr(parts, "close"):
            parts.close()
    return started[0], started[1], body


def asgi_app(status: int = 200) -> Any:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        task = current_task()
        assert task is not None
        assert task is scope["asapd.task"]
        task.tokens(3, 4)
        if scope["type"] == "websocket":
            await send({"type": "websocket.accept"})
            return
        if status == 0:
            raise RuntimeError("broken")
        await send({"type": "http.response.start", "status": status, "headers": [(b"x-app", b"1")]})
        await send({"type": "http.response.body", "body": b"hello", "more_body": False})

    return app


def wsgi_app(status: int = 200) -> Any:
    def app(environ: Any, start_response: Any) -> Iterable[bytes]:
        task = current_task()
        assert task is not None
        assert task is environ["asapd.task"]
        if status == 0:
            raise RuntimeError("broken")
        start_response(f"{status} X", [("x-app", "1")])
        task.tokens(3)
        return parts(task)

    def parts(task: Any) -> Iterator[bytes]:
        # In the iteration, as a streaming response does it.
        assert current_task() is task
        task.tokens(out=4)
        yield b"hel"
        yield b"lo"

    return app


WAYS = {
    "asgi": (AsgiMiddleware, asgi_app, asgi),
    "wsgi": (WsgiMiddleware, wsgi_app, wsgi),
}
ways = pytest.mark.parametrize("way", list(WAYS))


def served(way: str, meter: Meter, rules: Rules | None = None, status: int = 200) -> Callable[..., Answer]:
    middleware, app, call = WAYS[way]
    wrapped = middleware(app(status), meter, rules)  # type: ignore[operator] -- each with its own kind of application
    return lambda *args, **kwargs: call(wrapped, *args, **kwargs)  # type: ignore[operator] -- likewise


@ways
def test_a_request_is_a_task_with_its_id_in_the_response(way: str, meter: Meter, fake: Fake) -> None:
    ask = served(way, meter)
    status, headers, body = ask(headers={"x-asap-task-id": "mine", "x-asap-consumer": CONSUMER})
    assert (status, body) == (200, b"hello")
    assert headers == {"x-app": "1", "x-asap-task-id": "mine"}
    _, headers, _ = ask()
    assert meter.flush()
    first, second = fake.events
    assert (first["task_id"], first["agent"], first["consumer"]) == ("mine", AGENT, CONSUMER)
    assert first["metrics"]["tokens_in"] == 3
    assert first["metrics"]["tokens_out"] == 4
    assert "outcome" not in first
    assert second["task_id"] == headers["x-asap-task-id"]
    assert second["consumer"] == "urn:asap:agent:unknown"
    assert current_task() is None


@ways
@pytest.mark.parametrize(("status", "outcome"), [(404, None), (500, "failed"), (503, "failed")])
def test_the_outcome_is_that_of_the_status(
    way: str, meter: Meter, fake: Fake, status: int, outcome: str | None
) -> None:
    served(way, meter, status=status)()
    assert meter.flush()
    assert fake.events[0].get("outcome") == outcome


@ways
def test_an_exception_passes_on_and_is_a_failure(way: str, meter: Meter, fake: Fake) -> None:
    with pytest.raises(RuntimeError, match="broken"):
        served(way, meter, status=0)()
    assert meter.flush()
    assert fake.events[0]["error"] == "RuntimeError: broken"


def test_a_wsgi_response_that_breaks_off_is_a_failure(meter: Meter, fake: Fake) -> None:
    def app(environ: Any, start_response: Any) -> Iterator[bytes]:
        start_response("200 OK", [])
        yield b"some"
        raise OSError("gone")

    class Parts(list[bytes]):
        def close(self) -> None:
            raise ValueError("cannot close")

    with pytest.raises(OSError, match="gone"):
        wsgi(WsgiMiddleware(app, meter))
    unread: Any = WsgiMiddleware(lambda environ, start: start("200 OK", []) and Parts(), meter)(
        {}, lambda *args: lambda data: None
    )
    with pytest.raises(ValueError, match="cannot close"):
        unread.close()
    silent: Any = WsgiMiddleware(lambda environ, start: [], meter)({}, lambda *args: lambda data: None)
    assert list(silent) == []
    silent.close()
    assert meter.flush()
    assert [event["error"] for event in fake.events] == ["OSError: gone", "ValueError: cannot close", "no response"]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The time in ms, which goes on only when it is told to."""
    now = [0]
    monkeypatch.setattr("asapd.client.task.time.perf_counter_ns", lambda: now[0] * 1_000_000)
    return now


@ways
@pytest.mark.parametrize(("status", "error"), [(200, None), (500, "RuntimeError: too late")])
def test_what_comes_after_the_response_counts_and_neither_lasts_nor_fails(
    way: str, meter: Meter, fake: Fake, clock: list[int], status: int, error: str | None
) -> None:
    """Background tasks under ASGI, and what is called at the closing under WSGI. A status of 500 has failed anyhow."""

    def goes_on(task: Any) -> None:
        clock[0] += 60_000
        task.tokens(7)
        raise RuntimeError("too late")

    async def asgi_app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": status, "headers": []})
        clock[0] += 20
        await send({"type": "http.response.body", "body": b"some", "more_body": True})
        clock[0] += 10
        await send({"type": "http.response.body"})
        goes_on(scope["asapd.task"])

    class Parts:
        def __init__(self, task: Any) -> None:
            self.task = task

        def __iter__(self) -> Iterator[bytes]:
            clock[0] += 20
            yield b"some"
            clock[0] += 10

        def close(self) -> None:
            goes_on(self.task)

    def wsgi_app(environ: Any, start_response: Any) -> Iterable[bytes]:
        start_response(f"{status} X", [])
        return Parts(environ["asapd.task"])

    ask = {"asgi": lambda: asgi(AsgiMiddleware(asgi_app, meter)), "wsgi": lambda: wsgi(WsgiMiddleware(wsgi_app, meter))}
    with pytest.raises(RuntimeError, match="too late"):
        ask[way]()
    assert meter.flush()
    (event,) = fake.events
    assert event["metrics"] == {"tokens_in": 7, "duration_ms": 30}
    assert event.get("error") == error
    assert event.get("outcome") == (error and "failed")


def test_a_response_that_is_not_complete_is_a_failure(meter: Meter, fake: Fake) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"some", "more_body": True})
        raise RuntimeError("halfway")

    with pytest.raises(RuntimeError, match="halfway"):
        asgi(AsgiMiddleware(app, meter))
    assert meter.flush()
    assert fake.events[0]["error"] == "RuntimeError: halfway"


@ways
def test_what_a_caller_sends_as_names_is_not_believed_blindly(way: str, meter: Meter, fake: Fake) -> None:
    def consumer(headers: Any) -> str:
        return {"alice": "urn:asap:agent:alice"}[headers["x-user"]]

    ask = served(way, meter, Rules(agent="urn:asap:agent:other", consumer=consumer))
    ask(headers={"x-user": "alice", "x-asap-consumer": "urn:asap:agent:mallory", "x-asap-task-id": "x" * 300})
    ask(headers={"x-user": "nobody", "x-asap-consumer": "urn:asap:agent:victim"})
    assert meter.flush()
    assert [event["consumer"] for event in fake.events] == ["urn:asap:agent:alice", "urn:asap:agent:unknown"]
    assert meter.stats().misused == 1
    assert len(fake.events[0]["task_id"]) == 26
    assert fake.events[0]["agent"] == "urn:asap:agent:other"


@ways
@pytest.mark.parametrize(
    ("said", "consumer"),
    [
        ("Müller GmbH", "Müller GmbH"),
        ("ü" * 256, "ü" * 256),
        ("soft\xadhyphen\u3000", "soft\xadhyphen\u3000"),
        (42, "42"),
        (UUID(int=1), "00000000-0000-0000-0000-000000000001"),
        (None, "urn:asap:agent:house"),
        ("", "urn:asap:agent:house"),
    ],
)
def test_a_consumer_that_the_service_names_is_the_one_recorded(
    way: str, home: Path, fake: Fake, said: Any, consumer: str
) -> None:
    """The meter's own is for requests that have none, and what is recorded is what the daemon takes."""
    settings: Settings = {"agent": AGENT, "consumer": "urn:asap:agent:house", "spool": home / "spool"}
    with Meter(home / "ingest.sock", **settings) as meter:
        served(way, meter, Rules(consumer=lambda headers: said))(headers={"x-asap-consumer": "urn:asap:agent:victim"})
        assert meter.flush()
        assert meter.stats().misused == 0
    assert [event["consumer"] for event in fake.events] == [consumer]
    found = decode_events(json.dumps(fake.events[0]).encode())
    assert isinstance(found, Events)
    assert found.refusal is None


@ways
@pytest.mark.parametrize(
    "said",
    [
        "x" * 257,
        "two\nlines",
        "\x85",
        "\ud800",
        pytest.param(10**300, id="long"),
        pytest.param(10**5000, id="endless"),
        True,
        0.5,
        b"alice",
        ["alice"],
    ],
)
def test_a_consumer_that_is_none_is_nobody_and_is_complained_of(
    way: str, home: Path, fake: Fake, caplog: pytest.LogCaptureFixture, said: Any
) -> None:
    """Not the meter's own consumer, who would pay for others."""
    settings: Settings = {"agent": AGENT, "consumer": "urn:asap:agent:house", "spool": home / "spool"}
    with Meter(home / "ingest.sock", **settings) as meter:
        ask = served(way, meter, Rules(consumer=lambda headers: said))
        assert [ask()[0], ask()[0]] == [200, 200]
        assert meter.flush()
        assert meter.stats().misused == 2
    assert [event["consumer"] for event in fake.events] == ["urn:asap:agent:unknown"] * 2
    assert [record.message for record in caplog.records] == ["the consumer of a request could not be told"]
    assert caplog.records[0].exc_info is not None


@ways
@pytest.mark.parametrize("said", [None, 0.5])
def test_who_cannot_be_told_is_not_authorised_as_somebody_else(
    way: str, meter: Meter, fake: Fake, said: float | None
) -> None:
    """Neither as the one in the header, nor as nobody, past the budgets of whoever it is."""

    def consumer(headers: Any) -> Any:
        return said if said is not None else {}[headers["authorization"]]

    fake.http = lambda path, headers, body: (200, ALLOWED)
    sent = {"x-asap-delegation": "a.b.c", "x-asap-consumer": "urn:asap:agent:victim"}
    status, headers, body = served(way, meter, Rules(require_delegation=True, consumer=consumer))(headers=sent)
    assert (status, headers["retry-after"]) == (503, "5")
    assert json.loads(body)["code"] == "authorization_unavailable"
    assert meter.flush()
    assert (fake.requests, fake.events) == ([], [])


@ways
def test_skipped_paths_are_left_alone(way: str, meter: Meter, fake: Fake) -> None:
    ask = served(way, meter, Rules(skip={"/healthz"}, require_delegation=True))
    status, headers, body = ask("/healthz", {"x-asap-task-id": "mine"})
    assert (status, headers, body) == (200, {"x-app": "1"}, b"hello")
    assert current_task() is None
    assert meter.flush()
    assert fake.events == []
    assert meter.stats().misused == meter.stats().recorded == 0


def test_a_path_to_skip_that_is_no_collection_is_an_error_at_once() -> None:
    """In the text "/healthz" there is "/" too, which would be neither metered nor guarded."""
    with pytest.raises(ValueError, match=r"write skip=\('/healthz',\)"):
        Rules(skip=("/healthz"))


@ways
def test_with_a_delegation_the_work_is_reserved_and_settled(way: str, meter: Meter, fake: Fake) -> None:
    settled = (200, {"state": "settled"})
    fake.http = lambda path, headers, body: (200, ALLOWED) if path.endswith("authorize") else settled
    rules = Rules(action="task.write", require_delegation=True, estimate=lambda headers: {"cost_usd": "0.5"})
    status, _, _ = served(way, meter, rules)(headers={"x-asap-delegation": "a.b.c", "x-asap-consumer": CONSUMER})
    assert status == 200
    assert meter.flush()
    asked = fake.requests[0][2]
    assert (asked["token"], asked["action"], asked["estimate"]) == ("a.b.c", "task.write", {"cost_usd": "0.5"})
    assert (asked["delegate"], asked["consumer"]) == (AGENT, CONSUMER)
    (event,) = fake.events
    assert (event["delegation"], event["reservation"], event["action"]) == ("del_1", "res_1", "task.write")
    assert fake.log == ["/delegations/authorize", "usage", "/reservations/res_1/settle"]


@ways
@pytest.mark.parametrize("credential", [None, "del_01JD0Q6Y8T5W3N9V2X4Z7B1C6D", "job.42"])
def test_without_a_token_the_application_is_not_called(
    way: str, meter: Meter, fake: Fake, credential: str | None
) -> None:
    sent = {} if credential is None else {"x-asap-delegation": credential}
    status, headers, body = served(way, meter, Rules(require_delegation=True))(headers=sent)
    assert (status, headers["content-type"]) == (403, "application/problem+json")
    document = json.loads(body)
    assert (document["status"], document["code"]) == (403, "delegation_required")
    assert fake.requests == []


@ways
def test_a_denial_is_handed_on_but_for_what_a_budget_has_spent(way: str, meter: Meter, fake: Fake) -> None:
    denial = {**DENIED, "type": "urn:asapd:problem:revoked", "budget": {"name": "research", "spent": 7}}
    fake.http = lambda path, headers, body: (403, denial)
    status, headers, body = served(way, meter, Rules(require_delegation=True))(headers={"x-asap-delegation": "{}"})
    assert (status, headers["content-type"]) == (403, "application/problem+json")
    assert json.loads(body) == {**DENIED, "type": "urn:asapd:problem:revoked", "status": 403}
    assert meter.flush()
    assert fake.events == []


@ways
@pytest.mark.parametrize(("estimate", "reason"), [({"tokens": 1}, "missing_estimate"), ({"cost_usd": -1}, "invalid")])
def test_what_is_refused_for_good_is_not_to_be_tried_again(
    way: str, meter: Meter, fake: Fake, estimate: Any, reason: str
) -> None:
    fake.http = lambda path, headers, body: (422, {"code": "missing_estimate", "detail": "give cost_usd"})
    rules = Rules(require_delegation=True, estimate=estimate)
    status, headers, body = served(way, meter, rules)(headers={"x-asap-delegation": "a.b.c"})
    document = json.loads(body)
    assert (status, "retry-after" in headers) == (403, False)
    assert (document["code"], document["reason"]) == ("authorization_refused", reason)


@ways
def test_while_nobody_can_authorise_nothing_is_let_through(way: str, meter: Meter, fake: Fake) -> None:
    def broken(headers: Any) -> Any:
        raise KeyError("price")

    for estimate in (None, broken):
        rules = Rules(require_delegation=True, estimate=estimate)
        status, headers, body = served(way, meter, rules)(headers={"x-asap-delegation": "a.b.c"})
        assert (status, headers["retry-after"]) == (503, "5")
        assert json.loads(body)["code"] == "authorization_unavailable"


def test_under_trio_too_and_with_an_async_meter(home: Path, fake: Fake) -> None:
    fake.http = lambda path, headers, body: (200, ALLOWED)
    meter = AsyncMeter(home / "ingest.sock", agent=AGENT, spool=home / "spool")
    app = AsgiMiddleware(asgi_app(), meter, Rules(require_delegation=True))
    assert asgi(app, headers={"x-asap-delegation": "a.b.c"}, run=trio.run)[0] == 200
    meter.meter.close()
    assert fake.events[0]["reservation"] == "res_1"


def test_a_websocket_is_a_task_and_is_guarded(meter: Meter, fake: Fake) -> None:
    assert asgi(AsgiMiddleware(asgi_app(), meter), kind="websocket")[0] == 101
    guarded = AsgiMiddleware(asgi_app(), meter, Rules(require_delegation=True))
    assert asgi(guarded, kind="websocket")[0] == 1008

    async def turns_away(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "websocket.close", "code": 1000})

    asgi(AsgiMiddleware(turns_away, meter), kind="websocket")
    assert meter.flush()
    assert len(fake.events) == 2
    assert all("outcome" not in event for event in fake.events)


@pytest.mark.parametrize(("is_closed", "status"), [(False, 200), (True, 200), (True, 503)])
def test_a_request_that_is_cancelled_while_it_asks_leaves_no_reservation(
    meter: Meter, fake: Fake, is_closed: bool, status: int
) -> None:
    asked, answered = threading.Event(), threading.Event()

    def http(path: str, headers: dict[str, str], body: Any) -> tuple[int, dict[str, Any]]:
        if "authorize" in path:
            asked.set()
            answered.wait(PATIENCE_S)
        return status, ALLOWED

    async def main() -> None:
        scope = {"type": "http", "headers": [(b"x-asap-delegation-token", b"a.b.c")]}
        app: Any = AsgiMiddleware(asgi_app(), meter, Rules(require_delegation=True))
        request = asyncio.create_task(app(scope, None, None))
        await asyncio.to_thread(asked.wait, PATIENCE_S)
        request.cancel()
        with pytest.raises(asyncio.CancelledError):
            await request
        if is_closed:
            meter.close()
        answered.set()

    fake.http = http
    asyncio.run(main())  # which waits for its threads at the end
    assert meter.flush()
    assert fake.log == ["/delegations/authorize", *(["/reservations/res_1/settle"] if status == 200 else [])]


def test_a_loop_without_threads_lets_nothing_through(meter: Meter, fake: Fake) -> None:
    sent: list[dict[str, Any]] = []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    async def main() -> None:
        await asyncio.get_running_loop().shutdown_default_executor()
        scope = {"type": "http", "headers": [(b"x-asap-delegation-token", b"a.b.c")]}
        app: Any = AsgiMiddleware(asgi_app(), meter, Rules(require_delegation=True))
        await app(scope, None, send)

    asyncio.run(main())
    assert sent[0]["status"] == 503
    assert json.loads(sent[1]["body"])["code"] == "authorization_unavailable"


def test_other_scopes_pass_through(meter: Meter, fake: Fake) -> None:
    seen = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope["type"])

    asgi(AsgiMiddleware(app, meter), kind="lifespan")
    assert seen == ["lifespan"]
    assert meter.flush()
    assert fake.events == []
