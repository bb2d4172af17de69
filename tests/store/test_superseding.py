"""Telemetry that came later takes back what came before, but gives no budget back that its reporter could not."""

from __future__ import annotations

from typing import Any

import apsw
import pytest
from msgspec.structs import replace

from asapd.core.budgets import Budget, Limits, Match
from asapd.core.types import DAY_US
from asapd.core.usage import OTLP, Cost, UsageEvent
from asapd.store import ledger_held
from asapd.store.units.delegations import SyncBudgets
from asapd.store.units.usage import (
    CollectionChanged,
    CollectionPart,
    Evidence,
    RecordTelemetry,
    RecordUsage,
    SpanFact,
    VoidUsage,
)
from asapd.store.visibility import EVERYTHING, Visibility
from tests.store.ledger_desk import HOUR_US, NOW_US, ROOT, USD, B, C, Ledger

OF_B = Visibility(None, (B,))
TRACE = b"t" * 16
PARENT, CHILD = TRACE + b"a" * 8, TRACE + b"b" * 8
LINKS = [(CHILD, b"a" * 8)]
SPENT = UsageEvent("t", B, "urn:asap:agent:x", NOW_US, tokens_in=10, id="a", source=OTLP, delegation="root")
EMPTY = replace(SPENT, id="b", tokens_in=0)


@pytest.fixture
def ledger(connection: apsw.Connection) -> Ledger:
    ledger = Ledger(connection)
    ledger.register(ROOT)
    return ledger


def report(ledger: Ledger, *events: UsageEvent, by: Visibility = OF_B, near_us: int = 0, **told: Any) -> Any:
    """Report events at a dollar for each token."""
    costs = [Cost(event.tokens_in * USD, "priced") for event in events]
    is_bound = by.tenant is not None
    usage = RecordUsage(
        "default", "key:b", ledger.now_us, list(events), costs, partial="spans" in told, is_bound=is_bound
    )
    return ledger.submit(RecordTelemetry(usage, 0, near_us, by=by, **told))


def agents_span(ledger: Ledger, event: UsageEvent = SPENT, by: Visibility = OF_B) -> None:
    report(ledger, event, by=by, spans=[SpanFact(PARENT, True)])


def call_below(ledger: Ledger, event: UsageEvent, by: Visibility = OF_B) -> None:
    report(ledger, event, by=by, spans=[SpanFact(CHILD, False)], links=LINKS)


def debited(ledger: Ledger) -> tuple[int, int]:
    """Dollars and tasks of the delegation, of which the log says the same."""
    found: list[str] = []
    ledger_held.compare(ledger.connection, found.append)
    assert found == []
    spent, tasks = ledger.connection.execute("SELECT spent_microusd, tasks_used FROM delegation").fetchall()[0]
    return spent // USD, tasks


def counted(ledger: Ledger) -> int:
    return int(ledger.connection.execute("SELECT sum(tokens_in) FROM usage").get)


@pytest.mark.parametrize("below", [EMPTY, replace(EMPTY, delegation=None), replace(EMPTY, task_id="other")])
@pytest.mark.parametrize("first", ["work", "call"])
def test_an_empty_span_below_takes_nothing_from_a_span_with_tokens(
    ledger: Ledger, below: UsageEvent, first: str
) -> None:
    steps = [lambda: agents_span(ledger), lambda: call_below(ledger, below)]
    for step in steps if first == "work" else steps[::-1]:
        step()
    assert counted(ledger) == 10
    assert debited(ledger)[0] == 10
    assert ledger.connection.execute("SELECT sum(events) FROM usage_hour").get == 1


@pytest.mark.parametrize("below", [replace(SPENT, id="b", delegation=None), replace(SPENT, id="b", tokens_in=9)])
def test_what_is_debited_elsewhere_or_less_makes_nothing_good(ledger: Ledger, below: UsageEvent) -> None:
    agents_span(ledger)
    call_below(ledger, below)
    assert counted(ledger) == below.tokens_in
    assert debited(ledger)[0] == 10 + (9 if below.delegation else 0)


