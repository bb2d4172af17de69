"""The one writer: runs units of work in group commits, and the process that does so in production.

The process reads envelopes from a socket, takes all that wait (decisions first, then ingest up to a
number of rows), commits once, and answers. It ends when the socket closes, after finishing its commit;
it ignores SIGTERM and SIGINT, because its daemon decides when it is done.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import signal
import socket
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import wait
from itertools import takewhile
from pathlib import Path
from typing import Any

import apsw
import msgspec
from nacl.signing import SigningKey

from asapd.core.audit import Head, head_behind
from asapd.core.delegation import Denied
from asapd.core.errors import Refusal
from asapd.core.masking import compiled
from asapd.core.types import SECOND_US
from asapd.core.usage import past_64_bits
from asapd.store import handlers, usage, usage_behind
from asapd.store.authorizing_together import authorize_together
from asapd.store.beside import Beside
from asapd.store.folding import Folding
from asapd.store.frames import Frames
from asapd.store.giving_way import be_batch_work
from asapd.store.migrations import migrate
from asapd.store.overwriting import overwrite_what_goes
from asapd.store.prepared import RECORDED, Prepared, prepare, suppose
from asapd.store.tx import RefuseError, Tx
from asapd.store.units.delegations import AuthorizationDenied, Reserve
from asapd.store.units.exchange import Answer, AnyResult, Envelope, Idempotency
from asapd.store.units.unit import Failed, NotWritten
from asapd.store.units.usage import RecordTelemetry, RecordUsage, UsageConflict
from asapd.wire.log_lines import JsonFormatter, TerminalFormatter

ROWS_PER_COMMIT = 5_000
"""Beyond this a commit gains nothing more per row and only makes decisions wait longer."""

BUSY = 8
"""Units in a commit from which on the next one is worth a wait: fewer may be all the clients there are."""
BUSY_WAIT_US = 3_000
"""The longest such wait: a commit on a common disk takes as long."""
BUSY_GAP_US = 300
"""The wait ends when nothing comes for so long; the daemon needs a third of it for a single event."""

MUCH_ROWS = 8
"""Commits of so many are of much reporting, if no decision comes. Woken, the writer then lets the daemon end what it is
at instead of taking its processor: a twentieth more is recorded. No lone event or decision is to wait for that."""

LARGE_ROWS = 500
"""A commit of so many takes long enough to read and prepare the next one meanwhile."""

SWITCH_S = 0.0001
"""What ends a transaction runs beside the preparing of the next, and needs the interpreter for a moment between two
statements: with Python's own 5 ms a commit waited for that longer than for the disk."""

LOOK_S = 0.001
"""How long the next commit is not looked for while the disk is at work and nothing had come for it."""

ROWS_PER_STEP = 1_000
"""A decision that comes in the middle of a commit waits for this many rows at most: some 15 ms."""

SMALL_S = 1.0
"""For so long after a decision a commit takes in a step of ingest at most, and nothing is done beside it: the next one
comes soon, and would wait for what all the rows before it write and for what is decoded."""

DECISIONS_PER_COMMIT = 64
"""With so many in a commit it no longer waits for those that come meanwhile: they take some 6 ms."""

WARY_COMMITS = 32
"""So many have a savepoint for each report after one that had to begin again because a report was refused: who is
refused all the time has one commit in 33 done twice, and the others cost a tenth more."""

CACHE_KIB = 16_384
"""What is kept of the file, twice what the largest commit changes. After most commits SQLite looks at every page of it:
it moves pages by way of number 262 145, and then drops from its cache what lies behind the end of the file. With 64 MiB
commits of 32 events took 1.3 times the time."""

STATEMENTS = 256
"""Places for prepared statements. Each row of an `executemany` takes a new one and drops what was in it (APSW 3.54):
with the usual 100, a commit of 32 events prepared all of its thirteen statements again, a quarter of what it cost. All
are looked through for each, so that with 1 024 that was a twentieth of it."""

MASKS = "ASAPD_MASKS"
"""The variable that hands the patterns of `audit.mask` down, as a JSON list: arguments are everybody's to read."""

