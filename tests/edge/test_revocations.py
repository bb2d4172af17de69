"""The doors of revocation: who may read and import lists, and what followers of delegations are told."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from asapd.core.types import SECOND_US
from asapd.wire.keys import key_id
from asapd.wire.revocations import Entry, sign_list
from tests.edge.house import HELD, IDENTITY, T0, A, B, C, Edge
from tests.edge.test_ws import accepted

PATH = "/delegations/revocations"


@pytest.fixture
async def port(edge: Edge, tmp_path: Path) -> AsyncIterator[int]:
    async with edge.served(tmp_path) as (_, number, _):
        yield number


def a_list(*jtis: str, issuer: str = A, of: str = A, ends_s: int = 3600) -> bytes:
    """A list that agent A signed."""
    entries = [Entry(of, jti, T0, T0 + ends_s * SECOND_US) for jti in jtis]
    return sign_list(entries, HELD, issuer=issuer, number=1, updated_us=T0)


async def issue(edge: Edge, delegate: str = B) -> str:
    body = {
        "delegator": A,
        "delegate": delegate,
        "scopes": ["task.*"],
        "constraints": {"expires_at": "2027-01-15T09:00:00Z"},
    }
    found: str = (await edge.post("/delegations", body)).ok(201)["id"]
    return found


async def test_the_list_has_a_tag_and_is_made_by_the_daemons_own_key(edge: Edge) -> None:
    first = await edge.get(PATH)
    assert first.ok()["entries"] == []
    assert first.json["issuer"] == f"asapd/{key_id(bytes(IDENTITY.verify_key))}"
    assert first.headers["cache-control"] == "private, no-cache"
    again = await edge.get(PATH, headers={"If-None-Match": first.headers["etag"]})
    assert (again.status, again.body) == (304, b"")
    delegation = await issue(edge)
    (await edge.delete(f"/delegations/{delegation}")).ok()
    fresh = await edge.get(PATH, headers={"If-None-Match": f'W/"x", {first.headers["etag"]}'})
    assert [entry["id"] for entry in fresh.ok()["entries"]] == [delegation]
    assert (await edge.get(f"{PATH}?limit=1")).refused(400)["code"] == "bad_parameter"


async def test_the_daemons_own_list_may_come_back(edge: Edge) -> None:
    delegation = await issue(edge)
    (await edge.delete(f"/delegations/{delegation}")).ok()
    body = (await edge.get(PATH)).body
    outcome = (await edge.post(PATH, body)).ok()
    assert (outcome["entries"], outcome["added"], outcome["known"], outcome["not_allowed"]) == (1, 0, 1, 0)


async def test_an_import_says_what_became_of_each_entry(edge: Edge) -> None:
    delegation = await issue(edge)
    outcome = (await edge.post(PATH, a_list(delegation, "unseen"))).ok()
    assert outcome == {
        "status": "imported",
        "issuer": A,
        "key_id": hashlib.sha256(bytes(HELD.verify_key)).hexdigest()[:16],
        "number": 1,
        "entries": 2,
        "added": 2,
        "known": 0,
        "expired": 0,
        "revoked": [delegation],
        "count": 1,
        "not_allowed": 0,
        "not_allowed_entries": [],
    }
    foreign = (await edge.post(PATH, a_list("x", of=C))).ok()
    assert (foreign["added"], foreign["not_allowed_entries"]) == (0, [{"issuer": C, "id": "x"}])
    late = (await edge.post(PATH, a_list("x", ends_s=-3600))).ok()
    assert (late["added"], late["expired"]) == (0, 1)


async def test_an_import_under_an_idempotency_key_answers_as_it_did(edge: Edge) -> None:
    headers = {"Idempotency-Key": "once"}
    replies = [(await edge.post(PATH, a_list("x"), headers=headers)).ok() for _ in range(2)]
    assert replies[0] == replies[1]
    assert replies[0]["added"] == 1


@pytest.mark.parametrize("key", ["reader", "ingest"])
async def test_only_operators_import(edge: Edge, key: str) -> None:
    assert (await edge.post(PATH, a_list("x"), key=key)).refused(403)["code"] == "forbidden"


async def test_a_list_that_is_not_believed_changes_nothing(edge: Edge) -> None:
    changed = json.loads(a_list("x"))
    changed["number"] = 2
    assert (await edge.post(PATH, changed)).refused(422)["code"] == "bad_signature"
    assert (await edge.post(PATH, a_list("x", issuer=C))).refused(422)["code"] == "unknown_key"
    assert (await edge.post(PATH, a_list("x", issuer="asapd/0"))).refused(422)["code"] == "unknown_key"
    assert (await edge.post(PATH, b"{}")).refused(400)["code"] == "malformed"
    assert (await edge.get(PATH)).ok()["entries"] == []


# --- followers


async def test_a_follower_hears_of_what_its_key_and_its_filter_let_through(edge: Edge, port: int) -> None:
    await edge.new_key("of-b", "reader", B)
    await edge.new_key("elsewhere", "reader", tenant="other")
    to_b, to_c = await issue(edge, B), await issue(edge, C)
    async with (
        accepted(port, key=edge.keys["reader"]) as all_of_it,
        accepted(port, key=edge.keys["reader"]) as only_c,
        accepted(port, key=edge.keys["of-b"]) as of_b,
        accepted(port, key=edge.keys["elsewhere"]) as elsewhere,
    ):
        for client in (all_of_it, of_b, elsewhere):
            assert await client.ask("delegation.subscribe") == {"subscribed": True, "seq": 0}
        await only_c.ask("delegation.subscribe", agent_id=C)
        for delegation in (to_b, to_c):
            (await edge.delete(f"/delegations/{delegation}")).ok()
        event = {"task_id": "t", "agent": B, "consumer": C, "timestamp": "2027-01-15T08:00:00Z", "delegation": to_b}
        assert (await edge.post("/usage", event)).ok(201)["unauthorised"] == 1

        async def named(client: Any, count: int) -> list[Any]:
            heard = [await client.message() for _ in range(count)]
            return [
                [one["id"] for one in message["params"]["delegations"]]
                if message["method"] == "delegation.revoked"
                else [(one["agent"], one["code"]) for one in message["params"]["events"]]
                for message in heard
            ]

        assert await named(all_of_it, 3) == [[to_b], [to_c], [(B, "revoked")]]
        assert await named(only_c, 1) == [[to_c]]
        assert await named(of_b, 2) == [[to_b], [(B, "revoked")]]
        assert await elsewhere.ask("ping") == {"pong": True}


async def test_subscribing_again_begins_anew_and_unsubscribing_ends_it(edge: Edge, port: int) -> None:
    async with accepted(port, key=edge.keys["reader"]) as client:
        await client.ask("delegation.subscribe")
        await client.ask("delegation.subscribe", resume_after=0)
        (await edge.delete(f"/delegations/{await issue(edge)}")).ok()
        assert (await client.message())["params"]["seq"] == 1
        assert await client.ask("delegation.unsubscribe") == {"unsubscribed": True}
        (await edge.delete(f"/delegations/{await issue(edge)}")).ok()
        assert await client.ask("ping") == {"pong": True}
        assert (await client.ask("delegation.subscribe", min_severity="x"))["code"] == -32602


async def test_what_is_no_longer_kept_is_told_as_a_gap(edge: Edge, port: int) -> None:
    for _ in range(3):
        (await edge.delete(f"/delegations/{await issue(edge)}")).ok()
    edge.connection.execute("DELETE FROM delegation_news WHERE seq <= 2")
    async with accepted(port, key=edge.keys["reader"]) as client:
        await client.ask("delegation.subscribe", resume_after=0)
        gap = await client.message()
        assert (gap["method"], gap["params"]) == ("delegation.gap", {"first_missing": 1, "last_missing": 2})
        assert (await client.message())["params"]["seq"] == 3


async def test_a_follower_whose_key_was_revoked_is_let_go(edge: Edge, port: int) -> None:
    await edge.new_key("gone", "reader")
    async with accepted(port, key=edge.keys["gone"]) as client:
        await client.ask("delegation.subscribe")
        (key,) = [one["id"] for one in (await edge.get("/keys")).ok()["data"] if one["name"] == "gone"]
        assert (await edge.delete(f"/keys/{key}")).status == 200
        (await edge.delete(f"/delegations/{await issue(edge)}")).ok()
        assert (await client.closed()).code == 1008


async def test_a_signature_that_is_no_base64_is_malformed(edge: Edge) -> None:
    changed = {**json.loads(a_list("x")), "signature": base64.b64encode(b"short").decode()}
    assert (await edge.post(PATH, changed)).refused(400)["code"] == "malformed"
