"""Delegation by HTTP: from the token to the settled reservation, and every no with its code."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import msgspec
import pytest

from asapd.core.delegation import Claims
from asapd.core.types import DAY_US, SECOND_US
from asapd.wire.token import sign
from tests.edge.house import HELD, T0, A, B, C, Edge

TERMS: dict[str, Any] = {
    "delegator": A,
    "delegate": B,
    "scopes": ["task.*"],
    "constraints": {"max_cost_usd": "1.50", "max_tasks": 5, "expires_at": "2027-01-16T08:00:00Z"},
}


def token(**changes: Any) -> str:
    said: dict[str, Any] = {
        "id": "j1",
        "delegator": A,
        "delegate": B,
        "scopes": ("task.*",),
        "max_tasks": None,
        "max_cost_microusd": 1_000_000,
        "issued_at_us": T0,
        "expires_at_us": T0 + DAY_US,
    }
    return sign(Claims(**{**said, **changes}), HELD)


async def issue(edge: Edge, **changes: Any) -> Any:
    return (await edge.post("/delegations", {**TERMS, **changes})).ok(201)


async def authorize(edge: Edge, **changes: Any) -> Any:
    sent = {"token": token(), "action": "task.execute", "task_id": "t1", "estimate": {"cost_usd": "0.40"}, **changes}
    return await edge.post("/delegations/authorize", {name: value for name, value in sent.items() if value is not None})


async def test_a_delegation_is_issued_shown_and_revoked(edge: Edge) -> None:
    made = await issue(edge)
    shown = (await edge.get(f"/delegations/{made['id']}")).ok()
    assert shown == made["delegation"]
    assert shown["constraints"]["max_cost_usd"] == Decimal("1.5")
    assert shown["state"] == "active"
    child = await issue(edge, delegator=A, delegate=B, constraints={"expires_at": 1_800_003_600})
    listed = (await edge.get("/delegations?limit=1")).ok()
    assert [row["id"] for row in listed["data"]] == [made["id"]]
    rest = (await edge.get(f"/delegations?cursor={listed['next_cursor']}")).ok()
    assert [row["id"] for row in rest["data"]] == [child["id"]]
    gone = (await edge.delete(f"/delegations/{made['id']}?reason=done")).ok()
    none: dict[str, Any] = {"namesakes": [], "open_reservations": []}
    assert gone == {"id": made["id"], "revoked": [made["id"]], "count": 1, "newly": 1, **none}
    too_long = f"/delegations/{made['id']}?reason={'x' * 1001}"
    assert (await edge.delete(too_long)).refused(400)["errors"][0]["field"] == "reason"
    assert (await edge.delete(f"/delegations/{made['id']}")).ok()["newly"] == 0
    assert (await edge.get("/delegations?state=revoked")).ok()["count"] == 1
    assert (await edge.get(f"/delegations?delegator={A}&delegate={C}")).ok()["count"] == 0


async def test_a_token_signed_elsewhere_is_registered_once(edge: Edge) -> None:
    first = (await edge.post("/delegations", {"token": token()}, key="ingest")).ok(201)
    again = (await edge.post("/delegations", {"token": token()}, key="ingest")).ok(200)
    assert (again["id"], again["token"]) == (first["id"], token())
    assert (await edge.post("/delegations", {"token": token(delegator=C)})).refused(422)["code"] == "unknown_key"
    assert (await edge.post("/delegations", {"token": token(max_tasks=3)})).refused(409)["code"] == "jti_reused"
    assert (await edge.post("/delegations", {"token": "x"})).refused(400)["code"] == "malformed"


@pytest.mark.parametrize(
    ("beside", "status"), [({"token": ""}, 422), ({"token": None}, 422), ({"delegation": None}, 422)], ids=str
)
async def test_an_empty_token_beside_terms_issues_nothing(edge: Edge, beside: dict[str, Any], status: int) -> None:
    (await edge.post("/delegations", {**TERMS, **beside})).refused(status)
    assert (await edge.post("/delegations", {"token": ""})).refused(400)["code"] == "malformed"
    assert (await edge.get("/delegations")).ok()["count"] == 0


async def test_an_unknown_parent_is_said_to_be_unknown_whatever_its_name(edge: Edge) -> None:
    for parent in ("none", "v1.2", "a.b.c"):
        problem = (await edge.post("/delegations", {**TERMS, "parent": parent})).refused(422)
        assert problem["errors"][0]["field"] == "parent"
    assert (await edge.post("/delegations", {**TERMS, "parent": token() + "x"})).refused(400)["code"] == "malformed"


async def test_to_issue_takes_an_operator_also_with_the_right_to_sign(edge: Edge) -> None:
    await edge.new_key("reporter", "ingest", sign=True)
    await edge.new_key("issuer", "operator", sign=True)
    for path, body in (
        ("/delegations", TERMS),
        ("/asap/delegations", {"delegator": A, "delegate": B, "scopes": ["a"]}),
    ):
        problem = (await edge.post(path, body, key="reporter")).refused(403)
        assert problem["code"] == "forbidden"
        (await edge.post(path, body, key="issuer")).ok(201)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"delegator": None}, "delegator"),
        ({"delegator": "nourn"}, "delegator"),
        ({"delegate": "nourn"}, "delegate"),
        ({"scopes": []}, "scopes"),
        ({"constraints": None}, "constraints.expires_at"),
        ({"constraints": {"expires_at": "never"}}, "constraints.expires_at"),
        ({"constraints": {"expires_at": 1_900_000_000, "max_cost_usd": -1}}, "constraints.max_cost_usd"),
        ({"constraints": {"expires_at": 1_900_000_000, "max_cost_usd": "1_000"}}, "constraints.max_cost_usd"),
        ({"constraints": {"expires_at": 1_900_000_000, "max_cost_usd": "\u0661"}}, "constraints.max_cost_usd"),
        ({"constraints": {"expires_at": 1_900_000_000, "max_task": 1}}, "constraints.max_task"),
        ({"parent": "del_unknown"}, "parent"),
    ],
)
async def test_wrong_terms_name_their_field(edge: Edge, changes: dict[str, Any], field: str) -> None:
    problem = (await edge.post("/delegations", {**TERMS, **changes})).refused(422)
    assert problem["errors"][0]["field"] == field


async def test_all_terms_that_are_wrong_are_named_at_once(edge: Edge) -> None:
    wrong = {"delegator": "nourn", "scopes": [], "constraints": {"max_cost_usd": -1}, "parent": 5}
    problem = (await edge.post("/delegations", wrong)).refused(422)
    assert sorted(error["field"] for error in problem["errors"]) == [
        *("constraints.expires_at", "constraints.max_cost_usd", "delegate", "delegator", "parent", "scopes"),
    ]
    assert problem["detail"] == "nothing was issued: delegate is missing"
    empty = (await edge.post("/delegations", {**TERMS, "scopes": []})).refused(422)
    assert empty["detail"].startswith("nothing was issued: scopes is empty")
    halved = msgspec.json.encode({**TERMS, "parent": "?"}).replace(b'"?"', b'"\\ud800"')
    assert (await edge.post("/delegations", halved)).refused(400)["code"] == "malformed"


async def test_issuing_without_the_right_or_the_key_is_refused(edge: Edge) -> None:
    assert (await edge.post("/delegations", TERMS, key="operator")).refused(403)["code"] == "forbidden"
    assert (await edge.post("/delegations", TERMS, key="reader")).refused(403)["code"] == "forbidden"
    no_key = await edge.post("/delegations", {**TERMS, "delegator": C})
    problem = no_key.refused(422)
    assert (problem["code"], problem["errors"][0]["field"]) == ("no_signing_key", "delegator")
    assert problem["detail"] == f"nothing was issued: delegator {problem['errors'][0]['reason']}"


async def test_a_parent_that_is_not_there_breaks_the_chain_of_what_is_to_be_issued(edge: Edge) -> None:
    problem = (await edge.post("/delegations", {**TERMS, "parent": "nope"})).refused(422)
    assert (problem["code"], problem["explain"]["rule"]) == ("chain_broken", "parent_known")
    assert (problem["token_id"], problem["explain"]["asked"]) == (None, "nope")
    assert problem["detail"].startswith("nothing was issued: parent: there is no delegation nope")


async def test_what_is_not_there_is_404(edge: Edge) -> None:
    assert (await edge.get("/delegations/del_x")).refused(404)["code"] == "delegation_not_found"
    assert (await edge.delete("/delegations/del_x")).refused(404)["code"] == "delegation_not_found"
    assert (await edge.get("/reservations/rsv_x")).refused(404)["code"] == "reservation_not_found"
    assert (await edge.post("/reservations/rsv_x/settle")).refused(404)["code"] == "reservation_not_found"
    assert (await edge.post("/reservations/rsv_x/eat")).refused(404)["code"] == "not_found"


async def test_validate_judges_without_reserving(edge: Edge) -> None:
    sent = {"token": token(), "action": "task.execute", "delegate": B}
    verdict = (await edge.post("/delegations/validate", sent, key="ingest")).ok()
    assert verdict["valid"]
    assert (verdict["code"], verdict["delegator"], verdict["delegate"], verdict["scopes"]) == (None, A, B, ["task.*"])
    assert verdict["remaining"] == {"cost_usd": Decimal("1.0"), "tasks": None}
    assert [link["id"] for link in verdict["chain"]] == ["j1"]
    wrong = (await edge.post("/delegations/validate", {**sent, "action": "x"})).ok()
    assert (wrong["valid"], wrong["code"], wrong["token_id"]) == (False, "action_not_allowed", "j1")
    unread = (await edge.post("/delegations/validate", {"token": "x"})).ok()
    assert (unread["code"], unread["delegator"], unread["chain"], unread["remaining"]) == ("malformed", None, [], None)
    assert (await edge.get("/delegations")).ok()["count"] == 0


async def test_an_authorisation_holds_until_it_is_settled(edge: Edge) -> None:
    allowed = (await authorize(edge, ttl_seconds=120)).ok()
    assert allowed["decision"] == "allow"
    assert allowed["remaining"] == {"cost_usd": Decimal("0.6"), "tasks": None}
    one = allowed["reservation"]["id"]
    assert allowed["reservation"]["expires_at"] == "2027-01-15T08:02:00.000000Z"
    shown = (await edge.get(f"/reservations/{one}", key="ingest")).ok()
    assert (shown["state"], shown["held_usd"]) == ("open", Decimal("0.4"))
    longer = (await edge.post(f"/reservations/{one}/extend", {"ttl_seconds": 600})).ok()
    assert longer["expires_at"] == "2027-01-15T08:10:00.000000Z"
    settled = (await edge.post(f"/reservations/{one}/settle", {"cost_usd": f"0.1{'0' * 1000}1"})).ok()
    assert (settled["state"], settled["used_usd"], settled["held_usd"]) == (
        "settled",
        Decimal("0.100001"),
        Decimal("0.0"),
    )
    refund = {"cost_usd": "0.05", "reason": "bad work"}
    assert (await edge.post(f"/reservations/{one}/refund", refund, key="ingest")).refused(403)
    assert (await edge.post(f"/reservations/{one}/refund", {"reason": "x"})).refused(422)["errors"][0]["field"] == (
        "cost_usd"
    )
    assert (await edge.post(f"/reservations/{one}/refund", {"cost_usd": 1})).refused(422)["errors"][0]["field"] == (
        "reason"
    )
    given = (await edge.post(f"/reservations/{one}/refund", refund)).ok()
    assert given["remaining"]["cost_usd"] == Decimal("0.949999")
    assert (await edge.delete(f"/reservations/{one}")).refused(409)["code"] == "reservation_closed"


async def test_a_reservation_is_released(edge: Edge) -> None:
    one = (await authorize(edge)).ok()["reservation"]["id"]
    assert (await edge.delete(f"/reservations/{one}")).ok()["state"] != "open"
    delegation = (await edge.get("/delegations")).ok()["data"][0]
    assert delegation["reserved_usd"] == Decimal("0.0")
    again = (await authorize(edge, token=None, delegation=delegation["id"], task_id="t2")).ok()
    assert again["delegation"] == delegation["id"]


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"action": "money.spend"}, "action_not_allowed"),
        ({"delegate": C}, "wrong_delegate"),
        ({"token": "x"}, "malformed"),
        ({"estimate": {"cost_usd": 5}}, "insufficient_budget"),
    ],
)
async def test_a_denial_is_a_403_problem_with_its_code(edge: Edge, changes: dict[str, Any], code: str) -> None:
    problem = (await authorize(edge, **changes)).refused(403)
    assert (problem["decision"], problem["code"]) == ("deny", code)
    assert problem["reason"]
    assert "remaining" in problem


@pytest.mark.parametrize(
    ("changes", "status", "code"),
    [
        ({"delegation": "del_1"}, 422, "invalid"),
        ({"token": None}, 422, "invalid"),
        ({"token": None, "delegation": "del_x"}, 404, "delegation_not_found"),
        ({"estimate": {"cost_usd": -1}}, 422, "invalid"),
        ({"estimate": {"tasks": 1}}, 422, "missing_estimate"),
        ({"estimate": {"tasks": 0}}, 422, "invalid"),
        ({"ttl_seconds": 0}, 422, "invalid"),
        ({"task_id": "t\x00"}, 422, "invalid"),
        ({"consumer": "c\n"}, 422, "invalid"),
        ({"project": "\x7f"}, 422, "invalid"),
    ],
)
async def test_a_request_that_asks_nothing_clear_is_refused(
    edge: Edge, changes: dict[str, Any], status: int, code: str
) -> None:
    assert (await authorize(edge, **changes)).refused(status)["code"] == code


async def test_a_caller_without_the_right_is_forbidden_and_not_denied(edge: Edge) -> None:
    await edge.new_key("own", "ingest", C)
    sent = {"token": token(), "task_id": "t", "estimate": {"cost_usd": 0}}
    problem = (await edge.post("/delegations/authorize", sent, key="own")).refused(403)
    assert problem["code"] == "forbidden"
    assert "decision" not in problem


async def test_usage_that_names_the_reservation_is_debited(edge: Edge) -> None:
    one = (await authorize(edge)).ok()["reservation"]["id"]
    event = {
        "id": "e1",
        "task_id": "t1",
        "agent": B,
        "consumer": A,
        "metrics": {},
        "timestamp": T0 // SECOND_US,
        "cost_usd": "0.30",
        "reservation": one,
    }
    assert (await edge.post("/usage", event)).ok(201)["recorded"] == 1
    shown = (await edge.get(f"/reservations/{one}")).ok()
    assert (shown["used_usd"], shown["held_usd"]) == (Decimal("0.3"), Decimal("0.1"))
    # It is usage under the delegation, which it does not name; and one that names both is there once.
    delegation = (await edge.get("/delegations")).ok()["data"][0]["id"]
    both = {**event, "id": "e2", "delegation": delegation}
    other = {**event, "id": "e3", "reservation": "rsv_other"}
    assert (await edge.post("/usage", [both, other])).ok(201)["recorded"] == 2
    rows = (await edge.get(f"/usage?delegation={delegation}")).ok()["data"]
    assert [(row["id"], row["delegation"]) for row in rows] == [("e1", None), ("e2", delegation)]
    (row,) = (await edge.get(f"/usage/aggregate?group_by=agent&delegation={delegation}")).ok()["data"]
    assert row["total_events"] == 2
    assert (await edge.get(f"/usage/summary?delegation={delegation}")).ok()["total_cost_usd"] == Decimal("0.6")
    exported = await edge.get(f"/usage/export?format=ndjson&delegation={delegation}")
    assert exported.body.count(b"\n") == 2


async def test_reservations_are_listed_newest_first_by_state_delegation_agent_and_task(edge: Edge) -> None:
    ids = []
    for number in range(4):
        edge.clock.us += 1_000_000
        asked = {"task_id": f"t{number}", "ttl_seconds": 60, "token": token(max_cost_microusd=5_000_000)}
        ids.append((await authorize(edge, **asked)).ok()["reservation"]["id"])
    first, second, third, fourth = ids
    (await edge.post(f"/reservations/{first}/settle", {"cost_usd": "0.60"})).ok()
    (await edge.delete(f"/reservations/{second}")).ok()
    (await edge.post(f"/reservations/{fourth}/extend", {"ttl_seconds": 600})).ok()
    edge.clock.us += 60_000_000

    async def listed(query: str = "", **options: Any) -> list[str]:
        return [row["id"] for row in (await edge.get(f"/reservations{query}", **options)).ok()["data"]]

    assert await listed() == [fourth, third, second, first]
    # What lapsed is not open, although nothing has swept it yet.
    assert await listed("?state=open") == [fourth]
    assert await listed("?state=expired") == [third]
    assert await listed("?state=settled") == [first]
    assert await listed("?state=released") == [second]
    assert await listed("?delegation=j1&task=t1") == [second]
    assert await listed("?delegation=other") == []
    assert await listed(f"?agent={B}") == [fourth, third, second, first]
    assert await listed(f"?agent={A}") == []
    page = (await edge.get("/reservations?limit=3")).ok()
    assert await listed(f"?limit=3&cursor={page['next_cursor']}") == [first]
    assert (await edge.get("/reservations?state=lost")).refused(400)
    assert (await edge.get("/reservations?stat=open")).refused(400)
    row = (await edge.get("/reservations?state=settled")).ok()["data"][0]
    assert (row["delegator"], row["delegate"], row["reason"]) == (A, B, "settled")
    assert (row["used_usd"], row["overrun_usd"]) == (Decimal("0.6"), Decimal("0.2"))
    await edge.new_key("theirs", "reader", C)
    await edge.new_key("ours", "reader", B)
    assert await listed(key="theirs") == []
    assert await listed(key="ours") == [fourth, third, second, first]


@pytest.mark.parametrize(
    ("verb", "body", "fields"),
    [
        ("settle", {"cost_usd": "0.1", "ttl_seconds": 600}, ["ttl_seconds"]),
        ("settle", {"tokens": 1, "reason": "x"}, ["reason"]),
        ("extend", {"ttl_seconds": 600, "cost_usd": "0.1"}, ["cost_usd"]),
        ("extend", {"tokens": 1, "reason": "x"}, ["reason", "tokens"]),
        ("refund", {"cost_usd": "0.1", "reason": "x", "tokens": 1}, ["tokens"]),
        ("refund", {"cost_usd": "0.1", "reason": "x", "ttl_seconds": 1}, ["ttl_seconds"]),
        ("refund", {"reason": ""}, ["cost_usd", "reason"]),
        ("refund", {}, ["cost_usd", "reason"]),
        ("refund", b"", ["cost_usd", "reason"]),
    ],
)
async def test_a_verb_of_a_reservation_takes_its_own_fields_alone(
    edge: Edge, verb: str, body: Any, fields: list[str]
) -> None:
    one = (await authorize(edge)).ok()["reservation"]["id"]
    before = (await edge.get(f"/reservations/{one}")).ok()
    problem = (await edge.post(f"/reservations/{one}/{verb}", body)).refused(422)
    assert (problem["code"], sorted(error["field"] for error in problem["errors"])) == ("invalid", fields)
    assert problem["errors"][0]["field"] in problem["detail"]
    assert (await edge.get(f"/reservations/{one}")).ok() == before


async def test_a_refund_under_a_key_is_given_once(edge: Edge) -> None:
    one = (await authorize(edge)).ok()["reservation"]["id"]
    (await edge.post(f"/reservations/{one}/settle", {"cost_usd": "0.40"})).ok()
    refund, once = {"cost_usd": "0.10", "reason": "faulty"}, {"Idempotency-Key": "refund-1"}
    first = (await edge.post(f"/reservations/{one}/refund", refund, headers=once)).ok()
    assert (await edge.post(f"/reservations/{one}/refund", refund, headers=once)).ok() == first
    assert first["refunded_usd"] == Decimal("0.1")
    assert (await edge.get(f"/reservations/{one}")).ok()["refunded_usd"] == Decimal("0.1")
    assert (await edge.get("/delegations/j1")).ok()["spent_usd"] == Decimal("0.3")
    nothing = {"cost_usd": 0, "reason": "faulty"}
    assert (await edge.post(f"/reservations/{one}/refund", nothing)).refused(422)["code"] == "invalid"


async def test_only_who_operates_for_the_issuer_gives_back(edge: Edge) -> None:
    one = (await authorize(edge)).ok()["reservation"]["id"]
    (await edge.post(f"/reservations/{one}/settle", {"cost_usd": "0.40"})).ok()
    refund = {"cost_usd": "0.10", "reason": "faulty"}
    await edge.new_key("issuer", "operator", A)
    await edge.new_key("worker", "operator", B)
    await edge.new_key("stranger", "operator", C)
    path = f"/reservations/{one}/refund"
    assert (await edge.post(path, refund, key="worker")).refused(403)["code"] == "forbidden"
    assert (await edge.post(path, refund, key="stranger")).refused(404)
    assert (await edge.post(path, refund, key="ingest")).refused(403)
    given = (await edge.post(path, refund, key="issuer")).ok()
    assert (given["refunded_usd"], given["refunded_to"]) == (Decimal("0.1"), ["j1"])
    assert given["refunded_to_budgets"] == []


async def test_who_only_operates_releases_what_is_left_of_its_own_revoked_delegation(edge: Edge) -> None:
    held = (await authorize(edge)).ok()
    path = f"/reservations/{held['reservation']['id']}"
    for name, agent in (("issuer", A), ("worker", B), ("stranger", C)):
        await edge.new_key(name, "operator", agent)
    assert (await edge.delete(path, key="issuer")).refused(403)["code"] == "forbidden"
    gone = (await edge.delete(f"/delegations/{held['delegation']}", key="issuer")).ok()
    assert gone["open_reservations"] == [held["reservation"]["id"]]
    assert (await edge.delete(path, key="worker")).refused(403)["code"] == "forbidden"
    assert (await edge.delete(path, key="stranger")).refused(404)
    assert (await edge.delete(path, key="issuer")).ok()["state"] == "released"


async def test_another_tenants_reservation_is_not_there(edge: Edge) -> None:
    await edge.new_key("own", "admin", tenant="own")
    await edge.new_key("other", "admin", tenant="other")
    sent = {"token": token(), "task_id": "t", "estimate": {"cost_usd": 0.1}}
    one = (await edge.post("/delegations/authorize", sent, key="own")).ok()["reservation"]["id"]
    assert (await edge.get(f"/reservations/{one}", key="own")).ok()["state"] == "open"
    assert (await edge.get(f"/reservations/{one}", key="other")).refused(404)
    known = (await edge.get("/delegations", key="own")).ok()["data"][0]["id"]
    assert (await edge.get(f"/delegations/{known}", key="other")).refused(404)
    assert (await edge.get("/delegations", key="other")).ok()["count"] == 0
    await edge.new_key("stranger", "reader", C)
    assert (await edge.get(f"/delegations/{known}", key="stranger")).refused(404)
    assert (await edge.get(f"/reservations/{one}", key="stranger")).refused(404)
