"""Revocation on one host and between hosts: what is in force when, who may revoke what, and who hears of it."""

from __future__ import annotations

import base64
import hashlib
import json
import time
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
import trio
from nacl.signing import SigningKey, VerifyKey
from trio_websocket import ConnectionClosed, WebSocketConnection

from tests.e2e.daemon import PATIENCE_S, QUICK, Daemon, check_problem, running, until
from tests.e2e.forest import multiply
from tests.e2e.tokens import Party, jti_of

pytestmark = pytest.mark.load

ROOT, WORKER, HELPER, STRANGER = (Party(name) for name in ("root", "worker", "helper", "stranger"))
PEER = SigningKey.generate()


def key_id(key: SigningKey) -> str:
    return hashlib.sha256(bytes(key.verify_key)).hexdigest()[:16]


def pinned(*parties: Party) -> str:
    return "".join(
        f'[[agents]]\nid = "{party.urn}"\nurl = "http://127.0.0.1:9"\npublic_key = "{party.public_key}"\n'
        for party in parties
    )


CONFIG = (
    QUICK
    + f"""
[delegation]
roots = ["{ROOT.urn}"]
[[delegation.revocation_source]]
public_key = "{base64.b64encode(bytes(PEER.verify_key)).decode()}"
issuers = ["{ROOT.urn}"]
"""
    + pinned(ROOT, WORKER, HELPER)
)


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    with running(CONFIG) as started:
        yield started


@pytest.fixture(scope="module")
def other() -> Iterator[Daemon]:
    """A second host, which trusts the first for what the root issued."""
    with running(CONFIG) as started:
        yield started


def moment(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + seconds))


def signed(key: SigningKey, issuer: str, *entries: tuple[str, str], expires_in_s: float = 3600, **more: Any) -> bytes:
    """A list as another program would make it: RFC 8785 is sorted compact JSON here."""
    document = {
        "version": 1,
        "issuer": issuer,
        "key_id": key_id(key),
        "number": 1,
        "updated_at": moment(0),
        "entries": [
            {"issuer": of, "id": jti, "revoked_at": moment(-1), "expires_at": moment(expires_in_s)}
            for of, jti in entries
        ],
        **more,
    }
    text = json.dumps(document, sort_keys=True, separators=(",", ":")).encode()
    return json.dumps({**document, "signature": base64.b64encode(key.sign(text).signature).decode()}).encode()


async def verdict(client: httpx2.AsyncClient, token: str) -> str | None:
    answer = await client.post("/delegations/validate", json={"token": token, "action": "task.execute"})
    found: str | None = answer.json()["code"]
    return found


async def register(client: httpx2.AsyncClient, token: str) -> str:
    answer = await client.post("/delegations", json={"token": token})
    assert answer.status_code == 201, answer.text
    found: str = answer.json()["id"]
    return found


async def give(client: httpx2.AsyncClient, content: bytes) -> Any:
    answer = await client.post("/delegations/revocations", content=content)
    assert answer.status_code == 200, answer.text
    return answer.json()


# --- one host


async def test_revocation_goes_by_the_parent_link_not_by_the_name_of_the_delegate(daemon: Daemon) -> None:
    one, two = ROOT.grant(WORKER), ROOT.grant(WORKER)
    below_one, below_two = WORKER.grant(HELPER, parent=one), WORKER.grant(HELPER, parent=two)
    async with daemon.client() as client:
        ids = [await register(client, token) for token in (one, two, below_one, below_two)]
        revoked = (await client.delete(f"/delegations/{ids[0]}")).json()
        assert (revoked["revoked"], revoked["newly"]) == ([ids[0], ids[2]], 2)
        assert [await verdict(client, token) for token in (one, below_one)] == ["revoked", "revoked"]
        assert [await verdict(client, token) for token in (two, below_two)] == [None, None]


