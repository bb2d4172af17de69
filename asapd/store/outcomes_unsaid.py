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
        said = vouched_in(msgspec.json.decode(details))
        if said is not None:
            return said
    return None


def to_vouch(connection: apsw.Connection) -> dict[str, int] | None:
    """What nobody has vouched for yet; None when there is nothing."""
    return None if vouched(connection) is not None else only(counted(connection))


def only(counted: list[dict[str, int]]) -> dict[str, int] | None:
    """What was counted, if it is something, and as the upgrade left it."""
    return counted[0] if len(counted) == 1 and counted != [NOTHING] else None


def vouched_in(details: dict[str, Any]) -> dict[str, int] | None:
    """What an entry of an operator vouches for of this; None when it speaks of none."""
    said = details.get("task_outcomes")
    return None if said is None else {name: said[name] for name in NOTHING}
