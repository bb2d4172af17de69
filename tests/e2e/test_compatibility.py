"""`/asap/...` as clients of the reference implementation use it: its requests, its members, its statuses."""

from __future__ import annotations

import csv
import io
import itertools
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import pytest
from nacl.signing import SigningKey

from asapd.cli.conformance_visit import Expectations, visit
from asapd.wire.keys import load_private_pem, private_pem
from tests.e2e.daemon import QUICK, Daemon

PEER, TAKER, DESK = "urn:asap:agent:peer-a", "urn:asap:agent:peer-b", "urn:asap:agent:c1"
_numbers = itertools.count(1)


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    daemon = Daemon(QUICK + f'[[agents]]\nid = "{TAKER}"\nurl = "http://127.0.0.1:9"\n')
    keys = daemon.state_dir / "keys"
    keys.mkdir(parents=True, mode=0o700)
    daemon.state_dir.chmod(0o700)
    for name in ("peer-a", "keyed"):
        (keys / f"{name}.pem").write_bytes(private_pem(SigningKey.generate()))
        (keys / f"{name}.pem").chmod(0o600)
    try:
        yield daemon.start()
        daemon.stop()
    finally:
        daemon.close()


@pytest.fixture(scope="module")
def key(daemon: Daemon) -> str:
    """The key of one agent, which may sign for it: what stands for its OAuth2 token."""
    return daemon.create_key("operator", PEER, sign=True)


def wanted(**more: Any) -> dict[str, Any]:
    return {
        "delegate": TAKER,
        "scopes": ["task.execute", "data.read"],
        "max_tasks": 5,
        "expires_in_seconds": 3600,
        **more,
    }


# --- delegations


async def test_a_visit_finds_nothing_amiss_about_them(daemon: Daemon, key: str) -> None:
    signs = load_private_pem((daemon.state_dir / "keys" / "peer-a.pem").read_bytes())
    expected = Expectations(bearer=key, delegator=PEER, delegator_key=bytes(signs.verify_key))
    report = await visit(daemon.url, expected, timeout_s=10)
    assert report.conforms, report.findings
    checks = ("health", "manifest", "identity", "ttl", "delegation", "issuing", "token", "revocation")
    assert {check: report.checks[check] for check in checks} == dict.fromkeys(checks, "passed")


async def test_a_delegation_lives_as_it_does_there(daemon: Daemon, key: str) -> None:
    async with daemon.client(key) as client:
        made = await client.post("/asap/delegations", json=wanted())
        assert made.status_code == 201
        assert made.headers["content-type"] == "application/json"
        assert list(made.json()) == ["token"]
        checked = (await client.post("/delegations/validate", json=made.json())).json()
        assert (checked["valid"], checked["delegator"], checked["delegate"]) == (True, PEER, TAKER)
        assert checked["scopes"] == ["task.execute", "data.read"]
        (claims,) = checked["chain"]
        assert claims["max_tasks"] == 5
        left_s = (datetime.fromisoformat(claims["expires_at"]) - datetime.now(UTC)).total_seconds()
        assert 3590 < left_s <= 3600
        delegation = claims["id"]

        shown = await client.get(f"/asap/delegations/{delegation}")
        assert shown.status_code == 200
        detail = shown.json()
        assert list(detail) == ["id", "delegator", "delegate", "created_at", "active", "revoked_at"]
        assert (detail["id"], detail["active"], detail["revoked_at"]) == (delegation, True, None)
        assert datetime.fromisoformat(detail["created_at"]).tzinfo is not None

        later = (await client.post("/asap/delegations", json=wanted(delegate=DESK))).json()
        assert later["token"] != made.json()["token"]
        listed = (await client.get("/asap/delegations")).json()
        assert isinstance(listed, list)
        assert list(listed[0]) == ["id", "delegator", "delegate", "created_at", "active"]
        assert [(one["delegate"], one["active"]) for one in listed[:2]] == [(DESK, True), (TAKER, True)]
        assert listed[1]["id"] == delegation

        gone = await client.delete(f"/asap/delegations/{delegation}")
        assert (gone.status_code, gone.content, "content-length" in gone.headers) == (204, b"", False)
        assert (await client.delete(f"/asap/delegations/{delegation}")).status_code == 204
        after = (await client.get(f"/asap/delegations/{delegation}")).json()
        assert after["active"] is False
        assert datetime.fromisoformat(after["revoked_at"]) > datetime.fromisoformat(after["created_at"])
        assert delegation not in {one["id"] for one in (await client.get("/asap/delegations")).json()}
        everything = (await client.get("/asap/delegations", params={"active": "false"})).json()
        assert [one["active"] for one in everything if one["id"] == delegation] == [False]