@pytest.mark.parametrize("tokens", [10, 12])
def test_calls_that_are_debited_as_much_take_the_place_of_their_agents_span(ledger: Ledger, tokens: int) -> None:
    agents_span(ledger)
    call_below(ledger, replace(SPENT, id="b", tokens_in=tokens))
    assert counted(ledger) == tokens
    assert debited(ledger) == (tokens, 1)


def test_a_call_of_a_tenant_that_debits_nothing_of_another_makes_nothing_good(connection: apsw.Connection) -> None:
    ledger = Ledger(connection)
    ledger.register(ROOT, tenant="acme")
    agents_span(ledger, by=EVERYTHING)
    call_below(ledger, replace(SPENT, id="b"), by=Visibility("default", ("*",)))
    assert counted(ledger) == 10
    assert debited(ledger) == (10, 1)


def test_a_call_makes_good_for_one_span_only(ledger: Ledger) -> None:
    above = TRACE + b"c" * 8
    agents_span(ledger)
    report(ledger, replace(SPENT, id="c"), spans=[SpanFact(above, True)])
    report(ledger, replace(SPENT, id="b"), spans=[SpanFact(CHILD, False)], links=[*LINKS, (PARENT, b"c" * 8)])
    assert counted(ledger) == 10
    assert debited(ledger) == (20, 1)


def test_a_repeat_makes_nothing_good(ledger: Ledger) -> None:
    call = replace(SPENT, id="b")
    report(ledger, call, spans=[SpanFact(CHILD, False)])
    agents_span(ledger)
    call_below(ledger, call)
    assert counted(ledger) == 10
    assert debited(ledger) == (20, 1)


def test_who_may_void_is_given_back_what_a_span_below_takes_the_place_of(ledger: Ledger) -> None:
    agents_span(ledger, by=EVERYTHING)
    call_below(ledger, replace(EMPTY, tokens_in=1), by=EVERYTHING)
    assert counted(ledger) == 1
    assert debited(ledger) == (1, 1)


def test_what_is_withheld_goes_on_to_use_its_task(ledger: Ledger) -> None:
    agents_span(ledger)
    call_below(ledger, replace(EMPTY, tokens_in=1))
    ledger.submit(VoidUsage(ledger.connection.execute("SELECT max(seq) FROM usage").get, "why", "key:o", NOW_US))
    assert debited(ledger) == (10, 1)


@pytest.mark.parametrize(("cost", "spent"), [(1, 6), (5, 5)])
def test_a_span_of_unknown_cost_is_made_good_by_the_estimate_that_it_was_settled_at(
    ledger: Ledger, cost: int, spent: int
) -> None:
    span = replace(SPENT, delegation=None, reservation=ledger.reserved(ROOT, cost=5 * USD))
    usage = RecordUsage("default", "key:b", ledger.now_us, [span], [Cost(None)], partial=True, is_bound=False)
    ledger.submit(RecordTelemetry(usage, 0, 0, by=OF_B, spans=[SpanFact(PARENT, True)]))
    assert debited(ledger) == (5, 1)
    call_below(ledger, replace(span, id="b", tokens_in=cost, tokens_out=10))
    assert counted(ledger) == cost
    assert debited(ledger) == (spent, 1)


def test_a_reservation_keeps_what_is_withheld(ledger: Ledger) -> None:
    held = ledger.reserved(ROOT, task="t")
    spent = replace(SPENT, delegation=None, reservation=held)
    agents_span(ledger, spent)
    call_below(ledger, replace(spent, id="b", tokens_in=0))
    assert debited(ledger)[0] == 10


@pytest.mark.parametrize("first", ["work", "call"])
def test_spans_of_keys_of_other_patterns_are_not_below_each_other(ledger: Ledger, first: str) -> None:
    steps = [
        lambda: agents_span(ledger),
        lambda: call_below(ledger, replace(EMPTY, agent=C, delegation=None), Visibility(None, (C,))),
    ]
    for step in steps if first == "work" else steps[::-1]:
        step()
    assert counted(ledger) == 10
    assert debited(ledger) == (10, 1)


