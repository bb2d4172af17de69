"""Whether the sums of usage by hour are those of the events they were made from, for as long as these are kept.

Before retention takes the first event of an hour its sums are held to all of them: where they agree, a digest of the
sums is entered into the log, and they are held to that from then on. Where they do not, the events stay, being all that
shows it. Who changes sums by right after that enters them anew, with what they were.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import sha256
from typing import Annotated, Any, NamedTuple, TypeVar

import apsw
import msgspec

from asapd.core.errors import Refusal
from asapd.core.types import HOUR_US, format_us
from asapd.store.rows import Row, fetch, fetch_one, one_moment
from asapd.store.times import bounded_us, hour_us
from asapd.store.tx import RefuseError, Tx
from asapd.store.units.audit import SealHours
from asapd.store.units.unit import RowWritten

AT_ONCE = 200
"""Hours that are entered together: some eight days, in fifteen kilobytes."""

ROWS_AT_ONCE = 5_000
"""Sums that are read for that: some ten milliseconds of a thread, but for an hour that has more by itself."""

EVENTS_AT_ONCE = 50_000
"""Events that sums are held to by one read: a quarter of a second of a thread, but for an hour that has more."""

LARGE = 1_000_000
"""Events of an hour that are added up by several reads: three seconds and more, and one read may not take thirty."""

PARTS = 60
"""Reads that add up such an hour."""

KEY = ("tenant", "agent", "consumer", "model", "project", "outcome")
_COUNTS = (
    "tokens_in",
    "tokens_out",
    "cached_tokens_in",
    "cache_write_tokens",
    "reasoning_tokens",
    "duration_ms",
    "api_calls",
    "cache_write_1h_tokens",
)
SUMS = ("events", "tasks", "cost_microusd", "unpriced", *_COUNTS)

# There are few tenants, and the table is ordered by them first.
_TENANTS = (
    "WITH RECURSIVE tenants (tenant) AS (SELECT min(tenant) FROM usage_hour UNION ALL "
    "SELECT (SELECT min(u.tenant) FROM usage_hour u WHERE u.tenant > tenants.tenant) FROM tenants "
    "WHERE tenant IS NOT NULL) "
)
_NEXT = (
    f"{_TENANTS}SELECT min((SELECT min(hour) FROM usage_hour u WHERE u.tenant = tenants.tenant AND hour > ?)) "
    "FROM tenants WHERE tenant IS NOT NULL"
)
_KEPT = (
    f"{_TENANTS}SELECT {', '.join(f'h.{name}' for name in (*KEY, *SUMS))} FROM tenants CROSS JOIN usage_hour h "
    "ON h.tenant = tenants.tenant AND h.hour = ? WHERE tenants.tenant IS NOT NULL "
    f"ORDER BY {', '.join(f'h.{name}' for name in KEY)}"
)
# What voids an event takes it away again, counts and all; what corrects its cost is no event, and may be the first to
# know a cost.
_SUMMED = (
    *("sign", "sign * (1 - partial)", "coalesce(cost_microusd, 0)", "sign * (cost_microusd IS NULL) - is_first"),
    *_COUNTS,
)
_PLAIN = ", ".join(f"sum({one})" for one in _SUMMED)
_HALVES = ", ".join(f"sum(({one}) >> 32), sum(({one}) & 4294967295)" for one in _SUMMED)
_EVENTS = (
    "FROM (SELECT usage.*, CASE WHEN v.seq IS NOT NULL THEN -1 WHEN r.seq IS NOT NULL THEN 0 ELSE 1 END AS sign, "
    "r.seq IS NOT NULL AND r.was_microusd IS NULL AS is_first "
    "FROM usage LEFT JOIN usage_void v ON v.seq = usage.seq LEFT JOIN usage_repriced r ON r.seq = usage.seq "
)
_MADE = (
    f"SELECT {', '.join(KEY)}, {{sums}} {_EVENTS} WHERE timestamp_us >= ? AND timestamp_us < ?) "
    f"GROUP BY {', '.join(KEY)} HAVING sum(sign) <> 0"
)
_MADE_OF = (
    f"SELECT (timestamp_us - (timestamp_us % {HOUR_US} + {HOUR_US}) % {HOUR_US}) / {HOUR_US} AS hour, "
    f"{', '.join(KEY)}, {_PLAIN} {_EVENTS} "
    f"WHERE usage.seq IN (SELECT value FROM json_each(?))) GROUP BY hour, {', '.join(KEY)}"
)
_MOVED_SINCE = (
    "SELECT 1 FROM audit WHERE seq > ? AND event_type = 'erasure.applied' AND details ->> '$.moved' IS NOT NULL LIMIT 1"
)
# By the number of the row: what came since is little, and an hour may be large.
_CAME_SINCE = "SELECT 1 FROM usage WHERE seq > ? AND +timestamp_us < ? LIMIT 1"
_SAID = (
    "SELECT seq, event_type, CAST(details AS BLOB) FROM audit WHERE seq > ? AND seq <= ? AND "
    "(event_type = 'usage.sealed' OR (event_type = 'retention.applied' AND subject = 'usage')) ORDER BY seq"
)

_Hour = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
Digest = tuple[_Hour, int, str]
"""An hour, how many sums there are of it, and the SHA-256 of these."""


def made_of(connection: apsw.Connection, rows: list[int]) -> list[Row]:
    """What some rows of usage come to in each hour and under each key: the hour, the key, the sums."""
    return fetch(connection, _MADE_OF, (msgspec.json.encode(rows).decode(),))


class _Taken(msgspec.Struct):
    """What an entry of retention says; builds of before did not say from when on it took."""

    before_us: int
    first_timestamp_us: int = -(2**63)
    last_timestamp_us: int | None = None


class _Sealed(msgspec.Struct):
    """What an entry says of hours that were sealed, or were changed once they were."""

    hours: list[Digest]
    through_hour: int = -1
    was: list[Digest] = []


class Log:
    """What the log says of hours: which are sealed, as what, and from which ones retention took events.

    `through` is the hour up to which it was looked which to seal: of one behind it nothing was taken, but by a build
    that sealed hours only once they were empty.
    """

    def __init__(self) -> None:
        self.after = 0
        """The entry up to which this is known."""
        self.through = -1
        self.digests: dict[int, tuple[int, str]] = {}
        self.unreadable: list[int] = []
        """Entries that were damaged: what they said of hours nobody knows."""
        self._taken: set[tuple[int, int]] = set()

    def take(self, entries: Iterable[Row], through: int) -> None:
        """Take in the next entries, up to one with this number."""
        for seq, kind, details in entries:
            if details is None:
                continue
            try:
                if kind == "retention.applied":
                    self._take_retired(_decoded(details, _Taken))
                else:
                    self._take_sealed(_decoded(details, _Sealed))
            except (ValueError, RecursionError):  # not JSON, not UTF-8, not of that form, or nested without end
                self.unreadable.append(seq)
        self.after = max(self.after, through)

    def _take_retired(self, told: _Taken) -> None:
        last_us = told.before_us if told.last_timestamp_us is None else told.last_timestamp_us
        self._taken.add((told.first_timestamp_us // HOUR_US, last_us // HOUR_US))

    def _take_sealed(self, told: _Sealed) -> None:
        self.through = max(self.through, told.through_hour)
        was = {hour: (rows, digest) for hour, rows, digest in told.was}
        for hour, rows, digest in told.hours:
            # What a changed one was has to be what was entered of it before; and what was, is not sealed again.
            if was.get(hour) == self.digests.get(hour):
                self.digests[hour] = (rows, digest)

    def is_unsealed(self, hour: int) -> bool:
        """Whether retention took events of an hour whose sums nobody has entered, as builds of before did it."""
        return hour > self.through and any(first <= hour <= last for first, last in self._taken)


_Form = TypeVar("_Form", _Taken, _Sealed)


def _decoded(details: bytes, form: type[_Form]) -> _Form:
    # All of it is decoded, or a byte in the name of a field would have that passed over. An entry has integers that are
    # too large for JSON as text.
    return msgspec.convert(msgspec.json.decode(details), form, strict=False)


def read_log(connection: apsw.Connection, log: Log) -> None:
    """Take in all that was entered since this was last done.

    Raises:
        ValueError: an entry was damaged; without it hours would be found to be altered that are not.
    """
    head = _head(connection)
    log.take(said(connection, log.after, head), head)
    if log.unreadable:
        raise ValueError(f"entry {log.unreadable[0]} of the log, which tells of hours, cannot be read")


def said(connection: apsw.Connection, after: int, through: int) -> list[Row]:
    """What entries behind one number up to another say of hours."""
    return fetch(connection, _SAID, (after, through))


class Examined(NamedTuple):
    """What hours came to that are due: the digests of those that agree with their events, and what others differ in.

    `at` is the last that was looked at; `is_last` says that no other is due. With `is_unclear` the next one is for
    the log to explain, which has to be read first, and `large` is the next one if it has to be added up first. `head`
    and `newest` are the last entry and event that were there.
    """

    agreed: list[Digest]
    unlike: dict[int, str]
    at: int
    is_last: bool
    is_unclear: bool
    head: int
    newest: int
    large: int | None = None


class AddedUp(NamedTuple):
    """What the events of a large hour come to; `head` and `newest` were the last before they were read."""

    hour: int
    made: dict[Row, list[int]]
    head: int
    newest: int


def newest_of(connection: apsw.Connection) -> tuple[int, int]:
    """The last entry and the last event that are there."""
    return _head(connection), fetch(connection, "SELECT coalesce(max(seq), 0) FROM usage")[0][0]


def add_part(connection: apsw.Connection, to: AddedUp, part: int) -> None:
    """Add what the events of a part of an hour come to; a void and a correction are as old as their event."""
    first_us = to.hour * HOUR_US
    times = bounded_us(first_us + part * HOUR_US // PARTS), bounded_us(first_us + (part + 1) * HOUR_US // PARTS)
    for key, values in _made(connection, times).items():
        sums = to.made.setdefault(key, [0] * len(SUMS))
        for place, value in enumerate(values):
            sums[place] += value


def examine(
    connection: apsw.Connection,
    at: int,
    before_us: int,
    log: Log | None,
    skipped: frozenset[int],
    added_up: AddedUp | None = None,
) -> Examined:
    """Hold the sums of some hours behind one, that ended before a time and are not sealed, to their events."""
    agreed: list[Digest] = []
    unlike: dict[int, str] = {}
    sealed_through, retired_before = _sealed_through(connection), _retired_before(connection)
    head, newest = newest_of(connection)
    looked = events = 0
    hour = next_due(connection, at, before_us)
    while hour is not None and looked < AT_ONCE and sum(rows for _, rows, _ in agreed) < ROWS_AT_ONCE:
        is_unclear = log is None and hour <= sealed_through
        if not is_unclear and hour not in skipped and not (log is not None and hour in log.digests):
            count = _count_events(connection, hour, LARGE + 1)
            events += count
            if looked and events > EVENTS_AT_ONCE:
                break
            made = None
            if count > LARGE:
                if added_up is None or added_up.hour != hour or _is_changed(connection, added_up):
                    return Examined(agreed, unlike, at, False, False, head, newest, large=hour)
                made, head, newest = added_up.made, added_up.head, added_up.newest
            found: list[str] = []
            _hold_to_events(connection, hour, found.append, made)
            is_unclear = log is None and bool(found) and hour < retired_before
            digest = (hour, *_digest(connection, hour))
            if found and log is not None and log.unreadable and hour < max(retired_before, sealed_through + 1):
                unlike[hour] = f"{found[0]}, unless entry {log.unreadable[0]}, which cannot be read, tells why"
            elif found and not (log is not None and log.is_unsealed(hour)):
                unlike[hour] = found[0]
            else:
                agreed.append(digest)
            looked += 1
        if is_unclear:
            unlike.pop(hour, None)
            return Examined(agreed, unlike, at, is_last=False, is_unclear=True, head=head, newest=newest)
        at = hour
        hour = next_due(connection, at, before_us)
    return Examined(agreed, unlike, at, is_last=hour is None, is_unclear=False, head=head, newest=newest)


def next_due(connection: apsw.Connection, at: int, before_us: int) -> int | None:
    """The next hour behind one that may have to be sealed, if it ended before a time.

    Up to the last that was sealed that is one of which there are events; behind it, one that has sums as well.
    """
    through = _sealed_through(connection)
    hour = _next_event(connection, at)
    if hour is None or hour > through:
        hour = min((one for one in (hour, _next(connection, max(at, through))) if one is not None), default=None)
    return hour if hour is not None and hour < before_us // HOUR_US else None


def _is_changed(connection: apsw.Connection, since: AddedUp) -> bool:
    came = fetch_one(connection, _CAME_SINCE, (since.newest, (since.hour + 1) * HOUR_US))
    return came is not None or fetch_one(connection, _MOVED_SINCE, (since.head,)) is not None


def seal(tx: Tx, unit: SealHours) -> RowWritten:
    """Enter the digests of some hours, whose events may go from then on.

    Raises:
        RefuseError: `invalid`, when they are not over yet, or sealed with all events gone, or not as they were read; or
            when more is said to be sealed than can be: that is not signed, and stays a finding.
    """
    hours = [hour for hour, _, _ in unit.hours]
    before = _sealed_through(tx.connection)
    if not _is_over(before, unit.now_us):
        what = f"usage_hour_sealed says that hours are sealed up to {before} (since 1970), which is yet to come"
        hint = "it was altered, or the clock is behind: see what asapctl audit verify finds"
        raise RefuseError(Refusal("invalid", f"{what}: nothing was done; {hint}"))
    if (
        hours != sorted(set(hours))
        or not _is_over(hours[-1], unit.now_us)
        or not all(_count_events(tx.connection, hour, 1) for hour in hours if hour <= before)
    ):
        raise RefuseError(Refusal("invalid", "these hours are sealed, or not over yet: nothing was done"))
    if (
        tx.row(_MOVED_SINCE, (unit.head,)) is not None
        or tx.row(_CAME_SINCE, (unit.newest, (hours[-1] + 1) * HOUR_US)) is not None
    ):
        raise RefuseError(Refusal("invalid", "these hours changed since they were read: read them again"))
    through = max(before, hours[-1])
    details: dict[str, Any] = {"hours": [list(hour) for hour in unit.hours], "through_hour": through}
    tx.audit("usage.sealed", unit.actor, "usage_hour", details, unit.now_us)
    tx.execute("UPDATE usage_hour_sealed SET through_hour = ?", (through,))
    return RowWritten(through)


def _is_over(hour: int, now_us: int) -> bool:
    return (hour + 1) * HOUR_US <= now_us


@contextmanager
def changing(tx: Tx, hours: Iterable[int], actor: str, now_us: int) -> Iterator[None]:
    """Have sums of some hours changed in the block, and those that are sealed entered anew, each with what it was.

    Nothing is made good by that: one that was not then what had been sealed is found as before. Where more is said to
    be sealed than can be, that is not signed, and so much as can be is entered: of an hour that is not sealed that
    counts for nothing.
    """
    through = _sealed_through(tx.connection)
    sealed = sorted({hour for hour in hours if hour <= through and _is_over(hour, now_us)})
    was = [[hour, *_digest(tx.connection, hour)] for hour in sealed]
    yield
    now = [[hour, *_digest(tx.connection, hour)] for hour in sealed]
    changed = [(before, after) for before, after in zip(was, now, strict=True) if before != after]
    if changed:
        details: dict[str, Any] = {"hours": [after for _, after in changed], "was": [old for old, _ in changed]}
        if _is_over(through, now_us):
            details["through_hour"] = through
        tx.audit("usage.sealed", actor, "usage_hour", details, now_us)


def compare(connection: apsw.Connection, add: Callable[[str], None]) -> tuple[int, int, int]:
    """Hold all sums to the events or to the log, and name what differs; rows, sealed hours, and hours of neither."""
    log = Log()
    read_log(connection, log)
    missing = set(log.digests)
    count = len(missing)
    rows = waiting = 0
    for hour in _hours(connection):
        missing.discard(hour)
        # An hour at a time: its events and its sums are of one moment, and the log grows on meanwhile.
        with one_moment(connection):
            kept, found = _judge(connection, log, hour)
            if found:
                read_log(connection, log)  # it may have been sealed since, or changed by right
                kept, found = _judge(connection, log, hour)
            rows += kept
            if found and hour not in log.digests and log.is_unsealed(hour):
                waiting += 1
                continue
            for one in found:
                add(one)
    with one_moment(connection):
        read_log(connection, log)
        for hour in sorted(missing):
            if _digest(connection, hour) != log.digests[hour]:
                add(f"usage_hour of {_shown(hour)}: the sums are gone, and they were sealed before their events went")
    return rows, count, waiting


def _judge(connection: apsw.Connection, log: Log, hour: int) -> tuple[int, list[str]]:
    """How many sums there are of an hour, and what is wrong with them."""
    found: list[str] = []
    if hour not in log.digests:
        return _hold_to_events(connection, hour, found.append), found
    digest = _digest(connection, hour)
    if log.digests[hour] != digest:
        found.append(f"usage_hour of {_shown(hour)}: the sums are not those that were sealed before their events went")
    return digest[0], found


def _hold_to_events(
    connection: apsw.Connection,
    hour: int,
    add: Callable[[str], None],
    added_up: Mapping[Row, Sequence[int]] | None = None,
) -> int:
    kept = {row[: len(KEY)]: row[len(KEY) :] for row in fetch(connection, _KEPT, (hour,))}
    made: dict[Row, Row]
    if added_up is not None:
        made = {key: tuple(sums) for key, sums in added_up.items() if sums[0]}
    else:
        made = _made(connection, hour_us(hour))
    for key in sorted(kept.keys() | made.keys()):
        is_sum, of_events = kept.get(key), made.get(key)
        if is_sum == of_events:
            continue
        where = f"usage_hour of {_shown(hour)}, {_named(connection, key)}"
        if is_sum is None:
            add(f"{where}: there are events and no sums of them")
        elif of_events is None:
            add(f"{where}: there are sums and no events of them")
        else:
            name, is_value, value = next(
                found for found in zip(SUMS, is_sum, of_events, strict=True) if found[1] != found[2]
            )
            add(f"{where}: {name} is {is_value}, and the events come to {value}")
    return len(kept)


def _made(connection: apsw.Connection, times_us: tuple[int, int]) -> dict[Row, Row]:
    """What the events of an hour, or of a part of one, come to under each key.

    Of those that were voided, and their voids, the sums may pass 64 bits on the way: they are added up in two halves
    then, which takes twice as long.
    """
    of_key = len(KEY)
    try:
        return {row[:of_key]: row[of_key:] for row in fetch(connection, _MADE.format(sums=_PLAIN), times_us)}
    except apsw.SQLError:  # integer overflow; of any other the next statement dies too
        rows = fetch(connection, _MADE.format(sums=_HALVES), times_us)
    return {
        row[:of_key]: tuple((high << 32) + low for high, low in zip(row[of_key::2], row[of_key + 1 :: 2], strict=True))
        for row in rows
    }


def _hours(connection: apsw.Connection) -> Iterator[int]:
    """Every hour of which there are sums or events, in order."""
    at = -(2**63)
    while True:
        hours = [hour for hour in (_next(connection, at), _next_event(connection, at)) if hour is not None]
        if not hours:
            return
        at = min(hours)
        yield at


def _next_event(connection: apsw.Connection, after: int) -> int | None:
    sql = "SELECT min(timestamp_us) FROM usage WHERE timestamp_us >= ?"
    start_us = bounded_us((after + 1) * HOUR_US)
    if start_us < (after + 1) * HOUR_US:
        return None  # no time is that late
    first_us = fetch(connection, sql, (start_us,))[0][0]
    return None if first_us is None else int(first_us) // HOUR_US


def _count_events(connection: apsw.Connection, hour: int, most: int = -1) -> int:
    sql = "SELECT count(*) FROM (SELECT 1 FROM usage WHERE timestamp_us >= ? AND timestamp_us < ? LIMIT ?)"
    return int(fetch(connection, sql, (*hour_us(hour), most))[0][0])


def _next(connection: apsw.Connection, after: int) -> int | None:
    row = fetch_one(connection, _NEXT, (after,))
    return None if row is None else row[0]


def _sealed_through(connection: apsw.Connection) -> int:
    return int(fetch(connection, "SELECT through_hour FROM usage_hour_sealed")[0][0])


def _retired_before(connection: apsw.Connection) -> int:
    """The first hour of which no event was retired."""
    return -(-int(fetch(connection, "SELECT before_us FROM usage_retired")[0][0]) // HOUR_US)


def _head(connection: apsw.Connection) -> int:
    return int(fetch(connection, "SELECT coalesce(max(seq), 0) FROM audit")[0][0])


def _digest(connection: apsw.Connection, hour: int) -> tuple[int, str]:
    rows: list[Row] = fetch(connection, _KEPT, (hour,))
    return len(rows), sha256(b"\n".join(map(msgspec.json.encode, rows))).hexdigest()


def _shown(hour: int) -> str:
    try:
        return format_us(hour * HOUR_US)[:16] + "Z"
    except (ValueError, OverflowError):  # a number that was altered
        return f"hour {hour}"


def _named(connection: apsw.Connection, key: Row) -> str:
    def name(number: int) -> str:
        row = fetch_one(connection, "SELECT name FROM name WHERE id = ?", (number,))
        return f"name {number}" if row is None else str(row[0])

    tenant, agent, consumer, model, project, outcome = key
    return f"{name(agent)} for {name(consumer)} ({name(tenant)}, {name(model)}, {name(project)}, outcome {outcome})"