async def test_a_child_that_comes_after_the_revocation_is_revoked_too(daemon: Daemon) -> None:
    parent = ROOT.grant(WORKER)
    async with daemon.client() as client:
        delegation = await register(client, parent)
        assert (await client.delete(f"/delegations/{delegation}")).status_code == 200
        late = WORKER.grant(HELPER, parent=parent, expires_in_s=1800)
        assert await verdict(client, late) == "revoked"
        check_problem(await client.post("/delegations", json={"token": late}), 422, "revoked")
        asked = {"token": late, "task_id": "t", "estimate": {}}
        check_problem(await client.post("/delegations/authorize", json=asked), 403, "revoked")


async def test_a_revocation_is_in_force_for_the_next_validation_whoever_asks(daemon: Daemon) -> None:
    """Many revocations at once: none may undo what another has put in force."""
    tokens = [ROOT.grant(WORKER) for _ in range(40)]
    wrong: list[str] = []

    async def one(client: httpx2.AsyncClient, token: str) -> None:
        assert (await client.delete(f"/delegations/{jti_of(token)}")).status_code == 200
        if await verdict(client, token) != "revoked":
            wrong.append(token)

    async with daemon.client() as client:
        for token in tokens:
            await register(client, token)
        async with trio.open_nursery() as nursery:
            for token in tokens:
                nursery.start_soon(one, client, token)
        assert wrong == []
        assert {await verdict(client, token) for token in tokens} == {"revoked"}


async def test_an_id_that_was_never_seen_cannot_be_deleted(daemon: Daemon) -> None:
    async with daemon.client() as client:
        check_problem(await client.delete("/delegations/del_unseen"), 404, "delegation_not_found")


async def test_ten_thousand_descendants_go_at_once() -> None:
    """All in one call; how long it takes is for the benchmark to say."""
    with running(CONFIG) as daemon:
        database = daemon.state_dir / "asapd.db"
        root = ROOT.grant(WORKER)
        children = [WORKER.grant(HELPER, parent=root) for _ in range(3)]
        async with daemon.client() as client:
            for token in (root, *children):
                await register(client, token)
        daemon.stop()
        multiply(database, jti_of(children[0]), 10_000)
        daemon.start()
        async with daemon.client() as client:
            outcome = (await client.delete(f"/delegations/{jti_of(root)}")).json()
            assert (outcome["count"], outcome["newly"]) == (10_004, 10_004)
            for token in (root, *children):
                assert await verdict(client, token) == "revoked"
            listed = (await client.get("/delegations/revocations")).json()
            assert len(listed["entries"]) == 10_004
            active = (await client.get("/delegations", params={"state": "active"})).json()
            assert active["count"] == 0
            # The copies were put in behind its back, which it says; of all else, nothing is wrong.
            verified = (await client.get("/audit/verify")).json()
            assert verified["first_bad"] is None
            assert {table for table, tally in verified["reconciled"].items() if tally["findings"]} == {"delegation"}, (
                verified
            )


# --- the signed list


async def test_the_list_is_signed_by_the_daemon_and_has_what_is_revoked(daemon: Daemon) -> None:
    token = ROOT.grant(WORKER)
    async with daemon.client() as client:
        await register(client, token)
        await client.delete(f"/delegations/{jti_of(token)}")
        answer = await client.get("/delegations/revocations")
        assert answer.headers["content-type"] == "application/json"
        document = answer.json()
        manifest = (await client.get("/.well-known/asap/manifest.json")).json()
    signature = base64.b64decode(document.pop("signature"))
    text = json.dumps(document, sort_keys=True, separators=(",", ":")).encode()
    key = VerifyKey(base64.b64decode(public_key_in(manifest)))
    key.verify(text, signature)
    assert document["key_id"] == hashlib.sha256(bytes(key)).hexdigest()[:16]
    assert document["issuer"] == f"asapd/{document['key_id']}"
    (entry,) = [entry for entry in document["entries"] if entry["id"] == jti_of(token)]
    assert entry["issuer"] == ROOT.urn
    assert entry["revoked_at"] < entry["expires_at"]


def public_key_in(document: Any) -> str:
    """The daemon's key, wherever its manifest has it."""
    if isinstance(document, dict):
        for name, value in document.items():
            if name == "public_key" and isinstance(value, str):
                return value
            if found := public_key_in(value):
                return found
    return ""


