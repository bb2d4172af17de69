"""Named cursors: what was acknowledged never comes again, and nothing else is ever missing."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from asapd.store import delivery
from tests.edge.house import A, Edge
from tests.edge.test_ws import Listener, accepted


@pytest.fixture
async def port(edge: Edge, tmp_path: Path) -> AsyncIterator[int]:
    async with edge.served(tmp_path) as (_, number, _):
        yield number


async def heard(client: Listener, count: int) -> list[int]:
    return [(await client.message())["params"]["seq"] for _ in range(count)]


async def write(edge: Edge, *numbers: int) -> None:
    for number in numbers:
        await edge.breach(number=number, agent=f"{A}{number}")


async def test_a_cursor_begins_now_and_is_known_from_then_on_though_nothing_was_acknowledged(
    edge: Edge, port: int
) -> None:
    await write(edge, 1)
    async with accepted(port, key=edge.keys["reader"]) as client:
        answer = await client.ask("sla.subscribe", cursor="pager")
        assert answer == {"subscribed": True, "seq": 1, "cursor": "pager", "acknowledged": 1}
    await write(edge, 2, 3)
    async with accepted(port, key=edge.keys["reader"]) as client:
        assert (await client.ask("sla.subscribe", cursor="pager"))["acknowledged"] == 1
        assert await heard(client, 2) == [2, 3]


async def test_what_is_acknowledged_never_comes_again_and_what_is_not_comes_again(edge: Edge, port: int) -> None:
    await write(edge, 1, 2, 3)
    async with accepted(port, key=edge.keys["reader"]) as client:
        assert (await client.ask("sla.subscribe", cursor="pager", resume_after=0))["acknowledged"] == 0
        assert await heard(client, 3) == [1, 2, 3]
        assert await client.ask("sla.ack", cursor="pager", seq=2) == {"cursor": "pager", "acknowledged": 2}
        # An older one changes nothing.
        assert await client.ask("sla.ack", cursor="pager", seq=1) == {"cursor": "pager", "acknowledged": 2}
    async with accepted(port, key=edge.keys["reader"]) as client:
        # A cursor that is known goes before resume_after.
        await client.ask("sla.subscribe", cursor="pager", resume_after=0)
        assert await heard(client, 1) == [3]
        assert (await client.ask("sla.ack", cursor="pager", seq=3))["acknowledged"] == 3
        await write(edge, 4)
        assert await heard(client, 1) == [4]


async def test_a_cursor_is_its_callers_own_and_may_not_run_ahead(
    edge: Edge, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delivery, "MOST_CURSORS", 2)
    await write(edge, 1)
    async with accepted(port, key=edge.keys["reader"]) as client:
        ahead = await client.ask("sla.ack", cursor="pager", seq=2)
        assert ahead["code"] == -32602
        assert "the newest is 1" in ahead["message"]
        assert (await client.ask("sla.ack", cursor="pager", seq=1))["acknowledged"] == 1
        assert (await client.ask("sla.subscribe", cursor="other"))["subscribed"]
        for method, more in (("sla.subscribe", {}), ("sla.ack", {"seq": 1})):
            refused = await client.ask(method, cursor="third", **more)
            assert "2 cursors" in refused["message"]
        for wrong in ({"cursor": ""}, {"cursor": "x" * 129}, {"cursor": 1}):
            bad: dict[str, Any] = {"seq": 1, **wrong}
            assert (await client.ask("sla.ack", **bad))["code"] == -32602
    async with accepted(port, key=edge.keys["operator"]) as client:
        assert (await client.ask("sla.subscribe", cursor="pager", resume_after=0))["acknowledged"] == 0


async def test_a_cursor_of_the_admin_socket_is_its_users_whatever_process_comes(edge: Edge, tmp_path: Path) -> None:
    async with edge.served(tmp_path) as (_, port, path):
        await write(edge, 1)
        async with accepted(port, path=path) as client:
            await client.send('{"jsonrpc":"2.0","method":"sla.ack","params":{"cursor":"cli","seq":1}}')
            assert await client.ask("ping") == {"pong": True}
    owners = [row[0] for row in edge.connection.execute("SELECT owner FROM alert_cursor").fetchall()]
    assert len(owners) == 1
    assert owners[0].startswith("uid:")
    assert "pid" not in owners[0]
