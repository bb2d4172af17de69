"""What has to be remembered of OpenTelemetry exports, so that nothing they say is counted twice.

Of a cumulative stream of points its last value, for the next point repeats it; of a resource the newest end of a span,
for its metrics tell of the same calls.
"""

from __future__ import annotations

import apsw
import msgspec

from asapd.store import usage
from asapd.store.rows import fetch
from asapd.store.tx import RefuseError, Tx
from asapd.store.units import Recorded, RecordTelemetry, StreamsMoved, StreamValue, UsageConflict

# As many as an export brings anew, and more: the tables shrink faster than they can grow by exports that are kept.
FORGET_AT_ONCE = 1_000


class Memory(msgspec.Struct, frozen=True):
    """The last values of streams, and the newest end of a span (microseconds) by resource, where there are any."""

    streams: dict[bytes, StreamValue]
    spans_until_us: dict[bytes, int]


def remembered(connection: apsw.Connection, tenant: str, streams: list[bytes], resources: list[bytes]) -> Memory:
    """What is remembered of these streams and resources."""
    found = fetch(
        connection,
        "SELECT stream, start_ns, time_ns, value, calls FROM otlp_stream "
        "WHERE tenant = (SELECT id FROM name WHERE name = ?) AND stream IN (SELECT unhex(value) FROM json_each(?))",
        (tenant, _hex(streams)),
    )
    spans = fetch(
        connection,
        "SELECT resource, span_end_us FROM otlp_resource "
        "WHERE tenant = (SELECT id FROM name WHERE name = ?) AND resource IN (SELECT unhex(value) FROM json_each(?))",
        (tenant, _hex(resources)),
    )
    return Memory({row[0]: StreamValue(*row[1:]) for row in found}, dict(spans))


def record(tx: Tx, unit: RecordTelemetry) -> Recorded | UsageConflict:
    """Record usage together with the memory that it was made from or makes.

    Raises:
        RefuseError: with `StreamsMoved`, when another export moved one of the streams since it was looked at; with
            `UsageConflict` as for usage of other origin.
    """
    tenant = tx.intern(unit.usage.tenant)
    if any(_value(tx, tenant, change.stream) != change.before for change in unit.streams):
        raise RefuseError(StreamsMoved())
    recorded = usage.record(tx, unit.usage)
    now_us = unit.usage.now_us
    tx.insert_many(
        "INSERT OR REPLACE INTO otlp_stream VALUES (?,?,?,?,?,?,?)",
        ((tenant, change.stream, *msgspec.structs.astuple(change.after), now_us) for change in unit.streams),
    )
    tx.insert_many(
        "INSERT INTO otlp_resource VALUES (?,?,?) "
        "ON CONFLICT DO UPDATE SET span_end_us = max(span_end_us, excluded.span_end_us)",
        ((tenant, resource, end_us) for resource, end_us in unit.spans_until_us),
    )
    _forget(tx, unit)
    return recorded


def _value(tx: Tx, tenant: int, stream: bytes) -> StreamValue | None:
    row = tx.row(
        "SELECT start_ns, time_ns, value, calls FROM otlp_stream WHERE tenant = ? AND stream = ?", (tenant, stream)
    )
    return None if row is None else StreamValue(*row)


def _forget(tx: Tx, unit: RecordTelemetry) -> None:
    """Drop what no export can refer to any more: what would has points too late to be taken."""
    for table, key, column in (("otlp_stream", "stream", "seen_us"), ("otlp_resource", "resource", "span_end_us")):
        tx.execute(
            f"DELETE FROM {table} WHERE (tenant, {key}) IN "
            f"(SELECT tenant, {key} FROM {table} WHERE {column} < ? LIMIT ?)",
            (unit.forget_before_us, FORGET_AT_ONCE),
        )


def _hex(keys: list[bytes]) -> str:
    return msgspec.json.encode([key.hex() for key in keys]).decode()
