"""Writing usage: identity, rows, hourly rollups, ledger and audit entries, all in one unit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import msgspec

from asapd.core.ledger import Account
from asapd.core.types import Outcome
from asapd.core.usage import (
    FLAG_UNAUTHORISED,
    FLAG_UNTIMED,
    PAST_64_BITS,
    Cost,
    RollupKey,
    RollupSums,
    UsageEvent,
    content_digest,
    identity_digest,
    identity_key,
    rollup,
)
from asapd.store import charging, identity, outcomes, sources, unauthorised, usage_days
from asapd.store.budgets import open_book
from asapd.store.rows import Row
from asapd.store.tx import RefuseError, Tx
from asapd.store.units.usage import Recall, Recorded, RecordUsage, UsageConflict

# 1 025 events of 2**53 - 1 tokens in one request are more than an INTEGER column takes; SQLite sees to what is added.
_MAX_SUM = 2**63 - 1
COLUMNS = (
    "seq",
    "id",
    "tenant",
    "source",
    "source_seq",
    "agent",
    "consumer",
    "task_id",
    "timestamp_us",
    "tokens_in",
    "tokens_out",
    "cached_tokens_in",
    "cache_write_tokens",
    "reasoning_tokens",
    "duration_ms",
    "api_calls",
    "outcome",
    "partial",
    "error",
    "model",
    "provider",
    "project",
    "cost_microusd",
    "cost_source",
    "priced_microusd",
    "reported_microusd",
    "price_version",
    "delegation",
    "reservation",
    "action",
    "flags",
    "parent_task_id",
    "labels",
    "trace_id",
    "content",
    "committed_us",
    "reported_by",
    "cache_write_1h_tokens",
)
"""What a row of usage is made of."""

# The columns in their order, which a test holds: APSW looks at the whole text again for every row.
_INSERT = f"INSERT INTO usage VALUES ({','.join('?' * len(COLUMNS))})"
_HOUR = ("tenant", *RollupKey._fields, *RollupSums._fields)
_UPSERT_HOUR = (
    f"INSERT INTO usage_hour ({', '.join(_HOUR)}) VALUES ({','.join('?' * len(_HOUR))}) ON CONFLICT DO UPDATE SET "
    + ", ".join(f"{field} = {field} + excluded.{field}" for field in RollupSums._fields)
)


class UsageNote(msgspec.Struct, frozen=True, gc=False):
    """What the audit log says of an event; its fields stand in the order of their names, so its JSON is canonical.

    What a cost has not (a source, a price) is not said: most events have no such thing, and each byte is hashed.
    """

    agent: str
    api_calls: int
    consumer: str
    content: str
    cost_microusd: int | None
    cost_source: str | msgspec.UnsetType
    delegation: str | None
    duration_ms: int
    estimate_microusd: int | msgspec.UnsetType | None
    flags: int
    outcome: str
    price_version: str | msgspec.UnsetType
    priced_microusd: int | msgspec.UnsetType
    reservation: str | None
    row: int
    task_id: str
    tenant: str
    timestamp_us: int
    tokens_in: int
    tokens_out: int


_note = msgspec.json.Encoder()
_OUTCOMES = {outcome.value: outcome.name.lower() for outcome in Outcome}


_Fresh = tuple[int, UsageEvent, Cost, str, bytes]
"""An event that is to be written: its row, what was reported, its cost, id and content."""


def record(tx: Tx, unit: RecordUsage) -> Recorded | UsageConflict:
    """Record each event of a batch once.

    Raises:
        RefuseError: with `UsageConflict`, when an identity is taken by other content and the unit is not partial;
            `invalid`, when the sums of an hour would pass 64 bits.
    """
    return record_together(tx, [unit])[0]


def refuse(_: Tx, unit: Recall) -> NoReturn:
    """Refuse a request that was not answered before.

    Raises:
        RefuseError: always.
    """
    raise RefuseError(unit.refusal)


def record_together(tx: Tx, batch: Sequence[RecordUsage]) -> list[Recorded]:
    """Record units that follow each other, with few statements for all; the outcome is that of one after the other.

    Raises:
        RefuseError: when a unit is refused: all have to be rolled back then, and recorded one by one.
    """
    pass_ = _Pass(tx, batch)
    recorded = [pass_.record(unit, keys) for unit, keys in zip(batch, pass_.keys, strict=True)]
    pass_.write()
    return recorded


class _Pass:
    """What units bring together, until it is written."""

    def __init__(self, tx: Tx, batch: Sequence[RecordUsage]) -> None:
        self._tx = tx
        self._next = tx.next_seq("usage")
        self.keys = [
            [identity_key(unit.tenant, its.agent, its.source, its.id) if its.id else None for its in unit.events]
            for unit in batch
        ]
        self._known = identity.known(tx.connection, [key for keys in self.keys for key in keys if key is not None])
        if tx.has_digests:
            self._known |= self._known_by_digest(batch)
        self._claimed: list[Row] = []
        self._rows: list[Row] = []
        self._priced: dict[str, list[tuple[UsageEvent, Cost]]] = {}
        self._delivered: dict[sources.Key, sources.Delivered] = {}

    def _known_by_digest(self, batch: Sequence[RecordUsage]) -> dict[bytes, tuple[int, bytes | None]]:
        keys = {
            identity_digest((unit.tenant, event.agent, event.source, event.id)): key
            for unit, own in zip(batch, self.keys, strict=True)
            for event, key in zip(unit.events, own, strict=True)
            if key is not None
        }
        return {keys[digest]: holder for digest, holder in identity.known(self._tx.connection, list(keys)).items()}

    def record(self, unit: RecordUsage, keys: list[bytes | None]) -> Recorded:
        """Take in one unit."""
        tx, known, delivered, claimed = self._tx, self._known, self._delivered, self._claimed
        names = tx.names
        first = following = self._next
        fresh: list[_Fresh] = []
        ids: list[str] = []
        taken: list[int] = []
        resent: list[int] = []
        conflicts: list[tuple[int, int]] = []
        tenant = names[unit.tenant]
        unprotected = 0
        contents = unit.contents or [content_digest(event) for event in unit.events]
        for index, (event, cost, key, content) in enumerate(zip(unit.events, unit.costs, keys, contents, strict=True)):
            source_key = (tenant, names[event.agent], names[event.source])
            source = delivered.get(source_key)
            if source is None:
                source = delivered[source_key] = sources.Delivered()
            if key is not None:
                event_id = event.id
                holder = known.get(key)
                if holder is not None:
                    if holder[1] == content:
                        resent.append(index)
                        source.resent += 1
                        ids.append(event_id)
                        taken.append(index)
                    else:
                        conflicts.append((index, holder[0] if holder[0] < first else 0))
                    continue
                known[key] = (following, content)
                claimed.append((key, following))
            else:
                unprotected += 1
                event_id = tx.new_id("use", unit.now_us)
            source.events += 1
            if event.source_seq is not None:
                source.seqs.append(event.source_seq)
            ids.append(event_id)
            taken.append(index)
            fresh.append((following, event, cost, event_id, content))
            following += 1
        self._next = following
        if conflicts and not unit.partial:
            raise RefuseError(UsageConflict(conflicts))
        without_permission = self._charge(unit, tenant, fresh)
        if unit.places is None:
            return Recorded(len(fresh), len(resent), unprotected, ids, conflicts, without_permission)
        places = unit.places
        conflicts = [(places[index], seq) for index, seq in conflicts]
        return Recorded(
            len(fresh),
            len(resent),
            unprotected,
            ids,
            conflicts,
            without_permission,
            [places[index] for index in taken],
            unit.late,
            [places[index] for index in resent],
        )

    def _charge(self, unit: RecordUsage, tenant: int, fresh: list[_Fresh]) -> int:
        """Debit what the fresh events of a unit used, and make their rows and audit entries.

        Returns how many of them were done without permission.
        """
        tx = self._tx
        names, rows = tx.names, self._rows
        subjects: list[str] = []
        notes: list[UsageNote] = []
        priced = self._priced.setdefault(unit.tenant, [])
        book = open_book(tx, unit.actor, unit.now_us)
        refused: list[unauthorised.Work] = []
        attribution = unit.attribution
        for seq, reported, cost, event_id, content in fresh:
            event = reported if attribution is None else unauthorised.attribute(reported, attribution)
            flags = 0
            under: Account | None = None
            code: str | None = None
            estimated: int | msgspec.UnsetType | None = msgspec.UNSET
            if book is not None or event.reservation is not None or event.delegation is not None:
                if event.reservation is not None and cost.microusd is None:
                    estimated = None  # only such an event can have one
                flags, estimate, under, code = charging.charge(tx, book, unit, event, cost.microusd)
                if estimate is not None:
                    estimated = estimate
                    tx.execute("INSERT INTO usage_estimate VALUES (?,?)", (seq, estimate))
            if event.duration_ms is None:
                flags |= FLAG_UNTIMED
            if attribution is not None and attribution.code is not None:
                flags |= FLAG_UNAUTHORISED
                code = attribution.code
            if code is not None:
                refused.append(unauthorised.Work(seq, event_id, event, under, code))
            rows.append(
                (
                    seq,
                    event_id,
                    tenant,
                    names[event.source],
                    event.source_seq,
                    names[event.agent],
                    names[event.consumer],
                    event.task_id,
                    event.timestamp_us,
                    event.tokens_in,
                    event.tokens_out,
                    event.cached_tokens_in,
                    event.cache_write_tokens,
                    event.reasoning_tokens,
                    event.duration_ms or 0,
                    event.api_calls,
                    event.outcome,
                    event.partial,
                    event.error,
                    names[event.model],
                    names[event.provider],
                    names[event.project],
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
                    event.cache_write_1h_tokens,
                )
            )
            priced.append((event, cost))
            subjects.append(event_id)
            notes.append(
                UsageNote(
                    event.agent,
                    event.api_calls,
                    event.consumer,
                    content.hex(),
                    cost.microusd,
                    cost.source or msgspec.UNSET,
                    event.delegation,
                    event.duration_ms or 0,
                    estimated,
                    flags,
                    _OUTCOMES[event.outcome],
                    cost.price_version or msgspec.UNSET,
                    msgspec.UNSET if cost.priced_microusd is None else cost.priced_microusd,
                    event.reservation,
                    seq,
                    event.task_id,
                    unit.tenant,
                    event.timestamp_us,
                    event.tokens_in,
                    event.tokens_out,
                )
            )
        texts = _note.encode_lines(notes).splitlines()
        tx.audit_all("usage.recorded", unit.actor, list(zip(subjects, texts, strict=True)), unit.now_us)
        if refused:
            unauthorised.tell(tx, unit, refused)
        if book is not None:
            book.flush()
            tx.enter_budgets()
            # A budget that comes to count tasks looks for them among the rows: those of the units before must be there.
            self._write_rows()
        return len(refused)

    def _write_rows(self) -> None:
        self._tx.insert_many(_INSERT, self._rows)
        self._rows.clear()

    def write(self) -> None:
        """Write what was taken in."""
        tx = self._tx
        self._claimed.sort()  # the index is ordered by key: neighbours share its pages
        tx.insert_many("INSERT INTO usage_identity VALUES (?,?)", self._claimed)
        self._write_rows()
        hours = [(tenant, *hour) for tenant, priced in self._priced.items() for hour in rollup(priced).items()]
        if any(max(sums) > _MAX_SUM for _, _, sums in hours):
            raise RefuseError(PAST_64_BITS)
        rows = [
            (tx.intern(tenant), key.hour, *(tx.intern(name) for name in key[1:5]), key.outcome, *sums)
            for tenant, key, sums in hours
        ]
        tx.insert_many(_UPSERT_HOUR, rows)
        usage_days.add_late(tx, rows)
        sources.deliver(tx, self._delivered)
        for tenant, priced in self._priced.items():
            outcomes.usage_came(tx, tx.intern(tenant), (event for event, _ in priced))
