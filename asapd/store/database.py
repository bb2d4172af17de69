"""The store as the actors see it: submit a unit and hear of its commit, read a snapshot in a thread.

What runs the units is an argument: a process of its own in production (`ProcessRunner`), the same
code inline in tests (`InlineRunner`).
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

import apsw
import msgspec
import trio
from nacl.signing import SigningKey

from asapd.core.errors import Refusal
from asapd.store.frames import HEADER
from asapd.store.outbox import Outbox
from asapd.store.units.alerts import AlertWritten
from asapd.store.units.exchange import Answer, AnyResult, AnyUnit, Envelope, Idempotency
from asapd.store.units.unit import Failed, NotWritten, Unit
from asapd.store.writer import MASKS, ROWS_PER_COMMIT, Writer, open_for_writing

R = TypeVar("R")
T = TypeVar("T")

READERS = 4
"""Two cores, and queries that wait for the GIL half of their time."""

MAX_IN_FLIGHT_BYTES = 64 << 20
"""Eight of the largest request bodies: beyond it callers wait, and the doors stop reading."""

RECEIVE_BYTES = 64 << 10

_LEAST_BYTES = 256 << 10
"""With less SQLite may not even begin: its shared memory takes 32 KiB, and the log of what is written as much."""
READ_LIMIT_S = 30.0
"""A query that runs longer is interrupted: an open reader keeps the WAL from being folded back."""


class UnitFailedError(Exception):
    """A bug in the handler of a unit; nothing of the unit was written. The traceback is in the writer's log."""


class WriterDiedError(Exception):
    """The writer process ended by itself; its supervisor starts another. Callers heard of an unknown outcome."""


class ReadTooLongError(Exception):
    """A query ran for longer than `READ_LIMIT_S` and was interrupted; narrow it."""


Then = Callable[[Answer | Refusal], None]
"""Told the answer to one unit. It must not raise, and does not hold up what follows."""

OnCommit = Callable[[Sequence[AnyResult] | None], None]
"""Told the results of each commit, or None when something may have been committed that nobody answered.

Where units wrote transitions of breaches beside what they answer, there is an `AlertWritten` more.
"""

_ALERTED = AlertWritten(None)


class Runner(Protocol):
    """Whatever takes an envelope's content and answers after its commit."""

    async def post(
        self, unit: AnyUnit, then: Then, *, urgent: bool = False, idempotency: Idempotency | None = None
    ) -> None:
        """Send one unit; `then` is called once, with its answer. Waits only while too much is in flight."""
        ...

    async def execute(self, unit: AnyUnit, *, urgent: bool, idempotency: Idempotency | None) -> Answer | Refusal:
        """Run one unit."""
        ...


OUTCOME_UNKNOWN = Refusal(
    "outcome_unknown",
    "the writer stopped with this request in hand: send it again, an event with an id is still counted once",
    retry_after_s=1,
)
WRITER_AWAY = Refusal("writer_unavailable", "the writer is being restarted: try again in a moment", retry_after_s=1)


class Database:
    """Units in, results out; `on_commit` of its runner is called after every commit heard of."""

    def __init__(self, runner: Runner, readers: Readers) -> None:
        self._runner = runner
        self._readers = readers

    async def submit(
        self, unit: Unit[R], *, urgent: bool = False, idempotency: Idempotency | None = None
    ) -> R | Refusal:
        """Run a unit and return its result after the commit that holds it.

        A refusal with code `outcome_unknown`, `writer_unavailable`, `storage_full` or `storage_failed` says that the
        store could not answer; the first of them that it may still have been committed.

        Raises:
            UnitFailedError: the unit met a bug.
        """
        answer = await self._runner.execute(cast("AnyUnit", unit), urgent=urgent, idempotency=idempotency)
        outcome = _outcome(answer)
        if isinstance(outcome, UnitFailedError):
            raise outcome
        return cast("R | Refusal", outcome)

    async def post(
        self,
        unit: Unit[R],
        then: Callable[[R | Refusal | UnitFailedError], None],
        *,
        urgent: bool = False,
        idempotency: Idempotency | None = None,
    ) -> None:
        """Like `submit`, but goes on once the unit is on its way; `then` is called with what became of it, once.

        Where many units are in flight this costs no task for each that waits. `then` must not raise.
        """
        unit_: Any = unit
        then_: Callable[[Any], None] = then
        await self._runner.post(unit_, lambda answer: then_(_outcome(answer)), urgent=urgent, idempotency=idempotency)

    async def read(self, query: Callable[..., T], *arguments: Any) -> T:
        """Run `query(connection, *arguments)` on a read-only snapshot.

        Raises:
            ReadTooLongError: it did not end within `READ_LIMIT_S`.
        """
        return await self._readers.run(query, *arguments)


