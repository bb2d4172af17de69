"""A delegation between two tenants: both see it, the delegate's uses it, the delegator's revokes it."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from asapd import config
from asapd.actors.messages import ReconfigureRegistry
from asapd.core.errors import Refusal
from asapd.edge.asking import ask_actor
from asapd.wire.keys import private_pem
from tests.edge.house import HELD, A, B, C, Edge
from tests.edge.http.test_tenancy import TERMS, asked, event, place, token

D = "urn:asap:agent:d"
UNDER = {"X-ASAP-Delegation-Token": token()}


@pytest.fixture
async def house(edge: Edge) -> Edge:
    """A of tenant ta, B of tenant tb, and a third tenant that has nothing to do with them."""
    for tenant in ("ta", "tb", "tc"):
        await edge.new_key(tenant, "admin", tenant=tenant, sign=True)
        await edge.new_key(f"{tenant}-reader", "reader", tenant=tenant)
    await place(edge, A, "ta")
    await place(edge, B, "tb")
    return edge


async def enter(house: Edge, how: str, key: str) -> None:
    """Have a caller be the first to show the token."""
    if how == "register":
        (await house.post("/delegations", {"token": token()}, key=key)).ok(201)
    elif how == "authorize":
        reserved = (await house.post("/delegations/authorize", asked(), key=key)).ok()
        await house.delete(f"/reservations/{reserved['reservation']['id']}")
    else:
        told = (await house.post("/usage", event(cost_usd=0), key=key, headers=UNDER)).ok(201)
        assert (told["delegation"], told["denied"], told["unauthorised"]) == ("j1", None, 0)


FIRST = [("register", "ta"), ("register", "tb"), ("register", "admin"), ("authorize", "tb"), ("authorize", "admin")]


@pytest.mark.parametrize(("how", "first"), [*FIRST, ("usage", "tb"), ("usage", "admin")])
async def test_whoever_shows_a_token_first_it_is_the_same_delegation(house: Edge, how: str, first: str) -> None:
    await enter(house, how, first)
    for key in ("ta", "tb"):
        assert (await house.post("/delegations", {"token": token()}, key=key)).ok()["id"] == "j1"
        assert [row["id"] for row in (await house.get("/delegations", key=key)).ok()["data"]] == ["j1"]
        assert (await house.get("/delegations/j1", key=key)).ok()["state"] == "active"
        assert (await house.get("/asap/delegations/j1", key=key)).status == 200
        verdict = (await house.post("/delegations/validate", {"token": token()}, key=key)).ok()
        assert (verdict["valid"], verdict["remaining"]["cost_usd"]) == (True, 10)
    assert [row["id"] for row in (await house.get("/asap/delegations", key="ta")).json] == ["j1"]
    assert (await house.get("/asap/delegations", key="tb")).json == []
    # The delegate's tenant uses it, the delegator's does not act for the delegate.
    assert (await house.post("/delegations/authorize", asked(), key="ta")).refused(403)["code"] == "forbidden"
    assert (await house.post("/delegations/authorize", asked(token=None, delegation="j1"), key="ta")).status >= 400
    one = (await house.post("/delegations/authorize", asked(), key="tb")).ok()["reservation"]["id"]
    for key in ("ta", "tb"):
        assert [row["id"] for row in (await house.get("/reservations?state=open", key=key)).ok()["data"]] == [one]
        assert (await house.get(f"/reservations/{one}", key=key)).ok()["held_usd"] == 1
    assert (await house.post(f"/reservations/{one}/settle", {"cost_usd": 1}, key="ta")).refused(403)
    (await house.post("/usage", event(reservation=one), key="tb")).ok(201)
    (await house.post("/usage", event(delegation="j1"), key="tb")).ok(201)
    assert (await house.post(f"/reservations/{one}/settle", {"cost_usd": 1}, key="tb")).ok()["used_usd"] == Decimal(
        "1.5"
    )
    shown = (await house.get("/delegations/j1", key="ta")).ok()
    assert (shown["spent_usd"], shown["spend_by_task"][0]["spent_usd"]) == (Decimal("2.0"), Decimal("2.0"))
    refund = {"cost_usd": 0.5, "reason": "x"}
    assert (await house.post(f"/reservations/{one}/refund", refund, key="tb")).refused(403)
    assert (await house.post(f"/reservations/{one}/refund", refund, key="ta")).ok()["refunded_usd"] == Decimal("0.5")
    # Who gave it takes it back.
    assert "can revoke" in (await house.delete("/delegations/j1", key="tb")).refused(403)["detail"]
    assert (await house.delete("/asap/delegations/j1", key="tb")).status == 403
    assert (await house.delete("/delegations/j1", key="ta")).ok()["revoked"] == ["j1"]
    denied = (await house.post("/delegations/authorize", asked(task_id="t2"), key="tb")).refused(403)
    assert denied["code"] == "revoked"
    listed = (await house.get("/delegations/revocations", key="admin")).json["entries"]
    assert [(one["issuer"], one["id"]) for one in listed] == [(A, "j1")]


@pytest.mark.parametrize(("how", "first"), FIRST)
async def test_a_third_tenant_learns_nothing_and_debits_nothing(house: Edge, how: str, first: str) -> None:
    await enter(house, how, first)
    one = (await house.post("/delegations/authorize", asked(), key="tb")).ok()["reservation"]["id"]
    for path in ("/delegations/j1", "/asap/delegations/j1", f"/reservations/{one}"):
        assert (await house.get(path, key="tc")).status == 404
    for path in ("/delegations", "/reservations"):
        assert (await house.get(path, key="tc")).ok()["count"] == 0
    assert (await house.get("/asap/delegations", key="tc")).json == []
    assert (await house.delete("/delegations/j1", key="tc")).refused(404)
    assert (await house.delete("/asap/delegations/j1", key="tc")).status == 404
    for path, sent in (("/delegations", {"token": token()}), ("/delegations/authorize", asked())):
        assert (await house.post(path, sent, key="tc")).refused(403)["code"] == "forbidden"
    by_id = {"delegation": "j1", "task_id": "t1", "estimate": {"cost_usd": 1}}
    unknown = (await house.post("/delegations/authorize", {**by_id, "delegation": "no"}, key="tc")).refused(404)
    foreign = (await house.post("/delegations/authorize", by_id, key="tc")).refused(404)
    assert foreign == {**unknown, "detail": unknown["detail"].replace("no:", "j1:")}
    verdict = (await house.post("/delegations/validate", {"token": token()}, key="tc")).ok()
    assert (verdict["valid"], verdict["remaining"]) == (True, None)
    for named in ({"delegation": "j1"}, {"reservation": one}, {"reservation": "no"}, {"delegation": "no"}):
        told = (await house.post("/usage", event(C, **named), key="tc")).ok(201)
        assert told["unauthorised"] == 1
    told = (await house.post("/usage", event(C), key="tc", headers=UNDER)).ok(201)
    assert told["delegation"] is None
    assert (await house.get("/delegations/j1")).ok()["spent_usd"] == 0


async def hold(house: Edge, tmp_path: Path, name: str) -> None:
    """Have another agent's key held, with which its tokens are roots."""
    path = tmp_path / "keys" / f"{name}.pem"
    path.write_bytes(private_pem(HELD))
    path.chmod(0o600)
    await reconfigure(house, config.Delegation())


