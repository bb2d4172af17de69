"""What the audit log costs: `python -m tests.bench.auditing [--entries N]`.

Fills a log through the writer's own code, and measures in one process: growing the tree, verifying everything, and a
proof of inclusion.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path

from asapd.core.merkle import Tree
from asapd.core.usage import Cost, UsageEvent
from asapd.store import seals, verifying
from asapd.store.database import prepare
from asapd.store.units.audit import Seal
from asapd.store.units.exchange import Envelope
from asapd.store.units.usage import RecordUsage
from asapd.store.verifying import Request
from asapd.store.writer import Writer, open_for_writing

BATCH = 5_000
NOW_US = 1_795_169_203_000_000


def main() -> int:
    """Print a line for each figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--entries", type=int, default=200_000)
    entries = parser.parse_args().entries
    with tempfile.TemporaryDirectory(prefix="asapd-bench-") as directory:
        path = Path(directory) / "asapd.db"
        prepare(path)
        with closing(open_for_writing(path)) as connection:
            writer = Writer(connection)
            began = time.perf_counter()
            for first in range(0, entries, BATCH):
                events = [
                    UsageEvent(f"task-{number}", "urn:asap:agent:worker", "desk", NOW_US + number, 10, 20, 30, 1)
                    for number in range(first, first + BATCH)
                ]
                unit = RecordUsage("default", "key:bench", NOW_US + first, events, [Cost(5)] * BATCH)
                writer.run([Envelope(first, unit, False)])
            _say("recorded through the writer", entries, time.perf_counter() - began)
            began = time.perf_counter()
            tree, nodes = Tree(), []
            while tree.size < entries:
                tree, made = seals.grow_step(connection, tree, 4_096)
                nodes += made
            _say("grown into the tree", entries, time.perf_counter() - began)
            writer.run([Envelope(0, Seal(tree.size, tree.root(), nodes, None, NOW_US), False)])
            for reconciles in (False, True):
                began = time.perf_counter()
                found = verifying.report(connection, Request(reconcile=reconciles))
                assert found.is_valid, found
                what = "verified and reconciled with their rows" if reconciles else "verified: hashes, chain and tree"
                _say(what, entries, time.perf_counter() - began)
            took_ms = []
            for seq in random.Random(1).sample(range(1, entries + 1), 200):
                began = time.perf_counter()
                proof = seals.inclusion(connection, seq, entries)
                took_ms.append((time.perf_counter() - began) * 1_000)
                assert proof is not None
                assert proof.root == tree.root()
            print(f"a proof of inclusion: {statistics.median(took_ms):.2f} ms, at most {max(took_ms):.2f} ms")
    return 0


def _say(what: str, entries: int, seconds: float) -> None:
    print(f"{entries:,} entries {what}: {entries / seconds:,.0f} a second")


if __name__ == "__main__":
    sys.exit(main())
