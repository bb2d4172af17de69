"""What was spent under a reservation and given back, account by account.

A refund is given on the accounts that are the giver's to fill again, from the last one of the path up; those above
stay debited. So the last account was always given back the most, which is what the reservation says; of the others,
and of the budgets, is kept how much less it was.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Final

from asapd.store.rows import fetch
from asapd.store.tx import Tx

BUDGETS: Final = 0
"""Stands for all budgets that a reservation is held on; accounts of delegations count from 1."""


def owed(tx: Tx, reservation: str, accounts: Collection[int]) -> dict[int, int]:
    """What each account spent under a reservation and was not given back, in micro-USD."""
    used, refunded = _sums(tx, reservation)
    withheld = _withheld(tx, reservation)
    return {account: used - refunded + withheld.get(account, 0) for account in accounts}


def give_back(
    tx: Tx, reservation: str, microusd: int, accounts: Sequence[int], takers: Collection[int]
) -> dict[int, int]:
    """Note that an amount is given back; what of it each taker gets: no more than it is owed.

    `accounts` are all that the reservation debits, the last of the path first; `takers` those of them that get it.
    """
    left = owed(tx, reservation, accounts)
    before = _withheld(tx, reservation)
    shares = {account: max(0, min(microusd, left[account])) for account in takers}
    given = shares.get(accounts[0], 0)
    tx.execute(
        "UPDATE reservation SET refunded_microusd = refunded_microusd + ? WHERE id = ?",
        (given, reservation),
    )
    for account in accounts:
        known = before.get(account, 0)
        withheld = known + given - shares.get(account, 0)
        if withheld and withheld != known:
            tx.execute("INSERT OR REPLACE INTO refund_withheld VALUES (?,?,?)", (reservation, account, withheld))
        elif known and not withheld:
            tx.execute("DELETE FROM refund_withheld WHERE reservation = ? AND account = ?", (reservation, account))
    return shares


def _sums(tx: Tx, reservation: str) -> tuple[int, int]:
    row = tx.row("SELECT used_microusd, refunded_microusd FROM reservation WHERE id = ?", (reservation,))
    assert row is not None, "it was found before anything is given back"
    return row[0], row[1]


def _withheld(tx: Tx, reservation: str) -> dict[int, int]:
    rows = fetch(tx.connection, "SELECT account, microusd FROM refund_withheld WHERE reservation = ?", (reservation,))
    return dict(rows)
