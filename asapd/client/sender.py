"""The thread that sends what waits: in batches, in order, again until the daemon has answered."""

from __future__ import annotations

import json
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby, islice

from asapd.client.event import TOKEN_FIELD, encode
from asapd.client.late import Late, is_held
from asapd.client.link import Answer, Away, Link, Refused, Taken
from asapd.client.refused import PASSING, RefusedFile
from asapd.client.stats import Counters
from asapd.client.waiting import Kind, Record, Waiting

BATCH_BYTES = 2**19
FIRST_PAUSE_S = 0.05
LONGEST_PAUSE_S = 2.0
SYNC_EVERY_S = 1.0
ADOPT_EVERY_S = 30.0
MOST_ADOPTED = 4
"""Each has four files open of the program's own, which may have a thousand in all."""
BUG_TRIES = 5
FAILING_BYTES = 2**23
"""How much at which the daemon fails is looked beyond for what it takes."""
FAILURES_AT_A_STRETCH = 100
"""More are the daemon's, though it took something just before; and it is not asked on without a pause."""


@dataclass(eq=False)
class _Batch:
    """Records of one queue on their way; what is left of them is sent again after a failure."""

    queue: Waiting
    last: Record
    """The last of its records, which are `count`."""
    count: int = 0
    parts: list[list[Record]] = field(default_factory=list)
    """A stack: the last is sent first. A part is usage under one token, or a settlement."""
    settles: list[Record] = field(default_factory=list)
    """They have their turn when the usage is dealt with."""
    bugs: int = 0
    failing: list[Record] = field(default_factory=list)
    """At which the daemon failed, each by itself."""
    takes: dict[Record, int] = field(default_factory=dict)
    """Of each of those: what the daemon had taken when it failed at it last."""
    unkept: list[tuple[Record, str, str]] = field(default_factory=list)
    """Refused, with code and reason, but they could not be set aside yet."""
    has_waited: bool = False
    """For the file to set them aside."""
    failure: Away | None = None
    """The latest."""


@dataclass
class Work:
    """What a sender has to do with."""

    link: Link
    settle: Callable[[str], Answer]
    report_under: Callable[[str, Sequence[bytes]], Answer]
    """Reports events under the token of a delegation."""
    queues: list[Waiting]
    """First the own ones, `own` of them, which are closed at the end only."""
    own: int
    take_spool: Callable[[], Waiting | None]
    """The own spool; None where there is none, or it cannot be opened."""
    adopt: Callable[[], Iterator[Waiting]]
    """Queues that processes which are gone left behind."""
    late: Late
    refused: RefusedFile
    counters: Counters
    batch_events: int
    batch_age_s: float
    batches: dict[int, _Batch] = field(default_factory=dict)


