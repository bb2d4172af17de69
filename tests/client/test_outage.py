"""The daemon is killed while events flow: nothing is lost, nothing is counted twice."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from asapd.client import Meter, Rules, WsgiMiddleware, current_task
from tests.client.daemon import Daemon
from tests.client.test_middleware import wsgi
from tests.e2e.tokens import Party

AGENT, CONSUMER = "urn:asap:agent:writer", "urn:asap:agent:desk"
RATE_PER_S = 500
# With ASAPD_LONG_OUTAGE=30 the daemon is away for half a minute.
OUTAGE_S = float(os.environ.get("ASAPD_LONG_OUTAGE", "1"))


@pytest.mark.parametrize("way", ["socket", "http"])
def test_nothing_is_lost_and_nothing_counted_twice_when_the_daemon_is_killed_under_load(home: Path, way: str) -> None:
    with Daemon(home) as daemon:
        address = daemon.ingest if way == "socket" else daemon.url
        meter = Meter(address, agent=AGENT, consumer=CONSUMER, spool=home / "spool", batch_age_s=0.05)
        recorded = 0
        stop = threading.Event()

        def work() -> None:
            nonlocal recorded
            began_s = time.monotonic()
            while not stop.is_set():
                due = int((time.monotonic() - began_s) * RATE_PER_S)
                while recorded < due:
                    recorded += 1
                    assert meter.record(tokens_in=recorded) is not None
                stop.wait(0.002)

        worker = threading.Thread(target=work)
        worker.start()
        try:
            for _ in range(2):
                time.sleep(0.7)
                daemon.kill()
                time.sleep(OUTAGE_S)
                assert meter.stats().last_error is not None
                daemon.start()
            time.sleep(0.3)
        finally:
            stop.set()
            worker.join()
        assert meter.flush(60)
        stats = meter.stats()
        assert (stats.recorded, stats.sent, stats.lost, stats.refused, stats.pending) == (recorded, recorded, 0, 0, 0)
        meter.close()
        assert recorded > RATE_PER_S
        summary = daemon.get("/usage/summary")
        assert summary["total_tasks"] == recorded
        assert summary["total_tokens"] == recorded * (recorded + 1) // 2


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
