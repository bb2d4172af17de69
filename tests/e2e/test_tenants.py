"""Two tenants on one host: what one's agent gives to the other's, over every door that reports and decides."""

from __future__ import annotations

import itertools
import json
import struct
import time
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
import trio

from tests.e2e.daemon import QUICK, Daemon, check_problem, exact, running
from tests.e2e.tokens import Party, jti_of

BOSS, WORKER = Party("boss"), Party("worker")
_numbers = itertools.count(1)


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    pinned = "".join(
        f'[[agents]]\nid = "{party.urn}"\nurl = "http://127.0.0.1:9"\npublic_key = "{party.public_key}"\n'
        f'tenant = "{tenant}"\n'
        for party, tenant in ((BOSS, "giving"), (WORKER, "working"))
    )
    with running(QUICK + pinned) as started:
        yield started


@pytest.fixture(scope="module")
def keys(daemon: Daemon) -> dict[str, str]:
    return {tenant: daemon.create_key("admin", tenant=tenant) for tenant in ("giving", "working", "third")}


def event(**more: Any) -> dict[str, Any]:
    number = next(_numbers)
    said = {"id": f"e-{number}", "task_id": f"t-{number}", "agent": WORKER.urn, "consumer": BOSS.urn}
    return {**said, "timestamp": time.time(), "cost_usd": 0.25, **more}


async def framed(daemon: Daemon, sent: dict[str, Any]) -> dict[str, Any]:
    """Report by a frame of the ingest socket."""
    body = json.dumps(sent).encode()
    async with await trio.open_unix_socket(str(daemon.runtime_dir / "ingest.sock")) as stream:
        with trio.fail_after(30):
            await stream.send_all(struct.pack(">I", len(body)) + body)
            received = b""
            while len(received) < 4 or len(received) < 4 + struct.unpack(">I", received[:4])[0]:
                received += await stream.receive_some()
    answer: dict[str, Any] = json.loads(received[4:])
    return answer


async def spent(client: httpx2.AsyncClient, delegation: str) -> float:
    return float(exact(await client.get(f"/delegations/{delegation}"))["spent_usd"])


@pytest.mark.parametrize("door", ["frame", "ingest", "admin", "header"])
async def test_usage_that_comes_without_a_tenant_debits_the_delegation_it_names(
    daemon: Daemon, keys: dict[str, str], door: str
) -> None:
    token = BOSS.grant(WORKER, usd=10)
    name, sent = jti_of(token), event()
    async with daemon.client(keys["working"]) as working, daemon.client(keys["giving"]) as giving:
        assert (await working.post("/delegations", json={"token": token})).status_code == 201
        for _ in range(2):
            if door == "frame":
                told = await framed(daemon, {**sent, "delegation": name})
            elif door == "ingest":
                async with daemon.ingest_client() as client:
                    told = (await client.post("/usage", json={**sent, "delegation": name})).json()
            else:
                headers = {"X-ASAP-Delegation-Token": token} if door == "header" else {}
                under = {} if door == "header" else {"delegation": name}
                async with daemon.client() as client:
                    told = (await client.post("/usage", json={**sent, **under}, headers=headers)).json()
            assert told.get("unauthorised", 0) == 0, told
        assert told["duplicates"] == 1
        for client in (working, giving):
            assert await spent(client, name) == 0.25
        (row,) = (await working.get("/usage", params={"task": sent["task_id"]})).json()["data"]
        assert row["flags"] == ["unreserved"]
        assert (await giving.get("/usage", params={"agent": WORKER.urn})).json()["count"] == 0


async def test_the_issuers_tenant_revokes_what_the_delegates_registered(daemon: Daemon, keys: dict[str, str]) -> None:
    token = BOSS.grant(WORKER, usd=10)
    name = jti_of(token)
    asked = {"token": token, "task_id": "t", "estimate": {"cost_usd": 1}}
    async with (
        daemon.client(keys["working"]) as working,
        daemon.client(keys["giving"]) as giving,
        daemon.client(keys["third"]) as third,
    ):
        reserved = exact(await working.post("/delegations/authorize", json=asked))["reservation"]["id"]
        assert exact(await giving.get(f"/reservations/{reserved}"))["held_usd"] == 1
        daemon.stop()
        daemon.start()
        for client in (working, giving, third):
            client.base_url = httpx2.URL(daemon.url)
        check_problem(await third.get(f"/delegations/{name}"), 404, "delegation_not_found")
        check_problem(await third.delete(f"/delegations/{name}"), 404, "delegation_not_found")
        check_problem(await third.post("/delegations/authorize", json=asked), 403, "forbidden")
        check_problem(await working.delete(f"/delegations/{name}"), 403, "forbidden")
        gone = await giving.delete(f"/delegations/{name}")
        assert (gone.status_code, gone.json()["revoked"]) == (200, [name])
        check_problem(await working.post("/delegations/authorize", json=asked), 403, "revoked")
        # What was reserved before may still settle.
        settled = await working.post(f"/reservations/{reserved}/settle", json={"cost_usd": 0.5})
        assert settled.status_code == 200
        assert await spent(giving, name) == 0.5


async def test_a_tenant_adds_no_agent_that_the_host_knows(daemon: Daemon, keys: dict[str, str]) -> None:
    stranger = Party("stranger").urn
    assert (await framed(daemon, event(agent=stranger)))["ok"]
    async with daemon.client(keys["third"]) as third, daemon.client() as host:
        added = {"url": "http://127.0.0.1:9"}
        for agent in (stranger, WORKER.urn):
            check_problem(await third.post("/agents", json={"id": agent, **added}), 403, "forbidden")
        own = {"id": Party("newcomer").urn, **added}
        assert (await third.post("/agents", json=own)).json()["tenant"] == "third"
        assert (await third.get("/usage")).json()["count"] == 0
        assert (await host.post("/agents", json={"id": stranger, **added, "tenant": "third"})).status_code == 201
        assert (await third.get("/usage")).json()["count"] == 1


async def test_what_one_tenant_writes_of_a_revocation_is_not_told_to_another(
    daemon: Daemon, keys: dict[str, str]
) -> None:
    above = BOSS.grant(BOSS, usd=10)
    below = BOSS.grant(WORKER, usd=10, parent=above)
    async with daemon.client(keys["working"]) as working, daemon.client(keys["giving"]) as giving:
        assert (await giving.post("/delegations", json={"token": below})).status_code == 201
        assert (await giving.delete(f"/delegations/{jti_of(above)}?reason=secret")).status_code == 200
        reasons = [
            (await client.get(f"/delegations/{jti_of(below)}")).json()["revoke_reason"] for client in (giving, working)
        ]
        assert reasons == ["secret", "an ancestor was revoked"]
        listed = (await working.get("/delegations", params={"state": "revoked", "limit": 1000})).json()["data"]
        assert "secret" not in {one["revoke_reason"] for one in listed}
