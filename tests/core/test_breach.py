from decimal import Decimal

from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from asapd.core.breach import (
    NONE,
    BreachState,
    Escalated,
    Opened,
    Resolved,
    Transition,
    reopened,
    resolving_hold_us,
    step,
)
from asapd.core.sla import TermVerdict

MIN = 20


def verdict(met: bool | None, *, critical: bool = False, samples: int = 50, threshold: str = "99.5") -> TermVerdict:
    return TermVerdict("availability", Decimal(threshold), "99.5%", None, None, met, critical, samples)


BROKEN, WORSE, KEPT = verdict(False), verdict(False, critical=True), verdict(True)


def fold(
    state: BreachState,
    found: TermVerdict | None,
    now_us: int = 1000,
    *,
    hold_us: int = 0,
    min_samples: int = MIN,
    promise_changed: bool = False,
) -> tuple[BreachState, Transition | None]:
    return step(state, found, now_us=now_us, hold_us=hold_us, min_samples=min_samples, promise_changed=promise_changed)


def opened(found: TermVerdict = BROKEN, now_us: int = 1000) -> BreachState:
    state, transition = fold(NONE, found, now_us)
    assert isinstance(transition, Opened)
    return replace(state, breach_id="brc_1")


def test_a_broken_promise_opens_at_once_without_a_hold() -> None:
    assert fold(NONE, BROKEN) == (BreachState("open", 1000, None, 1000, "warning", Decimal("99.5")), Opened("warning"))
    assert fold(NONE, WORSE)[1] == Opened("critical")


def test_a_kept_promise_or_no_data_opens_nothing() -> None:
    assert fold(NONE, KEPT) == (NONE, None)
    assert fold(NONE, verdict(None, samples=0)) == (NONE, None)
    assert fold(NONE, None) == (NONE, None)


def test_below_the_least_samples_nothing_opens() -> None:
    assert fold(NONE, verdict(False, samples=MIN - 1)) == (NONE, None)
    assert fold(NONE, verdict(False, samples=MIN))[1] == Opened("warning")
    assert fold(NONE, verdict(False, samples=0), min_samples=0) == (NONE, None)


def test_a_hold_delays_opening_until_the_breach_lasted_for_it() -> None:
    state, transition = fold(NONE, BROKEN, 100, hold_us=50)
    assert (state.phase, state.is_open, transition) == ("pending", False, None)
    assert fold(state, BROKEN, 149, hold_us=50) == (state, None)
    assert fold(state, KEPT, 149, hold_us=50) == (NONE, None)
    assert fold(state, verdict(False, samples=1), 149, hold_us=50) == (NONE, None)
    after, transition = fold(state, BROKEN, 150, hold_us=50)
    assert (after.phase, after.opened_at_us, transition) == ("open", 150, Opened("warning"))


def test_a_hold_starts_again_with_another_promise() -> None:
    state, _ = fold(NONE, BROKEN, 100, hold_us=50)
    assert fold(state, BROKEN, 150, hold_us=50, promise_changed=True)[0].since_us == 150
    assert fold(state, verdict(False, threshold="99.9"), 150, hold_us=50)[0].since_us == 150


def test_a_hold_starts_again_when_the_clock_goes_back() -> None:
    pending, _ = fold(NONE, BROKEN, 1000, hold_us=50)
    pending, _ = fold(pending, BROKEN, 100, hold_us=50)
    assert fold(pending, BROKEN, 150, hold_us=50)[1] == Opened("warning")
    resolving, _ = fold(opened(), KEPT, 1000, hold_us=50)
    resolving, _ = fold(resolving, KEPT, 100, hold_us=50)
    assert fold(resolving, KEPT, 149, hold_us=50)[1] is None
    assert fold(resolving, KEPT, 150, hold_us=50) == (NONE, Resolved("recovered"))


def test_a_kept_promise_resolves_at_once_without_a_hold() -> None:
    assert fold(opened(), KEPT) == (NONE, Resolved("recovered"))


def test_a_hold_delays_resolving_and_a_relapse_ends_it() -> None:
    state, transition = fold(opened(), KEPT, 2000, hold_us=50)
    assert (state.phase, state.is_open, state.breach_id, transition) == ("resolving", True, "brc_1", None)
    assert fold(state, KEPT, 2049, hold_us=50) == (state, None)
    assert fold(state, KEPT, 2050, hold_us=50) == (NONE, Resolved("recovered"))
    relapsed, transition = fold(state, BROKEN, 2049, hold_us=50)
    assert (relapsed.phase, relapsed.breach_id, transition) == ("open", "brc_1", None)
    assert fold(relapsed, KEPT, 2050, hold_us=50)[1] is None


