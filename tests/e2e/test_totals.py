"""Ten thousand events, half of them sent twice, with and without somebody pulling the plug in the middle."""

from __future__ import annotations

import os
import random
import signal
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import httpx2
import pytest
import trio

from tests.e2e.daemon import QUICK, Daemon, every_page, exact, running, until

pytestmark = pytest.mark.load

PRICES = """
version = "test"
currency = "USD"
[[price]]
model = "large"
input_per_mtok = "3"
output_per_mtok = "15"
cached_input_per_mtok = "0.3"
[[price]]
model = "small-*"
input_per_mtok = "0.07"
output_per_mtok = "0.25"
"""
RATES = {"large": (3_000_000, 15_000_000, 300_000), "small-1": (70_000, 250_000, 70_000)}
ARRAYS, EVENTS = 20, 500
CLIENTS = 8
HOUR_S = 3600


def make_arrays() -> list[list[dict[str, Any]]]:
    chance = random.Random(1)
    now_s = int(time.time())

    def event(number: int) -> dict[str, Any]:
        tokens_in = chance.randrange(20_000)
        made: dict[str, Any] = {
            "id": f"event-{number}",
            "source": chance.choice(["", "gateway"]),
            "task_id": f"task-{number}",
            "agent": f"urn:asap:agent:worker-{chance.randrange(5)}",
            "consumer": f"urn:asap:agent:desk-{chance.randrange(4)}",
            "timestamp": datetime.fromtimestamp(now_s - chance.randrange(6 * 24 * HOUR_S), UTC).isoformat(),
            "outcome": chance.choice(["completed", "completed", "failed"]),
            "partial": chance.random() < 0.1,
            "project": chance.choice(["apollo", "gemini"]),
            "metrics": {
                "tokens_in": tokens_in,
                "cached_tokens_in": chance.randrange(tokens_in + 1),
                "tokens_out": chance.randrange(5_000),
                "duration_ms": chance.randrange(3_000),
                "api_calls": chance.randrange(4),
            },
        }
        if model := chance.choice(["large", "small-1", "unheard-of", ""]):
            made["model"] = model
        if chance.random() < 0.3:
            made["cost_usd"] = chance.randrange(1_000_000) / 1_000_000
        return made

    return [[event(number * EVENTS + index) for index in range(EVENTS)] for number in range(ARRAYS)]