_log = logging.getLogger("asapd.store.writer")
# A no is judged afresh when it is asked for again.
_NOT_KEPT = (Refusal, Denied, AuthorizationDenied, UsageConflict)
_result_encoder = msgspec.msgpack.Encoder()
_result_decoder: msgspec.msgpack.Decoder[AnyResult] = msgspec.msgpack.Decoder(AnyResult)


def open_for_writing(path: Path, *, synchronous: str = "full", key: SigningKey | None = None) -> apsw.Connection:
    """The write connection: WAL, 16 MiB cache, autocheckpoint at 16 000 pages, schema up to date.

    `key` is the daemon's, which signs what an upgrade enters.
    """
    # No lock around each value that is bound: one thread at a time has this connection.
    flags = apsw.SQLITE_OPEN_READWRITE | apsw.SQLITE_OPEN_CREATE | apsw.SQLITE_OPEN_NOMUTEX
    connection = apsw.Connection(str(path), flags=flags, statementcachesize=STATEMENTS)
    connection.set_busy_timeout(10_000)
    if path.stat().st_size == 0:
        # Only before the first table: retention then hands pages back. An older file needs one VACUUM for it.
        connection.pragma("auto_vacuum", "incremental")
    overwrite_what_goes(connection)
    migrate(connection, path, key)  # first: a file that is refused is left as it was, its journal mode too
    journal_mode = connection.pragma("journal_mode", "wal")
    assert journal_mode == "wal", f"{path} cannot be put into WAL mode"
    connection.pragma("synchronous", synchronous)
    connection.pragma("cache_size", -CACHE_KIB)
    connection.pragma("wal_autocheckpoint", 16_000)
    connection.pragma("foreign_keys", True)
    connection.pragma("temp_store", "memory")
    return connection


