"""The ledger as the log has it: every entry that debits, holds or gives back, done again.

What each delegation spent and holds, which tasks it counts, and every reservation follow from the entries alone. What
does not change after it was written (who gave which delegation to whom) is read from the rows, which are held to
their own entries elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import datetime
from typing import Any

import apsw
import msgspec

from asapd.core.audit import read_details
from asapd.core.ledger import MOST, Estimate, Hold, open_hold, release, reserved_after, settle, spent_after
from asapd.core.types import datetime_us
from asapd.core.usage import (
    FLAG_ACROSS_DELEGATION,
    FLAG_ACROSS_RESERVATION,
    FLAG_CLOSED_RESERVATION,
    FLAG_NOT_BY_RESERVATION,
)
from asapd.store.erasures import Erasures
from asapd.store.rows import fetch, fetch_one

STEP = 20_000
"""Entries that are looked through in one go, most of which are of no delegation."""

_ENTRIES = """
SELECT seq, event_type, timestamp_us, actor, details FROM audit WHERE seq > ? AND seq <= ? AND (
  event_type IN (
    'delegation.created', 'reservation.created', 'reservation.extended', 'reservation.refunded', 'reservation.settled',
    'reservation.released', 'reservation.expired', 'usage.recorded', 'usage.voided', 'usage.repriced'
  ) AND (
    details IS NULL OR event_type NOT GLOB 'usage.*'
    OR instr(details, '"delegation":null') = 0 OR instr(details, '"reservation":null') = 0
  ) OR event_type = 'retention.applied' AND subject = 'usage' AND details IS NOT NULL
) ORDER BY seq
"""
_ROW = """
SELECT (SELECT name FROM name WHERE id = agent), cost_microusd, delegation, reservation, flags,
       (SELECT name FROM name WHERE id = tenant), task_id, tokens_in, tokens_out, timestamp_us, committed_us
FROM usage WHERE seq = ?
"""
TABLES = {
    "replayed_task": (
        "account INTEGER, task_id TEXT, used INTEGER, holds INTEGER, oldest_us INTEGER, blind_us INTEGER, "
        "PRIMARY KEY (account, task_id)"
    ),
    "replayed_reservation": "id TEXT PRIMARY KEY, body BLOB",
}
"""Temporary tables that the ledger is replayed in, with their columns.

`oldest_us` is the time of the oldest event of a task, `blind_us` up to when retention had taken usage as it was voided.
"""

_NEVER = -(2**63)


class Account:
    """A delegation's part of the ledger."""

    def __init__(
        self, number: int, name: str, delegate: str, tenant: str, registered_us: int, parent: Account | None
    ) -> None:
        self.number, self.name, self.delegate, self.tenant = number, name, delegate, tenant
        self.registered_us = registered_us
        self.is_known = False
        """Whether its entry is there, and of an asapd that debited by the rules of today."""
        self.path: tuple[Account, ...] = (self, *(() if parent is None else parent.path))
        self.spent = self.reserved = self.tasks_reserved = 0


class Terms(msgspec.Struct, frozen=True):
    """What the entry of a reservation says of it that debits nothing."""

    tenant: str
    delegate: str | None
    project: str | None
    consumer_digest: str | None


class Reservation(msgspec.Struct):
    """A reservation as the log has it, in the names and order of its columns.

    `terms` is None in those of a build that said none.
    """

    id: str
    account: int
    task_id: str
    action: str
    cost_microusd: int | None
    tokens: int | None
    tasks: int
    held_microusd: int
    held_tokens: int
    tasks_extra: int
    used_microusd: int
    refunded_microusd: int
    state: str
    reason: str | None
    created_us: int
    expires_us: int
    closed_us: int | None
    created_by: str
    delegation: str
    terms: Terms | None

    @property
    def hold(self) -> Hold:
        return Hold(self.held_microusd, self.tasks_extra, self.used_microusd, self.held_tokens)

    def keep(self, hold: Hold) -> None:
        self.held_microusd, self.held_tokens = hold.cost_microusd, hold.tokens
        self.tasks_extra, self.used_microusd = hold.tasks_extra, hold.used_microusd


COLUMNS = Reservation.__struct_fields__[:-2]
_encode = msgspec.msgpack.Encoder().encode
decode = msgspec.msgpack.Decoder(Reservation).decode


class _Usage(msgspec.Struct, frozen=True):
    """What an entry, or a row of usage, says to the ledger."""

    agent: str
    cost_microusd: int | None
    delegation: str | None
    reservation: str | None
    flags: int
    tenant: str
    task_id: str
    tokens_in: int = 0
    tokens_out: int = 0
    timestamp_us: int = 0


