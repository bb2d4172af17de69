"""The address of live alerts that clients of the reference implementation know."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.edge.house import A, Edge
from tests.edge.test_ws import Listener, accepted

MEMBERS = {"id", "agent_id", "breach_type", "threshold", "actual", "severity", "detected_at", "resolved_at"}


@pytest.fixture
async def port(edge: Edge, tmp_path: Path) -> AsyncIterator[int]:
    async with edge.served(tmp_path) as (_, number, _):
        yield number


async def said(client: Listener, request: dict[str, Any]) -> Any:
    await client.send(json.dumps(request))
    return await client.message()


async def test_it_is_told_of_breaches_that_open_in_the_members_it_knows(edge: Edge, port: int) -> None:
    async with accepted(port, key=edge.keys["reader"], target="/asap/ws") as client:
        answer = await said(client, {"jsonrpc": "2.0", "method": "sla.subscribe", "id": 1})
        assert answer["id"] == 1
        assert answer["result"]["subscribed"] is True
        await edge.breach()
        await edge.breach("escalated", severity="critical")
        await edge.breach("resolved", severity="critical")
        await edge.breach(number=2, kind="burn_rate")
        await edge.breach(number=3, agent=f"{A}3")
        first, second = await client.message(), await client.message()
        assert (first["method"], set(first["params"]["breach"])) == ("sla.breach", MEMBERS)
        assert [one["params"]["breach"]["id"] for one in (first, second)] == ["brc_1", "brc_3"]
        assert [one["params"]["seq"] for one in (first, second)] == [1, 5]
        assert (await said(client, {"jsonrpc": "2.0", "method": "sla.unsubscribe", "id": "x"}))["result"] == {
            "unsubscribed": True
        }


async def test_who_asks_for_all_is_told_all(edge: Edge, port: int) -> None:
    await edge.breach()
    await edge.breach("resolved")
    async with accepted(port, key=edge.keys["reader"], target="/asap/ws") as client:
        await client.ask("sla.subscribe", resume_after=0, all=True)
        assert [(await client.message())["params"]["event"] for _ in range(2)] == ["opened", "resolved"]


async def test_heartbeats_are_answered_there_and_are_no_requests_elsewhere(edge: Edge, port: int) -> None:
    async with accepted(port, key=edge.keys["reader"], target="/asap/ws") as client:
        await client.send('{"type":"pong"}')
        assert await said(client, {"type": "ping"}) == {"type": "pong"}
        assert (await said(client, {"type": "dance"}))["error"]["code"] == -32600
        await client.send('{"type":"' + "x" * 200 + '"}')
        assert (await client.message())["error"]["code"] == -32600
    async with accepted(port, key=edge.keys["reader"]) as client:
        assert (await said(client, {"type": "ping"}))["error"]["code"] == -32600
