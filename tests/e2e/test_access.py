"""Who may do what: roles, agent patterns, tenants, host names, sockets."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.e2e.daemon import QUICK, Daemon, check_problem, running, until
from tests.e2e.tokens import Party

MINE, OTHER = "urn:asap:agent:mine", "urn:asap:agent:other"
DESK = "urn:asap:agent:desk"
ROOT, WORKER = Party("root"), Party("mine")


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    pinned = f'[[agents]]\nid = "{ROOT.urn}"\nurl = "http://127.0.0.1:9"\npublic_key = "{ROOT.public_key}"\n'
    more = f'[[agents]]\nid = "{OTHER}"\nurl = "http://127.0.0.1:9"\n'
    with running(QUICK + pinned + more) as started:
        yield started


@pytest.fixture(scope="module")
def keys(daemon: Daemon) -> dict[str, str]:
    return {role: daemon.create_key(role) for role in ("ingest", "reader", "operator", "admin")}


def event(agent: str = MINE, **more: Any) -> dict[str, Any]:
    return {"task_id": "t", "agent": agent, "consumer": DESK, "timestamp": time.time(), **more}


OPEN = (
    "/openapi.json",
    "/asyncapi.json",
    "/docs",
    "/healthz",
    "/readyz",
    "/.well-known/jwks.json",
    "/.well-known/asap/health",
    "/.well-known/asap/manifest.json",
)
ALL = frozenset({"ingest", "reader", "operator", "admin"})
READ = ALL - {"ingest"}
# What each route answers to a role that may use it. What is sent is wrong on purpose where a right one would change
# anything: it is a matter of who may get so far.
ROUTES: list[tuple[str, str, Any, frozenset[str], int]] = [
    ("POST", "/usage", [], frozenset({"ingest", "admin"}), 201),
    ("POST", "/usage/batch", [], frozenset({"ingest", "admin"}), 201),
    ("POST", "/usage/validate", {}, frozenset({"ingest", "admin"}), 200),
    ("POST", "/tasks", {}, frozenset({"ingest", "admin"}), 422),
    ("POST", "/delegations/validate", {"token": "x"}, ALL, 200),
    ("POST", "/delegations/authorize", {}, frozenset({"ingest", "admin"}), 422),
    ("POST", "/reservations/none/settle", {}, frozenset({"ingest", "admin"}), 404),
    ("POST", "/reservations/none/extend", {}, frozenset({"ingest", "admin"}), 404),
    ("DELETE", "/reservations/none", None, frozenset({"ingest", "operator", "admin"}), 404),
    ("POST", "/reservations/none/refund", {"cost_usd": 1, "reason": "x"}, frozenset({"operator", "admin"}), 404),
    ("GET", "/reservations", None, READ, 200),
    ("GET", "/usage", None, READ, 200),
    ("GET", "/usage/aggregate", None, READ, 200),
    ("GET", "/usage/summary", None, READ, 200),
    ("GET", "/usage/agents", None, READ, 200),
    ("GET", "/usage/consumers", None, READ, 200),
    ("GET", "/usage/stats", None, READ, 200),
    ("GET", "/usage/sources", None, READ, 200),
    ("GET", "/usage/export?format=json", None, READ, 200),
    ("POST", "/usage/none/void", {"reason": "x"}, frozenset({"operator", "admin"}), 404),
    ("GET", "/tasks", None, READ, 200),
    ("GET", "/tasks/none", None, READ, 404),
    ("GET", "/tasks/none/receipt", None, READ, 404),
    ("GET", "/budgets", None, READ, 200),
    ("GET", "/budgets/none", None, READ, 404),
    ("POST", "/retention?dry_run=true", None, READ, 200),
    ("POST", "/backup", None, frozenset({"admin"}), 200),
    ("GET", "/prices", None, READ, 200),
    ("POST", "/prices/reprice?dry_run=true", None, frozenset({"operator", "admin"}), 200),
    ("POST", "/prices/reprice?model=none", None, frozenset({"admin"}), 200),
    ("GET", "/delegations", None, READ, 200),
    ("GET", "/delegations/none", None, READ, 404),
    ("GET", "/delegations/revocations", None, READ, 200),
    ("POST", "/delegations/revocations", {}, frozenset({"operator", "admin"}), 400),
    ("POST", "/asap/delegations", {}, frozenset({"operator", "admin"}), 422),
    ("GET", "/asap/delegations", None, READ, 200),
    ("GET", "/asap/delegations/none", None, READ, 404),
    ("DELETE", "/asap/delegations/none", None, frozenset({"operator", "admin"}), 404),
    ("POST", "/asap/usage", [], frozenset({"ingest", "admin"}), 201),
    ("POST", "/asap/usage/batch", [], frozenset({"ingest", "admin"}), 201),
    ("POST", "/asap/usage/validate", {}, frozenset({"ingest", "admin"}), 200),
    ("GET", "/asap/usage", None, READ, 200),
    ("GET", "/asap/usage/aggregate?group_by=day", None, READ, 200),
    ("GET", "/asap/usage/agents", None, READ, 200),
    ("GET", "/asap/usage/consumers", None, READ, 200),
    ("GET", "/asap/usage/summary", None, READ, 200),
    ("GET", "/asap/usage/stats", None, READ, 200),
    ("GET", "/asap/usage/export", None, READ, 200),
    ("GET", "/asap/sla", None, READ, 200),
    ("GET", "/asap/sla/history", None, READ, 200),
    ("GET", "/asap/sla/breaches", None, READ, 200),
    ("GET", "/agents", None, READ, 200),
    ("GET", f"/agents/{OTHER}", None, READ, 200),
    ("GET", f"/agents/{OTHER}/health", None, READ, 200),
    ("GET", f"/agents/{OTHER}/history", None, READ, 200),
    ("GET", f"/agents/{OTHER}/manifests", None, READ, 200),
    ("GET", f"/agents/{OTHER}/manifests/none", None, READ, 404),
    ("POST", f"/agents/{OTHER}/heartbeat", {}, frozenset({"ingest", "admin"}), 409),
    ("POST", "/agents/urn:asap:agent:none/pause", {}, frozenset({"operator", "admin"}), 404),
    ("POST", "/agents/urn:asap:agent:none/resume", {}, frozenset({"operator", "admin"}), 404),
    ("GET", f"/agents/{OTHER}/sla", None, READ, 200),
    ("GET", f"/agents/{OTHER}/sla/breaches", None, READ, 200),
    ("GET", f"/agents/{OTHER}/sla/history", None, READ, 200),
    ("GET", f"/agents/{OTHER}/sla/penalty", None, READ, 200),
    ("GET", "/sla/history", None, READ, 200),
    ("POST", "/maintenance", {}, frozenset({"operator", "admin"}), 422),
    ("GET", "/maintenance", None, READ, 200),
    ("DELETE", "/maintenance/none", None, frozenset({"operator", "admin"}), 404),
    ("GET", "/sla", None, READ, 200),
    ("GET", "/sla/breaches", None, READ, 200),
    ("GET", "/breaches/none/evidence", None, READ, 404),
    ("POST", "/breaches/none/ack", {}, frozenset({"operator", "admin"}), 404),
    ("GET", "/breaches/groups", None, READ, 200),
    ("POST", "/breaches/ack", {}, frozenset({"operator", "admin"}), 422),
    ("GET", "/silences", None, READ, 200),
    ("POST", "/silences", {}, frozenset({"operator", "admin"}), 422),
    ("DELETE", "/silences/none", None, frozenset({"operator", "admin"}), 404),
    ("GET", "/alerts/targets", None, READ, 200),
    ("GET", "/alerts/dead-letters", None, READ, 200),
    ("POST", "/alerts/dead-letters/1/redeliver", {}, frozenset({"operator", "admin"}), 404),
    ("GET", "/audit/logs", None, READ, 200),
    ("GET", "/audit/logs/1", None, READ, 200),
    ("GET", "/audit/verify", None, READ, 200),
    ("POST", "/audit/verify", {}, READ, 422),
    ("POST", "/audit/erase", {}, frozenset({"admin"}), 422),
    ("POST", "/audit/vouch", {}, frozenset({"admin"}), 422),
    ("GET", "/audit/export?format=csv", None, READ, 200),
    ("GET", "/audit/checkpoint", None, READ, 200),
    ("GET", "/audit/pack?agent=urn:asap:agent:nobody&start=2026-01-01T00:00:00Z", None, READ, 404),
    ("GET", "/audit/proof/inclusion?id=1", None, READ, 200),
    ("GET", "/audit/proof/consistency?from=1", None, READ, 200),
    ("POST", "/login", None, READ, 201),
    ("GET", "/status", None, READ, 200),
    ("GET", "/metrics", None, READ, 200),
    ("POST", "/agents", {}, frozenset({"operator", "admin"}), 422),
    ("GET", f"/agents/{OTHER}/keys", None, READ, 200),
    ("POST", f"/agents/{OTHER}/keys", {}, frozenset({"operator", "admin"}), 422),
    ("DELETE", f"/agents/{OTHER}/keys/none", None, frozenset({"operator", "admin"}), 404),
    ("DELETE", "/agents/urn:asap:agent:none", None, frozenset({"operator", "admin"}), 404),
    ("DELETE", "/delegations/none", None, frozenset({"operator", "admin"}), 404),
    ("GET", "/keys", None, frozenset({"admin"}), 200),
    ("POST", "/keys", {}, frozenset({"admin"}), 422),
    ("DELETE", "/keys/none", None, frozenset({"admin"}), 404),
    ("GET", "/config", None, READ, 200),
    ("GET", "/config/diff", None, READ, 200),
    ("GET", "/config/versions", None, READ, 200),
    ("GET", "/config/versions/1", None, frozenset({"admin"}), 200),
    ("POST", "/reload", None, frozenset({"admin"}), 200),
    ("POST", "/actors/none/restart", None, frozenset({"admin"}), 404),
]


@pytest.mark.parametrize(("method", "path", "body", "roles", "status"), ROUTES, ids=[f"{r[0]} {r[1]}" for r in ROUTES])
async def test_a_route_is_for_its_roles(
    daemon: Daemon, keys: dict[str, str], method: str, path: str, body: Any, roles: frozenset[str], status: int
) -> None:
    for role, key in keys.items():
        async with daemon.client(key) as client:
            answer = await client.request(method, path, json=body)
            if role in roles:
                assert answer.status_code == status, (role, answer.text)
            else:
                check_problem(answer, 403, "forbidden")
    for key in ("", "nonsense", "asapd_0_0", keys["admin"][:-1] + "x", f"{keys['admin']}x"):
        async with daemon.client(key) as client:
            answer = await client.request(method, path, json=body)
            check_problem(answer, 401, "unauthorized")
            assert answer.headers["www-authenticate"].startswith("Bearer")


async def test_a_parameter_that_a_route_does_not_know_is_refused(daemon: Daemon) -> None:
    """Or a typo in `dry_run` would do what it was to show."""
    # A validation always has a verdict; the checkpoints that are sent to be verified are read first.
    lenient = {("POST", "/usage/validate"), ("POST", "/asap/usage/validate"), ("POST", "/audit/verify")}
    ignored = []
    async with daemon.client() as client:
        for method, path, body, *_ in ROUTES:
            mark = "&" if "?" in path else "?"
            answer = await client.request(method, f"{path}{mark}dry_rum=true", json=body)
            refused = answer.status_code == 400 and "dry_rum" in answer.json()["detail"]
            if not refused and (method, path) not in lenient:
                ignored.append(f"{method} {path}: {answer.status_code}")
    assert ignored == []


async def test_every_route_there_is_was_tried(daemon: Daemon) -> None:
    """So that a new route gets its row above."""
    from asapd.edge.http.app import create_app

    app = create_app(_NoServices(), None)  # type: ignore[arg-type]  # only its routes are looked at
    tried = {(method, _shape(path)) for method, path, *_ in ROUTES} | {("GET", path) for path in OPEN}
    tried |= {
        ("GET", "/"),
        ("GET", "/web/*"),
        ("GET", "/ws"),
        ("GET", "/asap/ws"),
        ("GET", "/reservations/*"),
        ("POST", "/delegations"),
    }
    # They are for who has no key: tests/edge/http/test_login.py
    tried |= {("GET", "/login"), ("DELETE", "/login")}
    # Their refusals are no problem documents: tests/e2e/test_ways_in.py
    tried |= {("POST", "/v1/traces"), ("POST", "/v1/metrics")}
    # A stream does not end: tests/edge/http/test_usage_more.py, tests/edge/http/test_events.py
    tried |= {("GET", "/usage/stream"), ("GET", "/events")}
    # It takes no key, only what a log that is witnessed has signed: tests/edge/http/test_audit.py
    tried.add(("POST", "/witness/add-checkpoint"))
    # A stream does not end: tests/edge/http/test_usage_more.py
    tried.add(("GET", "/usage/stream"))
    there = {
        (method, _shape(rule.rule))
        for rule in app.url_map.iter_rules()
        for method in rule.methods or {"GET"}
        if method in {"GET", "POST", "DELETE"}
    }
    expanded = set()
    for method, path in there:
        verbs = ("settle", "extend", "refund") if path == "/reservations/*/*" else ("",)
        expanded |= {(method, path.removesuffix("/*") + f"/{verb}" if verb else path) for verb in verbs}
    assert expanded - tried == set()


class _NoServices:
    """Enough to be asked for the body limit."""

    def __getattr__(self, name: str) -> Any:
        return _NoServices()

    def __call__(self, *_: Any) -> Any:
        return _NoServices()


def _shape(path: str) -> str:
    variable = {"none", "1", OTHER, "urn:asap:agent:none"}
    parts = ["*" if part in variable or part.startswith("<") else part for part in path.partition("?")[0].split("/")]
    return "/".join(parts)


async def test_what_is_open_needs_no_key(daemon: Daemon) -> None:
    async with daemon.client("") as client:
        for path in OPEN:
            assert (await client.get(path)).status_code == 200
        check_problem(await client.get("/nowhere"), 401, "unauthorized")
    async with daemon.client() as client:
        check_problem(await client.get("/nowhere"), 404, "not_found")
        answer = await client.put("/usage")
        check_problem(answer, 405, "method_not_allowed")
        assert "POST" in answer.headers["allow"]


async def test_a_pattern_narrows_what_is_written(daemon: Daemon) -> None:
    async with daemon.client(daemon.create_key("ingest", "urn:asap:agent:mi*")) as client:
        assert (await client.post("/usage", json=event(MINE))).status_code == 201
        document = check_problem(await client.post("/usage", json=[event(MINE), event(OTHER)]), 403, "forbidden")
        assert document["errors"][0]["index"] == 1
        partly = (await client.post("/usage?partial=true", json=[event(MINE), event(OTHER)])).json()
        assert (partly["recorded"], partly["refused"]) == (1, 1)
        task = {"task_id": "t", "agent": OTHER, "consumer": DESK, "state": "started", "timestamp": time.time()}
        check_problem(await client.post("/tasks", json=task), 403, "forbidden")


async def test_a_pattern_narrows_what_is_read(daemon: Daemon) -> None:
    async with daemon.client() as client:
        for agent in (MINE, OTHER):
            assert (await client.post("/usage", json=[event(agent, project="narrow")] * 2)).status_code == 201
    async with daemon.client(daemon.create_key("reader", MINE)) as client:
        rows = (await client.get("/usage", params={"project": "narrow"})).json()["data"]
        assert {row["agent_id"] for row in rows} == {MINE}
        assert (await client.get("/usage/summary", params={"project": "narrow"})).json()["total_events"] == 2
        groups = (await client.get("/usage/aggregate", params={"group_by": "agent"})).json()["data"]
        assert {row["agent_id"] for row in groups} == {MINE}
        assert (await client.get("/usage", params={"agent": OTHER})).json()["data"] == []
        assert OTHER not in {row["id"] for row in (await client.get("/agents")).json()["data"]}
        for path in (f"/agents/{OTHER}", f"/agents/{OTHER}/sla", f"/agents/{OTHER}/health"):
            check_problem(await client.get(path), 404, "agent_not_found")
        for path in ("/audit/logs", "/audit/verify", "/status", "/metrics"):
            check_problem(await client.get(path), 403, "forbidden")
    async with daemon.client(daemon.create_key("reader", DESK)) as client:
        rows = (await client.get("/usage", params={"project": "narrow"})).json()["data"]
        assert {row["agent_id"] for row in rows} == {MINE, OTHER}  # as their consumer


async def test_a_conflict_shows_the_stored_event_only_to_whom_may_read_it(daemon: Daemon) -> None:
    first = event(MINE, id="conflict", metrics={"tokens_in": 1})
    other = {**first, "metrics": {"tokens_in": 2}}
    async with daemon.client() as client:
        assert (await client.post("/usage", json=first)).status_code == 201
        document = check_problem(await client.post("/usage", json=other), 409, "usage_conflict")
        assert document["stored"]["tokens_in"] == 1
    async with daemon.client(daemon.create_key("ingest", MINE)) as client:
        assert check_problem(await client.post("/usage", json=other), 409, "usage_conflict")["stored"] is None


async def test_a_pattern_narrows_delegations(daemon: Daemon) -> None:
    token = ROOT.grant(WORKER, usd=10)
    asked = {"token": token, "task_id": "t", "estimate": {"cost_usd": 1}}
    async with daemon.client(daemon.create_key("ingest", OTHER)) as client:
        check_problem(await client.post("/delegations/authorize", json=asked), 403, "forbidden")
        check_problem(await client.post("/delegations", json={"token": token}), 403, "forbidden")
    async with daemon.client(daemon.create_key("ingest", WORKER.urn)) as client:
        allowed = await client.post("/delegations/authorize", json=asked)
        assert allowed.status_code == 200
        reservation, delegation = allowed.json()["reservation"]["id"], allowed.json()["delegation"]
    async with daemon.client(daemon.create_key("ingest", OTHER)) as client:
        for method, path in (
            ("POST", f"/reservations/{reservation}/settle"),
            ("DELETE", f"/reservations/{reservation}"),
        ):
            check_problem(await client.request(method, path), 404, "reservation_not_found")
        check_problem(await client.get(f"/reservations/{reservation}"), 404, "reservation_not_found")
    async with daemon.client(daemon.create_key("operator", WORKER.urn)) as client:
        check_problem(await client.delete(f"/delegations/{delegation}"), 403, "forbidden")
    async with daemon.client(daemon.create_key("operator", OTHER)) as client:
        check_problem(await client.get(f"/delegations/{delegation}"), 404, "delegation_not_found")
        check_problem(await client.delete(f"/delegations/{delegation}"), 404, "delegation_not_found")
    async with daemon.client(daemon.create_key("operator", ROOT.urn)) as client:
        assert (await client.delete(f"/delegations/{delegation}")).status_code == 200


async def test_tenants_do_not_see_each_other(daemon: Daemon) -> None:
    red, blue = (
        {role: daemon.create_key(role, tenant=tenant) for role in ("ingest", "reader", "operator")}
        for tenant in ("red", "blue")
    )
    same = event("urn:asap:agent:shared", id="same-id", timestamp=1_800_000_000 if time.time() < 0 else time.time())
    for keys, tokens in ((red, 1), (blue, 2)):
        async with daemon.client(keys["ingest"]) as client:
            answer = await client.post("/usage", json={**same, "metrics": {"tokens_in": tokens}})
            assert answer.json()["recorded"] == 1
    for keys, tokens in ((red, 1), (blue, 2)):
        async with daemon.client(keys["reader"]) as client:
            assert (await client.get("/usage/summary")).json()["total_tokens"] == tokens
            assert len((await client.get("/usage")).json()["data"]) == 1
            check_problem(await client.get("/audit/logs"), 403, "forbidden")
    added = {"id": "urn:asap:agent:red-one", "url": "http://127.0.0.1:9"}
    async with daemon.client(red["operator"]) as client:
        assert (await client.post("/agents", json=added)).json()["tenant"] == "red"
        assert [row["id"] for row in (await client.get("/agents")).json()["data"]] == [added["id"]]
    async with daemon.client(blue["operator"]) as client:
        assert (await client.get("/agents")).json()["data"] == []
        check_problem(await client.get(f"/agents/{added['id']}"), 404, "agent_not_found")
        taken = await client.post("/agents", json={**added, "url": "http://127.0.0.1:10"})
        assert taken.status_code in {403, 404, 409}, taken.text
        removed = await client.delete(f"/agents/{added['id']}")
        check_problem(removed, 404, "agent_not_found")
    async with daemon.client(red["operator"]) as client:
        assert (await client.get(f"/agents/{added['id']}")).json()["url"] == added["url"]


async def test_a_revoked_key_is_refused_at_once(daemon: Daemon) -> None:
    key = daemon.create_key("reader")
    async with daemon.client(key) as client, daemon.client() as admin:
        assert (await client.get("/usage")).status_code == 200
        assert (await admin.delete(f"/keys/{key.split('_')[1]}")).status_code == 200
        check_problem(await client.get("/usage"), 401, "unauthorized")
        shown = {row["id"]: row for row in (await admin.get("/keys")).json()["data"]}[key.split("_")[1]]
        assert shown["revoked_at"] is not None
        assert key.rpartition("_")[2] not in str(shown)
        entries = (await admin.get("/audit/logs", params={"subject": key.split("_")[1]})).json()["data"]
        assert [entry["event_type"] for entry in entries] == ["key.created", "key.revoked"]


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8727", "localhost.evil.example"])
async def test_a_foreign_host_name_is_refused(daemon: Daemon, host: str) -> None:
    async with daemon.client() as client:
        check_problem(await client.get("/usage", headers={"Host": host}), 403, "host_not_allowed")
        check_problem(await client.get("/healthz", headers={"Host": host}), 403, "host_not_allowed")


async def upgrade(daemon: Daemon, *headers: str) -> tuple[int, bytes]:
    """Ask for a WebSocket; the status, and the head of the answer."""
    lines = [
        "GET /ws HTTP/1.1",
        f"Host: 127.0.0.1:{daemon.port}",
        "Connection: Upgrade",
        "Upgrade: websocket",
        "Sec-WebSocket-Version: 13",
        "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==",
        *headers,
    ]
    return await daemon.raw("\r\n".join(lines).encode() + b"\r\n\r\n", until=b"\r\n\r\n")


async def test_a_foreign_origin_is_refused_and_our_own_is_not(daemon: Daemon) -> None:
    async with daemon.client() as client:
        for origin in ("https://evil.example", "null", f"https://127.0.0.1:{daemon.port + 1}"):
            check_problem(await client.get("/usage", headers={"Origin": origin}), 403, "host_not_allowed")
        assert (await client.get("/usage", headers={"Origin": daemon.url})).status_code == 200
    assert (await upgrade(daemon, f"Authorization: Bearer {daemon.admin_key}", "Origin: https://evil.example"))[
        0
    ] == 403
    assert (await upgrade(daemon, f"Authorization: Bearer {daemon.admin_key}", f"Origin: {daemon.url}"))[0] == 101


@pytest.mark.parametrize("key", ["", "wrong", "ingest"])
async def test_a_websocket_needs_a_key_that_reads(daemon: Daemon, keys: dict[str, str], key: str) -> None:
    headers = [f"Authorization: Bearer {keys.get(key, key)}"] if key else []
    status, received = await upgrade(daemon, *headers)
    assert status == (403 if key == "ingest" else 401)
    assert b"content-type: application/problem+json" in received.lower()


async def test_without_auth_everybody_on_loopback_is_admin() -> None:
    with running(QUICK.replace("[prober]", 'auth = "none"\n[prober]')) as daemon:
        async with daemon.client("") as client:
            assert (await client.get("/keys")).status_code == 200
            assert (await client.post("/usage", json=event())).status_code == 201
            check_problem(await client.get("/usage", headers={"Host": "evil.example"}), 403, "host_not_allowed")


async def test_the_admin_socket_knows_who_calls(daemon: Daemon) -> None:
    made = daemon.admin_request("POST", "/keys", json={"name": "who", "role": "reader"})
    assert made.status_code == 201
    async with daemon.client() as client:

        async def entries() -> list[Any]:
            found = await client.get("/audit/logs", params={"subject": made.json()["id"]})
            return list(found.json()["data"])

        (entry,) = await until(entries)
        assert entry["actor"] == f"uid:{os.getuid()} pid:{os.getpid()}"


async def test_names_of_keys_are_taken_once_and_patterns_are_checked(daemon: Daemon) -> None:
    async with daemon.client() as client:
        body = {"name": "unique", "role": "reader"}
        assert (await client.post("/keys", json=body)).status_code == 201
        check_problem(await client.post("/keys", json=body), 409, "key_name_taken")
        wrong: list[dict[str, Any]] = [
            {"role": "king"},
            {"agents": ["*a*"]},
            {"agents": []},
            {"agents": ["x" * 300]},
            {"name": ""},
            {"name": "a\nb"},
            {"name": "\x1b[2J"},
            {"x": 1},
        ]
        for bad in wrong:
            check_problem(await client.post("/keys", json={"name": "n", "role": "reader", **bad}), 422, "invalid")
