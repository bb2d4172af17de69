"""Pricing again while somebody pulls the plug and events keep coming: every total is as a recount says, to the cent."""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal
from typing import Any

import httpx2
import pytest
import trio

from tests.e2e.daemon import Daemon, every_page, exact, until
from tests.e2e.test_totals import (
    PRICES,
    RATES,
    check_audit,
    check_totals,
    kill_daemon,
    kill_writer,
    make_arrays,
    metered,
)

pytestmark = pytest.mark.load

__all__ = ["metered"]

DEARER = PRICES.replace('"3"', '"4"').replace('"small-*"', '["small-*", "unheard-of"]')


@pytest.mark.parametrize("kill", [kill_daemon, kill_writer])
async def test_pricing_again_is_finished_by_another_run_after_a_kill(
    metered: Daemon, kill: Callable[[Daemon], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    arrays = make_arrays()
    before, meanwhile = arrays[:3], arrays[3:5]
    events = [event for array in before for event in array]
    async with metered.client() as client:
        for array in before:
            assert (await client.post("/usage", json=array)).status_code == 201
        await check_totals(client, events)
    (metered.home / "prices.toml").write_text(DEARER)
    assert metered.admin_request("POST", "/reload").json()["applied"]["prices"].startswith("test+")
    small = RATES["small-1"]
    monkeypatch.setitem(RATES, "large", (4_000_000, *RATES["large"][1:]))
    monkeypatch.setitem(RATES, "unheard-of", small)
    async with metered.client() as client:
        would = exact(await client.post("/prices/reprice?dry_run=true"))
        assert would["next_cursor"] is None

    async def reprice(client: httpx2.AsyncClient) -> list[dict[str, Any]] | None:
        """A whole run, or None when it was cut off."""
        rows: list[dict[str, Any]] = []
        cursor: dict[str, str] = {}
        while True:
            try:
                answer = await client.post("/prices/reprice", params=cursor)
            except httpx2.TransportError:
                return None
            assert answer.status_code in {200, 503}, answer.text
            if answer.status_code == 503:
                return None
            part = exact(answer)
            rows += part["data"]
            if part["next_cursor"] is None:
                return rows
            cursor = {"cursor": part["next_cursor"]}

    async def report(client: httpx2.AsyncClient) -> None:
        for array in meanwhile:

            async def taken(array: list[dict[str, Any]] = array) -> bool:
                try:
                    return (await client.post("/usage", json=array)).status_code == 201
                except httpx2.TransportError:
                    return False

            await until(taken)

    async def corrected(client: httpx2.AsyncClient) -> int:
        entries = await client.get("/audit/logs", params={"event_type": "usage.repriced", "limit": 1000})
        found: int = entries.json()["count"]
        return found

    async with metered.client() as client, trio.open_nursery() as nursery:
        nursery.start_soon(reprice, client)
        async with metered.client() as other:

            async def some() -> bool:
                return await corrected(other) >= 200

            await until(some)
        await kill(metered)
    if metered.process is None:
        await trio.to_thread.run_sync(metered.start)
    async with metered.client() as client, trio.open_nursery() as nursery:
        # Two runs at once, and new events, which are priced by the new table from the start.
        nursery.start_soon(report, client)
        for _ in range(2):
            nursery.start_soon(until, lambda: reprice(client))
    events += [event for array in meanwhile for event in array]
    async with metered.client() as client:
        again = await until(lambda: reprice(client))
        assert sum(row["changed"] for row in again) == 0
        await check_totals(client, events)
        for array in before:
            answer = (await client.post("/usage", json=array)).json()
            assert (answer["recorded"], answer["duplicates"]) == (0, len(array))
        await check_audit(client, events)
        rows = await every_page(client, "/usage", limit=1000)
        added = sum((row["cost_usd"] for row in rows if row["cost_usd"] is not None), Decimal(0))
        assert added == exact(await client.get("/usage/summary"))["total_cost_usd"]
        assert sum(row["changed"] for row in would["data"]) == sum(row["reprices"] is not None for row in rows)
