"""`/asap/...`: members and statuses of the reference implementation, from the same figures."""

from __future__ import annotations

import pytest

from asapd.actors.messages import ReconfigureMeter
from asapd.core.price_table import parse_price_table
from asapd.runtime.ask import ask
from tests.edge.house import NOW, A, B, C, Edge

BREACH = ["id", "agent_id", "breach_type", "threshold", "actual", "severity", "detected_at", "resolved_at"]


async def test_breaches_have_the_members_of_the_reference(edge: Edge) -> None:
    await edge.breach(number=1)
    await edge.breach(number=2, agent=B, severity="critical")
    answer = (await edge.get("/asap/sla/breaches")).ok()
    assert answer["count"] == 2
    assert all(list(row) == BREACH for row in answer["data"])
    (only,) = (await edge.get(f"/asap/sla/breaches?agent_id={B}&severity=critical")).ok()["data"]
    assert (only["threshold"], only["actual"], only["resolved_at"]) == ("500ms", "900ms", None)
    assert (await edge.get("/asap/sla/breaches?agent_id=none")).ok() == {"data": [], "count": 0}
    assert (await edge.get("/asap/sla/breaches?severity=bad")).refused(400)["code"] == "bad_parameter"


async def test_pages_of_breaches_become_one(edge: Edge, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("asapd.edge.http.asap_usage.MAX_LIMIT", 2)
    for number in range(5):
        await edge.breach(number=number, agent=f"{A}{number}")
    assert (await edge.get("/asap/sla/breaches")).ok()["count"] == 5


async def test_a_key_of_one_agent_issues_for_it(edge: Edge) -> None:
    await edge.new_key("own", "operator", A, sign=True)
    wanted = {"delegate": B, "scopes": ["task.execute", "task.execute"], "max_tasks": 1}
    token = (await edge.post("/asap/delegations", wanted, key="own")).ok(201)["token"]
    (row,) = (await edge.get("/asap/delegations", key="own")).ok()
    assert (row["delegator"], row["delegate"], row["active"]) == (A, B, True)
    narrower = {"delegate": C, "scopes": ["task.other"], "parent": token}
    answer = await edge.post("/asap/delegations", narrower, key="own")
    assert (answer.status, list(answer.json)) == (422, ["detail"])
    foreign = await edge.post("/asap/delegations", {**wanted, "delegator": B}, key="own")
    assert foreign.status == 403
    gone = await edge.delete(f"/asap/delegations/{row['id']}", key="own")
    assert (gone.status, gone.body) == (204, b"")


@pytest.mark.parametrize(
    "body", [[], {"delegate": 1, "scopes": "x"}, {"delegate": B, "scopes": [1], "parent": 1, "max_cost_usd": True}]
)
async def test_a_body_that_is_wrong_names_every_fault(edge: Edge, body: object) -> None:
    answer = await edge.post("/asap/delegations", body)
    assert answer.status == 422
    assert all({"type", "loc", "msg", "input"} <= set(fault) for fault in answer.json["detail"])


@pytest.mark.parametrize("party", ["delegator", "delegate"])
@pytest.mark.parametrize("name", ["root", "urn:asap:agent:" + "x" * 70_000])
async def test_a_party_that_is_no_urn_is_named_and_not_echoed_whole(edge: Edge, party: str, name: str) -> None:
    answer = await edge.post("/asap/delegations", {"delegate": B, "scopes": ["task.*"], party: name})
    assert answer.status == 422
    (fault,) = answer.json["detail"]
    assert (fault["loc"], fault["input"]) == (["body", party], name[:256])
    assert len(answer.body) < 1_000


async def test_one_event_and_several_answer_as_they_do_there(edge: Edge) -> None:
    event = {"task_id": "t", "agent_id": A, "consumer_id": B, "timestamp": NOW}
    assert (await edge.post("/asap/usage", event)).ok(201) == {"status": "recorded", "task_id": "t"}
    several = {"status": "recorded", "count": 1, "task_ids": ["t"]}
    assert (await edge.post("/asap/usage", [event])).ok(201) == several
    assert (await edge.post("/asap/usage/batch", event)).ok(201) == several
    assert (await edge.post("/asap/usage/batch", b"{")).status == 400
    assert (await edge.post("/asap/usage/validate", [event])).ok() == {"valid": True}
    conflict = {**event, "id": "same"}
    assert (await edge.post("/asap/usage", conflict)).status == 201
    answer = await edge.post("/asap/usage", {**conflict, "tokens_in": 1})
    assert (answer.status, list(answer.json)) == (409, ["detail"])


async def test_an_export_of_several_pages_is_one_document(edge: Edge, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("asapd.edge.http.asap_usage.PAGE", 2)
    events = [{"task_id": f"t{n}", "agent": A, "consumer": "=1+1", "timestamp": NOW} for n in range(5)]
    assert (await edge.post("/usage", events)).ok(201)
    rows = (await edge.get("/asap/usage/export")).ok()["data"]
    assert [row["task_id"] for row in rows] == [f"t{n}" for n in range(5)]
    for limit in (1, 2, 3, 4):
        answer = await edge.get(f"/asap/usage/export?export_format=csv&limit={limit}")
        lines = answer.body.decode().split("\r\n")
        assert len(lines) == limit + 2
        assert lines[1] == f"t0,{A},'=1+1,0,0,0,0,2027-01-15T08:00:00.000000+00:00"
    nothing = await edge.get("/asap/usage/export?agent_id=none")
    assert nothing.ok() == {"data": []}


async def test_only_events_that_count_are_rows_and_fill_pages(edge: Edge, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("asapd.edge.http.asap_usage.PAGE", 2)
    events = [
        {"id": f"e{n}", "task_id": f"t{n}", "agent": A, "consumer": B, "timestamp": NOW, "tokens_in": 1, "model": "m"}
        for n in range(6)
    ]
    assert (await edge.post("/usage", events)).ok(201)
    for n in (0, 3):
        assert (await edge.post(f"/usage/e{n}/void", {"reason": "wrong"})).ok(201)
    prices = parse_price_table('[[price]]\nmodel = "m"\ninput_per_mtok = 1')
    metering = edge.settings.metering
    await ask(edge.services.mailboxes.meter, lambda to: ReconfigureMeter(metering, prices, to), deadline_s=5)
    assert (await edge.post("/prices/reprice")).ok()["data"][0]["changed"] == 4
    counting = ["t1", "t2", "t4", "t5"]
    for path in ("/asap/usage", "/asap/usage/export"):
        assert [row["task_id"] for row in (await edge.get(path)).ok()["data"]] == counting
        assert [row["task_id"] for row in (await edge.get(f"{path}?limit=3")).ok()["data"]] == counting[:3]
    assert (await edge.get("/asap/usage?limit=3&offset=3")).ok()["count"] == 1
    assert len((await edge.get("/asap/usage/export?export_format=csv")).body.splitlines()) == 5
    assert (await edge.get("/asap/usage/summary")).ok()["total_tasks"] == 4


async def test_an_empty_watcher_is_an_empty_list(edge: Edge) -> None:
    answer = (await edge.get("/asap/sla?window=1h")).ok()
    assert (answer["data"], answer["window"]) == ([], "1h")
    assert answer["period_end"].startswith("2027-01-15T08:00:00")


async def test_no_route_ignores_a_parameter_it_does_not_know(edge: Edge) -> None:
    routes = {rule.rule: rule.methods & {"GET", "POST", "DELETE"} for rule in edge.app.url_map.iter_rules()}
    asked = [(method, path) for path, methods in routes.items() if path.startswith("/asap/") for method in methods]
    assert len(asked) > 12
    for method, path in [*asked, ("POST", "/agents"), ("DELETE", f"/agents/{A}"), ("POST", f"/agents/{A}/keys")]:
        if path in {"/asap/usage/validate", "/asap/ws"}:
            continue  # a validation answers whatever is sent; a socket is no route of queries
        query = "group_by=agent&stray=1" if "aggregate" in path else "stray=1"
        sent = b"{}" if method == "POST" else None
        headers = {"Content-Type": "application/json"} if method == "POST" else {}
        answer = await edge.call(method, f"{path.replace('<delegation>', 'x')}?{query}", sent, headers=headers)
        assert (answer.status, "stray" in answer.json["detail"]) == (400, True), (method, path, answer.body)
