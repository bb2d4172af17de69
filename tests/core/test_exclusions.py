from datetime import UTC

from hypothesis import given
from hypothesis import strategies as st

from asapd.core.exclusions import NOTHING, Exclusions, Observed, observe
from asapd.core.intervals import joined
from asapd.core.support_hours import SupportHours
from asapd.core.types import DAY_US, HOUR_US
from asapd.core.uptime import UptimeTimeline

stretches = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)), max_size=4)
THURSDAY = SupportHours(((3, 9 * 60, 17 * 60),))


def test_what_lies_outside_support_hours_and_within_maintenance_does_not_count() -> None:
    assert NOTHING.between(0, DAY_US) == []
    outside = [(0, 9 * HOUR_US), (17 * HOUR_US, DAY_US)]
    assert Exclusions(THURSDAY, UTC).between(0, DAY_US) == outside
    upkeep = ((8 * HOUR_US, 10 * HOUR_US),)
    assert Exclusions(THURSDAY, UTC, upkeep).between(0, DAY_US) == [(0, 10 * HOUR_US), (17 * HOUR_US, DAY_US)]


@given(
    st.lists(st.tuples(st.integers(1, 9), st.booleans(), st.integers(0, 9)), max_size=8),
    stretches,
    stretches,
    st.integers(0, 60),
    st.integers(0, 60),
)
def test_uptime_is_that_of_every_single_moment(
    probes: list[tuple[int, bool, int]],
    excluded: list[tuple[int, int]],
    blind: list[tuple[int, int]],
    start: int,
    length: int,
) -> None:
    timeline, known = UptimeTimeline(), dict[int, bool]()
    at = 0
    for wait, up, hold in probes:
        at += wait
        timeline.extend(at, at + hold, up)
        known = {moment: was for moment, was in known.items() if moment < at}
        known |= dict.fromkeys(range(at, at + hold), up)
    out = {moment for first, last in excluded for moment in range(first, last)}
    unseen = {moment for first, last in blind for moment in range(first, last)} - out
    counted = [moment for moment in range(start, start + length) if moment not in out]
    seen = [known.get(moment) for moment in counted if moment not in unseen]
    assert observe(timeline, start, start + length, joined(excluded), joined(blind)) == Observed(
        seen.count(True),
        seen.count(False),
        seen.count(None) + len(counted) - len(seen),
        length - len(counted),
        len(counted) - len(seen),
    )
