"""The application as a whole: who comes in by which door, and that every error is a problem document."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import apsw
import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from asapd import config
from asapd.actors.reads import Reads
from asapd.core.rates import Rate
from asapd.core.types import SECOND_US
from asapd.edge.http.app import create_app
from asapd.edge.sockets import Peer
from asapd.edge.throttle import Throttle
from asapd.store import database as store_database
from asapd.store.database import Database, InlineReaders, ReadTooLongError, ThreadReaders
from asapd.wire.keys import public_base64
from tests.edge.house import HELD, IDENTITY, LOG, ME, NOW, T0, A, B, Edge, open_edge
from tests.slow_reads import giving_up

EVENT = {"task_id": "t", "agent": A, "consumer": B, "metrics": {}, "timestamp": NOW}
Inline = tuple[Database, apsw.Connection]


@pytest.mark.parametrize("key", [None, "", "nonsense", "asapd_1_2"])
async def test_without_a_valid_key_everything_else_is_401(edge: Edge, key: str | None) -> None:
    reply = await edge.get("/usage", key=key)
    assert reply.refused(401)["code"] == "unauthorized"
    assert reply.headers["www-authenticate"].startswith("Bearer")


async def test_every_reply_is_hardened(edge: Edge) -> None:
    for path in ("/usage", "/nothing", "/healthz"):
        reply = await edge.get(path)
        assert reply.headers["x-content-type-options"] == "nosniff"
        assert reply.headers["cache-control"] == "no-store"


async def test_an_address_or_method_that_is_not_there_is_a_problem(edge: Edge) -> None:
    nothing = (await edge.get("/nothing")).refused(404)
    assert (nothing["code"], nothing["detail"]) == ("not_found", "nothing is served at /nothing: /docs lists what is")
    plain = (await edge.get("/ws")).refused(400)
    assert (plain["code"], plain["detail"]) == ("malformed", "/ws is for WebSockets: connect with ws:// or wss://")
    reply = await edge.delete("/usage")
    assert reply.refused(405)["code"] == "method_not_allowed"
    assert "does not take" in reply.json["detail"]
    assert "POST" in reply.headers["allow"]
    assert (await edge.get("/usage/")).status == 200
    for path in ("/v1/traces//", "/v1//traces", "/usage//", "/healthz//"):
        assert (await edge.post(path)).refused(404)["code"] == "not_found"
        assert (await edge.get(path)).refused(404)["detail"] == f"nothing is served at {path}: /docs lists what is"


async def test_a_foreign_host_or_origin_is_refused_before_the_key_is_looked_at(edge: Edge) -> None:
    foreign = await edge.get("/healthz", headers={"Host": "evil.example"}, key=None)
    assert foreign.refused(403)["code"] == "host_not_allowed"
    page = await edge.get("/usage", headers={"Origin": "https://evil.example"})
    assert page.refused(403)["code"] == "host_not_allowed"


async def test_without_authentication_everybody_is_admin(edge: Edge) -> None:
    edge.with_settings(http=config.Http(auth="none"))
    assert (await edge.get("/keys", key=None)).ok()["count"] == 4


async def test_the_admin_socket_knows_its_caller_by_user(edge: Edge) -> None:
    assert (await edge.get("/keys", key=None, door={"door": "admin", "peer": ME})).status == 200
    operator = {"door": "admin", "peer": Peer(1, 12345, 5), "group": 5}
    assert (await edge.get("/keys", key=None, door=operator)).refused(403)["code"] == "forbidden"
    assert (await edge.get("/usage", key=None, door=operator)).status == 200
    for group in (6, None):
        stranger = {**operator, "group": group}
        for path in ("/usage", "/healthz", "/status"):
            assert "join that group" in (await edge.get(path, key=None, door=stranger)).refused(403)["detail"]


async def test_the_ingest_socket_lets_in_whom_its_rules_admit(edge: Edge) -> None:
    assert (await edge.post("/usage", EVENT, key=None, door={"door": "ingest", "peer": ME})).ok(201)["recorded"] == 1
    assert (await edge.get("/usage", key=None, door={"door": "ingest", "peer": ME})).refused(404)
    unknown = {"door": "ingest", "peer": Peer(0, 1, 1)}
    assert (await edge.post("/usage", EVENT, key=None, door=unknown)).refused(403)["code"] == "forbidden"


async def test_a_bug_in_a_route_is_a_problem_and_is_logged(edge: Edge, caplog: pytest.LogCaptureFixture) -> None:
    def broken() -> bytes:
        raise ZeroDivisionError

    services = replace(edge.services, metrics=broken)
    problem = (await edge.get("/metrics", services=services)).refused(500)
    assert problem["code"] == "internal"
    assert "GET /metrics failed" in caplog.text
    assert "ZeroDivisionError" in caplog.text


async def test_a_read_that_takes_too_long_is_503_and_says_how_to_narrow_it(
    edge: Edge, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for part in range(3):
        events = [{**EVENT, "id": f"e{part}.{number}"} for number in range(1_000)]
        assert (await edge.post("/usage", events)).ok(201)["recorded"] == 1_000
    readers = ThreadReaders(Path(edge.connection.filename))
    monkeypatch.setattr(InlineReaders, "run", lambda _, query, *arguments: readers.run(query, *arguments))
    path = "/usage/aggregate?group_by=minute"
    assert (await edge.get(path)).ok()["count"] == 1
    monkeypatch.setattr(store_database, "READ_LIMIT_S", 0.0)
    for door in ({"door": "http"}, {"door": "admin", "peer": ME}):
        reply = await edge.get(path, door=door)
        problem = reply.refused(503)
        assert problem["code"] == "read_too_long"
        assert problem["detail"] == (
            "reading took longer than 0 s and was given up: "
            "ask for less: a shorter time (start, end), one agent or consumer, coarser groups"
        )
        assert "retry-after" not in reply.headers  # the same again takes as long
    monkeypatch.undo()
    assert (await edge.get(path)).ok()["count"] == 1
    readers.close()
    assert "GET /usage/aggregate: reading took longer than 0 s" in caplog.text
    assert "Traceback" not in caplog.text


@pytest.mark.parametrize(
    ("method", "path", "body", "query"),
    [
        ("DELETE", "/delegations/del_x", None, "get_delegation"),
        ("GET", "/sla", None, "past_breaches"),
        ("POST", "/retention", b"", "told"),
        ("POST", "/retention", b"", "is_due"),
        ("POST", "/retention", b"", "newest"),
        ("POST", "/retention?dry_run=true", b"", "due"),
    ],
)
async def test_a_read_that_takes_too_long_for_an_actor_is_no_bug_either(
    edge: Edge,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    method: str,
    path: str,
    body: Any,
    query: str,
) -> None:
    monkeypatch.setattr(InlineReaders, "run", giving_up(query))
    problem = (await edge.call(method, path, body)).refused(503)
    assert (problem["code"], problem["detail"][:7]) == ("read_too_long", "GAVE UP")
    told = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(told) == 1
    assert "GAVE UP" in told[0]
    assert "Traceback" not in caplog.text


async def test_a_conflict_whose_event_takes_too_long_to_read_is_no_bug_either(
    edge: Edge, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    event = {**EVENT, "id": "e1"}
    assert (await edge.post("/usage", event)).ok(201)
    monkeypatch.setattr(InlineReaders, "run", giving_up("get_usage"))
    problem = (await edge.post("/usage", {**event, "task_id": "other"})).refused(503)
    assert (problem["code"], problem["detail"][:7]) == ("read_too_long", "GAVE UP")
    assert "a Report was refused: GAVE UP" in caplog.text
    assert "Traceback" not in caplog.text


class SlowAfterCommit(InlineReaders):
    """Readers for the doors that give up once something was committed since they were made."""

    def __init__(self, edge: Edge) -> None:
        super().__init__(edge.connection)
        self._committed, self._before = edge.committed, edge.committed.count

    async def run(self, query: Callable[..., Any], *arguments: Any) -> Any:
        """Run one query, or not."""
        if self._committed.count != self._before:
            raise ReadTooLongError("GAVE UP")
        return await super().run(query, *arguments)


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", "/agents", {"id": A, "url": "http://127.0.0.1:2"}),
        ("POST", f"/agents/{A}/pause", b""),
        ("POST", f"/agents/{B}/keys", {"public_key": public_base64(bytes(IDENTITY.verify_key))}),
        ("DELETE", f"/agents/{B}/keys/{{kid}}", None),
        (
            "POST",
            "/delegations",
            {"delegator": A, "delegate": B, "constraints": {"expires_at": T0 / SECOND_US + 3600}, "scopes": ["*"]},
        ),
        ("POST", "/breaches/brc_1/ack", b""),
    ],
)
async def test_a_commit_is_not_denied_where_what_is_to_be_shown_of_it_cannot_be_read(
    edge: Edge, caplog: pytest.LogCaptureFixture, method: str, path: str, body: Any
) -> None:
    for agent, key in ((A, None), (B, public_base64(bytes(HELD.verify_key)))):
        assert (await edge.post("/agents", {"id": agent, "url": "http://127.0.0.1:1", "public_key": key})).ok(201)
    await edge.breach()
    path = path.replace("{kid}", (await edge.get(f"/agents/{B}/keys")).ok()["data"][0]["kid"])
    reads = Reads(Database(edge.database._runner, SlowAfterCommit(edge)), edge.clock)
    reply = await edge.call(method, path, body, services=replace(edge.services, reads=reads))
    problem = reply.refused(503)
    assert (problem["code"], problem["detail"][:7]) == ("outcome_unknown", "GAVE UP")
    assert int(reply.headers["retry-after"]) >= 1
    assert f"{method} {path}: GAVE UP" in caplog.text
    assert "Traceback" not in caplog.text


async def test_a_full_mailbox_is_503_with_retry_after(inline_database: Inline, tmp_path: Path) -> None:
    async with open_edge(inline_database[1], tmp_path, meter=True) as edge, trio.open_nursery() as nursery:
        for _ in range(4):
            nursery.start_soon(edge.post, "/usage", EVENT)
        await wait_all_tasks_blocked()
        reply = await edge.post("/usage", EVENT)
        assert reply.refused(503)["code"] == "overloaded"
        assert int(reply.headers["retry-after"]) >= 1
        nursery.cancel_scope.cancel()


async def test_an_actor_that_does_not_answer_is_503_in_the_end(
    inline_database: Inline, tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with open_edge(inline_database[1], tmp_path, meter=True) as edge:
        task = {"task_id": "t1", "agent": A, "consumer": B, "state": "started", "timestamp": NOW}
        reply = await edge.post("/tasks", task)
        assert reply.refused(503)["code"] == "outcome_unknown"


@pytest.mark.parametrize(
    ("method", "path", "box"),
    [
        ("GET", "/sla", "watcher"),
        ("GET", "/agents/" + A + "/sla", "watcher"),
        ("POST", "/agents", "prober"),
        ("DELETE", "/agents/" + A, "prober"),
        ("POST", "/keys", "gatekeeper"),
        ("DELETE", "/keys/x", "gatekeeper"),
        ("DELETE", "/delegations/x", "registry"),
        ("POST", "/delegations/validate", "registry"),
        ("POST", "/delegations/authorize", "registry"),
        ("POST", "/delegations", "registry"),
    ],
)
async def test_an_actor_that_has_shut_down_is_503(edge: Edge, method: str, path: str, box: str) -> None:
    sent: dict[str, object] = {"token": "x"}
    if path == "/agents":
        sent = {"id": A, "url": "http://127.0.0.1:1"}
    elif path == "/keys":
        sent = {"name": "n", "role": "reader"}
    elif path.endswith("authorize"):
        sent = {"token": "x", "task_id": "t"}
    assert (await edge.post("/agents", {"id": A, "url": "http://127.0.0.1:1"})).ok(201)
    edge.mailboxes[box][0].close()
    reply = await edge.call(method, path, sent if method == "POST" else None)
    assert reply.refused(503)["code"] == "outcome_unknown"


async def test_a_handler_that_fails_is_500(edge: Edge, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL)
    edge.connection.execute("DROP TABLE task")
    task = {"task_id": "t1", "agent": A, "consumer": B, "state": "started", "timestamp": NOW}
    assert (await edge.post("/tasks", task)).refused(500)["code"] == "internal"


async def test_a_directory_without_figures_is_still_shown(edge: Edge) -> None:
    assert (await edge.post("/agents", {"id": A, "url": "http://127.0.0.1:1"})).ok(201)
    edge.mailboxes["watcher"][0].close()
    row = (await edge.get(f"/agents/{A}")).ok()
    assert (row["id"], row["sla"], row["uptime_percent"]) == (A, None, None)


async def test_beyond_its_rate_a_key_is_429_with_the_time_to_wait(edge: Edge) -> None:
    services = replace(edge.services, throttle=Throttle(Rate(2, 60_000_000), 3, edge.clock))
    app = create_app(services, LOG)
    client = app.test_client()

    async def get(path: str, key: str | None = "reader", door: dict[str, Any] | None = None) -> tuple[int, str | None]:
        headers = {"Host": "localhost"}
        if key is not None:
            headers["Authorization"] = f"Bearer {edge.keys[key]}"
        response = await client.get(path, headers=headers, scope_base={"asapd": door or {"door": "http"}})
        return response.status_code, response.headers.get("Retry-After")

    assert [await get("/usage") for _ in range(3)] == [(200, None)] * 3
    assert await get("/usage") == (429, "30")
    assert await get("/usage", "operator") == (200, None)
    assert [(await get("/healthz", key))[0] for key in ("reader", None)] == [200, 200]
    # The operator's own door stays open, whoever else is too many.
    assert {(await get("/keys", None, {"door": "admin", "peer": ME}))[0] for _ in range(9)} == {200}


async def test_doors_of_ingest_serve_what_reports_and_authorises_and_nothing_else(edge: Edge) -> None:
    for door in ({"door": "ingest", "peer": ME}, {"door": "lane"}):
        for method, path in (
            ("GET", "/usage"),
            ("POST", "/keys"),
            ("GET", "/healthz"),
            ("GET", "/"),
            ("POST", "/reload"),
        ):
            assert (await edge.call(method, path, b"{}", door=door)).refused(404)["code"] == "not_found"
        assert (await edge.post("/usage/", EVENT, door=door)).status == 201
        assert (await edge.get("/reservations/rsv_1", door=door)).status in {403, 404}