def microusd(event: dict[str, Any]) -> int | None:
    """A price goes before a report; rounded up once an event."""
    rates = RATES.get(event.get("model", ""))
    if rates is None:
        return None if "cost_usd" not in event else int(Decimal(repr(event["cost_usd"])) * 1_000_000)
    counts = event["metrics"]
    plain = counts["tokens_in"] - counts["cached_tokens_in"]
    pico: int = plain * rates[0] + counts["tokens_out"] * rates[1] + counts["cached_tokens_in"] * rates[2]
    return -(-pico // 1_000_000)


def moment(event: dict[str, Any]) -> datetime:
    return datetime.fromisoformat(event["timestamp"])


GROUPS: dict[str, tuple[str, Callable[[dict[str, Any]], Any]]] = {
    "agent": ("agent_id", lambda event: event["agent"]),
    "consumer": ("consumer_id", lambda event: event["consumer"]),
    "model": ("model", lambda event: event.get("model")),
    "project": ("project", lambda event: event["project"]),
    "outcome": ("outcome", lambda event: event["outcome"]),
    "hour": ("period", lambda event: moment(event).strftime("%Y-%m-%dT%H:00:00Z")),
    "day": ("period", lambda event: moment(event).strftime("%Y-%m-%d")),
    "week": ("period", lambda event: moment(event).strftime("%G-W%V")),
    "month": ("period", lambda event: moment(event).strftime("%Y-%m")),
}


def totals(events: list[dict[str, Any]]) -> dict[str, Any]:
    def added(name: str) -> int:
        return sum(event["metrics"][name] for event in events)

    costs = [microusd(event) for event in events]
    tasks = sum(not event["partial"] for event in events)
    tokens = added("tokens_in") + added("tokens_out")
    known = [cost for cost in costs if cost is not None]
    return {
        "total_tasks": tasks,
        "total_tokens": tokens,
        "total_duration_ms": added("duration_ms"),
        "total_api_calls": added("api_calls"),
        "total_cost_usd": Decimal(sum(known)) / 1_000_000 if known else None,
        "total_events": len(events),
        "unpriced_events": len(costs) - len(known),
        "unique_agents": len({event["agent"] for event in events}),
        "unique_consumers": len({event["consumer"] for event in events}),
    }


def shortened(row: dict[str, Any]) -> dict[str, Any]:
    return {name: row[name] for name in totals([])}


async def check_totals(client: httpx2.AsyncClient, events: list[dict[str, Any]]) -> None:
    """Summary, every grouping, pairs of groupings and a cut through an hour: all as a plain loop counts them."""
    assert shortened(exact(await client.get("/usage/summary"))) == totals(events)
    for groups in [(name,) for name in GROUPS] + [("agent", "day"), ("consumer", "model", "outcome")]:
        expected: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
        for event in events:
            expected[tuple(GROUPS[name][1](event) for name in groups)].append(event)
        rows = await every_page(client, "/usage/aggregate", group_by=",".join(groups))
        found = {tuple(row[GROUPS[name][0]] for name in groups): shortened(row) for row in rows}
        assert len(found) == len(rows)
        assert found == {key: totals(part) for key, part in expected.items()}, groups
    by_time = sorted(events, key=moment)
    start, end = moment(by_time[len(events) // 3]), moment(by_time[len(events) // 2])
    window = {"start": start.isoformat(), "end": end.isoformat(), "agent": "urn:asap:agent:worker-1"}
    inside = [event for event in events if start <= moment(event) < end and event["agent"] == window["agent"]]
    assert shortened(exact(await client.get("/usage/summary", params=window))) == totals(inside)


async def check_audit(client: httpx2.AsyncClient, events: list[dict[str, Any]]) -> None:
    """The chain is whole, and holds one entry an event."""
    walk = (await client.get("/audit/verify")).json()
    assert walk["valid"], walk
    recorded = 0
    cursor: dict[str, Any] = {}
    while True:
        page = (
            await client.get("/audit/logs", params={"event_type": "usage.recorded", "limit": 1000, **cursor})
        ).json()
        recorded += page["count"]
        if page["next_cursor"] is None:
            break
        cursor = {"cursor": page["next_cursor"]}
    assert recorded == len(events)
    assert walk["last_seq"] == walk["verified"] >= recorded


class Sender:
    """Eight clients that share a pile of arrays and remember what was acknowledged."""

    def __init__(self, daemon: Daemon, pile: list[list[dict[str, Any]]]) -> None:
        self.daemon = daemon
        self.pile = list(pile)
        self.recorded = self.duplicates = 0
        self.acknowledged: list[list[dict[str, Any]]] = []
        self.refused: list[httpx2.Response] = []
        self.broken = 0

    async def send(self) -> None:
        async with trio.open_nursery() as nursery:
            for _ in range(CLIENTS):
                nursery.start_soon(self._client)

    async def _client(self) -> None:
        async with self.daemon.client() as client:
            while self.pile:
                array = self.pile.pop()
                try:
                    answer = await client.post("/usage", json=array)
                except httpx2.TransportError:
                    self.broken += 1
                    return
                if answer.status_code == 503:
                    self.refused.append(answer)
                    continue
                assert answer.status_code == 201, answer.text
                body = answer.json()
                assert body["recorded"] + body["duplicates"] == len(array)
                assert body["ids"] == [event["id"] for event in array]
                self.recorded += body["recorded"]
                self.duplicates += body["duplicates"]
                self.acknowledged.append(array)


@pytest.fixture
def metered() -> Iterator[Daemon]:
    daemon = Daemon(QUICK + '[metering.pricing]\nfile = "prices.toml"\n')
    (daemon.home / "prices.toml").write_text(PRICES)
    try:
        yield daemon.start()
        daemon.stop()
    finally:
        daemon.close()


async def test_totals_and_duplicates_are_exact_however_batches_meet(metered: Daemon) -> None:
    arrays = make_arrays()
    pile = arrays + arrays[: ARRAYS // 2]
    random.Random(2).shuffle(pile)
    sender = Sender(metered, pile)
    await sender.send()
    assert (sender.recorded, sender.duplicates) == (10_000, 5_000)
    events = [event for array in arrays for event in array]
    async with metered.client() as client:
        await check_totals(client, events)
        await check_audit(client, events)


async def kill_daemon(daemon: Daemon) -> None:
    await trio.to_thread.run_sync(daemon.kill)


async def kill_writer(daemon: Daemon) -> None:
    await trio.to_thread.run_sync(daemon.kill_writer)


@pytest.mark.parametrize("kill", [kill_daemon, kill_writer])
async def test_nothing_acknowledged_is_lost_and_nothing_counts_twice_when_killed(
    metered: Daemon, kill: Callable[[Daemon], Any]
) -> None:
    arrays = make_arrays()
    pile = arrays + arrays[: ARRAYS // 2]
    random.Random(3).shuffle(pile)
    sender = Sender(metered, pile)
    first_pid = metered.pid
    async with trio.open_nursery() as nursery:
        nursery.start_soon(sender.send)

        async def enough() -> bool:
            return len(sender.acknowledged) >= 6

        await until(enough)
        await kill(metered)
    assert sender.broken or sender.refused, "the plug was pulled too late to matter"
    for answer in sender.refused:
        assert int(answer.headers["retry-after"]) >= 1
        assert answer.json()["code"] in {"outcome_unknown", "writer_unavailable"}
    if metered.process is None:
        await trio.to_thread.run_sync(metered.start)
        assert metered.pid != first_pid
    else:
        assert metered.pid == first_pid
    async with metered.client() as client:

        async def writes() -> bool:
            return (await client.post("/usage", json=sender.acknowledged[0])).status_code == 201

        await until(writes)
        stored = {row["id"] for row in await every_page(client, "/usage", limit=1000)}
        assert {event["id"] for array in sender.acknowledged for event in array} <= stored
        assert len(stored) % EVENTS == 0, "a batch is all or nothing"
        again = Sender(metered, pile)
        await again.send()
        assert not again.refused
        assert again.recorded == 10_000 - len(stored)
        events = [event for array in arrays for event in array]
        await check_totals(client, events)
        await check_audit(client, events)


async def test_a_restart_waits_for_the_writer_that_outlives_its_daemon(metered: Daemon) -> None:
    """The writer is stopped while it holds the lock; the next daemon starts once it is gone, not before."""
    writer = metered.status()["store"]["writer_pid"]
    os.kill(writer, signal.SIGSTOP)
    metered.kill()
    try:
        process = metered.spawn()
        await trio.sleep(1.0)
        assert process.poll() is None
    finally:
        os.kill(writer, signal.SIGCONT)
    process.kill()
    process.wait()
    await trio.to_thread.run_sync(metered.start)


async def test_a_clean_restart_changes_no_figure() -> None:
    with running() as daemon:
        async with daemon.client() as client:
            await client.post("/usage", json=make_arrays()[0])
            before = (await client.get("/usage/summary")).text
        await trio.to_thread.run_sync(daemon.stop)
        await trio.to_thread.run_sync(daemon.start)
        async with daemon.client() as client:
            assert (await client.get("/usage/summary")).text == before