@pytest.mark.parametrize(
    "below", [EMPTY, replace(SPENT, id="b"), replace(SPENT, id="b", timestamp_us=NOW_US - 40 * DAY_US)]
)
@pytest.mark.parametrize("delegation", [None, "root"])
def test_a_hard_limit_is_given_back_what_is_debited_in_its_period(
    ledger: Ledger, below: UsageEvent, delegation: str | None
) -> None:
    budgets = [
        Budget("hard", Match(agent=B), "day", "UTC", hard=Limits(microusd=99 * USD, tasks=9)),
        Budget("soft", Match(agent=B), "day", "UTC", soft=Limits(microusd=99 * USD)),
    ]
    ledger.submit(SyncBudgets(budgets, "key:x", NOW_US))
    agents_span(ledger, replace(SPENT, delegation=delegation))
    call_below(ledger, replace(below, delegation=delegation))
    found = ledger.connection.execute(
        "SELECT name, spent_microusd FROM budget_period p JOIN budget b ON b.id = p.budget "
        "WHERE start_us <= ?1 AND end_us > ?1 ORDER BY name",
        (NOW_US,),
    ).fetchall()
    in_period = 10 * USD if below.timestamp_us == NOW_US else 0
    assert found == [("hard", 10 * USD), ("soft", in_period)]


def test_metrics_that_a_span_outranks_stay_debited(ledger: Ledger) -> None:
    part = CollectionChanged(b"k", b"r", 1, NOW_US, 0, None, {b"s": CollectionPart(0, 10, 1)})
    report(ledger, SPENT, near_us=HOUR_US, collections=[part])
    told = {"spans": [SpanFact(CHILD, False)], "evidence": [Evidence(b"r", 2, NOW_US)]}
    report(ledger, EMPTY, near_us=HOUR_US, **told)
    assert counted(ledger) == 0
    assert debited(ledger)[0] == 10


def hard_and_soft(ledger: Ledger, match: Match, timezone: str) -> dict[str, tuple[int, int, int, int | None]]:
    """What a hard and a soft budget count: events, micro-dollars, tokens and tasks."""
    hard = Budget("hard", match, "day", timezone, hard=Limits(tokens=100, tasks=9))
    ledger.submit(SyncBudgets([hard, replace(hard, name="soft", soft=hard.hard, hard=Limits())], "key:x", NOW_US))
    return counted_by_budgets(ledger)


def counted_by_budgets(ledger: Ledger) -> dict[str, tuple[int, int, int, int | None]]:
    rows = ledger.connection.execute(
        "SELECT name, events, spent_microusd, spent_tokens, tasks_used FROM budget_period p JOIN budget b "
        "ON b.id = p.budget WHERE p.start_us <= ?1 AND p.end_us > ?1",
        (NOW_US,),
    )
    return {row[0]: row[1:] for row in rows.fetchall()}


@pytest.mark.parametrize("match", [Match(), Match(delegation="root"), Match(agent=B)])
def test_a_hard_limit_that_is_counted_anew_counts_what_is_withheld(ledger: Ledger, match: Match) -> None:
    hard_and_soft(ledger, match, "UTC")
    agents_span(ledger)
    call_below(ledger, replace(EMPTY, tokens_in=1))
    before = counted_by_budgets(ledger)
    assert before == {"hard": (2, 11 * USD, 11, 1), "soft": (1, USD, 1, 1)}
    assert hard_and_soft(ledger, match, "Etc/UTC") == before


@pytest.mark.parametrize("match", [Match(), Match(delegation="root")])
def test_a_hard_limit_goes_on_to_count_the_task_of_what_is_withheld(ledger: Ledger, match: Match) -> None:
    hard_and_soft(ledger, match, "UTC")
    agents_span(ledger)
    call_below(ledger, replace(EMPTY, tokens_in=1))
    ledger.submit(VoidUsage(ledger.connection.execute("SELECT max(seq) FROM usage").get, "why", "key:o", NOW_US))
    after = counted_by_budgets(ledger)
    assert after == {"hard": (1, 10 * USD, 10, 1), "soft": (0, 0, 0, 0)}
    assert hard_and_soft(ledger, match, "Etc/UTC") == after
