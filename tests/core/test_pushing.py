"""When a push is repeated, and when it is given up."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asapd.core.pushing import LONGEST_ASKED_S, LONGEST_WAIT_S, REFUSED_TRIES, Failed, gives_up, judge, wait_s, wants

ALL = ("opened", "escalated", "resolved")


@pytest.mark.parametrize(
    ("events", "least", "event", "severity", "held", "wanted"),
    [
        (ALL, "warning", "opened", "warning", None, True),
        (ALL, "critical", "opened", "warning", None, False),
        (ALL, "critical", "resolved", "critical", None, True),
        (("opened",), "warning", "resolved", "critical", None, False),
        (ALL, "warning", "opened", "critical", "silenced", False),
    ],
)
def test_a_target_is_pushed_what_its_filters_pass_and_nothing_that_is_held_back(
    events: tuple[str, ...], least: str, event: str, severity: str, held: str | None, wanted: bool
) -> None:
    assert wants(events, least, event=event, severity=severity, held=held) is wanted


def test_only_a_2xx_has_taken_an_alert() -> None:
    assert judge(200) is None
    assert judge(204) is None
    assert judge(500) == Failed("answered with status 500")
    assert judge(422) == Failed("answered with status 422", is_final=True)
    assert judge(429, "7") == Failed("answered with status 429", retry_after_s=7.0)
    assert judge(503, "999999") == Failed("answered with status 503", retry_after_s=LONGEST_ASKED_S)
    assert judge(503, "Sat, 21 Nov 2026 10:00:00 GMT") == Failed("answered with status 503")


@given(st.integers(1, 10_000), st.floats(0, 1), st.none() | st.floats(0, LONGEST_ASKED_S))
def test_waits_are_bounded_and_never_shorter_than_asked(failures: int, chance: float, asked: float | None) -> None:
    waited = wait_s(failures, asked, chance)
    assert max(0.5, asked or 0) <= waited <= max(LONGEST_WAIT_S, asked or 0)


def test_waits_double_from_a_second_and_half_of_each_is_chance() -> None:
    assert [wait_s(n, None, 1.0) for n in range(1, 9)] == [1, 2, 4, 8, 16, 32, 60, 60]
    assert [wait_s(n, None, 0.0) for n in (1, 2, 8)] == [0.5, 1, 30]


def test_an_alert_is_given_up_when_it_is_old_or_was_refused_for_good_often_enough() -> None:
    passing, final = Failed("x"), Failed("x", is_final=True)
    assert not gives_up(passing, 100, age_us=9, retry_for_us=10)
    assert gives_up(passing, 1, age_us=10, retry_for_us=10)
    assert not gives_up(final, REFUSED_TRIES - 1, age_us=0, retry_for_us=10)
    assert gives_up(final, REFUSED_TRIES, age_us=0, retry_for_us=10)