async def reconfigure(house: Edge, delegation: config.Delegation) -> None:
    house.with_settings(delegation=delegation)
    outcome = await ask_actor(
        house.services.mailboxes.registry, lambda reply: ReconfigureRegistry(delegation, {}, reply, (), "x")
    )
    assert not isinstance(outcome, Refusal)


async def test_ancestors_stay_with_who_gave_them_whoever_registers_the_chain(house: Edge, tmp_path: Path) -> None:
    await hold(house, tmp_path, "b")
    await place(house, D, "ta")
    down = token("a-d", A, D, parent=token("b-a", B, A))
    (await house.post("/delegations", {"token": down}, key="ta")).ok(201)
    (await house.post("/delegations/authorize", asked(token=down), key="ta")).ok()
    assert (await house.get("/delegations/b-a", key="tb")).ok()["reserved_usd"] == 1
    assert (await house.delete("/delegations/b-a", key="ta")).refused(403)
    assert (await house.get("/delegations/a-d", key="tb")).refused(404)
    gone = (await house.delete("/delegations/b-a", key="tb")).ok()
    assert (gone["revoked"], gone["count"]) == (["b-a"], 2)
    assert (await house.get("/delegations/a-d", key="ta")).ok()["state"] == "revoked"


@pytest.mark.parametrize("names_parent", [True, False])
async def test_a_child_that_the_daemon_signs_below_a_foreign_parent_falls_with_it(
    house: Edge, tmp_path: Path, *, names_parent: bool
) -> None:
    await hold(house, tmp_path, "b")
    given = token("b-a", B, A)
    if names_parent:
        (await house.post("/delegations", {"token": given}, key="tb")).ok(201)
    terms = {**TERMS, "delegate": C, "parent": "b-a" if names_parent else given}
    terms["constraints"] = {"expires_at": "2027-01-15T20:00:00Z", "max_cost_usd": 1}
    child = (await house.post("/delegations", terms, key="ta")).ok(201)["id"]
    assert (await house.post("/delegations", terms, key="tc")).status in {403, 422}
    assert (await house.get(f"/delegations/{child}", key="tb")).refused(404)
    gone = (await house.delete("/delegations/b-a", key="tb")).ok()
    assert (gone["revoked"], gone["count"]) == (["b-a"], 2)
    assert (await house.get(f"/delegations/{child}", key="ta")).ok()["state"] == "revoked"


