"""Benchmarks: `python -m tests.bench [--quick]` prints medians over rounds, beside the bare ceiling of the same run.

Every round measures everything once, one after the other, so that a machine that slows down slows all alike.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import platform
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nacl.signing import SigningKey

from asapd.core.delegation import Claims
from asapd.core.types import DAY_US, SECOND_US
from asapd.wire.token import sign
from tests.bench.ceiling import events_per_second, median_commit_s

ROOT, MIDDLE, LEAF = (f"urn:asap:agent:{name}" for name in ("root", "middle", "leaf"))
KEYS = {ROOT: SigningKey(b"r" * 32), MIDDLE: SigningKey(b"m" * 32)}


@dataclass(frozen=True)
class Size:
    """How much one round sends."""

    rounds: int
    arrays: int
    singles: int
    authorizations: int
    commits: int


FULL = Size(rounds=5, arrays=40, singles=20_000, authorizations=2_000, commits=300)
QUICK = Size(rounds=2, arrays=10, singles=3_000, authorizations=300, commits=50)


@dataclass
class Daemon:
    """A running daemon, and how to reach it."""

    port: int
    socket: Path
    key: str


@dataclass
class Figures:
    """What each round measured, by name."""

    values: dict[str, list[float]] = field(default_factory=dict)

    def add(self, name: str, value: float) -> None:
        """One more round."""
        self.values.setdefault(name, []).append(value)

    def median(self, name: str) -> float:
        """Over all rounds."""
        return statistics.median(self.values[name])

    def ratio(self, name: str, ceiling: str) -> float:
        """The median of the rounds' own ratios: within a round both met the same machine."""
        pairs = zip(self.values[name], self.values[ceiling], strict=True)
        return statistics.median(own / bare for own, bare in pairs)

    def spread(self, name: str) -> str:
        """Lowest and highest round."""
        return f"{_text(min(self.values[name]))} to {_text(max(self.values[name]))}"


def _text(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.2f}"


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


@contextmanager
def running(directory: Path) -> Iterator[Daemon]:
    """A daemon with durable commits in a directory of its own."""
    port = _free_port()
    public = {agent: base64.b64encode(bytes(key.verify_key)).decode() for agent, key in KEYS.items()}
    (directory / "asapd.toml").write_text(
        f'[http]\nbind = ["127.0.0.1:{port}"]\n[store]\nsynchronous = "full"\n'
        f'[delegation]\nroots = ["{ROOT}"]\n'
        + "".join(
            f'[[agents]]\nid = "{agent}"\nurl = "http://127.0.0.1:9"\npublic_key = "{key}"\n'
            for agent, key in public.items()
        )
        + '[prober]\ninterval = "1h"\n',
        encoding="utf-8",
    )
    state = directory / "state"
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "asapd", "run"),
                *("--config", str(directory / "asapd.toml"), "--state-dir", str(state)),
            ],
            env={**os.environ, "RUNTIME_DIRECTORY": str(directory / "run")},
            stderr=log,
        )
    try:
        _wait_ready(process, directory)
        yield Daemon(port, directory / "run" / "ingest.sock", (state / "admin.key").read_text().strip())
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


def _wait_ready(process: subprocess.Popen[bytes], directory: Path) -> None:
    for _ in range(600):
        if b"serving on" in (directory / "log").read_bytes():
            return
        if process.poll() is not None:
            break
        time.sleep(0.05)
    raise SystemExit(f"the daemon did not start: {(directory / 'log').read_text()}")


def load(directory: Path, **job: Any) -> dict[str, Any]:
    """Run a job in a load process."""
    (directory / "job.json").write_text(json.dumps(job))
    ended = subprocess.run(
        [sys.executable, "-m", "tests.bench.load", f"@{directory / 'job.json'}"],
        stdout=subprocess.PIPE,
        check=True,
    )
    measured: dict[str, Any] = json.loads(ended.stdout)
    if measured["failed"]:
        raise SystemExit(f"refused under load: {measured['failed']}")
    return measured