def _outcome(answer: Answer | Refusal) -> AnyResult | Refusal | UnitFailedError:
    """What an answer means to whoever asked."""
    if isinstance(answer, Refusal):
        return answer
    match answer.result:
        case Failed(error=error):
            return UnitFailedError(error)
        case NotWritten(error=error, full=True):
            return Refusal(
                "storage_full", f"nothing was written, the disk is full ({error}): make room", retry_after_s=30
            )
        case NotWritten(error=error):
            return Refusal("storage_failed", f"nothing was written, the disk failed ({error})", retry_after_s=5)
        case result:
            return result


class Readers(Protocol):
    """Whatever runs a query on a snapshot."""

    async def run(self, query: Callable[..., T], *arguments: Any) -> T:
        """Run one query."""
        ...


# --- inline


class InlineRunner:
    """Runs each unit at once on the given connection: for tests, with real SQLite and an honest mock clock."""

    def __init__(self, writer: Writer, on_commit: OnCommit = lambda _: None) -> None:
        self._writer = writer
        self._on_commit = on_commit
        self._number = 0

    async def post(
        self, unit: AnyUnit, then: Then, *, urgent: bool = False, idempotency: Idempotency | None = None
    ) -> None:
        """Run one unit in a commit of its own, and tell its answer."""
        then(await self.execute(unit, urgent=urgent, idempotency=idempotency))

    async def execute(self, unit: AnyUnit, *, urgent: bool, idempotency: Idempotency | None) -> Answer | Refusal:
        """Run one unit in a commit of its own."""
        await trio.lowlevel.checkpoint()
        self._number += 1
        (answer,) = self._writer.run([Envelope(self._number, unit, urgent, idempotency)])
        self._on_commit([answer.result, *([_ALERTED] if answer.alerts else ())])
        return answer


class InlineReaders:
    """Runs queries at once on the given connection."""

    def __init__(self, connection: apsw.Connection) -> None:
        self._connection = connection

    async def run(self, query: Callable[..., T], *arguments: Any) -> T:
        """Run one query."""
        await trio.lowlevel.checkpoint()
        return query(self._connection, *arguments)


# --- production


