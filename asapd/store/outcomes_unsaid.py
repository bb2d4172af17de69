"""Ends of tasks that older builds took without an entry: entered by the upgrade, vouched for by an operator."""

from __future__ import annotations

from typing import Any

import apsw
import msgspec

from asapd.store.excuses import VOUCHED
from asapd.store.rows import fetch

NOTHING = {"before_us": 0, "count": 0}


def counted(connection: apsw.Connection) -> list[dict[str, int]]:
    """What the upgrade counted, and from what time on none was gone: one, unless somebody changed that."""
    rows = fetch(connection, "SELECT before_us, count FROM task_outcome_unsaid")
    return [{"before_us": before_us, "count": count} for before_us, count in rows]


def entered(connection: apsw.Connection) -> tuple[int, dict[str, int]] | None:
    """What the upgrade entered of that in its own commit, and in which entry; None where there was nothing."""
    for seq, details in fetch(
        connection,
        "SELECT seq, details FROM audit WHERE event_type = 'upgrade.counted' AND details IS NOT NULL ORDER BY seq",
    ):
        told: dict[str, Any] = msgspec.json.decode(details)
        if "task_outcomes" in told:
            return seq, told["task_outcomes"]
    return None


def vouched(connection: apsw.Connection) -> dict[str, int] | None:
    """What an operator vouched for, once and for all."""
    for (details,) in fetch(
        connection,
        "SELECT details FROM audit WHERE event_type = ? AND details IS NOT NULL ORDER BY seq",
        (VOUCHED,),
    ):
        told: dict[str, Any] = msgspec.json.decode(details)
        if "task_outcomes" in told:
            return {name: told["task_outcomes"][name] for name in NOTHING}
    return None


def to_vouch(connection: apsw.Connection) -> dict[str, int] | None:
    """What nobody has vouched for yet; None when there is nothing."""
    found = counted(connection)
    if len(found) != 1 or found == [NOTHING] or vouched(connection) is not None:
        return None
    return found[0]