async def test_a_list_that_did_not_change_is_not_sent_again(daemon: Daemon) -> None:
    async with daemon.client() as client:
        first = await client.get("/delegations/revocations")
        tag = first.headers["etag"]
        assert (await client.get("/delegations/revocations")).content == first.content
        for header in (tag, f'"other", W/{tag}', "*"):
            again = await client.get("/delegations/revocations", headers={"If-None-Match": header})
            assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", tag)
        token = ROOT.grant(WORKER)
        await register(client, token)
        await client.delete(f"/delegations/{jti_of(token)}")
        fresh = await client.get("/delegations/revocations", headers={"If-None-Match": tag})
        assert fresh.status_code == 200
        assert fresh.json()["number"] > first.json()["number"]
        part = (await client.get(f"/delegations/revocations?since={first.json()['number']}")).json()
        assert [entry["id"] for entry in part["entries"]] == [jti_of(token)]
        assert (await client.get(f"/delegations/revocations?since={part['number']}")).json()["entries"] == []
        assert (await client.get("/delegations/revocations?since=x")).status_code == 400
    daemon.stop()
    daemon.start()
    async with daemon.client() as client:
        assert (await client.get("/delegations/revocations")).content == fresh.content


async def test_a_list_carries_revocations_to_another_host_which_never_saw_the_tokens(
    daemon: Daemon, other: Daemon
) -> None:
    parent = ROOT.grant(WORKER)
    child = WORKER.grant(HELPER, parent=parent)
    async with daemon.client() as here, other.client() as there:
        delegation = await register(here, parent)
        assert await verdict(there, child) is None
        await here.delete(f"/delegations/{delegation}")
        content = (await here.get("/delegations/revocations")).content
        # The other host does not know the first: nothing is believed.
        check_problem(await there.post("/delegations/revocations", content=content), 422, "unknown_key")
        assert await verdict(there, child) is None
        source = f'[[delegation.revocation_source]]\npublic_key = "{public_key_of(daemon)}"\nissuers = ["{ROOT.urn}"]\n'
        other.config.write_text(CONFIG + source)
        assert (await there.post("/reload")).status_code == 200
        outcome = await give(there, content)
        assert (outcome["issuer"], outcome["revoked"]) == (json.loads(content)["issuer"], [])
        assert outcome["added"] >= 1
        assert [await verdict(there, token) for token in (parent, child)] == ["revoked", "revoked"]
        check_problem(await there.post("/delegations", json={"token": parent}), 422, "revoked")
        asked = {"token": child, "task_id": "t", "estimate": {}}
        check_problem(await there.post("/delegations/authorize", json=asked), 403, "revoked")
        again = await give(there, content)
        assert (again["added"], again["known"]) == (0, outcome["added"] + outcome["known"])
        entries = (await there.get("/audit/logs", params={"event_type": "delegation.revoked"})).json()["data"]
        (entry,) = [entry for entry in entries if entry["subject"] == jti_of(parent)]
        assert entry["details"]["source"] == outcome["issuer"]
        noted = (await there.get("/audit/logs", params={"event_type": "revocations.imported"})).json()["data"]
        assert [one["details"]["added"] for one in noted] == [outcome["added"], 0]
        # What it was told it tells others.
        listed = (await there.get("/delegations/revocations")).json()["entries"]
        assert jti_of(parent) in {one["id"] for one in listed}
    other.kill()
    other.start()
    async with other.client() as there:
        assert await verdict(there, child) == "revoked"


def public_key_of(daemon: Daemon) -> str:
    manifest = daemon.admin_get("/.well-known/asap/manifest.json").json()
    return public_key_in(manifest)


async def test_importing_revokes_what_is_registered_with_its_descendants(daemon: Daemon) -> None:
    parent = ROOT.grant(WORKER)
    child = WORKER.grant(HELPER, parent=parent)
    async with daemon.client() as client:
        ids = [await register(client, token) for token in (parent, child)]
        outcome = await give(client, signed(PEER, f"asapd/{key_id(PEER)}", (ROOT.urn, jti_of(parent))))
        assert (outcome["added"], outcome["revoked"]) == (1, ids)
        assert await verdict(client, child) == "revoked"
        shown = (await client.get(f"/delegations/{ids[1]}")).json()
        assert shown["state"] == "revoked"
        assert shown["revoke_reason"] == f"revoked by asapd/{key_id(PEER)}"