class Writer:
    """Runs groups of envelopes against one connection."""

    def __init__(
        self,
        connection: apsw.Connection,
        entropy: Callable[[int], bytes] = os.urandom,
        masks: Sequence[str] = (),
        key: SigningKey | None = None,
    ) -> None:
        self._tx = Tx(connection, entropy, compiled(masks), key)
        if usage_behind.mark(connection) is None:
            # Somebody took the mark away, or made it one that cannot be: what asks by the indexes is not to wait.
            with connection:
                usage_behind.enter(self._tx)
        self._wary = 0
        self._prepared: dict[int, Prepared] = {}
        self._next_usage = 0
        self._next_head: Head | None = None
        self._beside = Beside()

    def prepare(self, envelope: Envelope) -> None:
        """Work out what can be before an envelope is run; those that come to be run first are prepared first."""
        unit = envelope.unit
        if not (isinstance(unit, RecordUsage) and _is_plain_report(envelope)) or envelope.number in self._prepared:
            return
        with contextlib.suppress(Exception):  # it happens again to the one whose it is, when it is run
            prepared, names = prepare(unit), self._tx.names
            if prepared.is_simple and len(unit.events) > usage.FEW:
                # Only names whose numbers are remembered have any: the connection is at work.
                salts = self._tx.salts(len(unit.events))
                supposed = suppose(unit, prepared.contents, self._next_usage, names.version, names.get, salts)
                if supposed is not None and self._next_head is not None:
                    sealed = supposed.sealed
                    entries = self._tx.chained(self._next_head, RECORDED, unit.actor, sealed, unit.now_us)
                    supposed = supposed._replace(entries=entries)
                prepared = prepared._replace(supposed=supposed)
            self._prepared[envelope.number] = prepared
            self._next_usage += len(unit.events)
            self._next_head = _behind(self._next_head, prepared)

    def _take_prepared(self, envelope: Envelope) -> Prepared | None:
        return self._prepared.pop(envelope.number, None)

    def run(
        self,
        group: Sequence[Envelope],
        joining: Callable[[], Sequence[Envelope]] = tuple,
        meanwhile: Callable[[], bool] | None = None,
    ) -> list[Answer]:
        """Run envelopes in one transaction and commit.

        A unit that fails rolls back alone. When the transaction itself fails (disk full, I/O error),
        every answer is `NotWritten`: nothing of the group is in the file. `joining` is asked for decisions after every
        few envelopes, or first of all without a group: the commit ends with them, and with those that come meanwhile.
        Only what is in it is answered, decisions first. `meanwhile` is called again and again while the disk is at
        work, for a part of what there is to do; it says whether there was any.
        """
        tx = self._tx
        joined = [] if group else list(joining())
        try:
            tx.execute("BEGIN IMMEDIATE")
            answers = self._run_bulk(group, joined, joining, guarded=self._wary > 0)
            self._wary = max(0, self._wary - (len(group) > 0))
            if answers is None:
                self._wary = WARY_COMMITS
                tx.execute("ROLLBACK")
                tx.forget()
                tx.execute("BEGIN IMMEDIATE")
                answers = self._run_bulk(group, joined, joining, guarded=True)
                assert answers is not None, "one by one each has its answer"
            decided: list[Answer] = []
            while len(decided) < len(joined):
                decided += self._decide(joined[len(decided) :])
                if len(decided) == len(joined) < DECISIONS_PER_COMMIT:
                    joined += joining()
            self._commit(meanwhile)
        except apsw.Error as error:
            if tx.connection.in_transaction:
                tx.execute("ROLLBACK")
            tx.forget()
            self._prepared.clear()
            _log.error("commit of %d units failed: %s", len(joined) + len(group), error)
            outcome = NotWritten(str(error) or type(error).__name__, full=isinstance(error, apsw.FullError))
            return [Answer(envelope.number, outcome) for envelope in (*joined, *group)]
        answers = decided + answers
        if tx.has_alerted:
            tx.has_alerted = False
            answers[-1] = msgspec.structs.replace(answers[-1], alerts=True)
        return answers

    def _commit(self, meanwhile: Callable[[], bool] | None) -> None:
        # Indexes are written last: SQLite does so by itself, beside the preparing of what comes next.
        statements = usage_behind.entering(self._tx) if self._tx.has_many_behind else []

        def end() -> None:
            for sql, values in statements:
                self._tx.execute(sql, values)
            self._tx.execute("COMMIT")

        if meanwhile is None:
            end()
            return
        self._next_usage = self._tx.next_usage + sum(len(its.keys) for its in self._prepared.values())
        self._next_head = self._tx.head
        for prepared in self._prepared.values():
            self._next_head = _behind(self._next_head, prepared)
        try:
            committed = self._beside.begin(end)
        except RuntimeError:  # no thread is to be had
            end()
            return
        try:
            while not committed.done():
                if not meanwhile():
                    wait([committed], LOOK_S)
        finally:
            wait([committed])  # whatever happened beside it: until then the connection is its own
        committed.result()

    def _run_bulk(
        self,
        group: Sequence[Envelope],
        joined: list[Envelope],
        joining: Callable[[], Sequence[Envelope]],
        *,
        guarded: bool,
    ) -> list[Answer] | None:
        """Run what is no decision, until decisions joined.

        Reports next to each other share their statements: single events, many to a commit, cost a third of it. Unless
        `guarded` they have no savepoint either, for which SQLite copies every page before it changes: None then says
        that one of them does not go through, and the whole transaction has to be rolled back.
        """
        answers: list[Answer] = []
        for envelopes in _steps(group):
            recorded = None
            if _is_plain_report(envelopes[0]) and (len(envelopes) > 1 or not guarded):
                recorded = self._record_together(envelopes, guarded=guarded)
                if recorded is None and not guarded:
                    return None
            answers += recorded or [self._run_one(envelope) for envelope in envelopes]
            joined += joining()
            if joined:
                break
        return answers

    def _decide(self, envelopes: Sequence[Envelope]) -> list[Answer]:
        """Run the first of these; authorisations go together with those next to them, which share their accounts."""
        plain = list(takewhile(_is_plain_authorization, envelopes))
        if len(plain) < 2:
            return [self._run_one(envelopes[0])]
        answers = self._authorize_together(plain)
        return answers + [self._run_one(envelope) for envelope in plain[len(answers) :]]

    def _authorize_together(self, envelopes: Sequence[Envelope]) -> list[Answer]:
        """Answer as many as go through together; nothing of the others is left."""
        tx = self._tx
        mark = tx.mark()
        tx.execute("SAVEPOINT unit")
        try:
            units = [unit for envelope in envelopes if isinstance(unit := envelope.unit, Reserve)]
            results = authorize_together(tx, units)
            tx.flush_audit()
        except (apsw.FullError, apsw.IOError, apsw.CorruptError, apsw.ReadOnlyError):
            raise
        except Exception:  # whatever it is, it happens again to the one whose it is
            if not tx.connection.in_transaction:
                raise
            self._undo(mark)
            return []
        tx.execute("RELEASE unit")
        return [Answer(envelope.number, result) for envelope, result in zip(envelopes, results, strict=False)]

    def _record_together(self, envelopes: Sequence[Envelope], *, guarded: bool) -> list[Answer] | None:
        """Record reports with few statements for all of them; None when one does not go through.

        With `guarded` nothing of any is left then, and one by one each hears its own answer.
        """
        tx = self._tx
        mark = tx.mark()
        if guarded:
            tx.execute("SAVEPOINT unit")
        try:
            batch = [
                (unit, self._take_prepared(envelope) or prepare(unit))
                for envelope in envelopes
                if isinstance(unit := envelope.unit, RecordUsage)
            ]
            results = usage.record_together(tx, batch)
            tx.flush_audit()
        except (apsw.FullError, apsw.IOError, apsw.CorruptError, apsw.ReadOnlyError):
            raise
        except Exception:  # whatever it is, it happens again to the one whose it is
            if not tx.connection.in_transaction:
                raise
            if guarded:
                self._undo(mark)
            return None
        if guarded:
            tx.execute("RELEASE unit")
        return [Answer(envelope.number, result) for envelope, result in zip(envelopes, results, strict=True)]

    def _run_one(self, envelope: Envelope) -> Answer:
        tx = self._tx
        self._take_prepared(envelope)
        mark = tx.mark()
        replayed = self._replay(envelope.idempotency)
        if replayed is not None:
            return Answer(envelope.number, replayed, replayed=not isinstance(replayed, Refusal))
        tx.execute("SAVEPOINT unit")
        try:
            result = handlers.handle(tx, envelope.unit)
            tx.flush_audit()
            self._remember(envelope.idempotency, result)
        except RefuseError as refusal:
            self._undo(mark)
            return Answer(envelope.number, refusal.value)
        except apsw.ConstraintError as error:
            if getattr(error, "extendedresult", None) != apsw.SQLITE_CONSTRAINT_DATATYPE:
                return self._failed(envelope, mark, error)
            # An integer that grew past 64 bits would have become a REAL, which no column here takes. Which it was is
            # what the message of SQLite ends in.
            self._undo(mark)
            return Answer(envelope.number, past_64_bits(str(error).rpartition(".")[2]))
        except (apsw.FullError, apsw.IOError, apsw.CorruptError, apsw.ReadOnlyError):
            raise
        except Exception as error:  # noqa: BLE001 -- a unit's bug is its own caller's only
            return self._failed(envelope, mark, error)
        tx.execute("RELEASE unit")
        return Answer(envelope.number, result)

    def _failed(self, envelope: Envelope, mark: tuple[int, bytes], error: Exception) -> Answer:
        if not self._tx.connection.in_transaction:
            raise error  # SQLite already rolled the whole transaction back: nobody's work is in it
        self._undo(mark)
        _log.error("unit %s failed", type(envelope.unit).__name__, exc_info=error)
        summary = "".join(traceback.format_exception_only(error)).strip()
        return Answer(envelope.number, Failed(f"{type(envelope.unit).__name__}: {summary}"))

    def _undo(self, mark: tuple[int, bytes]) -> None:
        self._tx.execute("ROLLBACK TO unit")
        self._tx.execute("RELEASE unit")
        self._tx.rewind(mark)

    def _replay(self, idempotency: Idempotency | None) -> AnyResult | None:
        if idempotency is None:
            return None
        row = self._tx.row("SELECT request, result FROM idempotency WHERE key = ?", (idempotency.key,))
        if row is None:
            return None
        if row[0] != idempotency.request:
            return Refusal(
                "idempotency_key_reused",
                "this Idempotency-Key came with another request before: use a new key for a new request",
            )
        return _result_decoder.decode(row[1])

    def _remember(self, idempotency: Idempotency | None, result: AnyResult) -> None:
        if idempotency is not None and not isinstance(result, _NOT_KEPT):
            self._tx.execute(
                "INSERT INTO idempotency VALUES (?,?,?,?)",
                (idempotency.key, idempotency.request, _result_encoder.encode(result), idempotency.now_us),
            )


