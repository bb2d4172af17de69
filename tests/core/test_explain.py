from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asapd.core.burnrate import WINDOWS_US, burning, forecast
from asapd.core.exclusions import Observed
from asapd.core.explain import explain
from asapd.core.quantiles import Histogram
from asapd.core.reputation import reputation
from asapd.core.sla import Metrics, Promise, burn_rate, error_budget_left_percent, evaluate, measure, sla_score
from asapd.core.types import HOUR_US, SECOND_US

PROMISE = Promise(Decimal(99), 500, Decimal(5))


def window(window_us: int, completed: int, failed: int, observed: Observed) -> Metrics:
    latency = Histogram()
    if completed:
        latency.add(750, completed)
    return measure(
        "a",
        window_us=window_us,
        period=(0, window_us),
        completed=completed,
        failed=failed,
        latency=latency,
        over_promise=completed,
        uptime=observed,
        probes=9,
        max_latency_p95_ms=500,
    )


def test_the_inputs_put_into_the_rules_give_the_figures() -> None:
    metrics = window(HOUR_US, 90, 10, Observed(985 * SECOND_US, 15 * SECOND_US, 7, 5, 3))
    by_window = dict.fromkeys(WINDOWS_US, metrics)
    burns = burning(by_window, PROMISE, 20)
    found = explain(
        metrics,
        PROMISE,
        evaluate(metrics, PROMISE),
        burns,
        forecast(metrics, metrics, PROMISE),
        reputation([metrics], (), 0, is_latency_promised=True),
    )
    assert all(entry["rule"] for entry in found.values())
    uptime = found["uptime_percent"]["inputs"]
    assert 100 * uptime["up_seconds"] / (uptime["up_seconds"] + uptime["down_seconds"]) == metrics.uptime_percent
    ratios = found["sla_score"]["inputs"]
    marks = [max(0, min(1, 2 - ratios[term])) for term in ("availability", "error_rate", "latency")]
    assert round(100 * sum(marks) / 3, 6) == sla_score(metrics, PROMISE)
    assert found["compliance_percent"]["inputs"]["terms"] == {
        "availability": False,
        "latency": False,
        "error_rate": False,
    }
    budget = found["error_budget_left_percent"]["inputs"]
    left = min(
        100 - 100 * budget["down_percent"] / budget["allowed_downtime_percent"],
        100 - 100 * budget["errors_percent"] / budget["allowed_errors_percent"],
    )
    assert max(0, left) == error_budget_left_percent(metrics, PROMISE)
    rules = found["burn_rates"]["inputs"]["rules"]
    assert {rule["long_burn"] for rule in rules if rule["term"] == "error_rate"} == {
        burn_rate(metrics, PROMISE, "error_rate")
    }
    parts = [part for part in found["reputation"]["inputs"]["components"].values() if part["value"] is not None]
    assert len(parts) == 4


def test_without_data_or_promise_nothing_is_invented() -> None:
    metrics = window(HOUR_US, 0, 0, Observed(0, 0, HOUR_US))
    found = explain(metrics, Promise(), [], [], [], None)
    assert "reputation" not in found
    assert found["sla_score"]["inputs"] == {"availability": None, "error_rate": None, "latency": None}
    assert found["error_budget_left_percent"]["inputs"]["down_percent"] is None
    assert found["latency_p95_ms"]["inputs"]["over_promise"] is None
    allowed_none = Promise(availability_percent=Decimal(100), max_error_rate_percent=Decimal(0))
    assert explain(metrics, allowed_none, [], [], [], None)["sla_score"]["inputs"]["availability"] is None
    burns = burning(dict.fromkeys(WINDOWS_US, metrics), PROMISE, 1)
    rules = explain(metrics, PROMISE, [], burns, [], None)["burn_rates"]["inputs"]["rules"]
    assert {rule["long_burn"] for rule in rules} == {None}


percents = st.sampled_from([None, Decimal(0), Decimal("99.9"), Decimal(100)])


@given(percents, percents, st.integers(0, 9), st.integers(0, 3), st.integers(0, 9), st.integers(0, 3))
def test_a_score_is_the_mean_of_its_ratios_also_where_nothing_is_allowed(
    availability: Decimal | None, errors: Decimal | None, completed: int, failed: int, up: int, down: int
) -> None:
    metrics = window(HOUR_US, completed, failed, Observed(up * SECOND_US, down * SECOND_US, 0))
    promise = Promise(availability, 500, errors)
    ratios = explain(metrics, promise, [], [], [], None)["sla_score"]["inputs"].values()
    marks = [max(0.0, min(1.0, 2 - ratio)) for ratio in ratios if ratio is not None]
    score = sla_score(metrics, promise)
    assert (score is None) == (not marks)
    assert score is None or score == pytest.approx(100 * sum(marks) / len(marks), abs=1e-4)
