from asapd.core.exclusions import Observed
from asapd.core.quantiles import Histogram
from asapd.core.reputation import HALF_LIFE_US, PastBreach, Reputation, reputation
from asapd.core.sla import Metrics, measure
from asapd.core.types import DAY_US, HOUR_US

NOW = 10**15


def window(window_us: int, completed: int, failed: int, *, up: int = 0, down: int = 0, slow: int = 0) -> Metrics:
    latency = Histogram()
    if completed:
        latency.add(10, completed)
    return measure(
        "a",
        window_us=window_us,
        period=(0, window_us),
        completed=completed,
        failed=failed,
        latency=latency,
        over_promise=slow,
        uptime=Observed(up, down, 0),
        probes=0,
    )


def judged(*windows: Metrics, breaches: tuple[PastBreach, ...] = (), latency: bool = True) -> Reputation:
    return reputation(windows, breaches, NOW, is_latency_promised=latency)


def parts(found: Reputation) -> dict[str, float | None]:
    return {part.name: part.value for part in found.components}


def test_without_data_there_is_none() -> None:
    for found in (judged(), judged(window(HOUR_US, 0, 0))):
        assert (found.score, found.provisional, found.samples) == (None, True, 0)
        assert set(parts(found).values()) == {None}


def test_parts_without_data_leave_their_weight_to_the_others() -> None:
    found = judged(window(HOUR_US, 150, 50), latency=False)
    assert parts(found) == {"availability": None, "success": 75, "latency": None, "breaches": 100}
    assert found.score == round((25 * 75 + 20 * 100) / 45, 6)
    assert not found.provisional
    assert judged(window(HOUR_US, 99, 0)).provisional


def test_what_is_older_counts_for_less() -> None:
    now = window(HOUR_US, 100, 0, up=10, slow=5)
    long_ago = window(30 * DAY_US, 100, 100, up=10, down=10, slow=5)
    found = judged(now, long_ago)
    success, availability = parts(found)["success"], parts(found)["availability"]
    assert success is not None
    assert 75 < success < 100
    assert availability is not None
    assert 75 < availability < 100
    assert parts(found)["latency"] == 95


def test_breaches_take_points_and_are_forgotten_by_half_lives() -> None:
    data = window(HOUR_US, 100, 0)
    open_now = judged(data, breaches=(PastBreach("critical", None), PastBreach("warning", NOW - HALF_LIFE_US)))
    assert parts(open_now)["breaches"] == 100 - 30 - 5
    assert parts(judged(data, breaches=(PastBreach("critical", None),) * 5))["breaches"] == 0
