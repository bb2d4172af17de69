"""Authorising what shares a commit: the accounts are read once and written once, however many debit them."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from asapd.core.ledger import Account, held, open_hold, remaining, reserve
from asapd.store.authorizing import Made, enter, make, write
from asapd.store.budgets import open_book
from asapd.store.ledger import path_from
from asapd.store.parties import is_party
from asapd.store.rows import fetch
from asapd.store.tx import Tx
from asapd.store.units.delegations import Reserve, Reserved

_PATH = (
    f"SELECT path.*, tenant FROM ({path_from('(SELECT account FROM delegation WHERE id = ?)')}) path "
    "JOIN delegation USING (account)"
)
_KNOWN = "SELECT task_id FROM account_task WHERE account = ? AND task_id IN (SELECT value FROM json_each(?))"


def authorize_together(tx: Tx, units: Sequence[Reserve]) -> list[Reserved]:
    """Hold the estimates of the first of these units, as `authorize` would one after the other.

    Each names a delegation. It ends before the first that is not a plain yes, which has written nothing and is for
    `authorize`, as is what comes after it; where there are budgets, which could hold any of them, before all.
    """
    if open_book(tx, "asapd", 0) is not None:
        return []
    paths = _Paths(tx, units)
    made: list[Made] = []
    answers: list[Reserved] = []
    for unit in units:
        path = paths.find(unit)
        if path is None:
            break
        known = [(account.account, unit.task_id) in paths.known for account in path]
        if reserve(path, unit.estimate, known_task=known, now_us=unit.now_us) is not None:
            break
        hold = open_hold(unit.estimate)
        one = make(tx, unit, path, paths.tenants[unit.delegation], hold)
        enter(tx, one, [])
        after = [held(account, hold, known_task=is_known) for account, is_known in zip(path, known, strict=True)]
        paths.put(after, unit.task_id)
        made.append(one)
        answers.append(Reserved(one.id, path[0].id, one.expires_us, remaining(after)))
    write(tx, made)
    tx.insert_many(
        "UPDATE delegation SET reserved_microusd = ?, tasks_used = ?, tasks_reserved = ? WHERE account = ?",
        [
            (account.reserved_microusd, account.tasks_used, account.tasks_reserved, account.account)
            for account in paths.changed.values()
        ],
    )
    return answers


class _Paths:
    """The accounts that units may debit, as they are and as they become, and which tasks each counts."""

    def __init__(self, tx: Tx, units: Sequence[Reserve]) -> None:
        self._tx = tx
        self._accounts: dict[int, Account] = {}
        self._numbers: dict[str, list[int]] = {}
        self._parties: dict[tuple[int, str], bool] = {}
        self.tenants: dict[str, str] = {}
        """For which tenant a delegation was registered."""
        self.known: set[tuple[int, str]] = set()
        """Accounts and the tasks that they count."""
        self.changed: dict[int, Account] = {}
        """The accounts as they become."""
        tasks: dict[int, list[str]] = {}
        for unit in units:
            for number in self._numbers_of(unit.delegation):
                tasks.setdefault(number, []).append(unit.task_id)
        for number, named in tasks.items():
            rows = fetch(tx.connection, _KNOWN, (number, msgspec.json.encode(named).decode()))
            self.known.update((number, task_id) for (task_id,) in rows)

    def _numbers_of(self, delegation: str) -> list[int]:
        found = self._numbers.get(delegation)
        if found is None:
            rows = fetch(self._tx.connection, _PATH, (delegation,))
            found = self._numbers[delegation] = [row[0] for row in rows]
            for row in rows:
                self._accounts[row[0]] = Account(*row[:-1])
            if rows:
                self.tenants[delegation] = rows[0][-1]
        return found

    def find(self, unit: Reserve) -> list[Account] | None:
        """The path that a unit debits, leaf first; None is one that it may not, or that is not there."""
        numbers = self._numbers_of(unit.delegation)
        if not numbers or (unit.is_bound and not self._is_party(numbers[0], unit.tenant)):
            return None
        return [self._accounts[number] for number in numbers]

    def _is_party(self, account: int, tenant: str) -> bool:
        found = self._parties.get((account, tenant))
        if found is None:
            found = self._parties[account, tenant] = is_party(self._tx.connection, account, tenant)
        return found

    def put(self, path: Sequence[Account], task_id: str) -> None:
        """Go on with these accounts, which count the task from now on."""
        for account in path:
            self._accounts[account.account] = self.changed[account.account] = account
            self.known.add((account.account, task_id))
