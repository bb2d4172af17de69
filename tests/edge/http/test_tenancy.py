"""What a tenant means for delegations: its agents act for nobody else, and its accounts are nobody else's."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import pytest

from asapd.core.delegation import Claims
from asapd.core.types import DAY_US
from asapd.wire.token import sign
from tests.edge.house import HELD, T0, A, B, C, Edge
from tests.edge.http.test_hostile_tokens import teach
from tests.wire.hostile_tokens import document

TERMS: dict[str, Any] = {
    "delegator": A,
    "delegate": B,
    "scopes": ["task.*"],
    "constraints": {"expires_at": "2027-01-16T08:00:00Z"},
}


def token(jti: str = "j1", delegator: str = A, delegate: str = B, parent: str | None = None) -> str:
    claims = Claims(jti, delegator, delegate, ("task.*",), None, 10_000_000, T0, T0 + DAY_US)
    return sign(claims, HELD, parent=parent)


def asked(**changes: Any) -> dict[str, Any]:
    return {"token": token(), "task_id": "t1", "estimate": {"cost_usd": 1}, **changes}


def event(agent: str = B, **changes: Any) -> dict[str, Any]:
    metrics = {"tokens_in": 1, "tokens_out": 1}
    said = {"task_id": "t1", "agent_id": agent, "consumer_id": "c", "metrics": metrics}
    return {**said, "timestamp": "2027-01-15T08:00:00Z", "cost_usd": 0.5, **changes}


@pytest.fixture
async def house(edge: Edge) -> Edge:
    """Keys of two tenants, and one agent that the directory gives to each."""
    for tenant in ("ta", "tb"):
        await edge.new_key(tenant, "admin", tenant=tenant, sign=True)
    return edge


async def place(edge: Edge, agent: str, tenant: str) -> None:
    await edge.post("/agents", {"id": agent, "url": "http://127.0.0.1:1", "tenant": tenant})


# --- agents


async def test_a_key_does_not_act_for_another_tenants_agent(house: Edge) -> None:
    await place(house, A, "ta")
    await place(house, B, "ta")
    for path, sent in (
        ("/delegations", TERMS),
        ("/delegations", {"token": token()}),
        ("/delegations/authorize", asked()),
        ("/usage", event()),
        (
            "/tasks",
            {"task_id": "t1", "agent": B, "consumer": "c", "state": "started", "timestamp": "2027-01-15T08:00:00Z"},
        ),
    ):
        refused = (await house.post(path, sent, key="tb")).refused(403)
        assert refused["code"] == "forbidden", path
        assert "decision" not in refused
    assert (await house.get("/delegations")).ok()["count"] == 0
    assert (await house.get("/usage")).ok()["count"] == 0
    (await house.post("/delegations", TERMS, key="ta")).ok(201)
    (await house.post("/usage", event(), key="ta")).ok(201)
    (await house.post("/usage", event(id="free"))).ok(201)


async def test_agents_in_no_directory_are_open_to_all_tenants_but_those_of_which_the_host_has_a_key(
    house: Edge,
) -> None:
    (await house.post("/usage", event(C), key="tb")).ok(201)
    assert (await house.post("/usage", event(A), key="tb")).refused(403)
    asap = {"delegator": A, "delegate": B, "scopes": ["task.*"]}
    for path, sent in (("/delegations", TERMS), ("/asap/delegations", asap)):
        assert (await house.post(path, sent, key="tb")).status == 403
    await place(house, A, "tb")
    (await house.post("/delegations", TERMS, key="tb")).ok(201)


async def test_a_change_of_the_directory_holds_from_the_next_request_on(house: Edge) -> None:
    (await house.post("/usage", event(C, id="1"), key="tb")).ok(201)
    await place(house, C, "ta")
    assert (await house.post("/usage", event(C, id="2"), key="tb")).refused(403)
    await place(house, C, "tb")
    (await house.post("/usage", event(C, id="2"), key="tb")).ok(201)
    assert (await house.post("/usage", event(C, id="3"), key="ta")).refused(403)
    await house.delete(f"/agents/{C}")
    (await house.post("/usage", event(C, id="3"), key="ta")).ok(201)


async def test_a_chain_through_another_tenants_agent_is_not_taken_over(house: Edge) -> None:
    await place(house, A, "ta")
    through = token("j2", A, C, parent=token("j0", A, A))
    assert (await house.post("/delegations", {"token": through}, key="tb")).refused(403)["code"] == "forbidden"
    assert (await house.post("/delegations/authorize", asked(token=through), key="tb")).refused(403)
    (await house.post("/delegations/authorize", asked(token=through), key="ta")).ok()
    reported = await house.post("/usage", event(C), key="tb", headers={"X-ASAP-Delegation-Token": through})
    assert (reported.ok(201)["delegation"], reported.json["unauthorised"]) == (None, 1)


# --- accounts


async def test_an_account_is_its_first_tenants(house: Edge) -> None:
    await place(house, A, "ta")
    known = (await house.post("/delegations", {"token": token()}, key="ta")).ok(201)["id"]
    for path, sent in (("/delegations", {"token": token()}), ("/delegations/authorize", asked())):
        refused = (await house.post(path, sent, key="tb")).refused(403)
        assert (refused["code"], "another tenant's" in refused["detail"]) == ("forbidden", True)
        assert "remaining" not in refused
    child = token("j2", A, C, parent=token("j3", A, A))
    (await house.post("/delegations", {"token": token("j3", A, A)}, key="ta")).ok(201)
    assert (await house.post("/delegations/authorize", asked(token=child), key="tb")).refused(403)
    assert (await house.post("/delegations/authorize", asked(action="x"), key="tb")).refused(403)["code"] == "forbidden"
    shown = (await house.get(f"/delegations/{known}", key="ta")).ok()
    assert shown["reserved_usd"] == 0
    verdict = (await house.post("/delegations/validate", {"token": token()}, key="tb")).ok()
    assert (verdict["valid"], verdict["remaining"]) == (True, None)
    assert (await house.post("/delegations/validate", {"token": token()}, key="ta")).ok()["remaining"] is not None
    told = (await house.post("/usage", event(), key="tb", headers={"X-ASAP-Delegation-Token": token()})).ok(201)
    assert (told["delegation"], told["denied"]["code"]) == (None, "delegation_not_found")
    assert (await house.get(f"/delegations/{known}", key="ta")).ok()["spent_usd"] == 0


async def test_a_reservation_belongs_to_whose_delegation_it_is(house: Edge) -> None:
    await place(house, A, "ta")
    known = (await house.post("/delegations", {"token": token()}, key="ta")).ok(201)["id"]
    one = (await house.post("/delegations/authorize", asked())).ok()["reservation"]["id"]
    assert [row["id"] for row in (await house.get("/reservations", key="ta")).ok()["data"]] == [one]
    assert (await house.get("/reservations", key="tb")).ok()["count"] == 0
    refund = {"cost_usd": 0.1, "reason": "x"}
    assert (await house.post(f"/reservations/{one}/refund", refund, key="tb")).refused(404)
    for key in ("ta", "admin"):
        paid = (await house.post("/usage", event(id=key, reservation=one), key=key)).ok(201)
        assert "unauthorised" not in paid
    shown = (await house.get(f"/reservations/{one}", key="ta")).ok()
    assert (shown["used_usd"], shown["held_usd"]) == (Decimal("1.0"), Decimal("0.0"))
    spending = (await house.get(f"/delegations/{known}", key="ta")).ok()
    assert spending["spend_by_task"][0]["spent_usd"] == Decimal("1.0")
    assert (await house.post(f"/reservations/{one}/refund", refund, key="ta")).ok()["refunded_usd"] == Decimal("0.1")
    assert (await house.delete(f"/reservations/{one}", key="ta")).ok()["state"] == "released"


async def test_usage_of_the_owner_under_anothers_reservation_can_be_taken_back(house: Edge) -> None:
    await place(house, A, "ta")
    known = (await house.post("/delegations", {"token": token()}, key="ta")).ok(201)["id"]
    one = (await house.post("/delegations/authorize", asked())).ok()["reservation"]["id"]
    (await house.post("/usage", event(id="e", reservation=one), key="ta")).ok(201)
    assert (await house.get(f"/delegations/{known}")).ok()["spent_usd"] == Decimal("0.5")
    (await house.post("/usage/e/void", {"reason": "twice"}, key="ta")).ok(201)
    assert (await house.get(f"/delegations/{known}")).ok()["spent_usd"] == 0


async def test_who_may_not_know_of_a_relative_is_told_how_many_there_are(house: Edge) -> None:
    await house.new_key("narrow", "operator", C)
    top = token("top", A, A)
    for jti, delegate, parent in (("low", B, top), ("mine", C, top)):
        (await house.post("/delegations", {"token": token(jti, A, delegate, parent)})).ok(201)
    mine = (await house.get("/delegations/mine", key="narrow")).ok()
    assert (mine["parent"], mine["children"], mine["hidden"]) == (None, [], 1)
    whole = (await house.get("/delegations/top")).ok()
    assert (whole["children"], whole["hidden"]) == (["low", "mine"], 0)
    await house.new_key("a", "operator", A, C)
    gone = (await house.delete("/delegations/top", key="a")).ok()
    assert (gone["revoked"], gone["count"]) == (["top", "low", "mine"], 3)


async def test_revoking_names_only_what_may_be_known(house: Edge) -> None:
    await teach(house)
    (await house.post("/delegations", document())).ok(201)
    (await house.post("/delegations", document(B, C, parent="doc-a-b"))).ok(201)
    await house.new_key("a", "operator", A)
    gone = (await house.delete("/delegations/doc-a-b", key="a")).ok()
    assert (gone["revoked"], gone["count"], gone["newly"]) == (["doc-a-b"], 2, 2)


# --- parents that are named


async def test_naming_an_id_is_not_holding_its_token(house: Edge) -> None:
    await teach(house)
    (await house.post("/delegations", document())).ok(201)
    await house.new_key("c", "ingest", C)
    asking = document(C, C, parent="doc-a-b"), document(C, C, parent="nothing")
    known, unknown = [(await house.post("/delegations/validate", {"token": one}, key="c")).ok() for one in asking]
    assert (known["chain"], known["remaining"]) == ([], None)
    assert {**known, "reason": None, "explain": None} == {**unknown, "reason": None, "explain": None}
    assert known["reason"] == unknown["reason"].replace("nothing", "doc-a-b")
    denied = (await house.post("/delegations/authorize", asked(token=asking[0]), key="c")).refused(403)
    assert (denied["code"], denied["remaining"], denied["explain"]["granted"]) == ("chain_broken", None, None)
    assert B not in str((await house.post("/delegations", asking[0], key="c")).refused(422))
    given = document(B, C, parent="doc-a-b")
    assert (await house.post("/delegations/validate", {"token": given}, key="c")).ok()["valid"]
    await house.new_key("b", "ingest", B)
    told = (await house.post("/delegations/validate", {"token": asking[0]}, key="b")).ok()
    assert [link["id"] for link in told["chain"]] == ["doc-a-b", "doc-c-c"]


async def test_an_issue_names_no_parent_that_is_anothers(house: Edge) -> None:
    await teach(house)
    (await house.post("/delegations", document(B, C))).refused(422)
    (await house.post("/delegations", document())).ok(201)
    (await house.post("/delegations", document(B, C, parent="doc-a-b"))).ok(201)
    await house.new_key("a", "operator", A, sign=True)
    refused = (await house.post("/delegations", {**TERMS, "parent": "doc-b-c"}, key="a")).refused(422)
    assert refused["code"] == "chain_broken"
    assert "there is no delegation doc-b-c" in refused["errors"][0]["reason"]
