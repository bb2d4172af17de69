"""The meter: takes usage events in, at once and without fail, and has them sent."""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import logging
import os
import ssl
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TypedDict, Unpack

from asapd.client import address as addresses
from asapd.client import delegation, locked, spool
from asapd.client.event import Details, Metrics, Usd, build, count, dollars, new_id
from asapd.client.late import Late, is_held
from asapd.client.link import Away, Refused, Requests, is_reservation, make_link, report, settle
from asapd.client.refused import RefusedFile
from asapd.client.sender import Sender, Work
from asapd.client.stats import Counters, Stats
from asapd.client.task import Task, as_details
from asapd.client.waiting import Kind, Memory, Waiting

SPOOL_BYTES = 256 * 2**20
# Beside a spool: what is taken in while the disk refuses. Without one: all there is.
MEMORY_BYTES = 8 * 2**20
EXIT_S = 2.0

_log = logging.getLogger("asapd.client")
_meters: weakref.WeakSet[Meter] = weakref.WeakSet()


class Settings(TypedDict, total=False):
    """The settings of a meter; `Meter` explains them."""

    agent: str
    consumer: str
    key: str | None
    spool: str | os.PathLike[str] | bool
    spool_bytes: int
    source: str | None
    batch_events: int
    batch_age_s: float
    tls: ssl.SSLContext | None


