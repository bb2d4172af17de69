"""Drift is 0: by every grouping and clock the totals are those of a recount, after all that goes wrong at once."""

from __future__ import annotations

import json
import random
import struct
import time
from collections.abc import Awaitable, Callable, Iterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any
from zoneinfo import ZoneInfo

import httpx2
import msgspec
import pytest
import trio

from asapd.core.usage import Cost, UsageEvent
from tests import recount
from tests.e2e.daemon import QUICK, Daemon, every_page, exact, until
from tests.e2e.test_totals import check_audit
from tests.recount import GROUPS, TIME_GROUPS, Stored

pytestmark = pytest.mark.load

BERLIN = ZoneInfo("Europe/Berlin")
ZONES = (recount.UTC, BERLIN, ZoneInfo("Asia/Kolkata"))
DAY_S, HOUR_S = 86_400, 3_600
EVENTS, BATCH = 4_000, 50
KILLS = 4
LATE_MAX_DAYS = 390

Event = dict[str, Any]


def clock_changes(now_s: int) -> list[int]:
    """When clocks were changed in Berlin within what is not too late to report."""
    days = [now_s // DAY_S * DAY_S - day * DAY_S for day in range(LATE_MAX_DAYS - 5)]

    def offset(at_s: int) -> timedelta | None:
        return datetime.fromtimestamp(at_s, BERLIN).utcoffset()

    # Always at 01:00 UTC.
    return [day_s + HOUR_S for day_s in days if offset(day_s) != offset(day_s + DAY_S)]


def make_events() -> list[Event]:
    chance = random.Random(11)
    now_s = int(time.time())
    changes = clock_changes(now_s)
    assert len(changes) >= 2

    def when_s() -> float:
        span = chance.choice(("change", "recent", "any"))
        if span == "change":
            return (
                chance.choice(changes) + chance.randrange(-2 * HOUR_S, 2 * HOUR_S) + chance.choice((0, 0.5, 0.999999))
            )
        return now_s - chance.randrange(3 * HOUR_S if span == "recent" else (LATE_MAX_DAYS - 5) * DAY_S)

    def event(number: int) -> Event:
        made: Event = {
            "id": f"event-{number}",
            "source": f"source-{number % 3}",
            "seq": number // 3,
            "task_id": f"task-{number}",
            "agent": f"urn:asap:agent:worker-{chance.randrange(5)}",
            "consumer": f"urn:asap:agent:desk-{chance.randrange(4)}",
            "timestamp": datetime.fromtimestamp(when_s(), UTC).isoformat(),
            "outcome": chance.choice(("completed", "completed", "failed")),
            "partial": chance.random() < 0.1,
            "metrics": {
                "tokens_in": chance.randrange(20_000),
                "tokens_out": chance.choice((0, chance.randrange(5_000), 2**53 - 1)),
                "duration_ms": chance.randrange(3_000),
                "api_calls": chance.randrange(4),
            },
        }
        made |= {name: value for name in ("model", "project") if (value := chance.choice(("", "x", "y")))}
        if chance.random() < 0.7:
            made["cost_usd"] = str(Decimal(chance.randrange(10_000_000)) / 1_000_000)
        return made

    return [event(number) for number in range(EVENTS)]


def stored(event: Event) -> Stored:
    """An event in its normal form, with what it cost."""
    at = datetime.fromisoformat(event["timestamp"]) - datetime(1970, 1, 1, tzinfo=UTC)
    normal = UsageEvent(
        task_id=event["task_id"],
        agent=event["agent"],
        consumer=event["consumer"],
        timestamp_us=at // timedelta(microseconds=1),
        outcome=1 if event["outcome"] == "completed" else 2,
        partial=event["partial"],
        model=event.get("model", ""),
        project=event.get("project", ""),
        **event["metrics"],
    )
    cost = event.get("cost_usd")
    return "default", normal, Cost(None if cost is None else int(Decimal(cost) * 1_000_000))


# --- ways in; each says whether a batch is recorded for certain


async def by_json(client: httpx2.AsyncClient, batch: list[Event]) -> bool:
    return settled(await client.post("/usage", json={"events": batch}))


async def by_ndjson(client: httpx2.AsyncClient, batch: list[Event]) -> bool:
    body = "\n".join(map(json.dumps, batch)).encode()
    return settled(await client.post("/usage", content=body, headers={"Content-Type": "application/x-ndjson"}))


async def by_cloudevents(client: httpx2.AsyncClient, batch: list[Event]) -> bool:
    envelopes = [
        {"specversion": "1.0", "type": "asap.usage", "id": event["id"], "source": event["source"], "data": event}
        for event in batch
    ]
    headers = {"Content-Type": "application/cloudevents-batch+json"}
    return settled(await client.post("/usage", content=json.dumps(envelopes).encode(), headers=headers))


def settled(answer: httpx2.Response) -> bool:
    assert answer.status_code in {201, 503}, answer.text
    return answer.status_code == 201


async def by_frame(daemon: Daemon, batch: list[Event]) -> bool:
    body = msgspec.msgpack.encode(batch)
    async with await trio.open_unix_socket(daemon.runtime_dir / "ingest.sock") as stream:
        await stream.send_all(struct.pack(">I", len(body)) + body)
        received = b""
        while len(received) < 4 or len(received) < 4 + int.from_bytes(received[:4], "big"):
            chunk = await stream.receive_some()
            if not chunk:
                return False
            received += chunk
    answer = json.loads(received[4:])
    assert answer["ok"] or answer["status"] == 503, answer
    return bool(answer["ok"])


GONE = (httpx2.TransportError, OSError, trio.BrokenResourceError)


class Reporters:
    """Writers that share a pile of batches, over every door, while others take back what the first reported."""

    def __init__(self, daemon: Daemon, pile: list[list[Event]], voids: list[Event]) -> None:
        self.daemon = daemon
        self.pile = pile
        self.voids = voids
        self.certain: set[str] = set()
        self.done = self.broken = 0

    async def run(self) -> None:
        """Until every batch is acknowledged and every void answered, however often the daemon dies."""
        async with trio.open_nursery() as nursery:
            for number in range(6):
                nursery.start_soon(
                    self._report, (by_json, by_ndjson, by_cloudevents, by_json, None, None)[number], number % 2
                )
            for part in range(2):
                nursery.start_soon(self._void, self.voids[part::2])

    async def _attempt(self, on_socket: bool, send: Callable[[httpx2.AsyncClient], Awaitable[bool]]) -> bool:
        try:
            async with self.daemon.ingest_client() if on_socket else self.daemon.client() as client:
                return await send(client)
        except GONE:
            self.broken += 1
            await trio.sleep(0.02)
            return False

    async def _report(
        self, way: Callable[[httpx2.AsyncClient, list[Event]], Awaitable[bool]] | None, on_socket: bool
    ) -> None:
        while self.pile:
            batch = self.pile.pop()

            async def send(client: httpx2.AsyncClient, batch: list[Event] = batch) -> bool:
                return await (by_frame(self.daemon, batch) if way is None else way(client, batch))

            while not await self._attempt(on_socket, send):
                pass
            self.certain.update(event["id"] for event in batch)
            self.done += 1

    async def _void(self, events: list[Event]) -> None:
        for event in events:
            where = {"agent": event["agent"], "source": event["source"]}

            async def send(client: httpx2.AsyncClient, event: Event = event, where: Any = where) -> bool:
                while event["id"] not in self.certain:  # noqa: ASYNC110 -- each batch would need an event of its own
                    await trio.sleep(0.02)
                answer = await client.post(f"/usage/{event['id']}/void", params=where, json={"reason": "a test"})
                # 409: it was taken back by an attempt whose answer was lost.
                assert answer.status_code in {201, 409, 503}, answer.text
                return answer.status_code != 503

            while not await self._attempt(False, send):
                pass
            self.done += 1


async def kill_again_and_again(daemon: Daemon, reporters: Reporters, works: int) -> None:
    """Daemon and writer in turn, each in the middle of the work."""
    for number in range(1, KILLS + 1):

        async def enough(number: int = number) -> bool:
            return reporters.done >= works * number // (KILLS + 1)

        await until(enough, within_s=60)
        if number % 2:
            await trio.to_thread.run_sync(daemon.kill)
            await trio.to_thread.run_sync(daemon.start)
        else:
            await trio.to_thread.run_sync(daemon.kill_writer)


async def check_every_grouping(client: httpx2.AsyncClient, rows: list[Stored]) -> None:
    summary = exact(await client.get("/usage/summary"))
    assert {name: summary[name] for name in recount.totals([])} == approximately(recount.totals(rows))
    pairs = [(name, timed) for name, timed in zip(GROUPS, reversed(TIME_GROUPS), strict=False)]
    for groups in [*((name,) for name in GROUPS), *pairs, ("agent", "consumer", "model", "project", "outcome")]:
        for zone in ZONES if set(groups) & set(TIME_GROUPS) else ZONES[:1]:
            where = {"group_by": ",".join(groups), "timezone": zone.key, "limit": 1000}
            found = await every_page(client, "/usage/aggregate", **where)
            assert found == [approximately(row) for row in recount.aggregate(rows, groups, zone)], (groups, zone)


def approximately(row: dict[str, Any]) -> dict[str, Any]:
    """As the row is read back from JSON: averages are the doubles that they are there."""
    return {name: Decimal(repr(value)) if isinstance(value, float) else value for name, value in row.items()}


@pytest.fixture
def daemon() -> Iterator[Daemon]:
    found = Daemon(QUICK + f'[metering]\nlate_max = "{LATE_MAX_DAYS}d"\n')
    try:
        yield found.start()
        found.stop()
    finally:
        found.close()


async def test_no_grouping_drifts_under_repeats_late_events_voids_and_kills(daemon: Daemon) -> None:
    events = make_events()
    chance = random.Random(12)
    batches = [events[start : start + BATCH] for start in range(0, EVENTS, BATCH)]
    # A third comes twice; some events come again in other company.
    mixed = [chance.sample(events, BATCH) for _ in range(len(batches) // 4)]
    pile = batches + chance.sample(batches, len(batches) // 3) + mixed
    chance.shuffle(pile)
    voided = chance.sample(events, 60)
    reporters = Reporters(daemon, pile, voided)
    works = len(pile) + len(voided)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(kill_again_and_again, daemon, reporters, works)
        nursery.start_soon(reporters.run)
    assert reporters.done == works
    assert reporters.broken, "the plug was pulled too late to matter"
    gone = {event["id"] for event in voided}
    async with daemon.client() as client:

        async def writes() -> bool:
            again = await client.post("/usage", json=events[:500])
            return again.status_code == 201 and bool(again.json()["duplicates"] == 500)

        await until(writes)
        for too_late in ("2001-01-01T00:00:00Z", (datetime.now(UTC) + timedelta(hours=1)).isoformat()):
            refused = await client.post("/usage", json=[{**events[0], "id": "new", "timestamp": too_late}, *events[:3]])
            assert refused.status_code == 422
        await check_every_grouping(client, [stored(event) for event in events if event["id"] not in gone])
        await check_audit(client, events)
        sources = (await client.get("/usage/sources", params={"limit": 1000})).json()["data"]
        assert sum(row["events"] for row in sources) == EVENTS
