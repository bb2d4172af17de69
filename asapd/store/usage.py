"""Writing usage: identity, rows, hourly rollups, ledger and audit entries, all in one unit."""

from __future__ import annotations

import msgspec

from asapd.core.types import Outcome
from asapd.core.usage import Cost, RollupSums, UsageEvent, content_digest, identity_digest, rollup
from asapd.store import ledger, sources
from asapd.store.budgets import open_book
from asapd.store.rows import Row, fetch
from asapd.store.tx import RefuseError, Tx
from asapd.store.units import Recorded, RecordUsage, UsageConflict

_INSERT = f"INSERT INTO usage VALUES ({','.join('?' * 37)})"
_UPSERT_HOUR = f"INSERT INTO usage_hour VALUES ({','.join('?' * 18)}) ON CONFLICT DO UPDATE SET " + ", ".join(
    f"{field} = {field} + excluded.{field}" for field in RollupSums._fields
)


def record(tx: Tx, unit: RecordUsage) -> Recorded | UsageConflict:
    """Record each event of a batch once.

    Raises:
        RefuseError: with `UsageConflict`, when an identity is taken by other content and the unit is not partial.
    """
    first = tx.next_seq("usage")
    keys = [identity_digest(unit.tenant, event) if event.id else None for event in unit.events]
    known = _known(tx, [key for key in keys if key is not None])
    claimed: list[Row] = []
    fresh: list[tuple[UsageEvent, Cost, str, bytes]] = []
    ids: list[str] = []
    conflicts: list[tuple[int, int]] = []
    delivered: dict[sources.Key, sources.Delivered] = {}
    tenant = tx.intern(unit.tenant)
    duplicates = unprotected = 0
    for index, (event, cost, key) in enumerate(zip(unit.events, unit.costs, keys, strict=True)):
        content = content_digest(event)
        source_key = (tenant, tx.intern(event.agent), tx.intern(event.source))
        source = delivered.get(source_key)
        if source is None:
            source = delivered[source_key] = sources.Delivered()
        if key is not None:
            event_id = event.id
            holder = known.get(key)
            if holder is not None:
                if holder[1] == content:
                    duplicates += 1
                    source.resent += 1
                    ids.append(event_id)
                else:
                    conflicts.append((index, holder[0] if holder[0] < first else 0))
                continue
            known[key] = (first + len(fresh), content)
            claimed.append((key, first + len(fresh)))
        else:
            unprotected += 1
            event_id = tx.new_id("use", unit.now_us)
        source.events += 1
        if event.source_seq is not None:
            source.seqs.append(event.source_seq)
        ids.append(event_id)
        fresh.append((event, cost, event_id, content))
    if conflicts and not unit.partial:
        raise RefuseError(UsageConflict(conflicts))
    claimed.sort()  # the index is ordered by key: neighbours share its pages
    tx.insert_many("INSERT INTO usage_identity VALUES (?,?)", claimed)
    _insert(tx, unit, first, fresh)
    sources.deliver(tx, delivered)
    return Recorded(len(fresh), duplicates, unprotected, ids, conflicts)


def _known(tx: Tx, keys: list[bytes]) -> dict[bytes, tuple[int, bytes | None]]:
    """Which identities are taken: the row that has each, and that row's content."""
    rows = fetch(
        tx.connection,
        "SELECT key, i.seq, content FROM usage_identity i LEFT JOIN usage u ON u.seq = i.seq "
        "WHERE key IN (SELECT unhex(value) FROM json_each(?))",
        (msgspec.json.encode([key.hex() for key in keys]).decode(),),
    )
    return {key: (seq, content) for key, seq, content in rows}


def _insert(tx: Tx, unit: RecordUsage, first: int, fresh: list[tuple[UsageEvent, Cost, str, bytes]]) -> None:
    tenant = tx.intern(unit.tenant)
    rows: list[Row] = []
    book = open_book(tx, unit.actor, unit.now_us)
    for seq, (event, cost, event_id, content) in enumerate(fresh, first):
        flags = 0
        if book is not None or event.reservation is not None or event.delegation is not None:
            flags = ledger.charge(tx, book, unit.tenant, event, cost.microusd, unit.now_us)
        rows.append(
            (
                seq,
                event_id,
                tenant,
                tx.intern(event.source),
                event.source_seq,
                tx.intern(event.agent),
                tx.intern(event.consumer),
                event.task_id,
                event.timestamp_us,
                event.tokens_in,
                event.tokens_out,
                event.cached_tokens_in,
                event.cache_write_tokens,
                event.reasoning_tokens,
                event.duration_ms,
                event.api_calls,
                event.outcome,
                event.partial,
                event.error,
                tx.intern(event.model),
                tx.intern(event.provider),
                tx.intern(event.project),
                cost.microusd,
                cost.source,
                cost.priced_microusd,
                event.reported_microusd,
                cost.price_version,
                event.delegation,
                event.reservation,
                event.action,
                flags,
                event.parent_task_id,
                None if event.labels is None else msgspec.json.encode(event.labels, order="sorted").decode(),
                event.trace_id,
                content,
                unit.now_us,
                unit.actor,
            )
        )
        tx.audit(
            "usage.recorded",
            unit.actor,
            event_id,
            {
                "agent": event.agent,
                "api_calls": event.api_calls,
                "consumer": event.consumer,
                "content": content.hex(),
                "cost_microusd": cost.microusd,
                "delegation": event.delegation,
                "duration_ms": event.duration_ms,
                "flags": flags,
                "outcome": Outcome(event.outcome).name.lower(),
                "reservation": event.reservation,
                "row": seq,
                "task_id": event.task_id,
                "tenant": unit.tenant,
                "timestamp_us": event.timestamp_us,
                "tokens_in": event.tokens_in,
                "tokens_out": event.tokens_out,
            },
            unit.now_us,
        )
    if book is not None:
        book.flush()
    tx.insert_many(_INSERT, rows)
    tx.insert_many(
        _UPSERT_HOUR,
        (
            (tenant, key.hour, *(tx.intern(name) for name in key[1:5]), key.outcome, *sums)
            for key, sums in rollup((event, cost) for event, cost, _, _ in fresh).items()
        ),
    )
