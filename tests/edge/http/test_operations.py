"""Routes about the daemon itself, the audit log and administration."""

from __future__ import annotations

from typing import Any

import pytest

from asapd.core.errors import Refusal
from asapd.store.units.house import Note
from tests.edge.house import ME, T0, A, Edge

ADMIN_DOOR = {"door": "admin", "peer": ME}


async def note(edge: Edge, number: int, **details: Any) -> None:
    unit = Note("config.reloaded", "uid:0", f"s{number}", details, T0 + number * 1_000_000)
    assert not isinstance(await edge.database.submit(unit), Refusal)


# --- what is open


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/.well-known/asap/health", "/.well-known/asap/manifest.json"])
async def test_health_and_manifest_answer_without_a_key(edge: Edge, path: str) -> None:
    assert (await edge.get(path, key=None)).ok()


async def test_not_ready_is_503(edge: Edge) -> None:
    edge.ready = False
    assert (await edge.get("/readyz", key=None)).ok(503) == {"ready": False}
    assert (await edge.get("/healthz", key=None)).ok()["status"] == "ok"


async def test_the_page_is_served_with_a_strict_policy(edge: Edge) -> None:
    page = await edge.get("/", key=None)
    assert page.status == 200
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert (await edge.get("/web/style.css", key=None)).headers["content-type"] == "text/css; charset=utf-8"


@pytest.mark.parametrize("name", ["none.js", "..%2Fapp.py", "%2e%2e/reporting.py", "style.txt", "app"])
async def test_nothing_else_is_served_from_the_pages_directory(edge: Edge, name: str) -> None:
    assert (await edge.get(f"/web/{name}", key=None)).refused(404)["code"] == "not_found"


# --- status and metrics


async def test_status_and_metrics_are_for_who_sees_everything(edge: Edge) -> None:
    assert (await edge.get("/status", key="reader")).ok() == {"ready": True}
    metrics = await edge.get("/metrics", key="reader")
    assert metrics.headers["content-type"].startswith("application/openmetrics-text")
    assert metrics.body.endswith(b"# EOF\n")
    await edge.new_key("narrow", "admin", A)
    await edge.new_key("tenant", "admin", tenant="x")
    for path in ("/status", "/metrics", "/audit/logs", "/audit/verify", "/keys"):
        for key in ("ingest", "narrow", "tenant"):
            assert (await edge.get(path, key=key)).refused(403)["code"] == "forbidden"


# --- audit


async def test_the_log_is_filtered_and_paged_either_way(edge: Edge) -> None:
    _, start = await edge.services.reads.audit.head(), (await edge.get("/audit/logs")).ok()["count"]
    for number in range(3):
        await note(edge, number, task_id=f"t{number}", agent=A)

    async def subjects(query: str) -> list[str]:
        return [row["subject"] for row in (await edge.get(f"/audit/logs?{query}")).ok()["data"]]

    assert await subjects("actor=uid:0") == ["s0", "s1", "s2"]
    assert await subjects("actor=uid:0&order=desc") == ["s2", "s1", "s0"]
    assert await subjects("subject=s1") == ["s1"]
    assert await subjects("task=t2") == ["s2"]
    assert await subjects(f"agent_id={A}&event_type=config.reloaded") == ["s0", "s1", "s2"]
    assert await subjects("event_type=config.reloaded&end=2027-01-15T08:00:01Z") == ["s0"]
    first = (await edge.get("/audit/logs?order=desc&limit=2")).ok()
    rest = (await edge.get(f"/audit/logs?order=desc&limit=2&cursor={first['next_cursor']}")).ok()
    assert [row["subject"] for row in first["data"] + rest["data"]][:3] == ["s2", "s1", "s0"]
    one = (await edge.get(f"/audit/logs/{first['data'][0]['id']}")).ok()
    assert one == first["data"][0] == (await edge.get(f"/audit/logs/{start + 3}")).ok()
    assert (await edge.get("/audit/logs/aud_none")).refused(404)["code"] == "entry_not_found"


