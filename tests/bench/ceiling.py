"""The bare ceiling: what this machine does with nothing of asapd in the way.

The same bodies come over a socket into one writer process, which decodes them with msgspec, refuses repeats by the same
key of their identity, keeps one row an event under two indexes, by agent and by consumer in the order of time, and an
hourly sum, and commits durably. No HTTP, no validation beyond types, no price, no audit log, no ledger, no answer but a
count.
"""

from __future__ import annotations

import os
import socket
import statistics
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import apsw
import msgspec

from asapd.core.usage import identity_key
from tests.bench.workload import ARRAY, arrays

HEADER = 4
# As many rows as asapd puts into one commit.
BODIES_PER_COMMIT = 5


class Metrics(msgspec.Struct, gc=False):
    """The counts of an event."""

    tokens_in: int
    tokens_out: int
    duration_ms: int
    api_calls: int


class Event(msgspec.Struct, gc=False):
    """An event as it is sent."""

    id: str
    task_id: str
    agent: str
    consumer: str
    metrics: Metrics
    timestamp: int
    model: str
    outcome: str


def _open(path: Path) -> apsw.Connection:
    connection = apsw.Connection(str(path))
    connection.pragma("journal_mode", "wal")
    connection.pragma("synchronous", "full")
    connection.pragma("cache_size", -65_536)
    connection.execute(
        "CREATE TABLE IF NOT EXISTS usage (seq INTEGER PRIMARY KEY, id TEXT, task_id TEXT, agent TEXT, consumer TEXT, "
        "timestamp INTEGER, tokens_in INTEGER, tokens_out INTEGER, duration_ms INTEGER, api_calls INTEGER, model TEXT, "
        "outcome TEXT) STRICT;"
        "CREATE INDEX IF NOT EXISTS by_agent ON usage (agent, timestamp);"
        "CREATE INDEX IF NOT EXISTS by_consumer ON usage (consumer, timestamp);"
        "CREATE TABLE IF NOT EXISTS identity (key BLOB PRIMARY KEY) STRICT, WITHOUT ROWID;"
        "CREATE TABLE IF NOT EXISTS hour (hour INTEGER, agent TEXT, events INTEGER, tokens INTEGER, "
        "PRIMARY KEY (hour, agent)) STRICT, WITHOUT ROWID"
    )
    return connection


def _record(connection: apsw.Connection, bodies: list[bytes], decoder: msgspec.json.Decoder[list[Event]]) -> None:
    events = [event for body in bodies for event in decoder.decode(body)]
    keys = [identity_key("default", event.agent, "", event.id) for event in events]
    with connection:
        known = {
            row[0]
            for row in connection.execute(
                "SELECT key FROM identity WHERE key IN (SELECT unhex(value) FROM json_each(?))",
                (msgspec.json.encode([key.hex() for key in keys]).decode(),),
            )
        }
        fresh = [(key, event) for key, event in zip(keys, events, strict=True) if key not in known]
        connection.executemany("INSERT INTO identity VALUES (?)", sorted((key,) for key, _ in fresh))
        connection.executemany(
            "INSERT INTO usage VALUES (NULL,?,?,?,?,?,?,?,?,?,?,?)",
            [
                (
                    event.id,
                    event.task_id,
                    event.agent,
                    event.consumer,
                    event.timestamp,
                    event.metrics.tokens_in,
                    event.metrics.tokens_out,
                    event.metrics.duration_ms,
                    event.metrics.api_calls,
                    event.model,
                    event.outcome,
                )
                for _, event in fresh
            ],
        )
        counts: Counter[tuple[int, str]] = Counter()
        tokens: Counter[tuple[int, str]] = Counter()
        for _, event in fresh:
            key = (event.timestamp // 3600, event.agent)
            counts[key] += 1
            tokens[key] += event.metrics.tokens_in + event.metrics.tokens_out
        connection.executemany(
            "INSERT INTO hour VALUES (?,?,?,?) ON CONFLICT DO UPDATE SET events = events + excluded.events, "
            "tokens = tokens + excluded.tokens",
            [(*key, count, tokens[key]) for key, count in counts.items()],
        )


def _serve(descriptor: int, path: Path) -> None:
    connection = _open(path)
    decoder = msgspec.json.Decoder(list[Event])
    with socket.socket(fileno=descriptor) as sock, sock.makefile("rb") as stream:
        ended = False
        while not ended:
            bodies: list[bytes] = []
            while len(bodies) < BODIES_PER_COMMIT:
                header = stream.read(HEADER)
                if not header:
                    ended = True
                    break
                bodies.append(stream.read(int.from_bytes(header, "big")))
            if bodies:
                _record(connection, bodies, decoder)
                sock.sendall(bytes([len(bodies)]))
    connection.close()


def events_per_second(path: Path, count: int, name: str, *, random_ids: bool = False) -> float:
    """Record `count` arrays in a writer process and return the rate; `path` is a database, made when missing."""
    bodies = arrays(count, name, random_ids=random_ids)
    os.sync()  # or it pays for what was written before it
    ours, theirs = socket.socketpair()
    with theirs:
        command = [sys.executable, "-m", "tests.bench.ceiling", str(theirs.fileno()), str(path)]
        writer = subprocess.Popen(command, pass_fds=(theirs.fileno(),))
    with ours:
        # One commit ahead of the clock: the process is up and its file open.
        _exchange(ours, arrays(BODIES_PER_COMMIT, f"{name}-first"))
        start_s = time.perf_counter()
        _exchange(ours, bodies)
        seconds = time.perf_counter() - start_s
    writer.wait()
    return count * ARRAY / seconds


def _exchange(sock: socket.socket, bodies: list[bytes]) -> None:
    answered = 0
    for body in bodies:
        sock.sendall(len(body).to_bytes(HEADER, "big") + body)
    while answered < len(bodies):
        answered += sum(sock.recv(1 << 16))


def commit_seconds(path: Path, count: int) -> list[float]:
    """How long each of `count` durable commits of one small row takes."""
    connection = apsw.Connection(str(path))
    connection.pragma("journal_mode", "wal")
    connection.pragma("synchronous", "full")
    connection.execute("CREATE TABLE IF NOT EXISTS t (x INTEGER PRIMARY KEY, y BLOB)")
    seconds = []
    for number in range(count):
        start_s = time.perf_counter()
        with connection:
            connection.execute("INSERT INTO t (y) VALUES (?)", (number.to_bytes(100, "big"),))
        seconds.append(time.perf_counter() - start_s)
    connection.close()
    return seconds


def median_commit_s(path: Path, count: int) -> float:
    """The median of that."""
    return statistics.median(commit_seconds(path, count))


if __name__ == "__main__":
    _serve(int(sys.argv[1]), Path(sys.argv[2]))
