"""The daemon is killed while events flow: nothing is lost, nothing is counted twice."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import trio

from asapd.client import AsyncMeter, Meter, Rules, Stats, WsgiMiddleware, current_task
from asapd.client.meter import Settings
from tests.client.daemon import Daemon
from tests.client.test_middleware import wsgi
from tests.e2e.tokens import Party

pytestmark = pytest.mark.load

AGENT, CONSUMER = "urn:asap:agent:writer", "urn:asap:agent:desk"
RATE_PER_S = 500
# With ASAPD_LONG_OUTAGE=30 the daemon is away for half a minute.
KILLS = 2
OUTAGE_S = float(os.environ.get("ASAPD_LONG_OUTAGE", "1"))


class Reporting:
    """A program that reports so many events a second, in a thread of its own, until it is told to stop."""

    def __init__(self, address: Path | str, spool: Path) -> None:
        self.count = 0
        self.slowest_s = self.flush_s = 0.0
        self.seen = Stats()
        self._address = address
        self._settings: Settings = {"agent": AGENT, "consumer": CONSUMER, "spool": spool, "batch_age_s": 0.05}
        self._stop = threading.Event()
        self._began_s = 0.0

    def report_due(self, meter: Meter | AsyncMeter) -> None:
        """What is due by now; reporting waits for nobody, whatever becomes of the daemon."""
        due = int((time.monotonic() - self._began_s) * RATE_PER_S)
        while self.count < due:
            self.count += 1
            before_s = time.monotonic()
            assert meter.record(tokens_in=self.count) is not None
            self.slowest_s = max(self.slowest_s, time.monotonic() - before_s)
        self.seen = meter.stats()

    def run_sync(self, during: Callable[[], object]) -> Stats:
        """Report by the synchronous form while something else goes on."""
        self._began_s = time.monotonic()
        with Meter(self._address, **self._settings) as meter, self._beside(during):
            while not self._stop.wait(0.002):
                self.report_due(meter)
            before_s = time.monotonic()
            assert meter.flush(60)
            self.flush_s = time.monotonic() - before_s
        return meter.stats()

    async def run_async(self, during: Callable[[], object], sleep: Callable[[float], Awaitable[None]]) -> Stats:
        """Report by the async form, with the event loop's own sleep."""
        self._began_s = time.monotonic()
        async with AsyncMeter(self._address, **self._settings) as meter:
            with self._beside(during):
                while not self._stop.is_set():
                    await sleep(0.002)
                    self.report_due(meter)
                before_s = time.monotonic()
                assert await meter.flush(60)
                self.flush_s = time.monotonic() - before_s
        return meter.stats()

    @contextlib.contextmanager
    def _beside(self, during: Callable[[], object]) -> Iterator[None]:
        with ThreadPoolExecutor(1) as pool:
            going_on = pool.submit(during)
            going_on.add_done_callback(lambda _: self._stop.set())
            yield
            going_on.result()


@pytest.mark.parametrize(
    ("way", "form"),
    [("socket", "sync"), ("http", "sync"), ("socket", "trio"), ("http", "asyncio")],
)
def test_nothing_is_lost_and_nothing_counted_twice_when_the_daemon_is_killed_under_load(
    home: Path, way: str, form: str
) -> None:
    with Daemon(home) as daemon:
        reporting = Reporting(daemon.ingest if way == "socket" else daemon.url, home / "spool")

        def kill_again_and_again() -> None:
            for _ in range(KILLS):
                time.sleep(0.7)
                daemon.kill()
                time.sleep(OUTAGE_S)
                assert reporting.seen.last_error is not None
                daemon.start()
            time.sleep(0.3)

        match form:
            case "sync":
                stats = reporting.run_sync(kill_again_and_again)
            case "asyncio":
                stats = asyncio.run(reporting.run_async(kill_again_and_again, asyncio.sleep))
            case _:
                stats = trio.run(reporting.run_async, kill_again_and_again, trio.sleep)
        recorded = reporting.count
        assert recorded > RATE_PER_S * KILLS * OUTAGE_S
        assert (stats.recorded, stats.sent, stats.lost, stats.refused, stats.pending) == (recorded, recorded, 0, 0, 0)
        summary = daemon.get("/usage/summary")
        assert (summary["total_events"], summary["total_tasks"]) == (recorded, recorded)
        assert summary["total_tokens"] == recorded * (recorded + 1) // 2
        (source,) = daemon.get("/usage/sources")["data"]
        assert source["drift_percent"] in {0, None}
        # Shown by -s; the figures of a long outage.
        figures = f"slowest call {reporting.slowest_s * 1_000:.0f} ms, flush {reporting.flush_s:.1f} s"
        print(f"{way}, {form}: {recorded} events, {source['resent']} of them sent again, {figures}")


def test_the_daemon_takes_every_kind_of_field_and_names_what_it_refuses(home: Path) -> None:
    with Daemon(home) as daemon, Meter(daemon.ingest, agent=AGENT, consumer=CONSUMER, spool=home / "spool") as meter:
        with meter.task(
            task_id="full",
            model="m",
            provider="p",
            project="x",
            action="task.read",
            parent_task_id="t0",
            trace_id="abc",
            labels={"a": "b"},
        ) as task:
            task.tokens(10, 5, cached_in=2, cache_write=1, reasoning=3)
            task.calls(2)
            task.cost("0.0000015")
            task.failed("line one\nline two \ud800")
        meter.record(agent="not a URN", task_id="bad")
        meter.record(task_id="good", model="bad \ud800 text")
        meter.record(task_id="good")
        assert meter.flush()
        assert (meter.stats().sent, meter.stats().refused) == (2, 2)
        rows = {row["task_id"]: row for row in daemon.get("/usage")["data"]}
        assert rows.keys() == {"full", "good"}
        assert rows["full"]["outcome"] == "failed"
        assert rows["full"]["error"] == "line one\nline two ?"
        assert rows["full"]["tokens_in"] == 10
    refused = (home / "spool" / "refused.ndjson").read_text()
    assert "urn:asap:agent:<name>" in refused


def test_a_service_works_under_a_delegation_until_the_budget_is_spent(home: Path) -> None:
    desk, writer = Party("desk"), Party("writer")
    agent = f"""
[[agents]]
id = "{desk.urn}"
url = "http://127.0.0.1:9"
public_key = "{desk.public_key}"
"""

    def app(environ: Any, start_response: Any) -> list[bytes]:
        task = current_task()
        assert task is not None
        task.cost("0.30")
        start_response("200 OK", [])
        return [b"done"]

    with Daemon(home, agent) as daemon, Meter(daemon.ingest, agent=writer.urn, spool=home / "spool") as meter:
        rules = Rules(require_delegation=True, estimate={"cost_usd": "0.50"}, consumer=lambda headers: desk.urn)
        service = WsgiMiddleware(app, meter, rules)
        token = desk.grant(writer, usd=1.0)
        statuses = []
        for _ in range(3):
            status, _, body = wsgi(service, headers={"x-asap-delegation": token})
            statuses.append(status)
            assert meter.flush()
        # 0.30 each: after two of them 0.50 more is too much.
        assert statuses == [200, 200, 403]
        assert json.loads(body)["code"] == "insufficient_budget"
        foreign = desk.grant(Party("other"), usd=1.0)
        assert json.loads(wsgi(service, headers={"x-asap-delegation": foreign})[2])["code"] == "wrong_delegate"
        (shown,) = [row for row in daemon.get("/delegations")["data"] if row["delegate"] == writer.urn]
        assert shown["spent_usd"] == 0.6
        assert shown["reserved_usd"] == 0
        assert meter.stats().refused == 0