class Sender:
    """The thread, and the ways to wake it."""

    def __init__(self, work: Work) -> None:
        self._work = work
        self._changed = threading.Condition()
        self._waits_since_s: float | None = time.monotonic()
        self._is_hurried = False
        self._may_cut_pause = False
        self._closing_at_s: float | None = None
        self._done: Counter[int] = Counter()  # by the id of the queue
        self._takes = 0
        self._failures = 0  # since then
        self._dealt_with = 0
        self._lost = 0
        self._has_ended = False
        self._synced_at_s = 0.0
        self._adopted_at_s = float("-inf")
        self._thread = threading.Thread(target=self._run, name="asapd-meter", daemon=True)

    def start(self) -> None:
        """Begin to send.

        Raises:
            RuntimeError: the host has no thread to spare.
        """
        self._thread.start()

    # --- from other threads

    def appended(self) -> None:
        """Something was appended."""
        waiting = self.waiting()[0]
        if self._waits_since_s is not None and waiting != self._work.batch_events:
            return
        with self._changed:
            if self._waits_since_s is None:
                self._waits_since_s = time.monotonic()
            self._changed.notify_all()

    def waiting(self) -> tuple[int, int]:
        """Records that wait, and their bytes."""
        queues = list(self._work.queues)
        return sum(queue.count for queue in queues), sum(queue.size_bytes for queue in queues)

    def flush(self, timeout_s: float) -> bool:
        """Wait until all that waits now in the own queues is dealt with; False too for what was lost at the end.

        A write to the spool that the thread has begun is waited for as well: records and their acknowledgement are
        counted together with it.
        """
        with self._changed:
            # Queue by queue: what is sent of one, perhaps of a process that is gone, says nothing about another.
            wanted = Counter({id(queue): self._done[id(queue)] + queue.count for queue in self._own()})
            deadline_s = time.monotonic() + timeout_s
            self._may_cut_pause = (
                True  # once: a daemon that is away or overloaded is not asked faster for being waited for
            )
            while not wanted <= self._done and self._thread.is_alive():
                self._is_hurried = True
                self._changed.notify_all()
                left_s = deadline_s - time.monotonic()
                if left_s <= 0:
                    return False
                self._changed.wait(min(left_s, 0.1))
            return wanted <= self._done and not self._lost

    def _own(self) -> list[Waiting]:
        return self._work.queues[: self._work.own]

    def close(self, timeout_s: float) -> None:
        """Send what can be sent in the time, and end the thread."""
        with self._changed:
            self._closing_at_s = time.monotonic() + timeout_s
            self._changed.notify_all()
        if self._thread.ident is None:
            return  # it is just being started, and ends at once
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            self._work.link.abort()
            self._thread.join(min(timeout_s, 1.0))
        # The thread may still be about to end; it corrects the number then by what got through after all.
        self._count_lost(sum(queue.count for queue in self._work.queues if not queue.is_durable), has_ended=False)

    def _count_lost(self, lost: int, *, has_ended: bool) -> None:
        with self._changed:
            if self._has_ended:
                return
            self._has_ended = has_ended
            self._work.counters.add("lost", lost - self._lost)
            self._lost = lost
        if lost:
            self._work.counters.complain("events that waited in memory are lost with the process")

    @property
    def is_entered(self) -> bool:
        """Whether this thread is in one of these methods already: no other may be called then."""
        return is_held(self._changed)

    @property
    def is_alive(self) -> bool:
        """Whether the thread still runs."""
        return self._thread.is_alive()

    # --- the thread

    def _run(self) -> None:
        pause_s = FIRST_PAUSE_S
        while self._wait_for_work():
            began_s = time.monotonic()
            dealt_with = self._dealt_with
            try:
                failure = self._round(began_s)
            except Exception as error:  # noqa: BLE001 -- the thread has to live on, whatever the disk or a bug does
                failure = f"{type(error).__name__}: {error}"
                self._work.counters.complain("sending usage events failed", error=error)
            self._work.counters.set_error(failure)
            with self._changed:
                # In this order, because `appended` adds first and looks at the time then.
                self._waits_since_s = None
                if self.waiting()[0]:
                    self._waits_since_s = began_s
                self._changed.notify_all()
            if failure is None or self._dealt_with > dealt_with:
                pause_s = FIRST_PAUSE_S  # what fails in one queue does not slow down the others
            if failure is None:
                continue
            self._sync(began_s)
            if self._closing_at_s is not None and all(queue.is_durable for queue in self._work.queues if queue.count):
                break
            self._pause(pause_s * random.uniform(0.5, 1.0))  # noqa: S311 -- spreads retries, keeps no secret
            pause_s = min(pause_s * 2, LONGEST_PAUSE_S)
        self._end()

    def _end(self) -> None:
        self._work.link.close()
        self._sync(float("inf"))
        # Counted as they are closed, so that nothing comes between; the memory last, which is there for what a spool
        # that was just closed does not take.
        lost = sum(queue.close() for queue in sorted(self._work.queues, key=lambda queue: not queue.is_durable))
        self._count_lost(lost, has_ended=True)

    def _wait_for_work(self) -> bool:
        """Until there is a batch, or the oldest record has waited long enough; False when it is time to end."""
        work = self._work
        work.late.catch_up()
        with self._changed:
            while True:
                waiting = self.waiting()[0]
                now_s = time.monotonic()
                if self._closing_at_s is not None:
                    return waiting > 0 and now_s < self._closing_at_s
                if work.late.is_waiting:
                    return True  # what was put off here is taken in before the next wait
                if now_s >= self._adopted_at_s + ADOPT_EVERY_S:
                    return True
                if not waiting:
                    self._waits_since_s = None
                    if not self.waiting()[0]:
                        self._changed.wait(self._adopted_at_s + ADOPT_EVERY_S - now_s)
                    continue
                since_s = now_s if self._waits_since_s is None else self._waits_since_s
                left_s = since_s + work.batch_age_s - now_s
                if self._is_hurried or waiting >= work.batch_events or left_s <= 0:
                    return True
                self._waits_since_s = since_s
                self._changed.wait(left_s)

    def _pause(self, pause_s: float) -> None:
        with self._changed:
            if self._closing_at_s is not None:
                self._changed.wait(min(pause_s, FIRST_PAUSE_S))
                return
            # However many flushes there are, one after the other.
            shortest_s = min(pause_s, FIRST_PAUSE_S)
            self._changed.wait_for(lambda: self._closing_at_s is not None, shortest_s)
            self._changed.wait_for(lambda: self._may_cut_pause or self._closing_at_s is not None, pause_s - shortest_s)
            self._may_cut_pause = False

    def _sync(self, now_s: float) -> None:
        if now_s < self._synced_at_s + SYNC_EVERY_S:
            return
        self._synced_at_s = now_s
        for queue in self._work.queues:
            try:
                queue.sync()
            except OSError as error:
                self._work.counters.complain("the spool cannot be synced", error=error)

    def _round(self, now_s: float) -> str | None:
        """One batch of each queue; the reason when the daemon does not take them."""
        work = self._work
        self._is_hurried = False
        if now_s >= self._adopted_at_s + ADOPT_EVERY_S:
            self._adopted_at_s = now_s
            try:
                spool = work.take_spool()
                if spool is not None and all(queue is not spool for queue in work.queues):
                    with self._changed:
                        work.queues.insert(0, spool)
                        work.own += 1
                work.queues.extend(islice(work.adopt(), max(0, work.own + MOST_ADOPTED - len(work.queues))))
            except OSError as error:
                work.counters.complain("abandoned spools cannot be looked at", error=error)
        failure: str | None = None
        for queue in list(work.queues):
            try:
                away = self._send_one(queue) if queue.count else None
            except OSError as error:
                work.counters.complain("a spool cannot be used", error=error)
                failure = f"a spool cannot be used: {error}"
                continue
            if away is not None:
                failure = away.reason
                if not away.is_bug:  # else it may be what is in this queue, and the others get on
                    return failure
        for queue in work.queues[work.own :]:
            if not queue.count:
                if len(work.queues) >= work.own + MOST_ADOPTED:
                    self._adopted_at_s = float("-inf")  # the next may wait for its place
                work.queues.remove(queue)
                queue.close()
        return failure

    def _send_one(self, queue: Waiting) -> Away | None:
        try:
            batch = self._work.batches.get(id(queue)) or self._begin(queue)
            away = self._deliver(batch)
        except BaseException:
            # What of it was sent is not known any more, so all of it is sent again.
            self._work.batches.pop(id(queue), None)
            raise
        if away is None:
            with self._changed:  # both at once for `flush`, which adds them up
                queue.acknowledge(batch.last, batch.count)
                self._done[id(queue)] += batch.count
                self._changed.notify_all()
            del self._work.batches[id(queue)]
        return away

    def _begin(self, queue: Waiting) -> _Batch:
        records = queue.read(self._work.batch_events, BATCH_BYTES)
        batch = _Batch(queue, records[-1])
        self._extend(batch, records)
        self._work.batches[id(queue)] = batch
        return batch

    def _extend(self, batch: _Batch, records: list[Record]) -> None:
        batch.last = [batch.last, *records][-1]
        batch.count += len(records)
        batch.parts += self._parts([record for record in records if record.kind is Kind.USAGE])
        batch.settles += [record for record in records if record.kind is Kind.SETTLE]
        for record in records:
            if record.kind is Kind.DAMAGED:
                self._set_aside(batch, record, "damaged", "the checksum of the line in the spool is wrong")

    def _parts(self, records: list[Record]) -> list[list[Record]]:
        """What is sent at once, the last first: usage under one token, or a settlement."""
        parts: list[list[Record]] = []
        for (kind, _), group in groupby(records, lambda record: (record.kind, _token(record))):
            most = 1 if kind is Kind.SETTLE else self._work.batch_events
            part: list[Record] = []
            size_bytes = 0
            for record in group:
                size_bytes += len(record.body)
                if not part or len(part) >= most or size_bytes > BATCH_BYTES:
                    part, size_bytes = [], len(record.body)
                    parts.append(part)
                part.append(record)
        return parts[::-1]

    def _deliver(self, batch: _Batch) -> Away | None:
        """Send what is left of it.

        After some tries, what the daemon fails at is sent one by one, and passed over. It is set aside only if the
        daemon takes something else then, from whatever queue, and fails at it again: else it is not them. That the
        daemon refuses something shows nothing, as it does so before it comes to what fails; nor that it knew something.
        """
        unkept, batch.unkept = batch.unkept, []
        for record, code, reason in unkept:
            self._set_aside(batch, record, code, reason)
        failures = 0
        while part := self._next_part(batch):
            answer = self._report(part)
            match answer:
                case Taken():
                    self._taken(answer)
                    failures = 0 if answer.is_written else failures
                case Refused():
                    batch.parts += self._split(batch, part, answer)
                case Away():
                    batch.bugs += answer.is_bug
                    if not answer.is_bug or batch.bugs < BUG_TRIES:
                        batch.parts.append(part)
                        return answer
                    batch.failure = answer
                    self._pass_over(batch, part, answer)
                    failures += 1
                    if failures >= FAILURES_AT_A_STRETCH:
                        return answer
        if not batch.failing and not batch.unkept:
            return None
        has_taken = any(self._takes > batch.takes[record] for record in batch.failing)
        held = batch.failing + batch.settles + [record for record, _, _ in batch.unkept]
        if not has_taken and sum(len(record.body) for record in held) < FAILING_BYTES:
            # What is behind shows whether it is the daemon.
            try:
                behind = batch.queue.read(self._work.batch_events, BATCH_BYTES, batch.last)
            except OSError as error:  # which is no trouble of what is dealt with already
                behind = []
                self._work.counters.complain("a spool cannot be used", error=error)
            self._extend(batch, behind)
        if not batch.parts:
            batch.parts, batch.failing = self._parts(batch.failing), []
        return batch.failure

    def _next_part(self, batch: _Batch) -> list[Record] | None:
        if not batch.parts and all(record.kind is Kind.SETTLE for record in batch.failing):
            batch.parts, batch.settles = self._parts(batch.settles), []
        return batch.parts.pop() if batch.parts else None

    def _pass_over(self, batch: _Batch, part: list[Record], failure: Away) -> None:
        self._failures += 1
        takes = batch.takes.get(part[0], self._takes)
        if len(part) > 1:
            batch.parts += [[record] for record in reversed(part)]
        elif self._takes > takes and self._failures <= FAILURES_AT_A_STRETCH:
            what = "settlement" if part[0].kind is Kind.SETTLE else "event"
            reason = f"the daemon fails at this {what}, and takes others: {failure.reason}"
            self._set_aside(batch, part[0], "internal", reason)
        else:
            batch.takes[part[0]] = self._takes
            batch.failing.append(part[0])

    def _report(self, part: list[Record]) -> Answer:
        if part[0].kind is Kind.SETTLE:
            return self._work.settle(_reservation(part[0]))
        token = _token(part[0])
        if token is None:
            return self._work.link.report([record.body for record in part])
        return self._work.report_under(token, [_without_token(record) for record in part])

    def _split(self, batch: _Batch, part: list[Record], answer: Refused) -> list[list[Record]]:
        """Set aside what was refused; give what is to be tried again, the last first."""
        named = {place: reason for place, reason in answer.places.items() if 0 <= place < len(part)}
        for place, reason in named.items():
            self._set_aside(batch, part[place], answer.code, reason)
        if named:
            rest = [record for place, record in enumerate(part) if place not in named]
            return [rest] if rest else []
        if len(part) == 1:
            self._set_aside(batch, part[0], answer.code, answer.detail)
            return []
        middle = len(part) // 2
        return [part[middle:], part[:middle]]

    def _taken(self, answer: Taken) -> None:
        if answer.is_written:
            self._takes += 1
            self._failures = 0
        self._dealt_with += 1
        self._work.counters.add("sent", answer.recorded + answer.duplicates)
        if answer.duplicates:
            self._work.counters.add("duplicates", answer.duplicates)

    def _set_aside(self, batch: _Batch, record: Record, code: str, reason: str) -> None:
        if batch.unkept:  # for a reason that holds for this one too
            batch.unkept.append((record, code, reason))
            return
        counters, refused = self._work.counters, self._work.refused
        is_kept, why = False, "there is no file for it"
        try:
            is_kept = refused.add(record, code, reason, is_patient=not batch.has_waited)
            if refused.path is not None:
                why = f"{refused.path} is full: send or remove what is in it"
        except OSError as error:
            if error.errno in PASSING:
                batch.unkept.append((record, code, reason))
                batch.has_waited = True
                batch.failure = Away(f"{refused.path} cannot be written: {error}", is_bug=True)
                counters.complain("what asapd refuses cannot be set aside at present, it waits", error=error)
                return
            why = str(error)
        self._dealt_with += 1
        counters.add("refused")
        if is_kept:
            what = "a settlement" if record.kind is Kind.SETTLE else "a usage event"
            counters.complain("asapd refuses %s: %s: %s; it is set aside: %s", what, code, reason, refused.path)
            return
        # Acknowledged all the same, or it would stand in the way of all the others for ever.
        counters.add("lost")
        counters.complain_of_unkept(
            "asapd refuses one: %s: %s; it cannot be set aside, %s: %s",
            code,
            reason,
            why,
            record.body.decode("utf-8", "replace"),
        )


_MARK = f'"{TOKEN_FIELD}":"'.encode()


def _token(record: Record) -> str | None:
    """The token that a record is under. Only what has the field's name in it, perhaps as a label's, is looked into."""
    if _MARK not in record.body:
        return None
    value = json.loads(record.body).get(TOKEN_FIELD)
    return value if isinstance(value, str) else None


def _without_token(record: Record) -> bytes:
    event = json.loads(record.body)
    del event[TOKEN_FIELD]
    return encode(event)


def _reservation(record: Record) -> str:
    return str(json.loads(record.body)["reservation"])
