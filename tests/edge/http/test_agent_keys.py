"""Keys over HTTP: who may see and change them, and the daemon's own key set."""

from __future__ import annotations

from typing import Any

from nacl.signing import SigningKey

from asapd.core.types import DAY_US
from asapd.wire.keys import jwk_thumbprint, public_base64, public_jwk
from tests.edge.house import HELD, IDENTITY, NOW, A, B, Edge

KEYS = [bytes(SigningKey(bytes([number]) * 32).verify_key) for number in (1, 2)]
TEXTS = [public_base64(key) for key in KEYS]
KIDS = [jwk_thumbprint(key) for key in KEYS]


def row(number: int, **more: Any) -> dict[str, Any]:
    shown = {"kid": KIDS[number], "public_key": TEXTS[number], "source": "import", "state": "active", "verifies": "all"}
    return {**shown, "since": NOW.replace("Z", ".000000Z"), "retired_at": None, "until": None, **more}


async def test_a_key_is_imported_once_and_retired_with_an_overlap(edge: Edge) -> None:
    for status in (201, 200):
        made = (await edge.post(f"/agents/{B}/keys", {"public_key": TEXTS[0]})).ok(status)
        assert made == {"agent": B, "data": [row(0)], "count": 1, "next_cursor": None}
    assert (await edge.get(f"/agents/{B}/keys", key="reader")).ok() == made
    gone = {"state": "retiring", "verifies": "older", "retired_at": "2027-01-15T08:00:00.000000Z"}
    shown = (await edge.delete(f"/agents/{B}/keys/{KIDS[0]}?overlap=1h")).ok()
    assert shown["data"] == [row(0, **gone, until="2027-01-15T09:00:00.000000Z")]
    edge.clock.us += DAY_US
    after = {**gone, "state": "retired", "verifies": "none", "until": "2027-01-15T09:00:00.000000Z"}
    assert (await edge.get(f"/agents/{B}/keys")).ok()["data"] == [row(0, **after)]


async def test_keys_are_listed_in_pages(edge: Edge) -> None:
    for text in TEXTS:
        (await edge.post(f"/agents/{B}/keys", {"public_key": text})).ok(201)
    first = (await edge.get(f"/agents/{B}/keys?limit=1")).ok()
    assert (first["agent"], first["count"]) == (B, 1)
    rest = (await edge.get(f"/agents/{B}/keys?limit=5&cursor={first['next_cursor']}")).ok()
    assert (rest["agent"], rest["count"], rest["next_cursor"]) == (B, 1, None)
    assert {one["kid"] for one in first["data"] + rest["data"]} == set(KIDS)
    assert (await edge.get(f"/agents/{B}/keys?limit=0")).refused(400)["errors"][0]["field"] == "limit"


async def test_an_idempotency_key_makes_a_repeat_safe(edge: Edge) -> None:
    headers = {"Idempotency-Key": "once"}
    for _ in range(2):
        await edge.post(f"/agents/{B}/keys", {"public_key": TEXTS[0]}, headers=headers)
    other = await edge.post(f"/agents/{B}/keys", {"public_key": TEXTS[1]}, headers=headers)
    assert other.refused(422)["code"] == "idempotency_key_reused"


async def test_what_is_no_key_or_no_agent_is_refused(edge: Edge) -> None:
    bad = (await edge.post(f"/agents/{B}/keys", {"public_key": "AAAA"})).refused(422)
    assert bad["errors"][0]["field"] == "public_key"
    assert (await edge.post("/agents/nobody/keys", {"public_key": TEXTS[0]})).refused(422)["errors"][0][
        "field"
    ] == "agent"
    assert (await edge.post(f"/agents/{B}/keys", {"key": 1})).refused(422)["code"] == "invalid"
    assert (await edge.delete(f"/agents/{B}/keys/x")).refused(404)["code"] == "agent_not_found"
    await edge.post(f"/agents/{B}/keys", {"public_key": TEXTS[0]})
    assert (await edge.delete(f"/agents/{B}/keys/x")).refused(404)["code"] == "key_not_found"
    for overlap in ("soon", "401d"):
        refused = (await edge.delete(f"/agents/{B}/keys/{KIDS[0]}?overlap={overlap}")).refused(400)
        assert refused["code"] == "bad_parameter"


async def test_the_key_of_a_listed_root_is_imported_by_whoever_may_sign(edge: Edge) -> None:
    delegation = edge.settings.delegation.model_copy(update={"roots": (B,)})
    edge.with_settings(delegation=delegation)
    await edge.new_key("op", "operator")
    await edge.new_key("signer", "operator", sign=True)
    body = {"public_key": TEXTS[0]}
    assert (await edge.post(f"/agents/{B}/keys", body, key="op")).refused(403)["code"] == "forbidden"
    (await edge.post(f"/agents/{B}/keys", body, key="signer")).ok(201)
    retired = f"/agents/{B}/keys/{KIDS[0]}"
    assert (await edge.delete(retired, key="op")).refused(403)["code"] == "forbidden"
    (await edge.delete(retired, key="signer")).ok()