class ThreadReaders:
    """A small pool of read-only connections, each used by one thread at a time."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._limiter = trio.CapacityLimiter(READERS)
        self._idle: list[apsw.Connection] = []

    async def run(self, query: Callable[..., T], *arguments: Any) -> T:
        """Run one query in a thread, on one snapshot however many statements it has."""
        return await trio.to_thread.run_sync(self._run, query, arguments, limiter=self._limiter)

    def _run(self, query: Callable[..., T], arguments: tuple[Any, ...]) -> T:
        try:
            connection = self._idle.pop()
        except IndexError:  # asking first whether one is there would race with the other threads
            connection = self._open()
        deadline_s = time.monotonic() + READ_LIMIT_S
        connection.set_progress_handler(lambda: time.monotonic() > deadline_s, 50_000)
        try:
            with _snapshot(connection):
                return query(connection, *arguments)
        except apsw.InterruptError:
            raise ReadTooLongError(f"reading took longer than {READ_LIMIT_S:g} s and was given up") from None
        finally:
            self._idle.append(connection)

    def _open(self) -> apsw.Connection:
        # No lock around each value: one thread at a time has a connection.
        connection = apsw.Connection(str(self._path), flags=apsw.SQLITE_OPEN_READONLY | apsw.SQLITE_OPEN_NOMUTEX)
        connection.set_busy_timeout(5_000)
        connection.pragma("cache_size", -16_384)
        connection.pragma("temp_store", "memory")
        return connection

    def close(self) -> None:
        """Close the connections; no query may be running."""
        while self._idle:
            self._idle.pop().close()


@contextlib.contextmanager
def _snapshot(connection: apsw.Connection) -> Iterator[None]:
    connection.execute("BEGIN")
    try:
        yield
    finally:
        if connection.in_transaction:  # an interruption that met a temporary table rolled back by itself
            connection.execute("COMMIT")


@contextlib.contextmanager
def _handed(key: SigningKey | None) -> Iterator[int]:
    """A pipe with the seed of a key, or nothing, in it: neither arguments nor the environment are kept for oneself."""
    readable, writable = os.pipe()
    try:
        os.write(writable, b"" if key is None else bytes(key))
        os.close(writable)
        yield readable
    finally:
        os.close(readable)


class ProcessRunner:
    """Runs units in a writer process: one at a time, started and restarted by whoever supervises `run`.

    `inherit` are file descriptors that the process holds as long as it lives: the lock of the state
    directory, so that no other daemon opens the file while a commit is still under way.
    `group_commit_max` bounds the rows of bulk ingest in one commit, `group_commit_wait_us` is how long a
    commit that is not full waits for more. `key` signs the entries that explain why something is gone.
    """

    def __init__(
        self,
        path: Path,
        *,
        synchronous: str,
        group_commit_max: int = ROWS_PER_COMMIT,
        group_commit_wait_us: int = 0,
        masks: Sequence[str] = (),
        key: SigningKey | None = None,
        inherit: Sequence[int] = (),
        on_commit: OnCommit = lambda _: None,
    ) -> None:
        self._arguments = (str(path), synchronous, str(group_commit_max), str(group_commit_wait_us))
        self.hand_down(masks)
        self._key = key
        self._inherit = tuple(inherit)
        self._on_commit = on_commit
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(Answer)
        self._number = 0
        self._pending: dict[int, tuple[int, Then]] = {}
        self._urgent, self._bulk = Outbox(), Outbox()
        self._in_flight_bytes = 0
        self._room = trio.lowlevel.ParkingLot()
        self._connected = False
        self._closing = False
        self.pid: int | None = None

    def hand_down(self, masks: Sequence[str]) -> None:
        """Have writers that are started from now on mask entries by these patterns."""
        self._environ = {MASKS: msgspec.json.encode(masks).decode()}

    @property
    def pending(self) -> int:
        """How many units wait for their commit."""
        return len(self._pending)

    async def execute(self, unit: AnyUnit, *, urgent: bool, idempotency: Idempotency | None) -> Answer | Refusal:
        """Send one unit and wait for its commit; waits first while too much is in flight."""
        waiter = _Waiter()
        await self.post(unit, waiter.settle, urgent=urgent, idempotency=idempotency)
        await waiter.settled.wait()
        return waiter.answer

    async def post(
        self, unit: AnyUnit, then: Then, *, urgent: bool = False, idempotency: Idempotency | None = None
    ) -> None:
        """Send one unit, and tell its answer after its commit; waits first while too much is in flight."""
        self._number += 1
        number = self._number
        body = self._encoder.encode(Envelope(number, unit, urgent, idempotency))
        while self._connected and self._in_flight_bytes > MAX_IN_FLIGHT_BYTES and not urgent:
            await self._room.park()
        if not self._connected or self._closing:
            then(WRITER_AWAY)
            return
        self._pending[number] = len(body), then
        self._in_flight_bytes += len(body)
        (self._urgent if urgent else self._bulk).put(HEADER.pack(len(body)) + body)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Run one writer process until `close`.

        Raises:
            WriterDiedError: it ended by itself.
        """
        ours, theirs = socket.socketpair()
        ours_urgent, theirs_urgent = socket.socketpair()
        stream, urgent = (trio.SocketStream(trio.socket.from_stdlib_socket(sock)) for sock in (ours, ours_urgent))
        try:
            with theirs, theirs_urgent, _handed(self._key) as seed:
                descriptors = (theirs.fileno(), theirs_urgent.fileno())
                process = await trio.lowlevel.open_process(
                    [sys.executable, "-m", "asapd.store.writer", *map(str, descriptors), *self._arguments],
                    pass_fds=(*descriptors, *self._inherit),
                    stdin=seed,
                    env={**os.environ, **self._environ},
                )
        except BaseException:
            ours.close()
            ours_urgent.close()
            raise
        self.pid = process.pid
        self._connected = True
        task_status.started()
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._bulk.run, stream)
                nursery.start_soon(self._urgent.run, urgent)
                await self._receive(stream)
                nursery.cancel_scope.cancel()
        finally:
            self._disconnect()
            urgent.socket.close()
            stream.socket.close()  # not aclose(): when cancelled it would raise before the process is waited for
            with trio.move_on_after(30, shield=True) as patience:
                await process.wait()  # its last commit; the process ignores signals on purpose
            if patience.cancelled_caught:
                process.kill()
                with trio.CancelScope(shield=True):
                    await process.wait()
        if not self._closing:
            raise WriterDiedError(f"the writer process ended with code {process.returncode}")

    async def _receive(self, stream: trio.SocketStream) -> None:
        buffer = bytearray()
        descriptor = stream.socket.fileno()
        while True:
            # A stream would first try whether something is there, which after the answers before never is.
            await trio.lowlevel.wait_readable(descriptor)
            try:
                chunk = os.read(descriptor, RECEIVE_BYTES)
            except BlockingIOError:
                continue
            except OSError:
                return
            if not chunk:
                return
            buffer += chunk
            self._take_answers(buffer)

    def _take_answers(self, buffer: bytearray) -> None:
        start = 0
        results: list[AnyResult] = []
        with memoryview(buffer) as view:
            while len(view) - start >= HEADER.size:
                (length,) = HEADER.unpack_from(view, start)
                begin = start + HEADER.size
                if len(view) - begin < length:
                    break
                answer = self._decoder.decode(view[begin : begin + length])
                start = begin + length
                size, then = self._pending.pop(answer.number)
                self._in_flight_bytes -= size
                then(answer)
                results.append(answer.result)
                if answer.alerts:
                    results.append(_ALERTED)
        del buffer[:start]
        if results:
            self._on_commit(results)
            self._room.unpark_all()

    def _disconnect(self) -> None:
        self._connected = False
        self.pid = None
        self._urgent.clear()
        self._bulk.clear()
        self._in_flight_bytes = 0
        lost, self._pending = self._pending, {}
        for _, then in lost.values():
            then(OUTCOME_UNKNOWN)
        self._room.unpark_all()
        self._on_commit(None)  # what was in flight may be committed: followers look

    def close(self) -> None:
        """Let the process finish what it has and end; `run` then returns."""
        self._closing = True
        self._urgent.close()
        self._bulk.close()
        self._room.unpark_all()