async def test_what_follows_from_a_root_of_nobodys_is_the_delegates(house: Edge, tmp_path: Path) -> None:
    await hold(house, tmp_path, "d")
    for delegate, owner, other in ((A, "ta", "tb"), (B, "tb", "ta")):
        one = token(f"d-{owner}", D, delegate)
        assert (await house.post("/delegations", {"token": one}, key=other)).refused(403)["code"] == "forbidden"
        (await house.post("/delegations", {"token": one})).ok(201)
        assert (await house.get(f"/delegations/d-{owner}", key=owner)).ok()
        assert (await house.get(f"/delegations/d-{owner}", key=other)).refused(404)


@pytest.mark.parametrize("under", ["delegation", "reservation", "header"])
async def test_usage_reported_without_a_tenant_debits_the_tenants_delegation(house: Edge, under: str) -> None:
    (await house.post("/delegations", {"token": token()}, key="tb")).ok(201)
    one = (await house.post("/delegations/authorize", asked(), key="tb")).ok()["reservation"]["id"]
    named = {"delegation": {"delegation": "j1"}, "reservation": {"reservation": one}, "header": {}}[under]
    headers = UNDER if under == "header" else {}
    told = (await house.post("/usage", event(id="e", **named), key="ingest", headers=headers)).ok(201)
    assert told.get("unauthorised", 0) == 0
    if under == "header":
        assert (told["delegation"], told["denied"]) == ("j1", None)
    again = (await house.post("/usage", event(id="e", **named), key="ingest", headers=headers)).ok(201)
    assert (again["recorded"], again["duplicates"]) == (0, 1)
    for key in ("admin", "ta", "tb"):
        shown = (await house.get("/delegations/j1", key=key)).ok()
        assert (shown["spent_usd"], shown["spend_unattributed_usd"]) == (Decimal("0.5"), 0)
        assert shown["spend_by_task"][0]["spent_usd"] == Decimal("0.5")
    # Who spent it does not give it back to itself.
    assert (await house.post("/usage/e/void", {"reason": "twice"}, key="tb")).refused(403)["code"] == "forbidden"
    assert (await house.get("/delegations/j1")).ok()["spent_usd"] == Decimal("0.5")
    (await house.post("/usage/e/void", {"reason": "twice"})).ok(201)
    shown = (await house.get("/delegations/j1")).ok()
    assert (shown["spent_usd"], shown["spend_unattributed_usd"]) == (0, 0)


async def test_usage_reported_without_a_tenant_is_its_agents_tenants_to_read(house: Edge) -> None:
    for agent in (A, B, C):
        (await house.post("/usage", event(agent), key="ingest")).ok(201)
    (await house.post("/usage", event(B), key="tb")).ok(201)
    await house.new_key("default-reader", "reader", tenant="default")

    async def seen(key: str) -> list[str]:
        rows = (await house.get("/usage", key=key)).ok()["data"]
        grouped = (await house.get("/usage/aggregate?group_by=agent", key=key)).ok()["data"]
        assert sorted({row["agent_id"] for row in rows}) == [row["agent_id"] for row in grouped]
        assert sum(row["total_events"] for row in grouped) == len(rows)
        return sorted(row["agent_id"] for row in rows)

    assert await seen("ta-reader") == [A]
    assert await seen("tb-reader") == [B, B]
    assert await seen("tc-reader") == []
    assert await seen("default-reader") == [C]
    assert await seen("reader") == [A, B, B, C]


async def test_a_tenant_takes_no_agent_that_others_know(house: Edge) -> None:
    added = {"url": "http://127.0.0.1:1"}
    (await house.post("/usage", event(C), key="ingest")).ok(201)
    (await house.post("/delegations", {"token": token("j9", A, D)}, key="ta")).ok(201)
    step = {"task_id": "t", "agent": f"{D}3", "consumer": A, "state": "started", "timestamp": "2027-01-15T08:00:00Z"}
    (await house.post("/tasks", step, key="ingest")).ok(201)
    for agent, tenant in ((C, "tb"), (D, "tb"), (f"{D}3", "tb"), (B, "ta")):
        refused = (await house.post("/agents", {"id": agent, **added}, key=tenant)).refused(403)
        assert (refused["code"], "without a tenant" in refused["detail"]) == ("forbidden", agent != B)
    (await house.post("/agents", {"id": D, **added}, key="ta")).ok(201)
    (await house.post("/agents", {"id": C, **added, "tenant": "tb"})).ok(201)
    (await house.post("/agents", {"id": f"{D}2", **added}, key="tb")).ok(201)


async def test_a_listed_root_that_no_directory_holds_is_the_hosts(house: Edge) -> None:
    await reconfigure(house, config.Delegation(roots=(D,)))
    added: dict[str, Any] = {"id": D, "url": "http://127.0.0.1:1"}
    assert (await house.post("/agents", added, key="ta")).refused(403)["code"] == "forbidden"
    assert (await house.post(f"/agents/{D}/keys", {"public_key": "x" * 44}, key="ta")).status in {404, 422}
    assert (await house.post("/usage", event(D), key="ta")).refused(403)
    (await house.post("/usage", event(D), key="ingest")).ok(201)
    (await house.post("/agents", {**added, "tenant": "ta"})).ok(201)
    (await house.post("/usage", event(D), key="ta")).ok(201)
