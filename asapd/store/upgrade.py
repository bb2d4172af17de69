"""What an upgrade finds that older builds had entered nothing of: it is entered in the upgrade's own commit.

From then on the log knows it, so that nobody changes it later unseen. That it was right before is on trust.
"""

from __future__ import annotations

import os
from itertools import islice
from typing import Any, Final

import apsw
from nacl.signing import SigningKey

from asapd.core.budget_counts import BudgetChanges
from asapd.store import budget_counts, outcomes_unsaid
from asapd.store.tx import Tx

UPGRADED: Final = "upgrade.counted"

PERIODS = 500
"""Periods of budgets in one entry: some hundred kilobytes."""


def enter(connection: apsw.Connection, version: int, key: SigningKey | None, now_us: int) -> None:
    """Enter what there is in a file of an older `version`; the caller commits it with the new schema."""
    tx = Tx(connection, os.urandom, key=key)
    said: dict[str, Any] = {"version": version}
    unsaid = outcomes_unsaid.counted(connection)
    if unsaid != [outcomes_unsaid.NOTHING]:
        said["task_outcomes"] = unsaid[0]
    if connection.execute("SELECT count(*) FROM budget").get:
        said["definitions_digest"] = budget_counts.say_definitions(tx)
    periods = budget_counts.periods(connection)
    while True:
        held = BudgetChanges()
        for period, holds in islice(periods, PERIODS):
            held.add(period, holds)
        if held:
            said["budgets"] = held.details()
        if len(said) > 1:
            tx.audit(UPGRADED, "asapd", "database", said, now_us)
            tx.flush_audit()
        if not held:
            return
        said = {"version": version}
