"""A commit wakes those whom it concerns, and nobody else."""

from __future__ import annotations

from typing import Any

import pytest

from asapd.core.errors import Refusal
from asapd.daemon.news import News
from asapd.store.units.alerts import AlertWritten
from asapd.store.units.delegations import RevocationsImported
from asapd.store.units.unit import RowWritten
from asapd.store.units.usage import Recorded

REFUSED = Refusal("invalid", "no")


def recorded(unauthorised: int) -> Recorded:
    return Recorded(1, 0, 0, ["use_1"], unauthorised=unauthorised)


@pytest.mark.parametrize(
    ("results", "woken"),
    [
        (None, {"committed", "alerts", "delegations"}),
        ([REFUSED], set()),
        ([REFUSED, RowWritten(1)], {"committed"}),
        ([recorded(0)], {"committed"}),
        ([recorded(1)], {"committed", "delegations"}),
        ([AlertWritten(None)], {"committed", "alerts"}),
        ([RevocationsImported(0, 1, [])], {"committed", "delegations"}),
    ],
)
def test_a_commit_wakes_whom_it_concerns(results: Any, woken: set[str]) -> None:
    news = News()
    news.on_commit(results)
    wakeups = {"committed": news.committed, "alerts": news.alerts, "delegations": news.delegations}
    assert {name for name, wakeup in wakeups.items() if wakeup.count} == woken
    assert news.directory.count == 0
