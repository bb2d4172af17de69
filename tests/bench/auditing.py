"""What the audit log costs: `python -m tests.bench.auditing [--entries N]`.

Fills a log through the writer's own code, and measures in one process: what of an event's cost is its audit entry's,
growing the tree, verifying everything, and proofs of inclusion and of consistency.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack, closing
from pathlib import Path
from unittest.mock import patch

import apsw

from asapd.core.merkle import Tree
from asapd.core.usage import Cost, UsageEvent
from asapd.store import prepared, seals, verifying
from asapd.store.database import prepare
from asapd.store.tx import Tx
from asapd.store.units.audit import Seal
from asapd.store.units.exchange import Envelope
from asapd.store.units.usage import RecordUsage
from asapd.store.verifying import Request
from asapd.store.verifying_process import open_alone
from asapd.store.writer import Writer, open_for_writing

BATCH = 5_000
NOW_US = 1_795_169_203_000_000


def main() -> int:
    """Print a line for each figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--entries", type=int, default=200_000)
    entries = parser.parse_args().entries
    with tempfile.TemporaryDirectory(prefix="asapd-bench-") as directory:
        _compare(Path(directory))
        path = Path(directory) / "asapd.db"
        prepare(path)
        with closing(open_for_writing(path)) as connection:
            writer = Writer(connection)
            began = time.perf_counter()
            for first in range(0, entries, BATCH):
                writer.run([Envelope(first, _unit(first, BATCH), False)])
            _say("recorded through the writer", entries, time.perf_counter() - began)
            began = time.perf_counter()
            tree, nodes = Tree(), []
            while tree.size < entries:
                tree, made = seals.grow_step(connection, tree, 4_096)
                nodes += made
            _say("grown into the tree", entries, time.perf_counter() - began)
            writer.run([Envelope(0, Seal(tree.size, tree.root(), nodes, None, NOW_US), False)])
            for reconciles in (False, True):
                with closing(open_alone(path)) as alone:
                    began, began_cpu = time.perf_counter(), time.process_time()
                    found = verifying.report(alone, Request(reconcile=reconciles))
                    took_s, took_cpu_s = time.perf_counter() - began, time.process_time() - began_cpu
                assert found.is_valid, found
                what = "verified and reconciled with their rows" if reconciles else "verified: hashes, chain and tree"
                _say(what, entries, took_s)
                _say("the same by CPU time", entries, took_cpu_s)
            _prove(connection, tree)
    return 0


def _prove(connection: apsw.Connection, tree: Tree) -> None:
    chosen = random.Random(1).sample(range(1, tree.size + 1), 200)
    for what, prove in (
        ("inclusion", lambda seq: seals.inclusion(connection, seq, tree.size)),
        ("consistency", lambda seq: seals.consistency(connection, seq, tree.size)),
    ):
        took_ms = []
        for seq in chosen:
            began = time.perf_counter()
            proof = prove(seq)
            took_ms.append((time.perf_counter() - began) * 1_000)
            assert proof is not None
        print(
            f"a proof of {what} in {tree.size:,} entries: {statistics.median(took_ms):.2f} ms, "
            f"at most {max(took_ms):.2f} ms"
        )


def _unit(first: int, count: int) -> RecordUsage:
    events = [
        UsageEvent(
            f"task-{number}", "urn:asap:agent:worker", "desk", NOW_US + number, 10, 20, 30, 1, id=f"e{number:09}"
        )
        for number in range(first, first + count)
    ]
    return RecordUsage("default", "key:bench", NOW_US + first, events, [Cost(5)] * count)


class _Silent(Tx):
    """A writer's transaction that enters nothing into the log."""

    def enter_all(self, *_: object) -> None:
        """Nothing."""

    def audit_all(self, *_: object) -> None:
        """Nothing."""


def _writing_us(directory: Path, size: int, *, audited: bool, events: int = 40_000) -> float:
    """The writer's CPU time for an event, in commits of `size`."""
    path = directory / f"{size}-{audited}.db"
    path.unlink(missing_ok=True)
    prepare(path)
    with closing(open_for_writing(path)) as connection, ExitStack() as undone:
        writer = Writer(connection)
        if not audited:
            writer._tx = _Silent(connection, os.urandom)  # what a writer without a log would be is not in the product
            for made in ("note_of", "texts_of", "seal"):
                undone.enter_context(patch.object(prepared, made, lambda *_: []))
        units = [Envelope(first, _unit(first, size), False) for first in range(0, events, size)]
        began = time.process_time()
        for unit in units:
            writer.run([unit])
        return (time.process_time() - began) / events * 1e6


def _compare(directory: Path) -> None:
    for size in (32, 1_000):
        pairs = [
            (_writing_us(directory, size, audited=True), _writing_us(directory, size, audited=False)) for _ in range(5)
        ]
        own, bare = (statistics.median(column) for column in zip(*pairs, strict=True))
        ratio = statistics.median(with_it / without for with_it, without in pairs)
        print(
            f"an event in commits of {size}: {own:.1f} us of the writer, {bare:.1f} without the log, {ratio:.2f} times"
        )


def _say(what: str, entries: int, seconds: float) -> None:
    print(f"{entries:,} entries {what}: {entries / seconds:,.0f} a second")


if __name__ == "__main__":
    sys.exit(main())