async def test_a_retired_key_is_imported_again_and_not_posted(edge: Edge) -> None:
    sent = {"id": B, "url": "http://127.0.0.1:9", "public_key": TEXTS[0]}
    (await edge.post("/agents", sent)).ok(201)
    (await edge.delete(f"/agents/{B}/keys/{KIDS[0]}?overlap=0s")).ok()
    refused = (await edge.post("/agents", sent)).refused(422)
    assert (refused["code"], refused["errors"][0]["field"]) == ("invalid", "public_key")
    (await edge.post(f"/agents/{B}/keys", {"public_key": TEXTS[0]})).ok(201)
    (await edge.post("/agents", sent)).ok()


async def test_two_imported_keys_stand_side_by_side_until_one_is_retired(edge: Edge) -> None:
    for text in TEXTS[:2]:
        (await edge.post(f"/agents/{B}/keys", {"public_key": text})).ok(201)

    async def verifies() -> dict[str, str]:
        return {row["kid"]: row["verifies"] for row in (await edge.get(f"/agents/{B}/keys")).ok()["data"]}

    assert await verifies() == {KIDS[0]: "all", KIDS[1]: "all"}
    (await edge.delete(f"/agents/{B}/keys/{KIDS[0]}?overlap=1h")).ok()
    assert await verifies() == {KIDS[0]: "older", KIDS[1]: "all"}
    (await edge.delete(f"/agents/{B}/keys/{KIDS[0]}?overlap=0s")).ok()
    assert await verifies() == {KIDS[0]: "none", KIDS[1]: "all"}


async def test_a_held_key_is_shown_and_stays(edge: Edge) -> None:
    (held,) = (await edge.get(f"/agents/{A}/keys")).ok()["data"]
    kid = jwk_thumbprint(bytes(HELD.verify_key))
    assert (held["source"], held["kid"], held["verifies"]) == ("held", kid, "all")
    assert (await edge.delete(f"/agents/{A}/keys/{kid}")).refused(409)["code"] == "key_fixed"
    assert (await edge.post(f"/agents/{A}/keys", {"public_key": TEXTS[0]})).refused(409)["code"] == "key_fixed"


async def test_a_pattern_and_a_tenant_narrow_keys(edge: Edge) -> None:
    await edge.new_key("narrow", "operator", A)
    await edge.new_key("red", "operator", tenant="red")
    await edge.post(f"/agents/{B}/keys", {"public_key": TEXTS[0]})
    assert (await edge.get(f"/agents/{B}/keys", key="narrow")).refused(404)["code"] == "agent_not_found"
    assert (await edge.delete(f"/agents/{B}/keys/{KIDS[0]}", key="narrow")).refused(404)["code"] == "agent_not_found"
    sent = {"public_key": TEXTS[1]}
    assert (await edge.post(f"/agents/{B}/keys", sent, key="narrow")).refused(403)["code"] == "forbidden"
    # An agent that is in nobody's directory is the host's own business.
    assert (await edge.get(f"/agents/{B}/keys", key="red")).refused(404)["code"] == "agent_not_found"
    assert (await edge.post(f"/agents/{B}/keys", sent, key="red")).refused(404)["code"] == "agent_not_found"
    taking = {"id": B, "url": "http://127.0.0.1:9"}
    assert (await edge.post("/agents", taking, key="red")).refused(403)["code"] == "forbidden"
    (await edge.post("/agents", {**taking, "tenant": "red"})).ok(201)
    shown = (await edge.post(f"/agents/{B}/keys", sent, key="red")).ok(201)["data"]
    assert {(row["kid"], row["source"]) for row in shown} == {(KIDS[0], "import"), (KIDS[1], "tenant")}


async def test_the_own_key_set_is_open_and_can_be_cached(edge: Edge) -> None:
    found = await edge.get("/.well-known/jwks.json", key=None)
    assert (found.status, found.headers["content-type"]) == (200, "application/jwk-set+json")
    assert found.headers["cache-control"] == "public, max-age=300"
    raw = bytes(IDENTITY.verify_key)
    assert found.json == {"keys": [public_jwk(raw)]}
    assert found.json["keys"][0]["kid"] == jwk_thumbprint(raw)
    again = await edge.get("/.well-known/jwks.json", key=None, headers={"If-None-Match": found.headers["etag"]})
    assert (again.status, again.body) == (304, b"")
    shown = (await edge.get("/agents/urn:asap:agent:asapd/keys")).ok()["data"]
    assert [(one["source"], one["verifies"]) for one in shown] == [("identity", "none")]