async def test_without_a_time_a_delegation_lasts_a_day_and_what_is_ours_is_taken_too(daemon: Daemon, key: str) -> None:
    async with daemon.client(key) as client:
        asked = {"delegate": TAKER, "scopes": ["*"], "max_cost_usd": "1.5", "expires_in_seconds": None}
        token = (await client.post("/asap/delegations", json=asked)).json()["token"]
        (claims,) = (await client.post("/delegations/validate", json={"token": token})).json()["chain"]
        left_s = (datetime.fromisoformat(claims["expires_at"]) - datetime.now(UTC)).total_seconds()
        assert 86_390 < left_s <= 86_400
        assert (claims["max_cost_usd"], claims["max_tasks"]) == (1.5, None)


async def test_refusals_have_the_form_they_have_there(daemon: Daemon, key: str) -> None:
    async with daemon.client(key) as client:
        unknown = await client.get("/asap/delegations/del_x")
        assert (unknown.status_code, unknown.json()) == (404, {"detail": "Delegation token not found"})
        unknown = await client.delete("/asap/delegations/del_x")
        assert unknown.status_code == 404
        assert unknown.json() == {"detail": "Delegation token not found or not issued via this server"}
        faults = [
            ({}, [("missing", "delegate"), ("missing", "scopes")]),
            (wanted(scopes=[]), [("list_type", "scopes")]),
            (wanted(expires_in_seconds=0), [("int_type", "expires_in_seconds")]),
            (wanted(expires_in_seconds=365 * 86_400 + 1), [("int_type", "expires_in_seconds")]),
            (wanted(max_tasks=-1), [("int_type", "max_tasks")]),
            (wanted(max_task=1), [("extra_forbidden", "max_task")]),
            (wanted(max_cost_usd="much"), [("value_error", "max_cost_usd")]),
        ]
        for body, expected in faults:
            answer = await client.post("/asap/delegations", json=body)
            assert answer.status_code == 422, body
            assert [(one["type"], one["loc"][-1]) for one in answer.json()["detail"]] == expected
        broken = await client.post("/asap/delegations", content=b"{")
        assert (broken.status_code, broken.json()["detail"][0]["type"]) == (422, "json_invalid")
        odd = await client.post("/asap/delegations", json=wanted(scopes=["a b"]))
        assert (odd.status_code, type(odd.json()["detail"])) == (422, str)
    async with daemon.client(daemon.create_key("operator", "urn:asap:agent:no-key", sign=True)) as client:
        answer = await client.post("/asap/delegations", json=wanted())
        assert answer.status_code == 503
        assert answer.json()["detail"].startswith("Delegation key not configured for this agent")
    async with daemon.client(daemon.create_key("operator", PEER)) as client:
        answer = await client.post("/asap/delegations", json=wanted())
        assert (answer.status_code, list(answer.json())) == (403, ["detail"])
    async with daemon.client("") as client:
        answer = await client.get("/asap/delegations")
        assert answer.status_code == 401
        assert isinstance(answer.json()["detail"], str)


async def test_only_the_delegator_revokes_and_strangers_learn_nothing(daemon: Daemon, key: str) -> None:
    async with daemon.client(key) as client:
        token = (await client.post("/asap/delegations", json=wanted())).json()["token"]
        delegation = (await client.post("/delegations/validate", json={"token": token})).json()["chain"][0]["id"]
    async with daemon.client(daemon.create_key("operator", TAKER)) as client:
        assert (await client.get(f"/asap/delegations/{delegation}")).status_code == 200
        answer = await client.delete(f"/asap/delegations/{delegation}")
        assert answer.status_code == 403
        assert answer.json() == {"detail": "Only the delegator that issued this token can revoke it"}
        assert (await client.get("/asap/delegations")).json() == []
    async with daemon.client(daemon.create_key("operator", DESK)) as client:
        assert (await client.get(f"/asap/delegations/{delegation}")).status_code == 404
        assert (await client.delete(f"/asap/delegations/{delegation}")).status_code == 404


async def test_a_key_of_many_agents_has_to_say_for_which_it_issues(daemon: Daemon) -> None:
    async with daemon.client() as client:
        answer = await client.post("/asap/delegations", json=wanted())
        assert (answer.status_code, answer.json()["detail"][0]["loc"]) == (422, ["body", "delegator"])
        assert (await client.post("/asap/delegations", json=wanted(delegator=PEER))).status_code == 201


async def test_a_request_that_is_sent_again_issues_once(daemon: Daemon, key: str) -> None:
    async with daemon.client(key) as client:
        headers = {"Idempotency-Key": "once"}
        answers = [await client.post("/asap/delegations", json=wanted(), headers=headers) for _ in range(2)]
        assert answers[0].json() == answers[1].json()


# --- usage and service levels


def flat(**more: Any) -> dict[str, Any]:
    return {
        "task_id": f"task_{next(_numbers)}",
        "agent_id": TAKER,
        "consumer_id": DESK,
        "tokens_in": 100,
        "tokens_out": 50,
        "duration_ms": 600,
        "api_calls": 2,
        "timestamp": datetime.now(UTC).isoformat(),
        **more,
    }


EVENT = ["task_id", "agent_id", "consumer_id", "tokens_in", "tokens_out", "duration_ms", "api_calls", "timestamp"]
SUMS = ["total_tokens", "total_duration_ms", "total_tasks", "total_api_calls"]


