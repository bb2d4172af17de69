"""What a stranger found by attacking the daemon; each stays mended."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
import trio
from trio_websocket import ConnectionClosed

from tests.e2e.daemon import QUICK, Daemon, running
from tests.e2e.tokens import Party

AGENT = "urn:asap:agent:team-a"


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    with running(QUICK) as started:
        yield started


def event(**more: Any) -> dict[str, Any]:
    return {"task_id": "t", "agent": AGENT, "consumer": "c", "timestamp": time.time(), "metrics": {}, **more}


async def test_a_batch_of_nothing_but_mistakes_costs_little(daemon: Daemon) -> None:
    """Explaining every field of 5 000 bad events held the event loop for seconds."""
    body = "[" + ",".join(['{"a":{}}'] * 5_000) + "]"
    async with daemon.client() as client:
        answer = await client.post("/usage", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 422
    errors = answer.json()["errors"]
    assert len(errors) == 100
    assert errors[0] == {
        "field": "a",
        "reason": "is not a field of a usage event; what is yours goes into labels",
        "index": 0,
    }


async def test_two_lengths_are_refused(daemon: Daemon) -> None:
    request = (
        f"POST /usage HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {daemon.admin_key}\r\n"
        "Content-Type: application/json\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n[]\r\n0\r\n\r\n"
    )
    status, _ = await daemon.raw(request.encode())
    assert status == 400


async def test_a_host_with_a_false_port_is_not_ours(daemon: Daemon) -> None:
    status, _ = await daemon.raw(
        b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1:1.evil.example\r\nConnection: close\r\n\r\n"
    )
    assert status == 403


async def test_a_revoked_key_ends_its_websocket(daemon: Daemon) -> None:
    key = daemon.create_key("reader")
    headers = [("Authorization", f"Bearer {key}")]
    async with daemon.websocket(extra_headers=headers) as socket:
        await socket.send_message('{"jsonrpc":"2.0","id":1,"method":"ping"}')
        assert "pong" in await socket.get_message()
        daemon.admin_request("DELETE", f"/keys/{key.split('_')[1]}")
        await socket.send_message('{"jsonrpc":"2.0","id":2,"method":"sla.subscribe","params":{"resume_after":0}}')
        with trio.fail_after(20), pytest.raises(ConnectionClosed) as closed:
            await socket.get_message()
    assert closed.value.reason is not None
    assert closed.value.reason.code == 1008


async def test_a_token_goes_by_an_id_that_fits_an_address_and_a_foreign_agent_cannot_drain_it() -> None:
    boss, worker = Party("boss"), Party("worker")
    agents = f'[[agents]]\nid = "{boss.urn}"\nurl = "http://127.0.0.1:9"\npublic_key = "{boss.public_key}"\n'
    with running(QUICK + agents) as daemon:
        token = boss.grant(worker, usd=10, jti="a/b")
        other = boss.grant(worker, usd=100, jti="a/b")
        async with daemon.client() as client:
            made = (await client.post("/delegations", json={"token": token})).json()
            assert made["id"].startswith("del_")
            assert (await client.get(f"/delegations/{made['id']}")).json()["jti"] == "a/b"
            verdict = (await client.post("/delegations/validate", json={"token": other, "action": "task.run"})).json()
            assert (verdict["valid"], verdict["code"]) == (False, "jti_reused")
            asked = {"delegation": made["id"], "action": "task.run", "task_id": "t", "estimate": {"cost_usd": 2}}
            held = (await client.post("/delegations/authorize", json=asked)).json()["reservation"]["id"]
            stolen = event(id="s", agent="urn:asap:agent:thief", reservation=held, cost_usd=9, action="task.run")
            assert (await client.post("/usage", json=stolen)).status_code == 201
            shown = (await client.get(f"/delegations/{made['id']}")).json()
            assert (shown["spent_usd"], shown["reserved_usd"]) == (0, 2)
            (row,) = (await client.get("/usage")).json()["data"]
            assert row["flags"] == ["unauthorised"]
            assert (await client.delete(f"/delegations/{made['id']}")).json()["revoked"] == [made["id"]]