def _behind(head: Head | None, prepared: Prepared) -> Head | None:
    """The head when what was prepared was entered; None when nobody knows."""
    return None if head is None or prepared.supposed is None else head_behind(head, prepared.supposed.entries)


def _is_plain_report(envelope: Envelope) -> bool:
    return isinstance(envelope.unit, RecordUsage) and envelope.idempotency is None


def _is_plain_authorization(envelope: Envelope) -> bool:
    return isinstance(envelope.unit, Reserve) and not envelope.unit.chain and envelope.idempotency is None


def _steps(group: Sequence[Envelope]) -> Iterator[list[Envelope]]:
    """A group in parts that run together: plain reports next to each other up to `ROWS_PER_STEP`, all else alone."""
    step: list[Envelope] = []
    rows = 0
    for envelope in group:
        weight = weigh(envelope)
        if step and not (_is_plain_report(envelope) and _is_plain_report(step[0]) and rows + weight <= ROWS_PER_STEP):
            yield step
            step, rows = [], 0
        step.append(envelope)
        rows += weight
    if step:
        yield step


def weigh(envelope: Envelope) -> int:
    """How many rows an envelope adds to a commit, roughly."""
    unit = envelope.unit.usage if isinstance(envelope.unit, RecordTelemetry) else envelope.unit
    return len(unit.events) if isinstance(unit, RecordUsage) else 1


