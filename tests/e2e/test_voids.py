"""Voids while somebody pulls the plug: each takes its event out once, and every total is as a recount says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx2
import pytest
import trio

from tests.e2e.daemon import Daemon, until
from tests.e2e.test_totals import check_audit, check_totals, kill_daemon, kill_writer, make_arrays, metered

pytestmark = pytest.mark.load

__all__ = ["metered"]

VOIDS = 60


@pytest.mark.parametrize("kill", [kill_daemon, kill_writer])
async def test_voids_take_each_event_out_once_across_a_kill(
    metered: Daemon,
    kill: Callable[[Daemon], Any],
) -> None:
    events = [event for array in make_arrays()[:4] for event in array]
    voided = events[::33][:VOIDS]
    answered: list[str] = []

    async def void(client: httpx2.AsyncClient, event: dict[str, Any]) -> int:
        where = {"agent": event["agent"], "source": event["source"]}
        try:
            answer = await client.post(f"/usage/{event['id']}/void", params=where, json={"reason": "a test"})
        except httpx2.TransportError:
            return 503
        assert answer.status_code in {201, 409, 503}, answer.text
        return answer.status_code

    async def work(client: httpx2.AsyncClient, share: list[dict[str, Any]]) -> None:
        for event in share:
            status = await void(client, event)
            answered.extend([event["id"]] * (status == 201))

    async with metered.client() as client:
        for start in range(0, len(events), 500):
            assert (await client.post("/usage", json=events[start : start + 500])).status_code == 201
    async with metered.client() as client, trio.open_nursery() as nursery:
        for part in range(4):
            nursery.start_soon(work, client, voided[part::4])

        async def enough() -> bool:
            return len(answered) >= VOIDS // 4

        await until(enough)
        await kill(metered)
    if metered.process is None:
        await trio.to_thread.run_sync(metered.start)
    async with metered.client() as client:

        async def all_out() -> bool:
            return all([await void(client, event) in {201, 409} for event in voided])

        await until(all_out)
        assert {await void(client, event) for event in voided} == {409}
        gone = {event["id"] for event in voided}
        await check_totals(client, [event for event in events if event["id"] not in gone])
        await check_audit(client, events)
