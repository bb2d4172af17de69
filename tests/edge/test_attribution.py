"""`X-ASAP-Delegation-Token`: what a report comes under, judged once for a request and told for each event."""

from __future__ import annotations

from typing import Any

import pytest
from nacl.signing import SigningKey

from asapd.core.delegation import Claims
from asapd.core.types import HOUR_US
from asapd.edge.usage_request import DELEGATION_HEADER
from asapd.wire.token import sign
from tests.edge.house import HELD, NOW, T0, A, B, C, Edge


def token(jti: str = "t", *, delegate: str = B, ends_us: int = T0 + HOUR_US, key: SigningKey = HELD) -> str:
    return sign(Claims(jti, A, delegate, ("task.*",), None, None, T0, ends_us), key)


def event(agent: str = B, **more: Any) -> dict[str, Any]:
    return {"task_id": "t", "agent": agent, "consumer": C, "timestamp": NOW, "cost_usd": 0.1, **more}


async def report(edge: Edge, body: Any, text: str, *, key: str = "admin", query: str = "") -> Any:
    return await edge.post(f"/usage{query}", body, headers={DELEGATION_HEADER: text}, key=key)


async def rows(edge: Edge) -> list[tuple[str | None, list[str]]]:
    found = (await edge.get("/usage")).ok()["data"]
    return [(row["delegation"], row["flags"]) for row in found]


async def told(edge: Edge) -> list[Any]:
    found = (await edge.get("/audit/logs?event_type=usage.unauthorised")).ok()["data"]
    return [entry["details"] for entry in found]


async def test_a_valid_token_is_registered_once_and_known_from_then_on(edge: Edge) -> None:
    for _ in range(2):
        answer = (await report(edge, event(), token())).ok(201)
        assert (answer["delegation"], answer["denied"], answer["unauthorised"]) == ("t", None, 0)
    assert await rows(edge) == [("t", ["unreserved"])] * 2
    assert len((await edge.get("/delegations")).ok()["data"]) == 1
    assert await told(edge) == []


async def test_a_token_that_is_revoked_meanwhile_still_names_its_delegation(edge: Edge) -> None:
    (await report(edge, event(), token())).ok(201)
    (await edge.delete("/delegations/t")).ok()
    answer = (await report(edge, event(), token())).ok(201)
    assert (answer["delegation"], answer["denied"]["code"], answer["unauthorised"]) == ("t", "revoked", 1)
    assert (await rows(edge))[1] == ("t", ["unreserved", "unauthorised"])


@pytest.mark.parametrize(
    ("text", "code", "token_id"),
    [
        ("x", "malformed", None),
        (token(key=SigningKey(b"z" * 32)), "bad_signature", "t"),
        (token(ends_us=T0), "expired", "t"),
        (sign(Claims("t", C, B, ("*",), None, None, T0, T0 + HOUR_US), SigningKey(b"z" * 32)), "unknown_key", "t"),
    ],
)
async def test_under_a_token_that_allows_nothing_usage_is_flagged_and_told(
    edge: Edge, text: str, code: str, token_id: str | None
) -> None:
    answer = (await report(edge, [event(), event(C)], text)).ok(201)
    assert (answer["recorded"], answer["unauthorised"], answer["denied"]["code"]) == (2, 2, code)
    assert await rows(edge) == [(None, ["unauthorised"])] * 2
    (details,) = await told(edge)
    assert (details["codes"], details["count"], details["token_id"]) == ([code], 2, token_id)
    assert details["agents"] == [B, C]
    assert (await edge.get("/delegations")).ok()["data"] == []


async def test_another_token_with_the_same_id_is_not_the_registered_one(edge: Edge) -> None:
    (await report(edge, event(), token())).ok(201)
    answer = (await report(edge, event(), token(ends_us=T0 + 2 * HOUR_US))).ok(201)
    assert (answer["delegation"], answer["denied"]["code"]) == (None, "jti_reused")


async def test_each_event_is_judged_by_its_own_agent_and_action(edge: Edge) -> None:
    sent = [event(), event(C), event(action="data.write"), event(reservation="none")]
    answer = (await report(edge, sent, token())).ok(201)
    assert (answer["recorded"], answer["unauthorised"]) == (4, 2)
    (details,) = await told(edge)
    assert details["codes"] == ["action_not_allowed", "wrong_delegate"]
    assert details["delegations"] == ["t"]


async def test_what_is_named_in_the_body_is_judged_when_it_comes(edge: Edge) -> None:
    (await edge.post("/delegations", {"token": token()})).ok(201)
    edge.clock.us += 2 * HOUR_US
    answer = (await edge.post("/usage", [event(delegation="t"), event(delegation="none")])).ok(201)
    assert answer["unauthorised"] == 2
    (details,) = await told(edge)
    assert details["codes"] == ["delegation_not_found", "expired"]


async def test_a_header_and_a_body_that_differ_are_refused_by_the_field(edge: Edge) -> None:
    one = (await report(edge, event(delegation="other"), token())).refused(422)
    assert [(error["field"], error.get("index")) for error in one["errors"]] == [("delegation", None)]
    two = (await report(edge, [event(delegation="t"), event(delegation="other")], token())).refused(422)
    assert [error["index"] for error in two["errors"]] == [1]
    sent = [event(delegation="other"), event(), event(timestamp=0)]
    partly = (await report(edge, sent, token(), query="?partial=true")).ok(201)
    assert (partly["recorded"], partly["refused"]) == (1, 2)
    alone = (await report(edge, event(delegation="other"), token(), query="?partial=true")).ok(201)
    assert (alone["recorded"], alone["refused"]) == (0, 1)
    # What an unbelieved token calls itself binds nobody.
    assert (await report(edge, event(delegation="other"), "x")).ok(201)["unauthorised"] == 1


async def test_a_key_registers_only_for_its_own_agents(edge: Edge) -> None:
    await edge.new_key("of-c", "ingest", C)
    answer = (await report(edge, event(C), token(), key="of-c")).ok(201)
    assert (answer["delegation"], answer["denied"]["code"]) == (None, "wrong_delegate")
    (await report(edge, event(), token())).ok(201)
    answer = (await report(edge, event(C), token(), key="of-c")).ok(201)
    assert answer["denied"]["code"] == "wrong_delegate", "that others used it changes nothing"


async def test_a_validation_does_not_look_at_the_token(edge: Edge) -> None:
    answer = await edge.post("/usage/validate", event(), headers={DELEGATION_HEADER: "x"})
    assert answer.ok()["valid"] is True


async def test_a_store_that_is_away_is_said_and_nothing_is_taken(edge: Edge) -> None:
    edge.connection.execute("PRAGMA query_only = 1")
    answer = await report(edge, event(), token())
    edge.connection.execute("PRAGMA query_only = 0")
    assert answer.refused(503)["code"] in {"storage_failed", "storage_full"}


async def test_an_idempotency_key_is_bound_to_the_token_too(edge: Edge) -> None:
    async def keyed(**token_header: str) -> Any:
        return await edge.post("/usage", event(), headers={"Idempotency-Key": "once", **token_header})

    (await keyed()).ok(201)
    assert (await keyed(**{DELEGATION_HEADER: token()})).refused(422)["code"] == "idempotency_key_reused"
    assert await rows(edge) == [(None, [])]