async def test_an_agent_may_revoke_what_it_issued_and_nothing_else(daemon: Daemon) -> None:
    parent = ROOT.grant(WORKER)
    mine = WORKER.grant(HELPER, parent=parent)
    async with daemon.client() as client:
        outcome = await give(
            client, signed(WORKER.key, WORKER.urn, (ROOT.urn, jti_of(parent)), (WORKER.urn, jti_of(mine)))
        )
        assert (outcome["added"], outcome["not_allowed"]) == (1, 1)
        assert outcome["not_allowed_entries"] == [{"issuer": ROOT.urn, "id": jti_of(parent)}]
        assert [await verdict(client, token) for token in (parent, mine)] == [None, "revoked"]


async def test_a_daemon_may_revoke_only_what_the_configuration_gives_it(daemon: Daemon) -> None:
    parent = ROOT.grant(WORKER)
    mine = WORKER.grant(HELPER, parent=parent)
    async with daemon.client() as client:
        outcome = await give(client, signed(PEER, f"asapd/{key_id(PEER)}", (WORKER.urn, jti_of(mine))))
        assert (outcome["added"], outcome["not_allowed"]) == (0, 1)
        assert await verdict(client, mine) is None


async def test_a_list_that_nobody_trusted_signed_changes_nothing(daemon: Daemon) -> None:
    token = ROOT.grant(WORKER)
    entry = (ROOT.urn, jti_of(token))
    changed = json.loads(signed(ROOT.key, ROOT.urn, (ROOT.urn, "another")))
    changed["entries"][0]["id"] = jti_of(token)
    refused = [
        (signed(STRANGER.key, STRANGER.urn, entry), 422, "unknown_key"),
        (signed(STRANGER.key, ROOT.urn, entry), 422, "bad_signature"),
        (signed(STRANGER.key, f"asapd/{key_id(STRANGER.key)}", entry), 422, "unknown_key"),
        (signed(STRANGER.key, f"asapd/{key_id(PEER)}", entry), 422, "bad_signature"),
        (json.dumps(changed).encode(), 422, "bad_signature"),
        (b"nonsense", 400, "malformed"),
        (b"[]", 400, "malformed"),
        (b'{"version": 1, "version": 1}', 400, "malformed"),
        (signed(ROOT.key, ROOT.urn, entry, version=2), 400, "malformed"),
        (signed(ROOT.key, ROOT.urn, entry, entries=[{"id": "x"}]), 400, "malformed"),
        (signed(ROOT.key, ROOT.urn, entry, entries=[{"id": "a b", "revoked_at": 1}]), 400, "malformed"),
        (signed(ROOT.key, ROOT.urn, entry, number=-1), 400, "malformed"),
    ]
    async with daemon.client() as client:
        for content, status, code in refused:
            check_problem(await client.post("/delegations/revocations", content=content), status, code)
        assert await verdict(client, token) is None


async def test_who_may_see_only_some_agents_neither_reads_nor_imports_the_list(daemon: Daemon) -> None:
    async with daemon.client(daemon.create_key("operator", ROOT.urn)) as client:
        check_problem(await client.get("/delegations/revocations"), 403, "forbidden")
        content = signed(ROOT.key, ROOT.urn)
        check_problem(await client.post("/delegations/revocations", content=content), 403, "forbidden")


async def test_what_has_expired_is_not_taken_and_what_expires_is_forgotten_after_a_while() -> None:
    with running(CONFIG + '[metering]\nclock_skew_max = "1s"\n') as daemon:
        async with daemon.client() as client:
            outcome = await give(client, signed(ROOT.key, ROOT.urn, (ROOT.urn, "old"), expires_in_s=-60))
            assert (outcome["added"], outcome["expired"]) == (0, 1)
            await give(client, signed(ROOT.key, ROOT.urn, (ROOT.urn, "soon"), expires_in_s=2))
            listed = await client.get("/delegations/revocations")
            assert [entry["id"] for entry in listed.json()["entries"]] == ["soon"]

            async def is_forgotten() -> bool:
                return (await client.get("/delegations/revocations")).json()["entries"] == []

            await until(is_forgotten)
            fresh = await client.get("/delegations/revocations", headers={"If-None-Match": listed.headers["etag"]})
            assert fresh.status_code == 200


