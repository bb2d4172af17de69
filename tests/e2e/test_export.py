"""A large export: in memory that stays flat, of one moment while ingest goes on, and resumed where it was cut off."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.client import HTTPConnection
from itertools import islice
from pathlib import Path
from typing import Any, Self

import apsw
import pytest

from asapd.core.usage import Cost, UsageEvent
from asapd.store.units.exchange import Envelope
from asapd.store.units.usage import RecordUsage
from asapd.store.writer import Writer, open_for_writing
from tests.e2e.daemon import Daemon

pytestmark = pytest.mark.load

ROWS, COPIES = 5_000, 60
EVENTS = ROWS * COPIES
# The rows are some 180 MB in JSON; pages of 500 rows, buffers of sockets and the caches of SQLite are a tenth of that.
GROWTH_BYTES = 24 * 2**20
AGENT = "urn:asap:agent:worker"


def fill(path: Path) -> None:
    """A store with many rows: some that the writer wrote, and copies of them at other times."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    connection = open_for_writing(path, synchronous="off")
    now_us = int(time.time()) * 1_000_000
    events = [
        UsageEvent(
            task_id=f"task-{number}",
            agent=AGENT,
            consumer="urn:asap:agent:desk",
            timestamp_us=now_us - 10**9 - number * 1_000,
            tokens_in=number,
            id=f"event-{number}",
            model="m",
            error="=cmd()",
            labels={"a": "b"},
        )
        for number in range(ROWS)
    ]
    unit = RecordUsage("default", "key:x", now_us, events, [Cost(4)] * ROWS)
    Writer(connection).run([Envelope(1, unit, False)])
    columns = [row[1] for row in connection.execute("PRAGMA table_info(usage)")]
    others = ", ".join(name for name in columns if name not in {"seq", "timestamp_us"})
    with connection:
        # Every other copy is older than what came before it, so that the order of time is none of commits.
        connection.execute(
            f"WITH RECURSIVE copy (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM copy WHERE n < {COPIES - 1}) "
            f"INSERT INTO usage (seq, timestamp_us, {others}) "
            f"SELECT seq + n * {ROWS}, timestamp_us + iif(n % 2, -n, n) * 10000000, {others} FROM copy, usage "
            f"WHERE seq <= {ROWS} ORDER BY n, seq"
        )
    connection.close()


@pytest.fixture
def daemon() -> Iterator[Daemon]:
    found = Daemon()
    fill(found.state_dir / "asapd.db")
    try:
        yield found.start()
        found.stop()
    finally:
        found.close()


class Export:
    """An export that is being read."""

    def __init__(self, daemon: Daemon, query: str) -> None:
        self._connection = HTTPConnection("127.0.0.1", daemon.port, timeout=60)
        self._connection.request(
            "GET", f"/usage/export?{query}", headers={"Authorization": f"Bearer {daemon.admin_key}"}
        )
        self.response = self._connection.getresponse()
        assert self.response.status == 200
        self.snapshot = int(self.response.headers["asapd-snapshot"])

    def rows(self, most: int | None = None) -> Iterator[tuple[str, int]]:
        """Where each row stands in the order of time, so many of them."""
        for line in islice(self.response, most):
            row = json.loads(line)
            yield row["timestamp"], row["seq"]

    def close(self) -> None:
        """Breaks off, wherever it is."""
        self.response.close()
        self._connection.close()


class Memory:
    """How much real memory a process has, and has had at most, while something goes on."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self.start_bytes = self.most_bytes = self.now_bytes()

    def now_bytes(self) -> int:
        lines = Path(f"/proc/{self._pid}/status").read_text().splitlines()
        (line,) = [line for line in lines if line.startswith("VmRSS")]
        return int(line.split()[1]) * 1024

    def look(self) -> None:
        self.most_bytes = max(self.most_bytes, self.now_bytes())


class Ingest:
    """Reports that go on beside, of times before, within and after those of the export."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.recorded = 0

    def _run(self) -> None:
        connection = HTTPConnection("127.0.0.1", self._daemon.port, timeout=60)
        headers = {"Authorization": f"Bearer {self._daemon.admin_key}", "Content-Type": "application/json"}
        now_s = int(time.time())
        while not self._stop.wait(0.02):
            event: dict[str, Any] = {"task_id": "t", "agent": AGENT, "consumer": "c"}
            batch = [{**event, "timestamp": now_s - back_s} for back_s in (0, 100, 1_000, 1_003, 1_500, 3_000)]
            connection.request("POST", "/usage", json.dumps(batch), headers)
            answer = connection.getresponse()
            assert (answer.status, answer.read()[:1]) == (201, b"{")
            self.recorded += len(batch)
        connection.close()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()


def test_three_hundred_thousand_rows_take_no_more_memory_than_a_few(daemon: Daemon) -> None:
    """And each is in it once, in order, though it was cut off twice and more came all the while."""
    warm = Export(daemon, "")
    assert len(list(warm.rows(5_000))) == 5_000
    warm.close()
    memory = Memory(daemon.pid)
    with Ingest(daemon) as ingest:
        first = Export(daemon, "format=ndjson")
        seen: list[tuple[str, int]] = []
        through = first.snapshot
        assert through >= EVENTS
        for most in (EVENTS // 3, EVENTS // 3, None):
            part = Export(daemon, f"after={seen[-1][1]}&through={through}") if seen else first
            assert part.snapshot == through
            for number, row in enumerate(part.rows(most)):
                seen.append(row)
                if number % 5_000 == 0:
                    memory.look()
            part.close()
    assert ingest.recorded > 0
    assert {seq for _, seq in seen} == set(range(1, through + 1))
    assert len(seen) == through
    assert seen == sorted(seen)
    memory.look()
    assert memory.most_bytes - memory.start_bytes < GROWTH_BYTES
    stored = apsw.Connection(str(daemon.state_dir / "asapd.db"), flags=apsw.SQLITE_OPEN_READONLY)
    assert stored.execute("SELECT count(*) FROM usage").get == EVENTS + ingest.recorded
    stored.close()
    # Shown by -s.
    print(f"grown by {(memory.most_bytes - memory.start_bytes) / 2**20:.1f} MiB over {len(seen)} rows")
