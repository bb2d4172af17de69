"""Authorisations over the ingest socket, idle and during full ingest: `python -m tests.bench.decisions`.

Sixteen clients, one request at a time each, a chain of three, durable commits. Every round measures both, beside the
bare durable commit of the same minute.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from nacl.signing import SigningKey

from asapd.core.delegation import Claims
from asapd.core.types import DAY_US, SECOND_US
from asapd.wire.token import sign
from tests.bench.__main__ import Figures
from tests.bench.ceiling import median_commit_s
from tests.bench.daemon import KEYS, LEAF, MIDDLE, ROOT, Daemon, load, running

CLIENTS = 16
WORKER = "urn:asap:agent:worker"
LEAF_KEY = SigningKey(b"l" * 32)


def chain() -> str:
    """A token of depth three that allows much."""
    now_us = int(time.time()) * SECOND_US
    terms = (None, 10**12, now_us, now_us + DAY_US)
    root = sign(Claims("decide-root", ROOT, MIDDLE, ("task.*",), *terms), KEYS[ROOT])
    middle = sign(Claims("decide-middle", MIDDLE, LEAF, ("task.*",), *terms), KEYS[MIDDLE], parent=root)
    return sign(Claims("decide-leaf", LEAF, WORKER, ("task.*",), *terms), LEAF_KEY, parent=middle)


def authorize(daemon: Daemon, directory: Path, token: str, name: str, count: int) -> dict[str, float]:
    """Percentiles in milliseconds, and decisions a second."""
    bodies = [
        json.dumps({"token": token, "task_id": f"{name}-{task}", "estimate": {"cost_usd": "0.0001"}})
        for task in range(count)
    ]
    done = load(
        directory,
        kind="requests",
        socket=str(daemon.socket),
        path="/delegations/authorize",
        connections=CLIENTS,
        bodies=bodies,
    )
    # The first of each client meet a load process that is still starting, on the cores that the daemon runs on.
    latencies_ms = sorted(latency_s * 1000 for latency_s in done["latencies_s"][4 * CLIENTS :])
    return {
        "p50": statistics.median(latencies_ms),
        "p99": latencies_ms[int(len(latencies_ms) * 0.99)],
        "max": latencies_ms[-1],
        "rate": done["count"] / done["seconds"],
    }


def ingest(daemon: Daemon, directory: Path, name: str, arrays: int) -> subprocess.Popen[bytes]:
    """Full ingest in a process of its own, frames of a thousand events on eight connections, once it has begun."""
    job, begun = directory / "ingest.json", directory / f"begun-{name}"
    said = {"connections": 8, "arrays": arrays, "name": name, "begun": str(begun)}
    job.write_text(json.dumps({"kind": "frames", "socket": str(daemon.socket), **said}))
    loading = subprocess.Popen([sys.executable, "-m", "tests.bench.load", f"@{job}"], stdout=subprocess.PIPE)
    while not begun.exists():  # its events are made before the first is sent
        time.sleep(0.05)
    time.sleep(1)
    return loading


def measure(daemon: Daemon, directory: Path, token: str, name: str, count: int, arrays: int, figures: Figures) -> None:
    """One round: idle, then while ingest runs."""
    for what, value in authorize(daemon, directory, token, f"{name}i", count).items():
        figures.add(f"idle {what}", value)
    figures.add("commit", median_commit_s(directory / "commit.db", 50) * 1000)
    loading = ingest(daemon, directory, f"{name}l", arrays)
    for what, value in authorize(daemon, directory, token, f"{name}b", count // 2).items():
        figures.add(f"ingest {what}", value)
    still = loading.poll() is None
    loading.wait()
    if not still:
        print(f"ingest ended before the decisions of round {name} did: send more arrays", file=sys.stderr)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.decisions", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--count", type=int, default=2_000)
    parser.add_argument("--arrays", type=int, default=400, help="of a thousand events, to last beyond the decisions")
    options = parser.parse_args()
    figures = Figures()
    KEYS[LEAF] = LEAF_KEY
    with tempfile.TemporaryDirectory() as made:
        directory = Path(made)
        with running(directory) as daemon:
            token = chain()
            authorize(daemon, directory, token, "warm", 200)
            for number in range(options.rounds):
                measure(daemon, directory, token, f"r{number}", options.count, options.arrays, figures)
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, medians of {options.rounds} rounds")
    for name in figures.values:
        print(f"{name:12} {figures.median(name):9.2f}   {figures.spread(name)}")


if __name__ == "__main__":
    main()