class _Waiter:
    """Waits for one answer."""

    __slots__ = ("answer", "settled")

    def __init__(self) -> None:
        self.settled = trio.Event()
        self.answer: Answer | Refusal = OUTCOME_UNKNOWN

    def settle(self, answer: Answer | Refusal) -> None:
        self.answer = answer
        self.settled.set()


def prepare(path: Path, key: SigningKey | None = None) -> None:
    """Create the file or bring its schema up to date, before the writer starts.

    `key` is the daemon's, which signs what an upgrade enters.

    Raises:
        DatabaseTooNewError, NotOurDatabaseError: see `asapd.store.migrations`.
        OSError: the disk is full or fails, or may not be written.
    """
    try:
        open_for_writing(path, key=key).close()
    except (apsw.FullError, apsw.IOError, apsw.CantOpenError, apsw.ReadOnlyError) as error:
        # On a full disk SQLite calls it an I/O error that it cannot make its shared memory.
        code = errno.EROFS if isinstance(error, apsw.ReadOnlyError) else errno.ENOSPC if _is_full(path) else errno.EIO
        raise OSError(code, f"{os.strerror(code)} ({error})", str(path)) from error
    path.chmod(0o600)


def _is_full(path: Path) -> bool:
    of_disk = os.statvfs(path.parent)
    return of_disk.f_bavail * of_disk.f_frsize < _LEAST_BYTES
