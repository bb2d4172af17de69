"""What has to be remembered of OpenTelemetry exports, so that nothing they say is counted twice, in whatever order.

Of a cumulative stream of points its last value, for the next point repeats it; of a collection its points, for others
of it may come. Of a resource when it had spans, for its metrics tell of the same calls; of a trace which spans are
below which, for an agent's span tells of theirs.

What comes late takes back what was counted in its place: by a compensating row, in the same commit.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

import apsw
import msgspec

from asapd.core.span_tree import SpanTree
from asapd.core.types import MINUTE_US
from asapd.core.usage import UsageEvent
from asapd.store import identity, retention, span_identity, superseding, usage
from asapd.store.rows import fetch
from asapd.store.tx import RefuseError, Tx
from asapd.store.units.usage import (
    CollectionChanged,
    CollectionPart,
    Evidence,
    Recorded,
    RecordTelemetry,
    SpanFact,
    StreamsMoved,
    StreamValue,
    UsageConflict,
    UsageTooLate,
    VoidUsage,
)
from asapd.store.void_kinds import BY_HAND
from asapd.wire.otlp import digest

# As many as an export brings anew, and more: the tables shrink faster than they can grow by exports that are kept.
FORGET_AT_ONCE = 1_000

# A trace comes in several exports: of each process that it went through, every few seconds, and again where one failed.
LINKS_KEPT_US: Final = 10 * MINUTE_US

SPANS: Final = 2
METRICS: Final = 1
FIRST_METRICS: Final = 0
"""Ranks: of several ways in which a resource tells of the same calls, the one of the highest rank counts.

