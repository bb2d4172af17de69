"""What the sums of days have to be."""

from __future__ import annotations

import apsw

from asapd.store import usage_days


def assert_days_hold_their_hours(connection: apsw.Connection) -> None:
    """Every hour before `through` is in its day, nothing else is, and nothing is left where there is no usage."""
    wrong: list[str] = []
    rows = usage_days.compare(connection, wrong.append)
    assert (wrong, rows) == ([], connection.execute("SELECT count(*) FROM usage_day WHERE events > 0").get)
