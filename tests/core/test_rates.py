from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from asapd.core.rates import Bucket, Rate, draw

RATES = st.builds(Rate, st.integers(1, 1_000), st.integers(1, 3_600_000_000))


def test_a_burst_comes_at_once_and_the_rest_at_the_rate() -> None:
    rate, bucket = Rate(2, 1_000_000), Bucket(at_us=5)
    for _ in range(3):
        bucket, wait_us = draw(bucket, rate, 3, 5)
        assert wait_us == 0
    bucket, wait_us = draw(bucket, rate, 3, 5)
    assert wait_us == 500_000
    _, wait_us = draw(bucket, rate, 3, 5 + 499_999)
    assert wait_us == 1
    _, wait_us = draw(bucket, rate, 3, 5 + 500_000)
    assert wait_us == 0


@given(rate=RATES, burst=st.integers(1, 50), steps=st.lists(st.integers(-(10**6), 10**9), max_size=25))
def test_no_stretch_of_time_has_more_than_the_burst_and_the_rate_allow(
    rate: Rate, burst: int, steps: list[int]
) -> None:
    bucket, now_us, latest_us = Bucket(), 0, 0
    drawn: list[int] = []
    for step in steps:
        now_us += step
        latest_us = max(latest_us, now_us)
        before = bucket
        bucket, wait_us = draw(bucket, rate, burst, now_us)
        assert bucket.at_us == latest_us
        if wait_us:
            assert bucket.debt <= before.debt
            # Exactly then there is one again, and not a microsecond before.
            assert draw(bucket, rate, burst, latest_us + wait_us)[1] == 0
            assert draw(bucket, rate, burst, latest_us + wait_us - 1)[1] > 0
        else:
            drawn.append(latest_us)
    for first, first_us in enumerate(drawn):
        for last in range(first, len(drawn)):
            assert (last - first + 1 - burst) * rate.period_us <= (drawn[last] - first_us) * rate.count