async def test_usage_is_reported_and_read_in_those_shapes(daemon: Daemon) -> None:
    one, two, three = flat(), flat(), flat(consumer_id="urn:asap:agent:c2")
    async with daemon.client() as client:
        posted = await client.post("/asap/usage", json=one)
        assert (posted.status_code, posted.json()) == (201, {"status": "recorded", "task_id": one["task_id"]})
        posted = await client.post("/asap/usage/batch", json={"events": [two, three]})
        tasks = [two["task_id"], three["task_id"]]
        assert (posted.status_code, posted.json()) == (201, {"status": "recorded", "count": 2, "task_ids": tasks})
        negative = await client.post("/asap/usage", json=flat(tokens_in=-1))
        assert (negative.status_code, list(negative.json())) == (400, ["detail"])
        assert "tokens_in" in negative.json()["detail"]
        valid = (await client.post("/asap/usage/validate", json=one)).json()
        assert valid == {"valid": True, "task_id": one["task_id"], "agent_id": TAKER, "consumer_id": DESK}
        assert list((await client.post("/asap/usage/validate", json={"x": 1})).json()) == ["valid", "error"]

        listed = (await client.get("/asap/usage")).json()
        assert list(listed) == ["data", "count"]
        assert listed["count"] == 3
        assert all(list(row) == EVENT for row in listed["data"])
        assert [row["task_id"] for row in listed["data"]] == [one["task_id"], *tasks]
        paged = (await client.get("/asap/usage", params={"limit": 1, "offset": 1})).json()
        assert [row["task_id"] for row in paged["data"]] == tasks[:1]

        shapes = {
            "agent": ["agent_id", "period", *SUMS, "avg_tokens_per_task", "avg_duration_ms_per_task"],
            "consumer": ["consumer_id", "period", *SUMS, "avg_tokens_per_task"],
            "day": ["period", *SUMS, "unique_agents", "unique_consumers"],
            "week": ["period", *SUMS, "unique_agents", "unique_consumers"],
        }
        for group, members in shapes.items():
            answer = (await client.get("/asap/usage/aggregate", params={"group_by": group})).json()
            assert list(answer) == ["group_by", "data"]
            assert all(list(row) == members for row in answer["data"])
            assert sum(row["total_tokens"] for row in answer["data"]) == 450
        bad = await client.get("/asap/usage/aggregate", params={"group_by": "model"})
        assert bad.status_code == 400
        assert bad.json() == {"detail": "group_by must be one of: agent, consumer, day, week"}
        (agent,) = (await client.get("/asap/usage/agents")).json()["data"]
        assert (agent["agent_id"], agent["period"], agent["avg_tokens_per_task"]) == (TAKER, "all", 150.0)
        assert len((await client.get("/asap/usage/consumers")).json()["data"]) == 2
        summary = (await client.get("/asap/usage/summary")).json()
        assert summary == {
            "total_tasks": 3,
            "total_tokens": 450,
            "total_duration_ms": 1800,
            "unique_agents": 1,
            "unique_consumers": 2,
            "total_api_calls": 6,
        }
        stats = (await client.get("/asap/usage/stats")).json()
        assert list(stats) == ["total_events", "oldest_timestamp", "retention_ttl_seconds"]

        exported = await client.get("/asap/usage/export", params={"export_format": "csv", "limit": 2})
        assert exported.headers["content-disposition"] == "attachment; filename=usage_export.csv"
        rows = list(csv.DictReader(io.StringIO(exported.text)))
        assert [list(row) for row in rows] == [EVENT, EVENT]
        assert rows[0]["timestamp"].endswith("+00:00")
        exported = await client.get("/asap/usage/export")
        assert [list(row) for row in exported.json()["data"]] == [EVENT] * 3
        # What was voided does not come with negative counts.
        event = (await client.get("/usage", params={"task": one["task_id"]})).json()["data"][0]["id"]
        assert (await client.post(f"/usage/{event}/void", json={"reason": "wrong"})).status_code == 201
        assert (await client.get("/asap/usage")).json()["count"] == 2
        assert len((await client.get("/asap/usage/export")).json()["data"]) == 2


async def test_service_levels_are_read_in_those_shapes(daemon: Daemon) -> None:
    async with daemon.client() as client:
        answer = (await client.get("/asap/sla")).json()
        assert list(answer) == ["data", "window", "period_start", "period_end"]
        assert answer["window"] == "24h"
        (row,) = answer["data"]
        assert list(row) == ["agent_id", "metrics", "compliance_percent"]
        assert list(row["metrics"]) == [
            "agent_id",
            "period_start",
            "period_end",
            "uptime_percent",
            "latency_p95_ms",
            "error_rate_percent",
            "tasks_completed",
            "tasks_failed",
        ]
        breaches = (await client.get("/asap/sla/breaches")).json()
        assert breaches == {"data": [], "count": 0}