def chain() -> str:
    """A token of depth two that allows much."""
    now_us = int(time.time()) * SECOND_US
    terms = (None, 10**12, now_us, now_us + DAY_US)
    parent = sign(Claims("bench-root", ROOT, MIDDLE, ("task.*",), *terms), KEYS[ROOT])
    return sign(Claims("bench-leaf", MIDDLE, LEAF, ("task.*",), *terms), KEYS[MIDDLE], parent=parent)


def measure(daemon: Daemon, directory: Path, token: str, size: Size, number: int, figures: Figures) -> None:
    """One round of everything."""
    name = f"r{number}"
    http = {"kind": "http", "host": "127.0.0.1", "port": daemon.port, "key": daemon.key}
    frames = {"kind": "frames", "socket": str(daemon.socket)}
    figures.add("ceiling", events_per_second(directory / "ceiling.db", size.arrays, f"{name}c"))
    done = load(directory, **http, path="/usage", connections=8, arrays=size.arrays, name=f"{name}h")
    figures.add("http", size.arrays * 1000 / done["seconds"])
    done = load(directory, **frames, connections=8, arrays=size.arrays, name=f"{name}f")
    figures.add("frames", done["count"] / done["seconds"])
    done = load(directory, **frames, connections=64, singles=size.singles, name=f"{name}s")
    figures.add("singles", done["count"] / done["seconds"])
    bodies = [
        json.dumps({"token": token, "task_id": f"{name}-{task}", "estimate": {"cost_usd": "0.0001"}})
        for task in range(size.authorizations)
    ]
    done = load(directory, **http, path="/delegations/authorize", connections=16, bodies=bodies)
    latencies_ms = sorted(latency_s * 1000 for latency_s in done["latencies_s"])
    figures.add("authorize p50", statistics.median(latencies_ms))
    figures.add("authorize p99", latencies_ms[int(len(latencies_ms) * 0.99)])
    figures.add("authorize rate", len(latencies_ms) / done["seconds"])
    figures.add("commit", median_commit_s(directory / "commit.db", size.commits) * 1000)


def table(figures: Figures) -> str:
    """The figures as a table in Markdown."""
    rows = [
        ("events/s over HTTP, arrays of 1000, 8 connections", "http", "ceiling"),
        ("events/s over the ingest socket, arrays of 1000, 8 connections", "frames", "ceiling"),
        ("events/s over the ingest socket, single events, 64 connections", "singles", "ceiling"),
        ("authorize over HTTP, 16 clients, chain of 2: p50, ms", "authorize p50", "commit"),
        ("authorize over HTTP, 16 clients, chain of 2: p99, ms", "authorize p99", "commit"),
    ]
    lines = ["| what | asapd | rounds | ceiling | ratio |", "|---|---|---|---|---|"]
    for what, name, ceiling in rows:
        own, bare, ratio = figures.median(name), figures.median(ceiling), figures.ratio(name, ceiling)
        lines.append(f"| {what} | {_text(own)} | {figures.spread(name)} | {_text(bare)} | {_text(ratio)} |")
    lines.append(
        f"| authorizations/s of the same run | {_text(figures.median('authorize rate'))} | "
        f"{figures.spread('authorize rate')} | | |"
    )
    lines.append(
        f"| ceiling: events/s, bare writer | | {figures.spread('ceiling')} | {_text(figures.median('ceiling'))} | |"
    )
    lines.append(
        f"| ceiling: one durable commit, ms | | {figures.spread('commit')} | {_text(figures.median('commit'))} | |"
    )
    return "\n".join(lines)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two short rounds, to see that it runs")
    parser.add_argument("--dir", type=Path, help="where the databases lie (default: the directory for temporary files)")
    options = parser.parse_args()
    size = QUICK if options.quick else FULL
    figures = Figures()
    with tempfile.TemporaryDirectory(dir=options.dir) as made:
        directory = Path(made)
        with running(directory) as daemon:
            token = chain()
            # A round ahead of the count: caches filled, files grown, everything imported.
            measure(daemon, directory, token, QUICK, -1, Figures())
            for number in range(size.rounds):
                measure(daemon, directory, token, size, number, figures)
                print(f"round {number + 1} of {size.rounds}", file=sys.stderr)
    print(f"{os.cpu_count()} cores, Python {platform.python_version()}, medians of {size.rounds} rounds\n")
    print(table(figures))


if __name__ == "__main__":
    main()