_read_usage = msgspec.json.Decoder(_Usage)


class ReplayedLedger:
    """The ledger as far as it was replayed; tasks and closed reservations are in temporary tables of the connection.

    It knows of the entries that had lost their content when it was made, and of none that lose it later.
    """

    def __init__(self, connection: apsw.Connection, add: Callable[[str], None]) -> None:
        self._connection = connection
        self._add = add
        self.accounts: dict[str, Account] = {}
        self.open: dict[str, Reservation] = {}
        self._tasks: dict[tuple[int, str], tuple[int, int, int, int]] = {}
        self._retired_us = _NEVER
        self._erasures = Erasures(connection)
        self._created_and_erased = self._erasures.times("delegation.created")
        # Of each row of usage there is one entry, and both are numbered in the same order.
        self._gone: Iterator[int] = self._erasures.rows()
        self.blind_us = -1
        """Up to when something happened that nothing is left of."""
        self.entries = 0

    def walk(self, after: int, through: int) -> int:
        """Do the entries between two numbers; the number of the last."""
        for seq, kind, timestamp_us, actor, details in fetch(self._connection, _ENTRIES, (after, through)):
            if kind == "retention.applied":
                applied = read_details(details)
                self._retired_us = max(self._retired_us, applied.get("last_timestamp_us", applied["before_us"]))
                continue
            self.entries += 1
            if details is None:
                self._without_content(seq, kind, timestamp_us)
            elif kind == "usage.recorded":
                self._use(_read_usage.decode(details))
            else:
                self._do(seq, kind, timestamp_us, actor, read_details(details))
        self._flush_tasks()
        return through

    def _without_content(self, seq: int, kind: str, timestamp_us: int) -> None:
        if kind.startswith("usage."):
            # One that nobody says to have erased is of none of these rows.
            number = next(self._gone, -1) if self._erasures.is_explained(seq) else -1
            row = fetch_one(self._connection, _ROW, (number,))
            if row is None or row[-1] != timestamp_us:
                self._lose(timestamp_us)
            elif kind == "usage.recorded":
                self._use(_Usage(*row[:-1]))
            elif row[2] is not None or row[3] is not None:  # what it gave back no row says
                self._lose(timestamp_us)
        elif kind != "delegation.created":
            self._lose(timestamp_us)

    def _lose(self, timestamp_us: int) -> None:
        """Say no more of what was there at a time: something happened to it that nothing tells."""
        self.blind_us = max(self.blind_us, timestamp_us)

    def _do(self, seq: int, kind: str, timestamp_us: int, actor: str, told: dict[str, Any]) -> None:
        match kind:
            case "delegation.created":
                made = self._make(told["id"])
                if made is not None:
                    made.is_known = "tenant" in told
            case "usage.voided":
                self._void(told, timestamp_us)
            case "usage.repriced":
                self._correct(told, timestamp_us)
            case "reservation.created":
                self._reserve(told, timestamp_us, actor)
            case _:
                found = self._reservation(told["id"])
                if found is None:
                    return  # its beginning is gone, and all that it debits is hidden
                if kind == "reservation.extended":
                    found.expires_us = _time_us(told["expires_at"])
                elif kind == "reservation.refunded":
                    given = told.get("given_microusd")
                    found.refunded_microusd += self._give_back(self._path(found), told["cost_microusd"], given)
                else:
                    self._close(seq, found, kind.removeprefix("reservation."), told, timestamp_us)
                self._put(found)

    # --- accounts and reservations

    def _make(self, name: str) -> Account | None:
        row = fetch_one(
            self._connection,
            "SELECT account, delegate, tenant, registered_us, (SELECT id FROM delegation p WHERE p.account = d.parent) "
            "FROM delegation d WHERE id = ?",
            (name,),
        )
        if row is None:
            return None
        number, delegate, tenant, registered_us, above = row
        parent = None if above is None else self.account(above)
        made = self.accounts[name] = Account(number, name, delegate, tenant, registered_us, parent)
        return made

    def account(self, name: str | None) -> Account | None:
        """A delegation that was registered by now; one whose entry was erased is taken to be."""
        if name is None or name in self.accounts:
            return self.accounts.get(name or "")
        row = fetch_one(self._connection, "SELECT registered_us FROM delegation WHERE id = ?", (name,))
        return self._make(name) if row is not None and self._created_and_erased[row[0]] else None

    def _path(self, found: Reservation) -> tuple[Account, ...]:
        account = self.account(found.delegation)
        return () if account is None else account.path

    def _reservation(self, name: str | None) -> Reservation | None:
        if name is None or name in self.open:
            return self.open.get(name or "")
        row = fetch_one(self._connection, "SELECT body FROM temp.replayed_reservation WHERE id = ?", (name,))
        return None if row is None else decode(row[0])

    def _put(self, found: Reservation) -> None:
        if found.state == "open":
            self.open[found.id] = found
            return
        self.open.pop(found.id, None)
        self._connection.execute(
            "INSERT OR REPLACE INTO temp.replayed_reservation VALUES (?, ?)", (found.id, _encode(found))
        )

    # --- tasks

    def _count(
        self,
        path: tuple[Account, ...],
        task_id: str,
        *,
        used: int = 0,
        holds: int = 0,
        at_us: int = 2**63 - 1,
        blind_us: int = _NEVER,
    ) -> None:
        for account in path:
            key = account.number, task_id
            was_used, was_holds, oldest_us, was_blind_us = self._tasks.get(key, (0, 0, at_us, blind_us))
            self._tasks[key] = was_used + used, was_holds + holds, min(oldest_us, at_us), max(was_blind_us, blind_us)

    def _flush_tasks(self) -> None:
        self._connection.executemany(
            "INSERT INTO temp.replayed_task VALUES (?,?,?,?,?,?) ON CONFLICT DO UPDATE SET "
            "used = used + excluded.used, holds = holds + excluded.holds, "
            "oldest_us = min(oldest_us, excluded.oldest_us), blind_us = max(blind_us, excluded.blind_us)",
            [(*key, *counts) for key, counts in self._tasks.items()],
        )
        self._tasks.clear()

    def _knows(self, account: Account, task_id: str) -> bool:
        self._flush_tasks()
        sql = "SELECT used > 0 OR holds > 0 FROM temp.replayed_task WHERE account = ? AND task_id = ?"
        row = fetch_one(self._connection, sql, (account.number, task_id))
        return row is not None and bool(row[0])

    # --- what happens

    def _spend(self, path: tuple[Account, ...], spent: int, released: int = 0, tasks: int = 0) -> None:
        for account in path:
            account.spent = spent_after(account.spent, spent)
            account.reserved = reserved_after(account.reserved, -released)
            account.tasks_reserved -= tasks

    def _give_back(self, path: tuple[Account, ...], microusd: int, given: dict[str, int] | None) -> int:
        """Give back to each what it got, all of it where an older entry does not say; returns what the last one got."""
        for account in path:
            account.spent = spent_after(account.spent, -(microusd if given is None else given.get(account.name, 0)))
        return microusd if given is None else given.get(path[0].name, 0) if path else 0

    def _debited(self, usage: _Usage) -> tuple[Account | None, Reservation | None]:
        """The account that usage is debited to, and the reservation that pays, by the rules of `charging`."""
        reservation = None if usage.flags & FLAG_NOT_BY_RESERVATION else usage.reservation
        found = self._reservation(reservation)
        if found is not None and not usage.flags & FLAG_ACROSS_RESERVATION:
            account = self.account(found.delegation)
            sql = "SELECT tenant FROM reservation WHERE id = ?"
            if account is not None and usage.tenant != account.tenant:
                made_by = fetch_one(self._connection, sql, (found.id,))
                found = found if made_by is not None and made_by[0] == usage.tenant else None
        if found is None and reservation is not None and self._is_beginning_gone(reservation):
            return None, None
        account = self.account(usage.delegation if found is None else found.delegation)
        if account is None or account.delegate != usage.agent:
            return None, None
        if found is None and usage.tenant != account.tenant and not usage.flags & FLAG_ACROSS_DELEGATION:
            return None, None
        return account, found

    def _is_beginning_gone(self, reservation: str) -> bool:
        """Whether a reservation that the log does not know is from before all is known; what it debits is hidden."""
        sql = "SELECT 1 FROM reservation WHERE id = ? AND created_us <= ?"
        return (
            self._reservation(reservation) is None
            and fetch_one(self._connection, sql, (reservation, self.blind_us)) is not None
        )

    def _use(self, usage: _Usage) -> None:
        account, found = self._debited(usage)
        if account is None:
            return
        if found is not None and not usage.flags & FLAG_CLOSED_RESERVATION:
            another = found.tasks_extra > 0 and usage.task_id != found.task_id
            done = settle(
                found.hold,
                usage.cost_microusd,
                another_task=another and not self._knows(account, usage.task_id),
                tokens=usage.tokens_in + usage.tokens_out,
            )
            self._spend(account.path, done.spend_microusd, done.release_microusd, done.release_tasks)
            found.keep(done.hold_after)
        else:
            self._spend(account.path, usage.cost_microusd or 0)
            if found is not None:
                found.used_microusd = min(found.used_microusd + (usage.cost_microusd or 0), MOST)
        if found is not None:
            self._put(found)
        self._count(account.path, usage.task_id, used=1, at_us=usage.timestamp_us)

    def _told_usage(self, told: dict[str, Any], timestamp_us: int) -> _Usage | None:
        """The usage that an entry is of; one from before entries said so is read from its row."""
        if "flags" in told:
            return _Usage(
                told["agent"],
                told["cost_microusd"],
                told["delegation"],
                told["reservation"],
                told["flags"],
                told["tenant"],
                told["task_id"],
            )
        row = fetch_one(self._connection, _ROW, (told["row"],))
        if row is None:
            self._lose(timestamp_us)
            return None
        return _Usage(*row[:-1])

    def _void(self, told: dict[str, Any], timestamp_us: int) -> None:
        usage = self._told_usage(told, timestamp_us)
        if usage is None:
            return
        account, found = self._debited(usage)
        if account is None or told.get("withheld"):
            return
        self._give_back(account.path, told["refunded_microusd"], told.get("given_microusd"))
        kept = told.get("tasks_kept", ())  # where retention may have taken other usage of the task
        freed = tuple(on_path for on_path in account.path if on_path.name not in kept)
        self._count(freed, usage.task_id, used=-1, blind_us=self._retired_us)
        if found is not None and "held_microusd" in told:  # it was open: its hold has back what it paid
            self._spend(account.path, 0, -told["held_microusd"], -told["held_tasks"])
            found.used_microusd -= told["refunded_microusd"]
            found.held_microusd += told["held_microusd"]
            found.tasks_extra += told["held_tasks"]
            found.held_tokens += told["held_tokens"]
        elif found is not None:
            found.refunded_microusd += told["refunded_microusd"]
        if found is not None:
            self._put(found)

    def _correct(self, told: dict[str, Any], timestamp_us: int) -> None:
        more = told["ledger_microusd"]
        usage = self._told_usage(told, timestamp_us) if more else None
        account, found = (None, None) if usage is None else self._debited(usage)
        if account is None:
            return
        released = 0
        if found is not None:
            if "held_microusd" in told:
                released = -told["held_microusd"]
            elif found.state == "open" and timestamp_us < found.expires_us and more > 0:
                released = min(more, found.held_microusd)
            found.used_microusd = min(found.used_microusd + more, MOST)
            found.held_microusd -= released
            self._put(found)
        self._spend(account.path, more, released)

    def _reserve(self, told: dict[str, Any], timestamp_us: int, actor: str) -> None:
        account = self.account(told["delegation"])
        if account is None:
            return
        hold = open_hold(Estimate(told["cost_microusd"], told["tasks"], told.get("tokens")))
        made = Reservation(
            told["id"],
            account.number,
            told["task_id"],
            told["action"],
            told["cost_microusd"],
            told.get("tokens"),
            told["tasks"],
            hold.cost_microusd,
            hold.tokens,
            hold.tasks_extra,
            0,
            0,
            "open",
            None,
            timestamp_us,
            _time_us(told["expires_at"]),
            None,
            actor,
            told["delegation"],
            msgspec.convert(told, Terms) if "tenant" in told else None,
        )
        self._put(made)
        self._spend(account.path, 0, -hold.cost_microusd, -hold.tasks_extra)
        self._count(account.path, made.task_id, holds=1)

    def _close(self, seq: int, found: Reservation, state: str, told: dict[str, Any], timestamp_us: int) -> None:
        path = self._path(found)
        last = told["used_microusd"] - found.used_microusd
        if last and state == "settled":
            done = settle(found.hold, last)
            self._spend(path, done.spend_microusd, done.release_microusd)
            found.keep(done.hold_after)
        back = release(found.hold)
        is_known = found.created_us > self.blind_us  # else usage of it may be gone
        if is_known and (found.used_microusd, back.cost_microusd) != (told["used_microusd"], told["released_microusd"]):
            self._add(
                f"reservation {found.id}: entry {seq} says {told['used_microusd']} used, {told['released_microusd']} "
                f"released, and the entries before it come to {found.used_microusd}, {back.cost_microusd}"
            )
        if state == "settled":
            self._count(path, found.task_id, used=1)
        self._count(path, found.task_id, holds=-1)
        self._spend(path, 0, back.cost_microusd, back.tasks_extra)
        found.held_microusd = found.held_tokens = found.tasks_extra = 0
        found.state, found.reason, found.closed_us = state, told.get("reason"), timestamp_us

    def is_hidden(self, account: Account | None) -> bool:
        """Whether something happened to an account that nothing is left of, or that other rules were for."""
        return account is None or not account.is_known or account.registered_us <= self.blind_us


def _time_us(text: str) -> int:
    return datetime_us(datetime.fromisoformat(text))