# --- the live stream


async def call(socket: WebSocketConnection, method: str, **params: Any) -> Any:
    await socket.send_message(json.dumps({"jsonrpc": "2.0", "id": 1, "method": method, "params": params}))
    with trio.fail_after(PATIENCE_S):
        return json.loads(await socket.get_message())


async def told(socket: WebSocketConnection) -> tuple[str, Any]:
    with trio.fail_after(PATIENCE_S):
        message = json.loads(await socket.get_message())
    return message["method"], message["params"]


async def test_subscribers_hear_of_a_revocation_and_resume_where_they_were(daemon: Daemon) -> None:
    parent = ROOT.grant(WORKER)
    child = WORKER.grant(HELPER, parent=parent)
    bearer = [("Authorization", f"Bearer {daemon.admin_key}")]
    async with daemon.client() as client:
        ids = [await register(client, token) for token in (parent, child)]
        async with daemon.websocket(extra_headers=bearer) as socket:
            seq = (await call(socket, "delegation.subscribe"))["result"]["seq"]
            await client.delete(f"/delegations/{ids[0]}", params={"reason": "key lost"})
            method, params = await told(socket)
            assert method == "delegation.revoked"
            assert (params["seq"], params["cause"], params["reason"]) == (seq + 1, ids[0], "key lost")
            assert [(one["id"], one["issuer"], one["delegate"]) for one in params["delegations"]] == [
                (ids[0], ROOT.urn, WORKER.urn),
                (ids[1], WORKER.urn, HELPER.urn),
            ]
            assert (await call(socket, "delegation.unsubscribe"))["result"] == {"unsubscribed": True}
            await give(client, signed(ROOT.key, ROOT.urn, (ROOT.urn, "unseen-by-all")))
            assert (await call(socket, "ping"))["result"] == {"pong": True}
        async with daemon.websocket(extra_headers=bearer) as socket:
            await call(socket, "delegation.subscribe", resume_after=seq)
            assert (await told(socket))[1] == params
            method, missed = await told(socket)
            assert (method, missed["cause"], missed["source"]) == ("delegation.revoked", None, ROOT.urn)
            assert [one["jti"] for one in missed["delegations"]] == ["unseen-by-all"]
        async with daemon.websocket(extra_headers=bearer) as socket:
            wrong = await call(socket, "delegation.subscribe", resume_after="x")
            assert wrong["error"]["code"] == -32602


async def test_a_subscriber_hears_only_of_agents_that_its_key_may_see(daemon: Daemon) -> None:
    mine, foreign = ROOT.grant(HELPER), ROOT.grant(WORKER)
    key = daemon.create_key("reader", HELPER.urn)
    async with (
        daemon.client() as client,
        daemon.websocket(extra_headers=[("Authorization", f"Bearer {key}")]) as socket,
    ):
        for token in (mine, foreign):
            await register(client, token)
        await call(socket, "delegation.subscribe")
        for token in (foreign, mine):
            await client.delete(f"/delegations/{jti_of(token)}")
        _, params = await told(socket)
        assert [one["jti"] for one in params["delegations"]] == [jti_of(mine)]


async def test_a_subscriber_to_delegations_is_closed_with_a_code_when_the_daemon_stops() -> None:
    with running(CONFIG) as daemon:
        bearer = [("Authorization", f"Bearer {daemon.admin_key}")]
        async with daemon.websocket(extra_headers=bearer) as socket:
            await call(socket, "delegation.subscribe")
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.to_thread.run_sync, daemon.stop)
                with pytest.raises(ConnectionClosed) as closed, trio.fail_after(PATIENCE_S):
                    await socket.get_message()
            assert closed.value.reason is not None
            assert closed.value.reason.code == 1001
