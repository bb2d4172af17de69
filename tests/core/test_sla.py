from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asapd.core.exclusions import Observed
from asapd.core.quantiles import Histogram
from asapd.core.sla import (
    Metrics,
    Promise,
    TermVerdict,
    burn_rate,
    compliance_percent,
    error_budget_left_percent,
    evaluate,
    measure,
    percent_text,
    sla_score,
)
from asapd.core.types import HOUR_US

NOTHING = Promise()
ALL = Promise(Decimal("99.5"), 500, Decimal(1), "24/7")
percents = st.decimals(0, 100, places=6)
counts = st.integers(0, 10**6)


def metrics(
    up: int = 0,
    down: int = 0,
    completed: int = 0,
    failed: int = 0,
    latencies: tuple[int, ...] = (),
    limit_ms: int | None = 500,
    probes: int = 0,
) -> Metrics:
    latency = Histogram()
    for value in latencies:
        latency.add(value)
    return measure(
        "urn:asap:agent:a",
        window_us=HOUR_US,
        period=(0, HOUR_US),
        completed=completed,
        failed=failed,
        latency=latency,
        over_promise=0 if limit_ms is None else sum(value > limit_ms for value in latencies),
        uptime=Observed(up, down, max(0, HOUR_US - up - down)),
        probes=probes,
        max_latency_p95_ms=limit_ms,
    )


def test_metrics_without_data_are_null() -> None:
    empty = metrics()
    assert (empty.uptime_percent, empty.latency_p95_ms, empty.error_rate_percent) == (None, None, None)
    assert empty.unknown_us == HOUR_US


def test_metrics_are_shares_in_percent() -> None:
    some = metrics(94, 6, 39, 1, (100,) * 39, probes=100)
    assert (some.uptime_percent, some.error_rate_percent, some.latency_p95_ms) == (94.0, 2.5, 100)
    assert (some.tasks, some.samples, some.over_promise, some.probes) == (40, 39, 0, 100)
    assert (some.period_start_us, some.period_end_us, some.window_us) == (0, HOUR_US, HOUR_US)


def test_a_p95_without_a_promise_is_the_histograms_own() -> None:
    assert metrics(latencies=(1000,), limit_ms=None).latency_p95_ms == 1003.5


def test_texts_have_the_references_shapes() -> None:
    verdicts = evaluate(
        metrics(94, 6, 39, 1, (100,) * 30 + (120,) * 9, limit_ms=110, probes=5),
        Promise(Decimal("99.5"), 110, Decimal(1)),
    )
    assert [(verdict.threshold_text, verdict.actual_text) for verdict in verdicts] == [
        ("99.5%", "94.0%"),
        ("110ms", "120ms"),
        ("1.0%", "2.5%"),
    ]
    assert [verdict.met for verdict in verdicts] == [False, False, False]
    assert [verdict.critical for verdict in verdicts] == [True, False, True]
    assert [verdict.samples for verdict in verdicts] == [5, 39, 40]
    assert [verdict.actual for verdict in verdicts] == [94, 120, Decimal("2.5")]


def test_only_what_is_promised_is_judged() -> None:
    assert evaluate(metrics(1, 1, 1, 1, (1,)), NOTHING) == []


def test_without_data_there_is_no_verdict() -> None:
    for verdict in evaluate(metrics(), ALL):
        assert (verdict.actual, verdict.actual_text, verdict.met, verdict.critical) == (None, None, None, False)


@given(percents, counts, counts)
def test_availability_is_judged_exactly(promised: Decimal, up: int, down: int) -> None:
    (verdict,) = evaluate(metrics(up, down), Promise(availability_percent=promised))
    if up + down == 0:
        assert verdict.met is None
        return
    share, limit = Fraction(100 * up, up + down), Fraction(promised)
    assert verdict.met == (share >= limit)
    assert verdict.critical == (share < limit and 100 - share >= 2 * (100 - limit))
    assert verdict.actual is not None
    assert abs(Fraction(verdict.actual) - share) <= Fraction(1, 10**6)
    assert (verdict.actual >= promised) == verdict.met


@given(percents, counts, counts)
def test_the_error_rate_is_judged_exactly(promised: Decimal, completed: int, failed: int) -> None:
    (verdict,) = evaluate(metrics(completed=completed, failed=failed), Promise(max_error_rate_percent=promised))
    if completed + failed == 0:
        assert verdict.met is None
        return
    share, limit = Fraction(100 * failed, completed + failed), Fraction(promised)
    assert verdict.met == (share <= limit)
    assert verdict.critical == (share > limit and share >= 2 * limit)
    assert verdict.actual is not None
    assert (verdict.actual <= promised) == verdict.met