def serve(
    sock: socket.socket,
    writer: Writer,
    *,
    decisions: socket.socket | None = None,
    rows_per_commit: int = ROWS_PER_COMMIT,
    wait_us: int = 0,
    busy_wait_us: int = BUSY_WAIT_US,
    busy_gap_us: int = BUSY_GAP_US,
    rest: Callable[[bool], None] = lambda _: None,
) -> None:
    """Answer envelopes until the other side closes its ends; what had arrived by then is still committed.

    `decisions` is a way in for them alone, where no half of a large report is before them. They have commits of their
    own, between two of which goes at least a step of what waits; one of bulk ingest that is under way is cut short, and
    they share it.
    With `wait_us` a commit that is not full waits that long for more to share it, unless a decision waits. Without, it
    waits only after a commit that many shared, and while units keep coming: a lone client never waits.
    `rest` is called after each commit, once it is answered, with whether much is recorded and no decision comes.
    """
    frames = Frames([sock] if decisions is None else [sock, decisions])
    urgent: deque[Envelope] = deque()
    bulk: deque[Envelope] = deque()
    waiting_rows = 0
    ready = 0  # of bulk, prepared
    small_until_s = 0.0
    busy = False

    def take(timeout_s: float | None, *, decisions_only: bool = False) -> int:
        rows = 0
        for envelope in frames.receive(timeout_s, decisions_only=decisions_only):
            (urgent if envelope.urgent else bulk).append(envelope)
            rows += 0 if envelope.urgent else weigh(envelope)
        return rows

    def joining() -> list[Envelope]:
        nonlocal waiting_rows, small_until_s
        waiting_rows += take(0, decisions_only=True)
        came = list(urgent)
        urgent.clear()
        if came:
            small_until_s = time.monotonic() + SMALL_S
        return came

    def are_small() -> bool:
        return time.monotonic() < small_until_s

    def most_rows() -> int:
        return min(rows_per_commit, ROWS_PER_STEP) if are_small() else rows_per_commit

    def work_ahead() -> bool:
        nonlocal waiting_rows, ready
        if ready < len(bulk):
            writer.prepare(bulk[ready])
            ready += 1
            return True
        came = take(0) if waiting_rows < most_rows() else 0
        waiting_rows += came
        return came > 0

    def answer(answers: list[Answer], rows: int = 0) -> None:
        # When the daemon is gone nobody hears the answers; what it sent is read to its end all the same.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            frames.send(answers)
        rest(rows >= MUCH_ROWS and not are_small())

    owed = False
    while True:
        if not urgent and not bulk and frames.ended:
            return
        waiting_rows += take(0, decisions_only=True)
        if (not urgent or owed) and waiting_rows < most_rows():
            waiting_rows += take(0 if urgent or bulk else None)
        patience_us, gap_us = (wait_us, wait_us) if wait_us else (busy_wait_us, busy_gap_us) if busy else (0, 0)
        deadline_s = time.monotonic() + patience_us / SECOND_US
        while not urgent and not owed and waiting_rows < most_rows() and not frames.ended:
            left_s = min(deadline_s - time.monotonic(), gap_us / SECOND_US)
            came = take(left_s) if left_s > 0 else 0
            waiting_rows += came
            if not came and (left_s <= 0 or not wait_us):
                break
        if urgent and not owed:
            answer(writer.run([], joining))
            # What came on the other way in meanwhile is owed its step as well.
            waiting_rows += 0 if bulk else take(0)
            owed = bool(bulk)
            continue
        group, rows = [], 0
        while bulk and (rows == 0 or rows + weigh(bulk[0]) <= most_rows()):
            rows += weigh(bulk[0])
            group.append(bulk.popleft())
        waiting_rows -= rows
        ready = max(0, ready - len(group))
        busy, owed = len(group) >= BUSY, False
        if group:
            if rows < LARGE_ROWS or are_small():
                answers = writer.run(group, joining)
            else:
                with frames.reading_ahead():
                    answers = writer.run(group, joining, work_ahead)
            answered = {answer.number for answer in answers}
            for envelope in reversed(group):
                if envelope.number not in answered:
                    bulk.appendleft(envelope)
                    waiting_rows += weigh(envelope)
                    ready = 0
            answer(answers, rows)