async def test_verify_names_the_first_bad_entry(edge: Edge) -> None:
    for number in range(3):
        await note(edge, number)
    good = (await edge.get("/audit/verify")).ok()
    assert (good["valid"], good["first_bad"]) == (True, None)
    assert good["verified"] == good["last_seq"]
    for (trigger,) in list(edge.connection.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'")):
        edge.connection.execute(f"DROP TRIGGER {trigger}")
    edge.connection.execute("UPDATE audit SET actor = 'x' WHERE seq = ?", (good["last_seq"] - 1,))
    bad = (await edge.get("/audit/verify")).ok()
    assert (bad["valid"], bad["first_bad"]["seq"]) == (False, good["last_seq"] - 1)


# --- administration


async def test_a_key_is_made_used_listed_and_revoked(edge: Edge) -> None:
    made = (await edge.post("/keys", {"name": "n", "role": "reader", "agents": [A]})).ok(201)
    assert (await edge.get("/usage", key=made["key"])).status == 200
    listed = (await edge.get("/keys")).ok()
    row = next(row for row in listed["data"] if row["id"] == made["id"])
    assert (row["name"], row["agents"], row["revoked_at"], row["sign"]) == ("n", [A], None, False)
    assert made["key"] not in str(listed)
    assert (await edge.delete(f"/keys/{made['id']}")).ok() == {"id": made["id"], "name": "n", "revoked": True}
    assert (await edge.get("/usage", key=made["key"])).refused(401)["code"] == "unauthorized"
    row = next(row for row in (await edge.get("/keys")).ok()["data"] if row["id"] == made["id"])
    assert row["revoked_at"] == "2027-01-15T08:00:00.000000Z"
    assert (await edge.delete("/keys/none")).refused(404)["code"] == "key_not_found"


async def test_a_reader_of_what_is_no_agent_is_told_so(edge: Edge) -> None:
    for name, agents, noted in (("a", [A, "urn:asap:*", "*"], []), ("b", ["customer", A], ["customer"])):
        made = (await edge.post("/keys", {"name": name, "role": "reader", "agents": agents})).ok(201)
        assert [note.split()[0] for note in made["notes"]] == noted


async def test_a_key_is_made_once_under_an_idempotency_key(edge: Edge) -> None:
    body, once = {"name": "n", "role": "reader", "agents": [A]}, {"Idempotency-Key": "once"}
    made = (await edge.post("/keys", body, headers=once)).ok(201)
    assert (await edge.post("/keys", body, headers=once)).ok(201) == made
    assert [row["name"] for row in (await edge.get("/keys")).ok()["data"]].count("n") == 1
    other = (await edge.post("/keys", {**body, "name": "m"}, headers=once)).refused(422)
    assert other["code"] == "idempotency_key_reused"
    assert (await edge.post("/keys", body, headers={"Idempotency-Key": ""})).refused(422)["code"] == "invalid"
    (await edge.delete("/keys/n")).ok()
    dead = (await edge.post("/keys", body, headers=once)).refused(409)
    assert (dead["code"], made["id"] in dead["detail"]) == ("key_revoked", True)


async def test_keys_are_listed_in_pages(edge: Edge) -> None:
    for number in range(3):
        await edge.new_key(f"n{number}", "reader")
    whole = [row["name"] for row in (await edge.get("/keys")).ok()["data"]]
    first = (await edge.get("/keys?limit=4")).ok()
    rest = (await edge.get(f"/keys?limit=4&cursor={first['next_cursor']}")).ok()
    assert [row["name"] for row in first["data"] + rest["data"]] == whole
    assert (first["count"], rest["next_cursor"]) == (4, None)
    for query in ("limit=0", "limit=1001", "cursor=x", "name=n"):
        problem = (await edge.get(f"/keys?{query}")).refused(400)
        assert problem["errors"][0]["field"] == query.partition("=")[0]


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({"name": "n", "role": "king"}, 422, "invalid"),
        ({"name": "", "role": "reader"}, 422, "invalid"),
        ({"name": "n", "role": "reader", "agents": []}, 422, "invalid"),
        ({"name": "n", "role": "reader", "agents": ["a*b"]}, 422, "invalid"),
        ({"name": "n", "role": "ingest", "agents": [A, "agent-b"]}, 422, "invalid"),
        ({"name": "n", "role": "ingest", "agents": ["urn:asap:agent:*", "urn:asap:agnet:*"]}, 422, "invalid"),
        ({"name": "admin", "role": "reader"}, 409, "key_name_taken"),
        (b"", 400, "malformed"),
    ],
)
async def test_a_key_that_cannot_be_is_refused(edge: Edge, body: Any, status: int, code: str) -> None:
    problem = (await edge.post("/keys", body)).refused(status)
    assert problem["code"] == code
    assert all(error["reason"] in problem["detail"] for error in problem.get("errors", [])[:1])


@pytest.mark.parametrize("role", ["ingest", "reader", "operator"])
async def test_administration_is_for_admins(edge: Edge, role: str) -> None:
    assert (await edge.post("/keys", {"name": "n", "role": "reader"}, key=role)).refused(403)
    assert (await edge.delete("/keys/x", key=role)).refused(403)
    assert (await edge.post("/reload", key=role)).refused(403)
    assert (await edge.post("/actors/meter/restart", key=role)).refused(403)
    assert edge.calls == []


@pytest.mark.parametrize(
    ("agents", "tenant", "reasons"),
    [((), "acme", ["tenant is acme"]), ((A,), None, ["patterns"]), ((A,), "acme", ["tenant is acme", "patterns"])],
)
async def test_an_admin_key_that_is_narrowed_does_not_act_on_the_whole_host(
    edge: Edge, agents: tuple[str, ...], tenant: str | None, reasons: list[str]
) -> None:
    await edge.new_key("narrow", "admin", *agents, tenant=tenant)
    for path in ("/reload", "/actors/meter/restart", "/retention", "/keys"):
        detail = (await edge.post(path, key="narrow")).refused(403)["detail"]
        assert [word for word in ("tenant is acme", "patterns") if word in detail] == reasons
    assert edge.calls == []


async def test_reload_and_restart_are_handed_on_with_who_asked(edge: Edge) -> None:
    assert (await edge.post("/reload", door=ADMIN_DOOR, key=None)).ok() == {"state": "ok"}
    assert (await edge.post("/actors/meter/restart", door=ADMIN_DOOR, key=None)).ok(202) == {"restarted": "meter"}
    assert (await edge.post("/actors/chef/restart")).refused(404)["code"] == "actor_not_found"
    who = f"uid:{ME.uid} pid:{ME.pid}"
    assert edge.calls[:2] == [("reload", who), ("restart", "meter", who)]
    edge.reload_outcome = Refusal("config_refused", "nothing was changed", extra={"problems": ["x:1: y: z"]})
    assert (await edge.post("/reload")).refused(422)["problems"] == ["x:1: y: z"]
