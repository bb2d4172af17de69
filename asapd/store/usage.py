"""Writing usage: identity, rows, hourly rollups, ledger and audit entries, all in one unit."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import NoReturn, cast

import msgspec

from asapd.core.ledger import Account
from asapd.core.usage import (
    FLAG_UNAUTHORISED,
    FLAG_UNTIMED,
    Cost,
    RollupKey,
    RollupSums,
    UsageEvent,
    identity_digest,
    past_64_bits,
    rollup,
    too_late,
)
from asapd.store import (
    charging,
    identity,
    outcomes,
    retention,
    sources,
    unauthorised,
    usage_behind,
    usage_days,
    usage_hours,
)
from asapd.store.budgets import open_book
from asapd.store.prepared import INSERT, RECORDED, Prepared, UsageNote, note_of, prepare, row_of, suppose, texts_of
from asapd.store.rows import Row
from asapd.store.tx import RefuseError, Tx
from asapd.store.units.usage import Recall, Recorded, RecordUsage, UsageConflict, UsageTooLate

# 1 025 events of 2**53 - 1 tokens in one request are more than an INTEGER column takes; SQLite sees to what is added.
_MAX_SUM = 2**63 - 1
_HOUR = ("tenant", *RollupKey._fields, *RollupSums._fields)
_SUMS = f"({','.join('?' * len(_HOUR))})"
_ADD_HOURS = {
    count: f"INSERT INTO usage_hour ({','.join(_HOUR)}) VALUES {','.join([_SUMS] * count)} ON CONFLICT DO UPDATE SET "
    + ",".join(f"{field}={field}+excluded.{field}" for field in RollupSums._fields)
    for count in (16, 4, 1)
}
"""Of so many at once each takes half as long: APSW looks at the whole text again for every statement."""


# A statement for many takes half as long; more of them gain nothing. A row as wide as one of usage takes longer so.
_CLAIMS = 50
_CLAIMED = ",(?,?)"
_CLAIM = f"INSERT INTO usage_identity VALUES (?,?){_CLAIMED * (_CLAIMS - 1)}"

FEW = 4
"""Events of a report that go in one by one as fast as all at once, or faster."""

_Fresh = tuple[int, int, str]
"""An event that is to be written: its row, its place in its report, and its id."""


def record(tx: Tx, unit: RecordUsage) -> Recorded | UsageConflict | UsageTooLate:
    """Record each event of a batch once.

    Raises:
        RefuseError: with `UsageConflict`, when an identity is taken by other content, or `UsageTooLate`, when nobody
            can tell any more whether one was, and the unit is not partial; `invalid`, when the sums of an hour would
            pass 64 bits.
    """
    return record_together(tx, [(unit, prepare(unit))])[0]


def find_late(tx: Tx, unit: RecordUsage) -> list[int]:
    """The places of events from a time that retention has reached: they may have been taken with their identities.

    The clock may have been ahead as it did so, or the report have waited while the settings changed. One whose
    identity is there is a repeat as ever.
    """
    before_us = retention.retired_edge(tx)
    old = [place for place, event in enumerate(unit.events) if event.timestamp_us < before_us]
    identities = [(unit.tenant, its.agent, its.source, its.id) for its in map(unit.events.__getitem__, old)]
    held = identity.holders(tx.connection, [its for its in identities if its[3]])
    return [place for place, its in zip(old, identities, strict=True) if its not in held]


def refuse(_: Tx, unit: Recall) -> NoReturn:
    """Refuse a request that was not answered before.

    Raises:
        RefuseError: always.
    """
    raise RefuseError(unit.refusal)


def record_together(tx: Tx, batch: Sequence[tuple[RecordUsage, Prepared]]) -> list[Recorded]:
    """Record units that follow each other, with few statements for all; the outcome is that of one after the other.

    Raises:
        RefuseError: when a unit is refused: all have to be rolled back then, and recorded one by one.
    """
    pass_ = _Pass(tx, batch)
    recorded = [pass_.record(unit, prepared) for unit, prepared in batch]
    pass_.write()
    return recorded


class _Pass:
    """What units bring together, until it is written."""

    def __init__(self, tx: Tx, batch: Sequence[tuple[RecordUsage, Prepared]]) -> None:
        self._tx = tx
        self._now_us = batch[-1][0].now_us
        self._retired_us = retention.retired_edge(tx)
        self._first = self._next = tx.next_seq("usage")
        self._known = identity.known(tx.connection, [key for _, its in batch for key in its.keys if key is not None])
        if tx.has_digests:
            self._known |= self._known_by_digest(batch)
        self._claimed: list[tuple[bytes, int]] = []
        self._rows: list[Row] = []
        self._priced: dict[str, list[tuple[UsageEvent, Cost]]] = {}
        self._delivered: dict[sources.Key, sources.Delivered] = {}

    def _known_by_digest(self, batch: Sequence[tuple[RecordUsage, Prepared]]) -> dict[bytes, tuple[int, bytes | None]]:
        keys = {
            identity_digest((unit.tenant, event.agent, event.source, event.id)): key
            for unit, prepared in batch
            for event, key in zip(unit.events, prepared.keys, strict=True)
            if key is not None
        }
        return {keys[digest]: holder for digest, holder in identity.known(self._tx.connection, list(keys)).items()}

    def record(self, unit: RecordUsage, prepared: Prepared) -> Recorded:
        """Take in one unit."""
        late = find_late(self._tx, unit) if prepared.oldest_us < self._retired_us else []
        if late and (not unit.partial or unit.places is None):
            raise RefuseError(UsageTooLate(self._retired_us, late))
        is_simple = prepared.is_simple and len(unit.events) > FEW
        if is_simple and not late and self._are_new(prepared) and open_book(self._tx, unit.actor, unit.now_us) is None:
            return self._record_new(unit, prepared)
        tx, known, claimed = self._tx, self._known, self._claimed
        left_out = set(late)
        first = following = self._next
        fresh: list[_Fresh] = []
        ids: list[str] = []
        taken: list[int] = []
        resent: list[int] = []
        conflicts: list[tuple[int, int]] = []
        unprotected = 0
        for index, (event, key, content) in enumerate(zip(unit.events, prepared.keys, prepared.contents, strict=True)):
            if index in left_out:
                continue
            source = self._source(unit.tenant, event.agent, event.source)
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
            fresh.append((following, index, event_id))
            following += 1
        self._next = following
        if conflicts and not unit.partial:
            raise RefuseError(UsageConflict(conflicts))
        without_permission = self._charge(unit, prepared, fresh)
        if unit.places is None:
            return Recorded(len(fresh), len(resent), unprotected, ids, conflicts, without_permission)
        places = unit.places
        found_late = [(places[index], too_late(self._retired_us)) for index in late]
        conflicts = [(places[index], seq) for index, seq in conflicts]
        return Recorded(
            len(fresh),
            len(resent),
            unprotected,
            ids,
            conflicts,
            without_permission,
            [places[index] for index in taken],
            sorted([*unit.late, *found_late]),
            [places[index] for index in resent],
        )

    def _source(self, tenant: str, agent: str, source: str) -> sources.Delivered:
        names = self._tx.names
        key = names[tenant], names[agent], names[source]
        found = self._delivered.get(key)
        if found is None:
            found = self._delivered[key] = sources.Delivered()
        return found

    def _are_new(self, prepared: Prepared) -> bool:
        """Whether no event of a unit is a repeat, of what was recorded before or of another one in it."""
        keys = prepared.keys
        return self._known.keys().isdisjoint(keys) and len(set(keys)) == len(keys)

    def _record_new(self, unit: RecordUsage, prepared: Prepared) -> Recorded:
        """Take in a simple unit of which nothing is a repeat, and that debits nothing."""
        tx, first, count = self._tx, self._next, len(unit.events)
        supposed = prepared.supposed
        if supposed is None or (supposed.first_row, supposed.names_version) != (first, tx.names.version):
            number_of, salts = tx.names.__getitem__, tx.salts(count)
            supposed = suppose(unit, prepared.contents, first, tx.names.version, number_of, salts)
            assert supposed is not None, "each name gets a number"
        self._next += count
        self._rows += supposed.rows
        tx.enter_all(RECORDED, unit.actor, supposed.sealed, unit.now_us, supposed.entries)
        self._priced.setdefault(unit.tenant, []).extend(zip(unit.events, unit.costs, strict=True))
        seqs, keys = range(first, self._next), cast("list[bytes]", prepared.keys)
        self._claimed += zip(keys, seqs, strict=True)
        self._known.update(zip(keys, zip(seqs, prepared.contents, strict=True), strict=True))
        delivered: dict[tuple[str, str], sources.Delivered] = {}
        for event in unit.events:
            source = delivered.get((event.agent, event.source))
            if source is None:
                source = delivered[event.agent, event.source] = self._source(unit.tenant, event.agent, event.source)
            source.events += 1
            if event.source_seq is not None:
                source.seqs.append(event.source_seq)
        ids = [event.id for event in unit.events]
        if unit.places is None:
            return Recorded(count, 0, 0, ids, [])
        return Recorded(count, 0, 0, ids, [], 0, unit.places, unit.late, [])

    def _charge(self, unit: RecordUsage, prepared: Prepared, fresh: list[_Fresh]) -> int:
        """Debit what the fresh events of a unit used, and make their rows and audit entries.

        Returns how many of them were done without permission.
        """
        tx = self._tx
        names, rows = tx.names, self._rows
        tenant = names[unit.tenant]
        priced = self._priced.setdefault(unit.tenant, [])
        book = open_book(tx, unit.actor, unit.now_us)
        subjects: list[str] = []
        notes: list[UsageNote] = []
        refused: list[unauthorised.Work] = []
        attribution = unit.attribution
        for seq, index, event_id in fresh:
            event, cost, content = unit.events[index], unit.costs[index], prepared.contents[index]
            if attribution is not None:
                event = unauthorised.attribute(event, attribution)
            flags = 0
            under: Account | None = None
            code: str | None = None
            estimated: int | msgspec.UnsetType | None = msgspec.UNSET
            if book is not None or event.reservation is not None or event.delegation is not None:
                if event.reservation is not None and cost.microusd is None:
                    estimated = None  # only such an event can have one
                event, flags, estimate, under, code = charging.charge(tx, book, unit, event, cost.microusd)
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
            found = (
                seq,
                event_id,
                flags,
                tenant,
                names[event.source],
                names[event.agent],
                names[event.consumer],
                names[event.model],
                names[event.provider],
                names[event.project],
            )
            rows.append(row_of(unit, found, event, cost, content))
            priced.append((event, cost))
            subjects.append(event_id)
            notes.append(note_of(unit.tenant, event, cost, content, flags, estimated, seq))
        said = list(zip(subjects, texts_of(notes), strict=True))
        tx.audit_all(RECORDED, unit.actor, said, unit.now_us)
        if refused:
            unauthorised.tell(tx, unit, refused)
        if book is not None:
            book.flush()
            tx.enter_budgets()
            # A budget that comes to count tasks looks for them among the rows: those of the units before must be there.
            self._write_rows()
        return len(refused)

    def _write_rows(self) -> None:
        self._tx.insert_many(INSERT, self._rows)
        self._rows.clear()

    def _add_hours(self, rows: list[Row]) -> None:
        at = 0
        for count, statement in _ADD_HOURS.items():
            while len(rows) - at >= count:
                self._tx.execute(statement, [*chain.from_iterable(rows[at : at + count])])
                at += count

    def write(self) -> None:
        """Write what was taken in."""
        tx = self._tx
        self._claimed.sort()  # the index is ordered by key: neighbours share its pages
        for at in range(0, len(self._claimed), _CLAIMS):
            part = self._claimed[at : at + _CLAIMS]
            tx.execute(_CLAIM[: len(_CLAIM) - (_CLAIMS - len(part)) * len(_CLAIMED)], [*chain.from_iterable(part)])
        self._write_rows()
        tx.next_usage = self._next
        usage_behind.came(tx, self._first, self._next)
        names, rows = tx.names, []
        for tenant, priced in self._priced.items():
            for (hour, agent, consumer, model, project, outcome), sums in rollup(priced).items():
                if max(sums) > _MAX_SUM:
                    raise RefuseError(past_64_bits(sums._fields[sums.index(max(sums))]))
                of = (names[agent], names[consumer], names[model], names[project])
                rows.append((names[tenant], hour, *of, outcome, *sums))
        # An event that was taken just before its time was over may come when the hour is sealed.
        with usage_hours.changing(tx, {row[1] for row in rows}, "asapd", self._now_us):
            self._add_hours(rows)
        usage_days.add_late(tx, rows)
        sources.deliver(tx, self._delivered)
        for tenant, priced in self._priced.items():
            outcomes.usage_came(tx, tx.intern(tenant), (event for event, _ in priced))
