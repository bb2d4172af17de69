"""Whether the sums of usage by hour are those of the events they were made from, for as long as these are kept.

Once retention took the last event of an hour nothing changes its sums any more: a digest of them is entered into the
log, and they are held to that from then on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from hashlib import sha256
from typing import Any

import apsw
import msgspec

from asapd.core.errors import Refusal
from asapd.core.types import HOUR_US, format_us
from asapd.store.rows import Row, fetch, fetch_one, one_moment
from asapd.store.tx import RefuseError, Tx
from asapd.store.units.audit import SealHours
from asapd.store.units.unit import RowWritten

AT_ONCE = 200
"""Hours that are entered together: some eight days, in fifteen kilobytes."""

ROWS_AT_ONCE = 5_000
"""Sums that are read for that: some ten milliseconds of a thread, but for an hour that has more by itself."""

_END = 2**63 // HOUR_US
"""Hours, either way, in which a time of 64 bits can be."""

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
_ERASED_SINCE = "SELECT 1 FROM audit WHERE seq > ? AND event_type = 'erasure.applied' LIMIT 1"

Digest = tuple[int, int, str]
"""An hour, how many sums there are of it, and the SHA-256 of these."""


def made_of(connection: apsw.Connection, rows: list[int]) -> list[Row]:
    """What some rows of usage come to in each hour and under each key: the hour, the key, the sums."""
    return fetch(connection, _MADE_OF, (msgspec.json.encode(rows).decode(),))


def unsealed(connection: apsw.Connection) -> list[Digest]:
    """The next hours whose events are all gone and whose sums are in no entry yet: rows and digest of each."""
    at = _sealed_through(connection)
    before = _whole_before(connection)
    found: list[Digest] = []
    while (
        len(found) < AT_ONCE
        and sum(rows for _, rows, _ in found) < ROWS_AT_ONCE
        and (hour := _next(connection, at)) is not None
        and hour < before
    ):
        found.append((hour, *_digest(connection, hour)))
        at = hour
    return found


def seal(tx: Tx, unit: SealHours) -> RowWritten:
    """Enter the digests of some hours.

    Raises:
        RefuseError: `invalid`, when they are not behind those that are sealed, or events of them are still there.
    """
    hours = [hour for hour, _, _ in unit.hours]
    if hours != sorted(set(hours)) or not _sealed_through(tx.connection) < hours[0] <= hours[-1] < _whole_before(
        tx.connection
    ):
        raise RefuseError(Refusal("invalid", "these hours are sealed, or not over yet: nothing was done"))
    digests = unit.hours
    if tx.row(_ERASED_SINCE, (unit.head,)) is not None:
        digests = [(hour, *_digest(tx.connection, hour)) for hour in hours]
    details: dict[str, Any] = {"hours": [list(hour) for hour in digests], "through_hour": hours[-1]}
    tx.audit("usage.sealed", unit.actor, "usage_hour", details, unit.now_us)
    tx.execute("UPDATE usage_hour_sealed SET through_hour = ?", (hours[-1],))
    return RowWritten(hours[-1])


def sealed(connection: apsw.Connection, hours: list[int]) -> list[Digest]:
    """The digests that some hours have now, of those that are sealed."""
    through = _sealed_through(connection)
    return [(hour, *_digest(connection, hour)) for hour in hours if hour <= through]


def seal_anew(tx: Tx, before: list[Digest], actor: str, now_us: int) -> None:
    """Enter hours that are sealed and were changed in the unit at hand, each with what it was `before`.

    Nothing is made good by that: one that was not then what had been sealed is found as before.
    """
    through = _sealed_through(tx.connection)
    after = sealed(tx.connection, [hour for hour, _, _ in before])
    details = {"hours": [list(hour) for hour in after], "through_hour": through, "was": [list(was) for was in before]}
    tx.audit("usage.sealed", actor, "usage_hour", details, now_us)


class _Sealed:
    """What the log says of hours whose events are gone."""

    def __init__(self, connection: apsw.Connection) -> None:
        self._connection = connection
        self._after = 0
        self.through = -1
        self.digests: dict[int, tuple[int, str]] = {}
        self.read()

    def read(self) -> None:
        """Take in what was entered since this was last done."""
        head = fetch(self._connection, "SELECT coalesce(max(seq), 0) FROM audit")[0][0]
        entries = fetch(
            self._connection,
            "SELECT details FROM audit WHERE seq > ? AND seq <= ? AND event_type = 'usage.sealed' ORDER BY seq",
            (self._after, head),
        )
        self._after = head
        for (details,) in entries:
            if details is None:
                continue
            told = msgspec.json.decode(details)
            self.through = max(self.through, told["through_hour"])
            was = {hour: (rows, digest) for hour, rows, digest in told.get("was", ())}
            for hour, *digest in told["hours"]:
                # One that an erasure changed: what it was has to be what was entered of it before.
                if hour not in was or was[hour] == self.digests.get(hour):
                    self.digests[hour] = (digest[0], digest[1])


def compare(connection: apsw.Connection, add: Callable[[str], None]) -> tuple[int, int, int]:
    """Hold all sums to the events or to the log, and name what differs; rows, sealed hours, and hours of neither."""
    log = _Sealed(connection)
    through = log.through
    rows = waiting = 0
    missing = set(log.digests)
    count = len(missing)
    for hour in _hours(connection):
        # An hour at a time: its events and its sums are of one moment, and the log grows on meanwhile.
        with one_moment(connection):
            if hour <= through:
                missing.discard(hour)
                found = _digest(connection, hour)
                rows += found[0]
                if log.digests.get(hour) != found:
                    log.read()  # an erasure may have changed it since
                if log.digests.get(hour) != found:
                    add(f"usage_hour of {_shown(hour)}: the sums are not those that were sealed when their events went")
            elif hour < _retired_before(connection):
                waiting += 1
            else:
                rows += _hold_to_events(connection, hour, add)
    for hour in sorted(missing):
        add(f"usage_hour of {_shown(hour)}: the sums are gone, and they were sealed when their events went")
    return rows, count, waiting


def _hold_to_events(connection: apsw.Connection, hour: int, add: Callable[[str], None]) -> int:
    kept = {row[: len(KEY)]: row[len(KEY) :] for row in fetch(connection, _KEPT, (hour,))}
    made: dict[Row, Row] = {}
    if abs(hour) < _END:
        made = _made(connection, (hour * HOUR_US, (hour + 1) * HOUR_US))
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


def _made(connection: apsw.Connection, hour_us: tuple[int, int]) -> dict[Row, Row]:
    """What the events of an hour come to under each key.

    Of those that were voided, and their voids, the sums may pass 64 bits on the way: they are added up in two halves
    then, which takes twice as long.
    """
    of_key = len(KEY)
    try:
        return {row[:of_key]: row[of_key:] for row in fetch(connection, _MADE.format(sums=_PLAIN), hour_us)}
    except apsw.SQLError:  # integer overflow; of any other the next statement dies too
        rows = fetch(connection, _MADE.format(sums=_HALVES), hour_us)
    return {
        row[:of_key]: tuple((high << 32) + low for high, low in zip(row[of_key::2], row[of_key + 1 :: 2], strict=True))
        for row in rows
    }


def _hours(connection: apsw.Connection) -> Iterator[int]:
    """Every hour of which there are sums or events, in order."""
    at = -(2**63)
    while True:
        hour = _next(connection, at)
        after_us = min(max(-(2**63), (at + 1) * HOUR_US), 2**63 - 1)
        row = fetch_one(connection, "SELECT min(timestamp_us) FROM usage WHERE timestamp_us >= ?", (after_us,))
        hours = [
            found for found in (hour, row[0] // HOUR_US if row and row[0] is not None else None) if found is not None
        ]
        if not hours:
            return
        at = min(hours)
        yield at


def _next(connection: apsw.Connection, after: int) -> int | None:
    row = fetch_one(connection, _NEXT, (after,))
    return None if row is None else row[0]


def _sealed_through(connection: apsw.Connection) -> int:
    return int(fetch(connection, "SELECT through_hour FROM usage_hour_sealed")[0][0])


def _retired_before(connection: apsw.Connection) -> int:
    """The first hour of which no event was retired."""
    return -(-int(fetch(connection, "SELECT before_us FROM usage_retired")[0][0]) // HOUR_US)


def _whole_before(connection: apsw.Connection) -> int:
    """The first hour of which an event may be there, or come."""
    before = int(fetch(connection, "SELECT before_us FROM usage_retired")[0][0]) // HOUR_US
    row = fetch_one(connection, "SELECT min(timestamp_us) FROM usage")
    return before if row is None or row[0] is None else min(before, row[0] // HOUR_US)


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