@given(st.lists(st.integers(400, 1200), min_size=1, max_size=60), st.integers(400, 1100))
def test_latency_is_judged_by_the_exact_count_and_shown_without_contradiction(items: list[int], limit_ms: int) -> None:
    found = metrics(latencies=tuple(items), limit_ms=limit_ms)
    (verdict,) = evaluate(found, Promise(max_latency_p95_ms=limit_ms))
    true_p95 = sorted(items)[-(-95 * len(items) // 100) - 1]
    assert verdict.met == (true_p95 <= limit_ms)
    assert verdict.actual is not None
    assert (verdict.actual <= limit_ms) == verdict.met
    assert abs(float(verdict.actual) - true_p95) <= true_p95 / 100
    assert verdict.actual == found.latency_p95_ms
    assert verdict.critical == (not verdict.met and verdict.actual >= 2 * limit_ms)


def test_latency_is_broken_by_more_than_five_percent_over_it() -> None:
    promise = Promise(max_latency_p95_ms=100)
    assert evaluate(metrics(latencies=(100,) * 95 + (101,) * 5, limit_ms=100), promise)[0].met
    broken = evaluate(metrics(latencies=(100,) * 94 + (101,) * 6, limit_ms=100), promise)[0]
    assert (broken.met, broken.critical) == (False, False)
    assert evaluate(metrics(latencies=(200,), limit_ms=100), promise)[0].critical


@pytest.mark.parametrize(("up", "critical"), [(9899, True), (9900, True), (9901, False)])
def test_twice_the_allowed_downtime_is_critical(up: int, critical: bool) -> None:
    (verdict,) = evaluate(metrics(up, 10_000 - up), Promise(availability_percent=Decimal("99.5")))
    assert verdict.met is False
    assert verdict.critical is critical


def test_where_nothing_is_allowed_every_breach_is_critical() -> None:
    strict = Promise(availability_percent=Decimal(100), max_error_rate_percent=Decimal(0))
    assert all(verdict.critical for verdict in evaluate(metrics(10**9, 1, 10**9, 1), strict))
    assert [verdict.met for verdict in evaluate(metrics(1, 0, 1, 0), strict)] == [True, True]


def test_a_hair_below_the_promise_is_not_shown_as_the_promise() -> None:
    (short,) = evaluate(metrics(995 * 10**9 - 1, 5 * 10**9 + 1), Promise(availability_percent=Decimal("99.5")))
    assert (short.met, short.actual_text) == (False, "99.499999%")
    (over,) = evaluate(metrics(995 * 10**9 + 1, 5 * 10**9 - 1), Promise(availability_percent=Decimal("99.5")))
    assert (over.met, over.actual_text) == (True, "99.500001%")


def verdict_that(met: bool | None) -> TermVerdict:
    return TermVerdict("latency", Decimal(1), "1ms", None, None, met, False, 1)


@pytest.mark.parametrize(
    ("mets", "expected"),
    [([], None), ([None], None), ([True, None], 100.0), ([True, False], 50.0), ([True, True, False], 66.666667)],
)
def test_compliance_is_the_share_of_judged_terms_that_are_met(mets: list[bool | None], expected: float | None) -> None:
    assert compliance_percent([verdict_that(met) for met in mets]) == expected


def test_there_is_no_score_without_a_promise_or_data() -> None:
    assert sla_score(metrics(1, 1, 1, 1, (1,)), NOTHING) is None
    assert sla_score(metrics(), ALL) is None


def test_the_score_is_full_while_the_promise_is_kept_and_nought_at_twice() -> None:
    assert sla_score(metrics(1000, 0, 100, 1, (500,)), ALL) == 100.0
    assert sla_score(metrics(9925, 75), Promise(availability_percent=Decimal("99.5"))) == 50.0
    assert sla_score(metrics(0, 1, 0, 1, (5000,)), ALL) == 0.0
    assert sla_score(metrics(1, 0, latencies=(5000,)), ALL) == 50.0
    assert sla_score(metrics(9, 1), Promise(availability_percent=Decimal(100))) == 0.0


@given(percents, percents, st.integers(1, 1000), counts, counts, counts, counts, st.lists(st.integers(0, 9999)))
def test_a_score_is_full_exactly_when_every_term_is_met(
    availability: Decimal, errors: Decimal, limit: int, up: int, down: int, done: int, failed: int, items: list[int]
) -> None:
    promise = Promise(availability, limit, errors)
    found = metrics(up, down, done, failed, tuple(items), limit)
    score, compliance = sla_score(found, promise), compliance_percent(evaluate(found, promise))
    assert (score is None) == (compliance is None)
    if score is not None:
        assert 0 <= score <= 100
        if compliance == 100:
            assert score == 100


def test_the_budget_left_is_that_of_the_term_with_less() -> None:
    promise = Promise(availability_percent=Decimal(99), max_error_rate_percent=Decimal(10))
    assert error_budget_left_percent(metrics(9975, 25, 95, 5), promise) == 50.0
    assert error_budget_left_percent(metrics(9975, 25), promise) == 75.0
    assert error_budget_left_percent(metrics(1, 1), promise) == 0.0
    assert error_budget_left_percent(metrics(), promise) is None
    assert error_budget_left_percent(metrics(1, 1), NOTHING) is None


def test_a_budget_of_nothing_is_whole_or_gone() -> None:
    promise = Promise(availability_percent=Decimal(100))
    assert error_budget_left_percent(metrics(1, 0), promise) == 100.0
    assert error_budget_left_percent(metrics(1, 1), promise) == 0.0
    assert burn_rate(metrics(1, 0), promise, "availability") == 0.0
    assert burn_rate(metrics(1, 1), promise, "availability") is None


def test_the_burn_rate_is_the_actual_over_the_allowed_share() -> None:
    assert burn_rate(metrics(98, 2), Promise(availability_percent=Decimal(99)), "availability") == 2.0
    assert burn_rate(metrics(completed=99, failed=1), ALL, "error_rate") == 1.0
    assert burn_rate(metrics(), ALL, "availability") is None
    assert burn_rate(metrics(1, 1), NOTHING, "availability") is None


@pytest.mark.parametrize(
    ("percent", "text"),
    [("99.5", "99.5%"), ("1", "1.0%"), ("99.50", "99.5%"), ("1E+2", "100.0%"), ("1E-6", "0.000001%"), ("0", "0.0%")],
)
def test_percentages_are_written_with_at_least_one_decimal(percent: str, text: str) -> None:
    assert percent_text(Decimal(percent)) == text
