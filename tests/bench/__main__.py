"""Benchmarks: `python -m tests.bench [--quick]` prints medians over rounds, beside the bare ceiling of the same run.

Every round measures everything once, one after the other, so that a machine that slows down slows all alike.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from tests.bench.bare_http import KINDS as BARE
from tests.bench.bare_http import bare_lane
from tests.bench.ceiling import events_per_second, median_commit_s
from tests.bench.daemon import Daemon, chain, lag_p99_ms, load, loading, running
from tests.bench.validation import measure as measure_validation


@dataclass(frozen=True)
class Size:
    """How much one round sends."""

    rounds: int
    arrays: int
    singles: int
    authorizations: int
    commits: int


FULL = Size(rounds=5, arrays=120, singles=20_000, authorizations=2_000, commits=300)
QUICK = Size(rounds=2, arrays=10, singles=3_000, authorizations=300, commits=50)


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


def measure(daemon: Daemon, directory: Path, token: str, size: Size, number: int, figures: Figures) -> None:
    """One round of everything."""
    name = f"r{number}"
    http = {"kind": "http", "host": "127.0.0.1", "port": daemon.port, "key": daemon.key}
    frames = {"kind": "frames", "socket": str(daemon.socket)}
    lane = {"kind": "requests", "socket": str(daemon.socket), "path": "/usage", "connections": 64}
    ceiling = events_per_second(directory / "ceiling.db", size.arrays, f"{name}c")
    random = events_per_second(directory / "random.db", size.arrays, f"{name}q", random_ids=True)
    figures.add("random ceiling", random)
    done = load(directory, **http, path="/usage", connections=8, arrays=size.arrays, name=f"{name}h")
    figures.add("http", size.arrays * 1000 / done["seconds"])
    before = daemon.lag()
    done = load(directory, **frames, connections=8, arrays=size.arrays, name=f"{name}f")
    figures.add("lag p99", lag_p99_ms(before, daemon.lag()))
    figures.add("frames", done["count"] / done["seconds"])
    # Before and behind what is compared with it: it differs most of all.
    figures.add("ceiling", (ceiling + events_per_second(directory / "ceiling.db", size.arrays, f"{name}e")) / 2)
    done = load(directory, **frames, connections=8, arrays=size.arrays, random_ids=True, name=f"{name}v")
    figures.add("random", done["count"] / done["seconds"])
    done = load(directory, **frames, connections=64, singles=size.singles, name=f"{name}s")
    figures.add("singles", done["count"] / done["seconds"])
    done = load(directory, **lane, singles=size.singles, name=f"{name}l")
    figures.add("lane", done["count"] / done["seconds"])
    figures.add("lane p99", quantile_ms(done["latencies_s"], 0.99))
    requests = {"kind": "requests", "path": "/usage", "connections": 64, "singles": size.singles}
    for kind in BARE:
        with bare_lane(kind, directory / "bare.sock") as bare:
            done = load(directory, **requests, **bare, name=f"{name}b")
        figures.add(f"{kind} lane", done["count"] / done["seconds"])
    tcp = {"host": "127.0.0.1", "port": daemon.lane, "key": daemon.key}
    done = load(directory, **requests, **tcp, name=f"{name}t")
    figures.add("tcp lane", done["count"] / done["seconds"])
    with bare_lane("seeing") as bare:
        done = load(directory, **requests, **bare, name=f"{name}b")
    figures.add("seeing tcp lane", done["count"] / done["seconds"])
    authorize = {"path": "/delegations/authorize", "connections": 16}
    done = load(directory, **http, **authorize, bodies=decisions(token, f"{name}d", size.authorizations))
    figures.add("authorize p50", quantile_ms(done["latencies_s"], 0.5))
    figures.add("authorize p99", quantile_ms(done["latencies_s"], 0.99))
    done = load(directory, **{**lane, **authorize}, bodies=decisions(token, f"{name}i", size.authorizations))
    figures.add("decide p50", quantile_ms(done["latencies_s"], 0.5))
    figures.add("decide p99", quantile_ms(done["latencies_s"], 0.99))
    figures.add("decide rate", len(done["latencies_s"]) / done["seconds"])
    with loading(directory, **frames, connections=8, arrays=size.arrays, name=f"{name}g"):
        done = load(directory, **{**lane, **authorize}, bodies=decisions(token, f"{name}u", size.authorizations // 4))
    figures.add("busy p50", quantile_ms(done["latencies_s"], 0.5))
    figures.add("busy p99", quantile_ms(done["latencies_s"], 0.99))
    figures.add("commit", median_commit_s(directory / "commit.db", size.commits) * 1000)
    figures.add("memory", daemon.resident_bytes() / 2**20)
    validation = measure_validation(size.commits * 5)
    figures.add("bare signatures", validation.bare_us)
    figures.add("validate cold", validation.cold_us)
    figures.add("validate warm", validation.warm_us)


def decisions(token: str, name: str, count: int) -> list[str]:
    """Bodies that ask for an authorisation, each of a task of its own."""
    return [
        json.dumps({"token": token, "task_id": f"{name}-{task}", "estimate": {"cost_usd": "0.0001"}})
        for task in range(count)
    ]


def quantile_ms(seconds: list[float], share: float) -> float:
    """In milliseconds."""
    return sorted(seconds)[int((len(seconds) - 1) * share)] * 1000


def table(figures: Figures) -> str:
    """The figures as a table in Markdown."""
    rows = [
        ("events/s over HTTP, arrays of 1000, 8 connections", "http", "ceiling"),
        ("events/s over the ingest socket, arrays of 1000, 8 connections", "frames", "ceiling"),
        ("the same, random ids", "random", "random ceiling"),
        ("events/s over the ingest socket, single events as frames, 64 connections", "singles", "ceiling"),
        ("events/s over the fast lane, single events as requests, 64 connections", "lane", "seeing lane"),
        ("the same, beside a listener that looks at nothing but bodies", "lane", "blind lane"),
        ("the same over TCP, with a key", "tcp lane", "seeing tcp lane"),
        ("events/s over the fast lane: p99, ms", "lane p99", "commit"),
        ("authorize over HTTP, 16 clients, chain of 2: p50, ms", "authorize p50", "commit"),
        ("the same: p99, ms", "authorize p99", "commit"),
        ("authorize over the ingest socket, 16 clients: p50, ms", "decide p50", "commit"),
        ("the same: p99, ms", "decide p99", "commit"),
        ("the same while arrays are recorded: p50, ms", "busy p50", "commit"),
        ("the same while arrays are recorded: p99, ms", "busy p99", "commit"),
        ("validation in process, chain of 3 never seen, us", "validate cold", "bare signatures"),
        ("the same, seen before, us", "validate warm", "bare signatures"),
    ]
    lines = ["| what | asapd | rounds | ceiling | ratio |", "|---|---|---|---|---|"]
    for what, name, ceiling in rows:
        own, bare, ratio = figures.median(name), figures.median(ceiling), figures.ratio(name, ceiling)
        lines.append(f"| {what} | {_text(own)} | {figures.spread(name)} | {_text(bare)} | {_text(ratio)} |")
    for what, name in (
        ("authorizations/s over the ingest socket", "decide rate"),
        ("event loop lag while arrays are recorded: p99, ms, at most", "lag p99"),
        ("memory of the daemon after a round, MiB", "memory"),
        ("ceiling: events/s, bare writer", "ceiling"),
        ("ceiling: events/s, bare writer, random ids", "random ceiling"),
        ("ceiling: requests/s, bare lane", "seeing lane"),
        ("ceiling: requests/s, bare lane that looks at nothing but bodies", "blind lane"),
        ("ceiling: requests/s, bare lane over TCP", "seeing tcp lane"),
        ("ceiling: one durable commit, ms", "commit"),
        ("ceiling: three bare signatures, us", "bare signatures"),
    ):
        lines.append(f"| {what} | {_text(figures.median(name))} | {figures.spread(name)} | | |")
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
