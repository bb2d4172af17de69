"""What a handler holds while its unit runs: the connection, interned names, ids, and the audit chain's head."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import apsw
from nacl.signing import SigningKey
from ulid import base32

from asapd.core.audit import GENESIS, Chained, Head, Sealed, canonical_details, chain, head_behind, seal
from asapd.core.budget_counts import BudgetChanges, Key
from asapd.core.canonical import exact
from asapd.core.masking import masked_details
from asapd.store.identity import has_digests
from asapd.store.rows import Row, fetch_one
from asapd.wire.attestation import attested
from asapd.wire.receipt import signature_of

EXCUSES = ("erasure.applied", "retention.applied", "usage.sealed", "log.vouched", "upgrade.counted")
"""Entries that explain to verification why something is gone, or what it was: they are signed."""


@lru_cache(maxsize=64)  # the rows of one commit share few times
def _ulid_time(now_ms: int) -> str:
    return base32.encode_timestamp(now_ms.to_bytes(6, "big"))


_PAIRS = [first + second for first in base32.ENCODE for second in base32.ENCODE]
_LOW = 0xFFFFF
"""What the last four characters of a ULID hold."""


def _high(number: int) -> str:
    """The first twelve characters of the random part of a ULID."""
    return "".join([_PAIRS[number >> shift & 1023] for shift in (70, 60, 50, 40, 30, 20)])


MAX_NAMES = 100_000
"""Names remembered with their numbers, some 15 MB of them; a consumer may be anybody, so they have no end."""


class RefuseError(Exception):
    """Raised by a handler to roll its unit back and answer `value`; never leaves the writer."""

    def __init__(self, value: Any) -> None:
        self.value = value


class Names(dict[str, int]):
    """The numbers that stand for names in wide tables, each made on its first use: `names[name]`."""

    def __init__(self, connection: apsw.Connection) -> None:
        super().__init__()
        self._connection = connection
        self._new: list[str] = []
        self.version = 0
        """Another one, when a number that was found here may stand for another name by now, or for none."""
        self.forget()

    def __missing__(self, name: str) -> int:
        row = fetch_one(self._connection, "SELECT id FROM name WHERE name = ?", (name,))
        if row is None:
            self._connection.execute("INSERT INTO name (name) VALUES (?)", (name,))
            number = self._connection.last_insert_rowid()
            self._new.append(name)
        else:
            number = int(row[0])
        self[name] = number
        return number

    def mark(self) -> None:
        """Remember what a rollback of the next unit returns to."""
        self._new.clear()
        if len(self) > MAX_NAMES:
            self.forget()

    def rewind(self) -> None:
        """Forget what was made since the mark."""
        for name in self._new:
            self.pop(name)
        self._new.clear()

    def pop(self, name: str) -> None:  # type: ignore[override]  # nobody asks for what it was
        """Forget the number of a name, if it is remembered."""
        self.version += 1
        super().pop(name, None)

    def forget(self) -> None:
        """Forget all that is remembered."""
        self.version += 1
        self.clear()
        self._new.clear()
        self[""] = 0


class Tx:
    """One write connection and what it caches; the caches follow savepoints and rollbacks."""

    def __init__(
        self,
        connection: apsw.Connection,
        entropy: Callable[[int], bytes],
        masks: tuple[re.Pattern[str], ...] = (),
        key: SigningKey | None = None,
    ) -> None:
        self.connection = connection
        self.masks = masks
        """What is masked in the free text of entries, besides secrets."""
        self._key = key
        self._entropy = entropy
        self.names = Names(connection)
        """What `intern` finds, for those who look up thousands."""
        self._pending_audit: list[Chained] = []
        self._counted = BudgetChanges()
        self._counted_us = 0
        self.budget_rules: Any = None
        """What `asapd.store.budgets` has read of the configured budgets; None is not read."""
        self.retired_us: int | None = None
        """What `asapd.store.retention` has read of the time up to which events may be gone; None is not read."""
        self.next_usage = 0
        """The number that the next row of usage is likely to have."""
        self.has_many_behind = self._had_many_behind = False
        """Whether rows of usage are to be entered into the indexes behind them when the transaction ends."""
        self.has_alerted = False
        """Whether a unit wrote a transition of a breach, until somebody is told."""
        self.has_digests = has_digests(connection)
        """Whether there are rows that are found by the digest of their identity only."""
        self._load_head()

    def _load_head(self) -> None:
        self._audit_seq: int
        self._audit_hash: bytes
        self._audit_seq, self._audit_hash = self.row("SELECT seq, hash FROM audit ORDER BY seq DESC LIMIT 1") or (
            0,
            GENESIS,
        )

    # --- statements

    def execute(self, sql: str, values: Sequence[Any] | dict[str, Any] = ()) -> apsw.Cursor:
        """Run one statement with the connection's statement cache."""
        return self.connection.execute(sql, values)

    def row(self, sql: str, values: Sequence[Any] = ()) -> Row | None:
        """The first row of a statement, or None."""
        return fetch_one(self.connection, sql, values)

    def insert_many(self, sql: str, rows: Iterable[Row]) -> None:
        """Run a statement once for each row."""
        self.connection.executemany(sql, rows)

    def next_seq(self, table: str) -> int:
        """The number of the next row of a table that counts its rows: never one that was given before."""
        row = self.row("SELECT seq + 1 FROM sqlite_sequence WHERE name = ?", (table,))
        return 1 if row is None else int(row[0])

    # --- names and ids

    def intern(self, name: str) -> int:
        """The number that stands for a name in wide tables; made on first use."""
        return self.names[name]

    def rename(self, name: str, to: str) -> None:
        """Have a number stand for another name from now on; without a number for it, nothing happens."""
        self.execute("UPDATE name SET name = ? WHERE name = ?", (to, name))
        self.names.pop(name)

    def new_id(self, prefix: str, now_us: int) -> str:
        """A ULID with a type prefix, its time taken from the unit: `use_01J...`."""
        return self.new_ids(prefix, now_us, 1)[0]

    def new_ids(self, prefix: str, now_us: int, count: int) -> list[str]:
        """Ids of one moment in ascending order: one random number, counted on (the ULID specification)."""
        # Without its highest bit, counting on never overflows.
        number = int.from_bytes(self._entropy(10), "big") >> 1
        ids: list[str] = []
        while len(ids) < count:
            low = number & _LOW
            run = min(count - len(ids), _LOW + 1 - low)
            head = f"{prefix}_{_ulid_time(now_us // 1000)}{_high(number)}"
            ids += [head + _PAIRS[at >> 10] + _PAIRS[at & 1023] for at in range(low, low + run)]
            number += run
        return ids

    def signature_of(self, signed: bytes) -> str | None:
        """The daemon's signature of something, in base64; None in a writer that has no key."""
        return None if self._key is None else signature_of(signed, self._key)

    def salts(self, count: int) -> bytes:
        """16 random bytes for each."""
        return self._entropy(16 * count)

    # --- audit

    def audit(self, event_type: str, actor: str, subject: str, details: dict[str, Any], now_us: int) -> None:
        """Chain one entry to the log; it is written with its unit or not at all."""
        said = masked_details(details, self.masks)
        if event_type in EXCUSES and self._key is not None:
            said = attested(event_type, actor, subject, exact(said), self._audit_hash, self._key)
        self.audit_all(event_type, actor, [(subject, canonical_details(said))], now_us)

    def audit_all(self, event_type: str, actor: str, notes: Sequence[tuple[str, bytes]], now_us: int) -> None:
        """Chain an entry for each subject and its details, which are RFC 8785 text."""
        self.enter_all(event_type, actor, seal(actor, notes, self.salts(len(notes))), now_us)

    @property
    def head(self) -> Head:
        """The newest entry, of those that are not written yet too."""
        return self._audit_seq, self._audit_hash

    def chained(self, head: Head, event_type: str, actor: str, sealed: Sequence[Sealed], now_us: int) -> list[Chained]:
        """An entry for each of what was sealed for this actor, behind a head."""
        return chain(head, event_type, actor, now_us, self.new_ids("aud", now_us, len(sealed)), sealed)

    def enter_all(
        self, event_type: str, actor: str, sealed: Sequence[Sealed], now_us: int, supposed: Sequence[Chained] = ()
    ) -> None:
        """Chain an entry for each of what was sealed for this actor: those that are `supposed`, if they fit."""
        if not sealed:
            return
        following = head_behind(self.head, supposed)
        if following is None:
            supposed = self.chained(self.head, event_type, actor, sealed, now_us)
            following = supposed[-1][0], supposed[-1][-1]
        self._pending_audit += supposed
        self._audit_seq, self._audit_hash = following

    def count_budget(self, period: Key, changes: Mapping[str, int], now_us: int) -> None:
        """Have it entered, in one entry for the unit at hand, by how much counters of a budget's period changed."""
        self._counted.add(period, changes)
        self._counted_us = now_us

    def remove_budget(self, budget: int, now_us: int) -> None:
        """Have it entered that a budget went with all its periods."""
        self._counted.removed.add(budget)
        self._counted_us = now_us

    def enter_budgets(self) -> None:
        """Enter what the unit at hand changed of budgets: before another begins, or when its entries are written."""
        if self._counted:
            text = canonical_details(self._counted.details())
            self.audit_all("budgets.counted", "asapd", [("budgets", text)], self._counted_us)
            self._counted.clear()

    def flush_audit(self) -> None:
        """Write the entries of the unit at hand in one statement."""
        self.enter_budgets()
        if self._pending_audit:
            self.insert_many("INSERT INTO audit VALUES (?,?,?,?,?,?,?,?,?,?,?)", self._pending_audit)
            self._pending_audit.clear()

    # --- savepoints

    def mark(self) -> tuple[int, bytes]:
        """Remember the state that a rollback of the next unit returns to."""
        self.names.mark()
        self._had_many_behind = self.has_many_behind
        return self._audit_seq, self._audit_hash

    def rewind(self, mark: tuple[int, bytes]) -> None:
        """Forget what the unit since `mark` cached, its SQL having been rolled back."""
        self.names.rewind()
        # Where the unit had entered them, that is undone as well.
        self.has_many_behind |= self._had_many_behind
        self._pending_audit.clear()
        self._counted.clear()
        self.budget_rules = self.retired_us = None
        self._audit_seq, self._audit_hash = mark

    def forget(self) -> None:
        """Forget everything cached, the whole transaction having been rolled back."""
        self.names.forget()
        self._pending_audit.clear()
        self._counted.clear()
        self.budget_rules = self.retired_us = None
        self.has_alerted = self.has_many_behind = False
        self._load_head()