class Meter:
    """Reports usage to asapd. Thread-safe, survives `fork`; an event is on disk when `record` or a task returns.

    `address`: the ingest socket (`/run/asapd/ingest.sock`, the default) or `http(s)://host:port`, with an API `key`
    (else `$ASAPD_KEY`). `agent` and `consumer` are those of tasks that name none. `spool` is a directory on a local
    disk, of at most `spool_bytes` a process; True stands for one below `$XDG_STATE_HOME`, for this daemon and key,
    False for none. `source` names this program in the daemon's list of sources. A batch leaves when it has
    `batch_events` or its first event is `batch_age_s` old.

    Raises:
        ValueError: for an address that is none, or bounds that are not positive. Nothing else here or later: without
            its directory the meter keeps events in memory, and says so in the log.
    """

    def __init__(
        self,
        address: str | os.PathLike[str] | None = None,
        *,
        agent: str = "",
        consumer: str = "",
        key: str | None = None,
        spool: str | os.PathLike[str] | bool = True,
        spool_bytes: int = SPOOL_BYTES,
        source: str | None = None,
        batch_events: int = 500,
        batch_age_s: float = 0.2,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        if not 1 <= batch_events <= 5000 or not batch_age_s >= 0 or spool_bytes < 1:
            raise ValueError("batch_events must be within 1 and 5000, batch_age_s and spool_bytes positive")
        # Before anything is opened here: what the parent had open is closed then, by its number.
        _follow_fork()
        self._address = addresses.parse(address)
        self.agent = agent
        self.consumer = consumer
        key = os.environ.get("ASAPD_KEY", "") if key is None else key
        # Without the line end that a key read from a file has.
        self._key = key.strip() or None
        self._tls = tls
        self._has_default_root = spool is True
        self._root = _default_spool(self._address, self._key) if spool is True else Path(spool) if spool else None
        self._spool_bytes = spool_bytes
        self._source = source
        self._batch_events = batch_events
        self._batch_age_s = min(batch_age_s, threading.TIMEOUT_MAX)
        self.counters = Counters(_log)
        self._lock = threading.RLock()
        self._is_closed = False
        self._closer: int | None = None  # the thread that is at it, or was when an interrupt came
        self._has_ended = False
        self._late = Late()
        self._forget()
        _meters.add(self)
        self._open()

    def _forget(self) -> None:
        self._requests = Requests(self._address, self._key, self._tls)
        self._link = make_link(self._address, self._requests)
        self._spool: spool.Spool | None = None
        self._memory = Memory(MEMORY_BYTES, self._source)
        self._sender: Sender | None = None
        self._starting: dict[str, object] = {}  # whoever is at it; no lock, which an interrupt could leave taken

    # --- opening, and forking

    def _open(self) -> Sender | None:
        """The sender and the queues, made when there are none yet in this process; never raises."""
        sender = self._sender
        if self._is_closed or (sender is not None and sender.is_alive):
            return sender
        try:
            self._take_spool()
            # Waited for by nobody else, and not in the lock: before the new thread has begun it may run a finalizer
            # that records. What comes meanwhile is in the queues, and the sender is told of it.
            starting, mine = self._starting, object()
            try:
                if starting.setdefault("is", mine) is mine:
                    self._start()
            finally:
                if starting == {"is": mine}:  # without a call, as in `Late`
                    del starting["is"]
        except Exception as error:  # noqa: BLE001 -- a host without threads to spare does not stop the caller's work
            self.counters.complain("the meter cannot start to send, events are kept", error=error)
        return self._sender

    def _start(self) -> None:
        if self._sender is not None and self._sender.is_alive:
            return
        self._sender = Sender(self._work())
        try:
            self._sender.start()
        except Exception:  # after an interrupt it may run, and another one would send the same
            self._sender = None
            raise
        _close_with_worker(self)
        if self._is_closed:  # just now, by another thread, which found no sender to end
            self._sender.close(0)

    def _take_spool(self) -> Waiting | None:
        """The spool, if there is to be one; tried again by the sender where it could not be opened so far."""
        with self._lock:
            if self._root is None or self._spool is not None or self._is_closed:
                return self._spool
            try:
                self._spool = spool.take(self._root, self._spool_bytes, self._source)
            except OSError as error:
                self.counters.complain("no spool, events wait in memory until it can be opened: %s", error)
                return None
            if self._has_default_root:
                self._tell_of_others(self._root)
            return self._spool

    def _own(self) -> list[Waiting]:
        return [self._memory] if self._spool is None else [self._spool, self._memory]

    def _tell_of_others(self, root: Path) -> None:
        """What waits under another key is left alone: under this one it would be refused, or be somebody else's."""
        others: list[str] = []
        with contextlib.suppress(OSError):
            others = [str(path) for path in _other_spools(root) if spool.is_left(path)]
        if others:
            self.counters.complain(
                "usage events wait in %s, recorded under another key or by an older asapd.client, and this meter does "
                "not send them; to send them, make a meter with their key and with that directory as its `spool`",
                ", ".join(others),
            )

    def _work(self) -> Work:
        requests = self._requests
        own = self._own()
        return Work(
            link=self._link,
            settle=lambda reservation: settle(requests, reservation),
            report_under=lambda token, events: report(requests, events, token),
            queues=own,
            own=len(own),
            take_spool=self._take_spool,
            adopt=self._abandoned,
            late=self._late,
            refused=RefusedFile(None if self._root is None else self._root / "refused.ndjson"),
            counters=self.counters,
            batch_events=self._batch_events,
            batch_age_s=self._batch_age_s,
        )

    def _abandoned(self) -> Iterator[Waiting]:
        if self._root is not None and self._spool is not None:
            yield from spool.abandoned(self._root, self._spool_bytes, self._passed_over)

    def _passed_over(self, directory: Path, error: OSError) -> None:
        # With the name in it, so that none of several is silent because of another.
        self.counters.complain(f"what waits in {directory} is not sent, it cannot be opened", error=error)

    def forget_in_child(self) -> None:
        """In a forked child, whose spools are closed: leave the connections to the parent; what comes opens others."""
        with contextlib.suppress(OSError):
            self._link.close()
            self._requests.close()
        self.counters.forget_in_child()
        self._late.forget_in_child()
        self._lock = threading.RLock()
        self._forget()

    def catch_up(self) -> None:
        """Take in what came where it had to wait, such as in a child that did not have a spool of its own yet."""
        self._late.catch_up()

    # --- recording

    def task(
        self,
        *,
        agent: str | None = None,
        consumer: str | None = None,
        task_id: str | None = None,
        **details: Unpack[Details],
    ) -> Task:
        """A piece of work, for `with` or as a decorator; without a `task_id` it is given one."""
        _follow_fork()  # a task counts what is misused without asking the meter
        return Task(self, self._name(agent, self.agent), self._name(consumer, self.consumer), task_id, **details)

    def _name(self, given: str | None, own: str) -> str:
        try:
            return given or own
        except Exception as error:  # noqa: BLE001 -- metering never breaks the work that it measures
            self.counters.add("misused")
            self.counters.complain("the agent or the consumer of a metered task is left out", error=error)
            return own

    def record(
        self,
        *,
        agent: str | None = None,
        consumer: str | None = None,
        task_id: str | None = None,
        tokens_in: int | None = None,
        tokens_out: int | None = None,
        cached_tokens_in: int = 0,
        cache_write_tokens: int = 0,
        cache_write_1h_tokens: int = 0,
        reasoning_tokens: int = 0,
        duration_ms: int | None = None,
        api_calls: int = 0,
        outcome: Literal["completed", "failed"] = "completed",
        error: str | None = None,
        cost_usd: Usd | None = None,
        **details: Unpack[Details],
    ) -> str | None:
        """Record work that was measured elsewhere and ends now; gives the event's id, or None without an event."""
        try:
            metrics = Metrics(
                cached_tokens_in=count(cached_tokens_in),
                cache_write_tokens=count(cache_write_tokens),
                reasoning_tokens=count(reasoning_tokens),
                api_calls=count(api_calls),
            )
            if tokens_in is not None:
                metrics["tokens_in"] = count(tokens_in)
            if tokens_out is not None:
                metrics["tokens_out"] = count(tokens_out)
            if duration_ms is not None:
                metrics["duration_ms"] = count(duration_ms)
            if cache_write_1h_tokens:  # a daemon that does not know the field would refuse it
                metrics["cache_write_1h_tokens"] = count(cache_write_1h_tokens)
            event = build(
                agent=agent or self.agent,
                consumer=consumer or self.consumer,
                task_id=new_id() if task_id is None else str(task_id),
                now_ns=time.time_ns(),
                metrics=metrics,
                outcome=outcome,
                error=error,
                cost=None if cost_usd is None else dollars(cost_usd),
                details=as_details(details),
            )
        except Exception as problem:  # noqa: BLE001 -- metering never breaks the work that it measures
            self.counters.add("misused")
            self.counters.complain("a usage event could not be made", error=problem)
            return None
        return str(event["id"]) if self.submit(event) else None

    def submit(self, event: dict[str, Any]) -> bool:
        """Take an event in, which has an `id` and lacks `source` and `seq`; False if it is lost. Never raises."""
        return self._now_or_late(Kind.USAGE, event)

    def _now_or_late(self, kind: Kind, values: dict[str, Any]) -> bool:
        kept: list[bool] = []
        if self._is_entered():
            self._late.put(lambda: self._take(kind, values, kept))
            return True
        if not self._late.catch_up() and kind is Kind.SETTLE:
            # Behind the usage that another thread is taking in, which it may settle.
            self._late.put(lambda: self._take(kind, values, kept))
            self._late.catch_up()  # where that thread has come to its end since
            return True
        try:
            return self._take(kind, values, kept)
        finally:
            self._late.catch_up()

    def _is_entered(self) -> bool:
        """Whether this thread is in one of the meter's locks, and what asks came between: a finalizer or a signal.

        So is a child that was forked and has all that is the parent's until `forget_in_child`.
        """
        if not _follow_fork():
            return True
        sender = self._sender
        is_sender_entered = sender is not None and sender.is_entered
        return is_held(self._lock) or is_sender_entered or any(queue.is_entered for queue in self._own())

    def _take(self, kind: Kind, values: dict[str, Any], kept: list[bool]) -> bool:
        """Take it in. `kept` is empty at first; after an interrupt it says whether that is to be done again."""
        is_taken = self._append(kind, values, kept)
        if kind is Kind.USAGE or not is_taken:
            self.counters.add("recorded" if is_taken else "lost")
        return is_taken

    def _append(self, kind: Kind, values: dict[str, Any], kept: list[bool]) -> bool:
        try:
            if not kept:
                if self._is_closed:
                    self.counters.complain("an event came after the meter was closed, and is lost")
                    return False
                self._open()
                kept.append(self._keep(kind, values))  # at once, so that no interrupt comes between the two
            sender = self._sender
            if sender is not None:
                sender.appended()
        except Exception as error:  # noqa: BLE001 -- metering never breaks the work that it measures
            self.counters.complain("a usage event is lost", error=error)
            return False
        if not kept[0]:
            self.counters.complain("no room left for usage events, new ones are lost: %s", self._root or "in memory")
        return kept[0]

    def _keep(self, kind: Kind, values: dict[str, Any]) -> bool:
        # Behind the usage that waits there, which it may settle: the spool would be sent first.
        if kind is Kind.SETTLE and self._memory.count > 0 and self._memory.append(kind, values):
            return True
        if self._spool is not None:
            try:
                return self._spool.append(kind, values)
            except OSError as error:
                self.counters.complain("the spool cannot be written, events wait in memory", error=error)
        return self._memory.append(kind, values)

    # --- delegations

    def authorize(
        self,
        credential: str,
        *,
        task_id: str,
        action: str = "task.execute",
        agent: str | None = None,
        consumer: str | None = None,
        project: str | None = None,
        estimate: delegation.Estimate | None = None,
        ttl_s: int | None = None,
    ) -> delegation.Authorization:
        """Ask the daemon, and wait for its answer, whether `agent` may work under a token or a delegation's id."""
        _follow_fork()
        try:
            return delegation.authorize(
                self._requests,
                credential,
                action=action,
                task_id=task_id,
                delegate=agent or self.agent or None,
                consumer=consumer or self.consumer or None,
                project=project,
                estimate=estimate,
                ttl_s=ttl_s,
            )
        except (TypeError, ValueError) as error:
            self.counters.add("misused")
            self.counters.complain("an authorisation was asked for in a way that makes no sense", error=error)
            return delegation.Denied("invalid", str(error))
        except Exception as error:  # noqa: BLE001 -- the caller gets an answer whatever happens, and it is not a yes
            self.counters.complain("an authorisation could not be asked for", error=error)
            return delegation.Unavailable(f"{type(error).__name__}: {error}")

    def settle(self, reservation: str) -> None:
        """Have a reservation closed, after all that was recorded before; never raises, survives an outage."""
        if not is_reservation(reservation):
            _follow_fork()
            self.counters.add("misused")
            self.counters.complain(
                "settle() takes the `reservation` of an `Allowed`, and nothing is settled by what it was given: %.100r",
                reservation,
            )
            return
        self._now_or_late(Kind.SETTLE, {"reservation": reservation})

    def settle_unwanted(self, reservation: str) -> None:
        """Settle what was allowed once nobody waited for it any more; also where the meter was closed meanwhile.

        There it asks the daemon by itself and waits: it is called where the question was asked, in a thread for that.
        """
        if not self._is_closed:
            self.settle(reservation)
            return
        answer = settle(self._requests, reservation, delegation.AUTHORIZE_S)
        if isinstance(answer, Away | Refused):
            self.counters.add("lost")
            reason = answer.reason if isinstance(answer, Away) else answer.detail
            self.counters.complain("a reservation that nobody uses stays open until it expires: %s", reason)

    # --- ending

    def stats(self) -> Stats:
        """What this meter did, in this process."""
        _follow_fork()
        pending, pending_bytes = (0, 0) if self._sender is None else self._sender.waiting()
        return self.counters.snapshot(pending, pending_bytes)

    def flush(self, timeout_s: float = 10.0) -> bool:
        """Wait until the daemon has all that was recorded before; False when the time is over, or it never will."""
        if self._is_entered():
            return False
        try:
            self._late.catch_up()
            sender = self._open()
            return sender is not None and sender.flush(_seconds(timeout_s))
        except Exception as error:  # noqa: BLE001 -- metering never breaks the work that it measures
            self.counters.complain("the meter could not be flushed", error=error)
            return False
        finally:
            self._late.catch_up()

    def close(self, timeout_s: float = 5.0) -> None:
        """Send what can be sent in the time, and end. What remains in the spool is sent by whoever opens it next."""
        if self._is_entered():
            self.counters.complain("close() came inside another call of the meter, which is closed at the exit instead")
            return
        self._late.catch_up()
        mine = threading.get_ident()
        with self._lock:
            # Again by the thread whose call was interrupted, or where it failed, as in the thread that sends.
            if self._has_ended or self._closer not in {None, mine}:
                return
            self._is_closed, self._closer = True, mine
        try:
            if self._sender is not None:
                self._sender.close(_seconds(timeout_s))
            else:
                self.counters.add("lost", sum(queue.close() for queue in self._own()))
            self._requests.close()
            self.counters.say_rest()
            self._has_ended = True
        except Exception as error:  # noqa: BLE001 -- metering never breaks the work that it measures
            self.counters.complain("the meter could not be closed", error=error)
        self._closer = None
        self._late.catch_up()  # what came since is counted as lost

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _seconds(timeout_s: float) -> float:
    """A time that can be waited: not longer than a lock takes, and none where it is no number."""
    return max(0.0, min(timeout_s, threading.TIMEOUT_MAX))  # in this order NaN is 0


def _default_spool(address: addresses.Address, key: str | None) -> Path | None:
    """One directory for each daemon and key, so that no program sends what is meant for another, or as another."""
    home = Path(os.environ.get("XDG_STATE_HOME") or "~/.local/state")
    with contextlib.suppress(RuntimeError):
        home = home.expanduser()
    if not home.is_absolute():
        return None
    name = _digest(str(address))
    if key is not None:  # without one it is the name that it had when keys counted for nothing, so that it is found
        name += "-" + _digest(f"{address}\n{key}")
    return home / "asapd" / "spool" / name


def _other_spools(root: Path) -> list[Path]:
    """The default spools for the same daemon under other keys, and that from before keys had one each."""
    address = root.name.partition("-")[0]
    return sorted(path for path in root.parent.glob(f"{address}*") if path != root)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


_pid = os.getpid()
"""The process that the meters are in, as far as they know."""
_following: dict[int, threading.RLock] = {}
"""What a process holds while its meters follow it; one for each, as a child inherits its parent's as it was."""
_is_forking = False
"""Whether this process is about to fork by Python's hooks, or is a child that they were not all called in yet."""


def _set_forking(is_forking: bool) -> None:
    global _is_forking  # noqa: PLW0603 -- a process forks as a whole
    _is_forking = is_forking


def _follow_fork() -> bool:
    """Have the meters follow a fork of a server written in C, such as uWSGI, which calls no hooks of Python by itself.

    False while they are about to follow one: what comes between then, in a hook or a finalizer, has to wait.
    """
    pid = os.getpid()
    if _pid == pid:
        return True
    lock = _following.setdefault(pid, threading.RLock())
    if _is_forking or is_held(lock):
        return False
    with lock:
        if _pid != pid:  # else another thread was first, and what it made is in use
            locked.forget_in_child()
            _after_fork()
    return True


def _after_fork() -> None:
    global _pid  # noqa: PLW0603 -- a process forks as a whole
    spool.forget_in_child()
    meters = list(_meters)
    for meter in meters:
        meter.forget_in_child()
    _pid = os.getpid()
    _following.clear()  # of its parents, and this one, which nobody asks for any more
    _set_forking(False)
    for meter in meters:
        meter.catch_up()


def _at_exit() -> None:
    for meter in list(_meters):
        meter.close(EXIT_S)


def _close_with_worker(meter: Meter) -> None:
    """In a process of `multiprocessing`, which may end without `atexit`, have the meters closed before."""
    util: Any = sys.modules.get("multiprocessing.util")
    if util is None:
        return

    def close_at_end(_: object) -> None:
        util.Finalize(None, _at_exit, exitpriority=-100)  # after those of the program's own that may record

    # A worker calls it, and has forgotten what was to be done at its end before, once it knows that it is one: after
    # the hooks of the fork and the import of the program, which may record. It forgets this with the meter.
    util.register_after_fork(meter, close_at_end)
    if sys.modules["multiprocessing.process"].parent_process() is not None:
        close_at_end(meter)


os.register_at_fork(
    before=lambda: _set_forking(True), after_in_parent=lambda: _set_forking(False), after_in_child=_after_fork
)
atexit.register(_at_exit)
