"""What much that is stored changes: `python -m tests.bench.stored [--events N]`.

Fills a database through the writer itself, starts a daemon on it, and measures queries while arrays are recorded, the
rate of recording beside that of an empty store in the same run, and the daemon's memory while everything is exported.
"""

from __future__ import annotations

import argparse
import os
import platform
import socket
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

from asapd.core.errors import Refusal
from asapd.core.pricing import PriceTable
from asapd.core.types import DAY_US
from asapd.store.database import prepare
from asapd.store.units.exchange import Envelope
from asapd.store.units.usage import RecordUsage
from asapd.store.writer import Writer, open_for_writing
from asapd.wire.usage import decode_events
from tests.bench.__main__ import quantile_ms
from tests.bench.daemon import Daemon, load, loading, running
from tests.bench.workload import ARRAY, arrays

QUERIES = (
    "/usage/summary",
    "/usage/aggregate?group_by=agent",
    "/usage/aggregate?group_by=day",
    "/usage/aggregate?group_by=agent,day",
    "/usage/aggregate?group_by=day&timezone=Europe/Berlin",
    "/usage?limit=100",
)


def fill(path: Path, events: int) -> None:
    """Store that many events over thirty days."""
    prepare(path)
    connection = open_for_writing(path)
    writer, prices = Writer(connection), PriceTable()
    for number in range(events // ARRAY):
        (body,) = arrays(1, f"fill-{number}")
        decoded = decode_events(body)
        assert not isinstance(decoded, Refusal), decoded
        now_us = time.time_ns() // 1000 - 30 * DAY_US * (events // ARRAY - number) // (events // ARRAY)
        shift_us = time.time_ns() // 1000 - now_us
        moved = [
            type(event)(**{**_fields(event), "timestamp_us": event.timestamp_us - shift_us}) for event in decoded.events
        ]
        costs = [prices.cost(event, prefer="priced") for event in moved]
        (answer,) = writer.run([Envelope(number, RecordUsage("default", "key:bench", now_us, moved, costs), False)])
        assert answer.result.recorded == ARRAY, answer
    connection.close()


def _fields(event: object) -> dict[str, object]:
    return {name: getattr(event, name) for name in event.__struct_fields__}  # type: ignore[attr-defined]


def export(daemon: Daemon) -> tuple[int, float]:
    """Read a whole export; its size in bytes, and by how many MiB the daemon grew meanwhile at most."""
    before = peak = daemon.resident_bytes()
    size = 0
    with socket.create_connection(("127.0.0.1", daemon.port)) as sock:
        request = (
            f"GET /usage/export?format=ndjson HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {daemon.key}\r\n"
        )
        sock.sendall(f"{request}Connection: close\r\n\r\n".encode())
        while data := sock.recv(1 << 20):
            size += len(data)
            peak = max(peak, daemon.resident_bytes())
    return size, (peak - before) / 2**20


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.stored", description=__doc__)
    parser.add_argument("--events", type=int, default=1_000_000, help="how many are stored first")
    parser.add_argument("--arrays", type=int, default=100, help="arrays of a thousand recorded in each measurement")
    parser.add_argument("--dir", type=Path, help="where the databases lie (default: the directory for temporary files)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.dir) as made:
        empty, full = Path(made) / "empty", Path(made) / "full"
        for directory in (empty, full):
            (directory / "state").mkdir(parents=True)
        start_s = time.perf_counter()
        fill(full / "state" / "asapd.db", options.events)
        print(f"filled in {time.perf_counter() - start_s:.0f} s", file=sys.stderr)
        rates: dict[str, float] = {}
        for name, directory in (("an empty store", empty), ("a full store", full)):
            with running(directory) as daemon:
                job = {"kind": "frames", "socket": str(daemon.socket), "connections": 8}
                load(directory, **job, arrays=10, name="warm")
                done = load(directory, **job, arrays=options.arrays, name="rate")
                rates[name] = done["count"] / done["seconds"]
                if directory is full:
                    lines = queries(daemon, directory, job, options.arrays)
                    idle = daemon.resident_bytes() / 2**20
                    size, grown = export(daemon)
    stored = f"{options.events:,} events stored"
    print(f"{os.cpu_count()} cores, Python {platform.python_version()}, {stored}\n")
    print("| what | p50 | p99 |\n|---|---|---|")
    print("\n".join(lines))
    print(
        f"\narrays of a thousand: {rates['a full store']:,.0f} events/s into it, {rates['an empty store']:,.0f} into "
        f"an empty store (ratio {rates['a full store'] / rates['an empty store']:.2f})"
    )
    print(f"export of {size / 2**20:,.0f} MiB: the daemon's memory grew by {grown:.1f} MiB from {idle:.0f}")


def queries(daemon: Daemon, directory: Path, job: dict[str, object], count: int) -> list[str]:
    """How long queries take while arrays are recorded, in milliseconds."""
    lines = []
    for path in QUERIES:
        seconds: list[float] = []
        stop = threading.Event()

        def ask(path: str = path, seconds: list[float] = seconds, stop: threading.Event = stop) -> None:
            while not stop.is_set():
                seconds.append(daemon.get(path)[0])
                time.sleep(0.02)

        asking = threading.Thread(target=ask)
        with loading(directory, **{**job, "arrays": count, "name": path}):
            time.sleep(1)  # the load makes its bodies first
            asking.start()
        stop.set()
        asking.join()
        lines.append(
            f"| GET {path} | {statistics.median(seconds) * 1000:.1f} ms | {quantile_ms(seconds, 0.99):.1f} ms |"
        )
    return lines


if __name__ == "__main__":
    main()