def main(arguments: Sequence[str]) -> int:
    """`python -m asapd.store.writer SOCKET-FD DECISIONS-FD DATABASE SYNCHRONOUS ROWS WAIT-US`; for the daemon only.

    The seed of the daemon's key is on stdin.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(TerminalFormatter() if sys.stderr.isatty() else JsonFormatter())
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    path, synchronous = Path(arguments[2]), arguments[3]
    apsw.shutdown()
    apsw.config(apsw.SQLITE_CONFIG_MULTITHREAD)
    apsw.config(apsw.SQLITE_CONFIG_MEMSTATUS, False)
    apsw.initialize()
    with _inherited(arguments[0]) as sock, _inherited(arguments[1]) as decisions:
        connection = open_for_writing(path, synchronous=synchronous)
        # A commit makes some 30 000 rows and values that die with it and form no cycles: looked through at the default
        # of every 700th they cost more than the rest of Python's part.
        gc.freeze()
        gc.set_threshold(200_000, 20, 20)
        sys.setswitchinterval(SWITCH_S)
        _keep_arenas()
        with contextlib.closing(connection), Folding(connection, path) as folding:
            rows, wait_us = int(arguments[4]), int(arguments[5])
            masks = msgspec.json.decode(os.environ.get(MASKS, "[]"), type=list[str])
            seed = sys.stdin.buffer.read()
            writer = Writer(connection, masks=masks, key=SigningKey(seed) if seed else None)
            is_batch = False

            def rest(much: bool) -> None:
                nonlocal is_batch
                if much != is_batch:
                    be_batch_work(is_batch=much)
                    is_batch = much
                folding.rest(much)

            serve(sock, writer, decisions=decisions, rows_per_commit=rows, wait_us=wait_us, rest=rest)
    return 0


_kept: list[bytes] = []
_ARENAS = 32


def _keep_arenas() -> None:
    """Have Python keep the memory of a large commit between two of them.

    It hands a mebibyte back to the system as soon as nothing in it is alive, and the next commit has it cleared again,
    page by page: a tenth of a commit's time. A few bytes stay alive in each.
    """
    filled = [bytes(480) for _ in range(_ARENAS * 2_048)]
    _kept.extend(filled[::1_024])


def _inherited(number: str) -> socket.socket:
    # A daemon with thousands of sockets hands down numbers that select() cannot take; a copy gets a low one.
    descriptor = os.dup(int(number))
    os.close(int(number))
    return socket.socket(fileno=descriptor)


def replay(connection: apsw.Connection, envelopes: Sequence[Envelope]) -> list[Any]:
    """Run a log of envelopes one by one, each in a commit of its own: the model that tests compare with."""
    writer = Writer(connection)
    return [writer.run([envelope])[0].result for envelope in envelopes]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