The lowest is of metrics of the first generation, which the second took the place of.
"""

_COVERED = "a span below it counts"
_TOPPED = "a span above it tells the tokens of the same call"
_OUTRANKED = "better telemetry of its resource tells of the same calls"
_REGROUPED = "counted anew with what came later of the same collection"
_TRACE = 16
# An operator took back the event of a collection: its points must not come back with others of it.
_IS_VOID = f"EXISTS (SELECT 1 FROM usage_void v WHERE v.voids = otlp_collection.seq AND v.superseded = {BY_HAND})"

_trees: msgspec.msgpack.Decoder[SpanTree] = msgspec.msgpack.Decoder(SpanTree)
_parts: msgspec.msgpack.Decoder[dict[bytes, CollectionPart]] = msgspec.msgpack.Decoder(dict[bytes, CollectionPart])
_encode = msgspec.msgpack.Encoder().encode


class Memory(msgspec.Struct, frozen=True):
    """The last values of streams, and the parts of collections by their keys, where there are any.

    `fresh` are the streams that no commit forgets now.
    """

    streams: dict[bytes, StreamValue]
    collections: dict[bytes, dict[bytes, CollectionPart]]
    fresh: set[bytes]


def remembered(
    connection: apsw.Connection, tenant: str, streams: list[bytes], collections: list[bytes], forget_before_us: int
) -> Memory:
    """What is remembered of these streams and collections."""
    found = fetch(
        connection,
        "SELECT stream, seen_us, start_ns, time_ns, value, calls FROM otlp_stream "
        "WHERE tenant = (SELECT id FROM name WHERE name = ?) AND stream IN (SELECT unhex(value) FROM json_each(?))",
        (tenant, _hex(streams)),
    )
    parts = fetch(
        connection,
        f"SELECT key, parts, {_IS_VOID} FROM otlp_collection "
        "WHERE tenant = (SELECT id FROM name WHERE name = ?) AND key IN (SELECT unhex(value) FROM json_each(?))",
        (tenant, _hex(collections)),
    )
    return Memory(
        {row[0]: StreamValue(*row[2:]) for row in found},
        {key: _read_parts(raw, is_void) for key, raw, is_void in parts},
        {row[0] for row in found if row[1] >= forget_before_us},
    )


def record(tx: Tx, unit: RecordTelemetry) -> Recorded | UsageConflict | UsageTooLate:
    """Record usage together with the memory that it was made from or makes.

    Raises:
        RefuseError: with `StreamsMoved`, when another export moved one of the streams or collections since it was
            looked at; with `UsageConflict` as for usage of other origin; with `UsageTooLate` for a partial
            unit too: what else it says of such an event has to be left out as well.
    """
    late = usage.find_late(tx, unit.usage)
    if late:
        raise RefuseError(UsageTooLate(retention.retired_edge(tx), late))
    tenant = tx.intern(unit.usage.tenant)
    moved = any(_value(tx, tenant, change.stream) != change.before for change in unit.streams)
    if moved or any(_parts_of(tx, tenant, change.key) != change.before for change in unit.collections):
        raise RefuseError(StreamsMoved())
    trees = _trees_of(tx, tenant, unit)
    refused = span_identity.refused(tx, unit.usage) if unit.spans else {}
    left_out, uncounted = _grow(trees, unit, refused)
    covered = sorted(left_out)
    refused = {place: why for place, why in refused.items() if place not in left_out}
    left_out |= refused.keys()
    superseded, set_aside = _note_evidence(tx, tenant, unit, _evidence_of(unit, set(covered), refused))
    superseded += uncounted
    counting = []
    for change in unit.collections:
        outranked_by = _outranking(tx, tenant, unit, change)
        if not outranked_by:
            counting.append(change)
        elif outranked_by == {SPANS}:
            event = unit.usage.events[change.event]
            set_aside.append((change.resource, event.id, event.tokens_in + event.tokens_out))
    left_out |= {change.event for change in unit.collections} - {change.event for change in counting}
    for change in counting:
        if change.before is not None:
            row = tx.row("SELECT seq FROM otlp_collection WHERE tenant = ? AND key = ?", (tenant, change.key))
            assert row is not None
            superseded.append((row[0], _REGROUPED))
    if superseded:
        instead = superseding.Instead(tx, unit.usage, left_out)
        for seq, reason in superseded:
            superseding.supersede(tx, VoidUsage(seq, reason, unit.usage.actor, unit.usage.now_us, unit.by), instead)
    recorded = _record_without(tx, unit, left_out)
    _keep(tx, tenant, unit, counting, trees, left_out)
    if not unit.is_narrow:
        # The ids of spans go to whoever is called from within them, and nobody may take another agent's beforehand.
        gone = {*covered, *(place for place, why in refused.items() if why.is_others)}
        kept = [unit.usage.events[place] for place in range(len(unit.spans)) if place not in gone]
        span_identity.keep(tx, unit.usage.tenant, kept)
    _forget(tx, unit)
    if not isinstance(recorded, Recorded):
        return recorded
    conflicts = sorted([*recorded.conflicts, *((place, why.seq) for place, why in refused.items())])
    return msgspec.structs.replace(recorded, conflicts=conflicts, covered=covered, set_aside=set_aside)


def _record_without(tx: Tx, unit: RecordTelemetry, left_out: set[int]) -> Recorded | UsageConflict | UsageTooLate:
    """Record the usage of a unit but for some events; conflicts and repeats are at their places among all."""
    kept = [place for place in range(len(unit.usage.events)) if place not in left_out]
    events = [unit.usage.events[place] for place in kept]
    costs = [unit.usage.costs[place] for place in kept]
    contents = [unit.usage.contents[place] for place in kept] if unit.usage.contents else []
    its = msgspec.structs.replace(unit.usage, events=events, costs=costs, contents=contents, places=kept)
    try:
        return usage.record(tx, its)
    except RefuseError as refused:
        if isinstance(refused.value, UsageConflict):
            conflicts = [(kept[index], seq) for index, seq in refused.value.conflicts]
            raise RefuseError(UsageConflict(conflicts)) from None
        raise


def _keep(
    tx: Tx,
    tenant: int,
    unit: RecordTelemetry,
    counting: list[CollectionChanged],
    trees: dict[bytes, SpanTree],
    left_out: set[int],
) -> None:
    """Write down what the next export has to know."""
    now_us, events = unit.usage.now_us, unit.usage.events
    tx.insert_many(
        "INSERT OR REPLACE INTO otlp_stream VALUES (?,?,?,?,?,?,?)",
        ((tenant, change.stream, *msgspec.structs.astuple(change.after), now_us) for change in unit.streams),
    )
    may_go = [
        place
        for place, fact in enumerate(unit.spans)
        if place not in left_out and (fact.gives_way or not span_identity.has_tokens(events[place]))
    ]
    rows = _rows_of(tx, unit.usage.tenant, [events[place] for place in may_go])
    for place, row in zip(may_go, rows, strict=True):
        fact = unit.spans[place]
        trees[_trace(fact)].note(
            _id(fact), row, has_tokens=span_identity.has_tokens(events[place]), gives_way=fact.gives_way
        )
    tx.insert_many(
        "INSERT OR REPLACE INTO otlp_trace VALUES (?,?,?,?,?)",
        (
            (tenant, _key(unit, trace), tree.is_counted, now_us, _encode(tree))
            for trace, tree in trees.items()
            if tree.is_counted or tree.parents
        ),
    )
    rows = _rows_of(tx, unit.usage.tenant, [events[change.event] for change in counting])
    tx.insert_many(
        "INSERT OR REPLACE INTO otlp_collection VALUES (?,?,?,?,?,?,?)",
        (
            (tenant, change.key, change.resource, change.rank, change.time_us, row, _encode(change.after))
            for change, row in zip(counting, rows, strict=True)
        ),
    )


def _rows_of(tx: Tx, tenant: str, events: Sequence[UsageEvent]) -> list[int]:
    """The rows of usage that have the identities of events."""
    identities = [(tenant, event.agent, event.source, event.id) for event in events]
    rows = identity.holders(tx.connection, identities)
    return [rows[its] for its in identities]


# --- traces


def _trace(fact: SpanFact) -> bytes:
    return fact.span[:_TRACE]


def _id(fact: SpanFact) -> bytes:
    return fact.span[_TRACE:]


def _key(unit: RecordTelemetry, trace: bytes) -> bytes:
    """A trace as who reports tells of it: whose patterns leave agents out does so for itself alone.

    Anybody can name a span, and what is below it voids usage: that of agents of other keys too.
    """
    return trace + digest(sorted(unit.by.agents)) if unit.is_narrow else trace


def _trees_of(tx: Tx, tenant: int, unit: RecordTelemetry) -> dict[bytes, SpanTree]:
    """What is known of the traces that a unit is of."""
    trees = {span[:_TRACE]: SpanTree() for span, _ in unit.links}
    trees |= {_trace(fact): SpanTree() for fact in unit.spans}
    traces = {_key(unit, trace): trace for trace in trees}
    found = fetch(
        tx.connection,
        "SELECT trace, tree FROM otlp_trace WHERE tenant = ? AND trace IN (SELECT unhex(value) FROM json_each(?))",
        (tenant, _hex(traces)),
    )
    return trees | {traces[key]: _trees.decode(raw) for key, raw in found}


def _grow(
    trees: dict[bytes, SpanTree], unit: RecordTelemetry, refused: dict[int, span_identity.Refused]
) -> tuple[set[int], list[tuple[int, str]]]:
    """Take in the spans of a unit; returns the places of those that give way, and rows that do so now, and why.

    One that is refused was counted before, and what it told then is known; what it tells now is not.
    """
    links: dict[bytes, list[tuple[bytes, bytes]]] = {}
    for span, parent in unit.links:
        links.setdefault(span[:_TRACE], []).append((span[_TRACE:], parent))
    told: dict[bytes, list[bytes]] = {}
    untold: dict[bytes, list[bytes]] = {}
    tops: dict[bytes, list[bytes]] = {}
    for place, (fact, event) in enumerate(zip(unit.spans, unit.usage.events, strict=False)):
        is_told = span_identity.has_tokens(event) and (place not in refused or refused[place].has_its_tokens)
        (told if is_told else untold).setdefault(_trace(fact), []).append(_id(fact))
        if is_told and fact.gives_way and place not in refused:
            tops.setdefault(_trace(fact), []).append(_id(fact))
    rows: list[tuple[int, str]] = []
    below: dict[bytes, set[bytes]] = {}
    for trace, tree in trees.items():
        grown = tree.grow(links.get(trace, ()), told.get(trace, ()), untold.get(trace, ()), tops.get(trace, ()))
        below[trace] = grown.below
        rows += [(row, _COVERED) for row in grown.covered] + [(row, _TOPPED) for row in grown.topped]
    gone = set()
    for place, (fact, event) in enumerate(zip(unit.spans, unit.usage.events, strict=False)):
        span, tree, has_tokens = _id(fact), trees[_trace(fact)], span_identity.has_tokens(event)
        is_covered = fact.gives_way and (span in tree.covered or (not has_tokens and span in tree.hollow))
        if is_covered or (not has_tokens and span in below[_trace(fact)]):
            gone.add(place)
    return gone, rows


# --- evidence


def _evidence_of(
    unit: RecordTelemetry, covered: set[int], refused: dict[int, span_identity.Refused]
) -> Iterable[Evidence]:
    """That of a unit and of its spans. One that gives way to another of its trace is none: its tokens do not count.

    Nor is one that told no tokens, or was refused and told others than are counted in its place: metrics of its
    resource would be lost for the sake of nothing.
    """
    for_nothing = covered | {place for place, why in refused.items() if not why.has_its_tokens}
    told = {
        Evidence(fact.told_of, SPANS, unit.usage.events[place].timestamp_us)
        for place, fact in enumerate(unit.spans)
        if fact.told_of and place not in for_nothing
    }
    return [*unit.evidence, *told]


def _note_evidence(
    tx: Tx, tenant: int, unit: RecordTelemetry, evidence: Iterable[Evidence]
) -> tuple[list[tuple[int, str]], list[tuple[bytes, str, int]]]:
    """Remember when resources told of their usage; returns the rows of lesser metrics near it, and why they go.

    Besides, of what resources which events go for the sake of spans, and how many tokens.
    """
    superseded: list[tuple[int, str]] = []
    set_aside: list[tuple[bytes, str, int]] = []
    for resource, rank, start_us, end_us in _stretches(evidence, unit.near_us):
        key = (tenant, resource, rank)
        reach = (start_us - 2 * unit.near_us, end_us + 2 * unit.near_us)
        # Two are near each other when any time between them is near one of them.
        joined = fetch(
            tx.connection,
            "SELECT start_us, end_us FROM otlp_evidence WHERE tenant = ? AND resource = ? AND rank = ? "
            "AND end_us >= ? AND start_us <= ?",
            (*key, *reach),
        )
        tx.insert_many(
            "DELETE FROM otlp_evidence WHERE tenant = ? AND resource = ? AND rank = ? AND start_us = ?",
            ((*key, start) for start, _ in joined),
        )
        first = min([start_us, *(start for start, _ in joined)])
        last = max([end_us, *(end for _, end in joined)])
        tx.execute("INSERT INTO otlp_evidence VALUES (?,?,?,?,?)", (*key, first, last))
        where = "WHERE tenant = ? AND resource = ? AND rank < ? AND time_us BETWEEN ? AND ?"
        values = (*key, start_us - unit.near_us, end_us + unit.near_us)
        outranked = fetch(tx.connection, f"SELECT seq FROM otlp_collection {where}", values)
        superseded += [(seq, _OUTRANKED) for (seq,) in outranked]
        if rank == SPANS:
            set_aside += [(resource, *_told_by(tx, seq)) for (seq,) in outranked]
        tx.execute(f"DELETE FROM otlp_collection {where}", values)
    return superseded, set_aside


def _told_by(tx: Tx, seq: int) -> tuple[str, int]:
    """The id and the tokens of a row of usage; none where it is gone."""
    row = tx.row("SELECT id, tokens_in + tokens_out FROM usage WHERE seq = ?", (seq,))
    return ("", 0) if row is None else (row[0], row[1])


def _stretches(evidence: Iterable[Evidence], near_us: int) -> list[tuple[bytes, int, int, int]]:
    """Resource, rank, first and last time of what is near each other."""
    found: list[tuple[bytes, int, int, int]] = []
    for one in sorted(evidence, key=msgspec.structs.astuple):
        if found and found[-1][:2] == (one.resource, one.rank) and one.time_us <= found[-1][3] + 2 * near_us:
            found[-1] = (*found[-1][:3], one.time_us)
        else:
            found.append((one.resource, one.rank, one.time_us, one.time_us))
    return found


def _outranking(tx: Tx, tenant: int, unit: RecordTelemetry, change: CollectionChanged) -> set[int]:
    """The ranks of the better telemetry near a collection."""
    after_us = 0 if unit.spans_ended else unit.near_us
    found = fetch(
        tx.connection,
        "SELECT DISTINCT rank FROM otlp_evidence WHERE tenant = ?1 AND resource = ?2 AND rank > ?3 "
        f"AND start_us <= ?4 + ?5 AND end_us >= ?4 - CASE rank WHEN {SPANS} THEN ?6 ELSE ?5 END",
        (tenant, change.resource, change.rank, change.time_us, unit.near_us, after_us),
    )
    return {rank for (rank,) in found}


# --- memory


def _value(tx: Tx, tenant: int, stream: bytes) -> StreamValue | None:
    row = tx.row(
        "SELECT start_ns, time_ns, value, calls FROM otlp_stream WHERE tenant = ? AND stream = ?", (tenant, stream)
    )
    return None if row is None else StreamValue(*row)


def _parts_of(tx: Tx, tenant: int, key: bytes) -> dict[bytes, CollectionPart] | None:
    row = tx.row(f"SELECT parts, {_IS_VOID} FROM otlp_collection WHERE tenant = ? AND key = ?", (tenant, key))
    return None if row is None else _read_parts(*row)


def _read_parts(raw: bytes, is_void: int) -> dict[bytes, CollectionPart]:
    parts = _parts.decode(raw)
    return {key: msgspec.structs.replace(part, is_void=True) for key, part in parts.items()} if is_void else parts


def _forget(tx: Tx, unit: RecordTelemetry) -> None:
    """Drop what no export can refer to any more: what would has points and spans too late to be taken.

    A trace of which nothing counts is only of use to those that come along with it, however near spans have to be to
    win over metrics.
    """
    before_us = unit.forget_before_us
    links_before_us = unit.usage.now_us - max(unit.near_us, LINKS_KEPT_US)
    for table, key, condition, value in (
        ("otlp_stream", "stream", "seen_us < ?", before_us),
        ("otlp_evidence", "resource, rank, start_us", "end_us < ?", before_us),
        ("otlp_collection", "key", "time_us < ?", before_us),
        ("otlp_trace", "trace", "counted = 1 AND seen_us < ?", before_us),
        ("otlp_trace", "trace", "counted = 0 AND seen_us < ?", max(before_us, links_before_us)),
    ):
        tx.execute(
            f"DELETE FROM {table} WHERE (tenant, {key}) IN "
            f"(SELECT tenant, {key} FROM {table} WHERE {condition} LIMIT ?)",
            (value, FORGET_AT_ONCE),
        )


def _hex(keys: Iterable[bytes]) -> str:
    return msgspec.json.encode([key.hex() for key in keys]).decode()