def test_an_empty_window_resolves_for_want_of_data() -> None:
    assert fold(opened(), verdict(None, samples=0)) == (NONE, Resolved("no_data"))
    state, transition = fold(opened(), verdict(None, samples=0), 2000, hold_us=50)
    assert (state.phase, transition) == ("resolving", None)
    assert fold(state, verdict(None, samples=0), 2050, hold_us=50) == (NONE, Resolved("no_data"))


def test_few_samples_keep_a_breach_open_or_let_it_recover() -> None:
    state = opened()
    assert fold(state, verdict(False, samples=1)) == (state, None)
    assert fold(state, verdict(True, samples=1)) == (NONE, Resolved("recovered"))


def test_a_changed_promise_resolves_at_once_and_the_new_one_opens_next() -> None:
    state = opened()
    other = verdict(False, threshold="99.9")
    for resolved in (
        fold(state, None, hold_us=50),
        fold(state, other, hold_us=50),
        fold(state, BROKEN, hold_us=50, promise_changed=True),
    ):
        assert resolved == (NONE, Resolved("sla_changed"))
    assert fold(NONE, other)[1] == Opened("warning")


def test_an_equal_promise_written_otherwise_is_no_change() -> None:
    state = opened()
    assert fold(state, verdict(False, threshold="99.500")) == (state, None)


def test_a_warning_escalates_once_and_never_falls() -> None:
    state, transition = fold(opened(), WORSE)
    assert (state.severity, state.breach_id, transition) == ("critical", "brc_1", Escalated())
    assert fold(state, WORSE) == (state, None)
    assert fold(state, BROKEN) == (state, None)
    assert fold(opened(WORSE), WORSE)[1] is None


def test_too_few_samples_do_not_escalate() -> None:
    state = opened()
    assert fold(state, verdict(False, critical=True, samples=MIN - 1)) == (state, None)


def test_a_stored_breach_goes_on_where_it_was() -> None:
    state = reopened("brc_9", opened_at_us=5, severity="warning", threshold=Decimal("99.5"))
    assert fold(state, BROKEN) == (state, None)
    assert fold(state, KEPT) == (NONE, Resolved("recovered"))
    assert fold(replace(state, threshold=None), verdict(False, threshold="1"))[1] is None


verdicts = st.one_of(
    st.none(),
    st.builds(
        verdict,
        st.sampled_from([True, False, False, None]),
        critical=st.booleans(),
        samples=st.sampled_from([0, 1, MIN, 50]),
        threshold=st.sampled_from(["99.5", "99.5", "99.5", "99.9"]),
    ),
)
courses = st.lists(st.tuples(verdicts, st.integers(-30, 60), st.sampled_from([False, False, False, True])), max_size=30)


@given(courses, st.sampled_from([0, 40]), st.sampled_from([0, 1, MIN]))
def test_whatever_happens_a_breach_opens_escalates_at_most_once_and_resolves(
    course: list[tuple[TermVerdict | None, int, bool]], hold_us: int, min_samples: int
) -> None:
    state, now_us = NONE, 1000
    is_open, severity = False, "warning"
    for found, passed_us, promise_changed in course:
        now_us += passed_us
        state, transition = fold(
            state, found, now_us, hold_us=hold_us, min_samples=min_samples, promise_changed=promise_changed
        )
        match transition:
            case Opened():
                assert not is_open
                assert found is not None
                assert found.met is False
                assert found.samples >= min_samples
                is_open, severity = True, transition.severity
            case Escalated():
                assert is_open
                assert severity == "warning"
                severity = "critical"
            case Resolved():
                assert is_open
                is_open = False
            case None:
                pass
        assert state.is_open == is_open
        if is_open:
            assert state.severity == severity


@given(st.lists(st.integers(0, 200), max_size=60))
def test_no_window_holds_more_than_17_openings(waits: list[int]) -> None:
    """Of a term that is broken as soon as it may be, whatever the moments are at which it is looked at."""
    window_us, now_us = 120, 1000
    opened: list[int] = []
    free_us = now_us
    for wait in waits:
        now_us += wait
        if now_us >= free_us:
            opened.append(now_us)
            free_us = now_us + 1 + resolving_hold_us(0, window_us, opened, now_us)
    for start_us in opened:
        assert sum(start_us <= at_us < start_us + window_us for at_us in opened) <= 17


def test_what_opens_for_the_fifth_time_recovers_later_and_never_sooner_than_the_hold() -> None:
    often = [800, 850, 900, 950, 1000]
    assert resolving_hold_us(5, 1200, [], 1000) == 5
    assert resolving_hold_us(5, 1200, often[1:], 1000) == 5
    assert resolving_hold_us(5, 1200, often, 1000) == 100
    assert resolving_hold_us(500, 1200, often, 1000) == 500
    assert resolving_hold_us(5, 1200, often, 2001) == 5
