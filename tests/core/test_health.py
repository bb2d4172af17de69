import pytest
from hypothesis import given
from hypothesis import strategies as st

from asapd.core.flapping import Flaps
from asapd.core.health import (
    AgentState,
    ProbeResult,
    State,
    Status,
    Transition,
    fall_silent,
    pause,
    resume,
    shown_state,
    step,
)


def good(ts_us: int, status: Status | None = "healthy") -> ProbeResult:
    return ProbeResult(ts_us, True, status, 1.5)


def bad(ts_us: int) -> ProbeResult:
    return ProbeResult(ts_us, False, reason="timeout", detail="5s")


def run(state: AgentState, results: list[ProbeResult], up_after: int = 1, down_after: int = 2) -> list[Transition]:
    transitions = []
    for result in results:
        state, transition = step(state, result, healthy_after=up_after, unhealthy_after=down_after)
        if transition is not None:
            transitions.append(transition)
    return transitions


def test_an_unknown_agent_is_healthy_as_soon_as_enough_results_say_so() -> None:
    assert run(AgentState(), [good(1)]) == [Transition("unknown", "healthy", 1)]
    assert run(AgentState(), [good(1), good(2)], up_after=2) == [Transition("unknown", "healthy", 2)]
    assert run(AgentState(), [good(1), bad(2), good(3)], up_after=2) == []


def test_a_single_failure_does_not_make_an_agent_unhealthy() -> None:
    assert run(AgentState("healthy"), [bad(1), good(2), bad(3), good(4)]) == []
    assert run(AgentState("healthy"), [bad(1), bad(2), bad(3)]) == [Transition("healthy", "unhealthy", 2, "timeout")]


def run_within(results: str, within: int, down_after: int = 2, up_after: int = 1) -> list[tuple[State, int]]:
    """Changes of state with the number of the result that brought each; `.` is a good result and `x` a failure."""
    state, changes = AgentState(), []
    for ts_us, sign in enumerate(results):
        state, transition = step(
            state,
            bad(ts_us) if sign == "x" else good(ts_us),
            healthy_after=up_after,
            unhealthy_after=down_after,
            unhealthy_within=within,
        )
        if transition is not None:
            changes.append((transition.new, ts_us))
    return changes


def test_failures_among_the_last_results_bring_an_agent_down_in_a_row_or_not() -> None:
    assert run_within(".x.x", 3) == [("healthy", 0), ("unhealthy", 3)]
    assert run_within(".x..x", 3) == [("healthy", 0)]
    assert run_within(".x..x", 4) == [("healthy", 0), ("unhealthy", 4)]
    assert run_within("x.x", 3) == [("healthy", 1)]
    # What brought it down once is not held against it once more when it has come up.
    assert run_within(".x.x.x..x", 3) == [("healthy", 0), ("unhealthy", 3), ("healthy", 4)]
    assert run_within(".x.x..xx", 3, up_after=2) == [("unhealthy", 3), ("healthy", 5), ("unhealthy", 7)]


@given(st.text("x."), st.integers(1, 4), st.integers(1, 4))
def test_among_as_many_results_as_failures_is_in_a_row(results: str, down_after: int, up_after: int) -> None:
    within = [run_within(results, few, down_after, up_after) for few in range(down_after + 1)]
    assert within == [within[0]] * len(within)


def test_an_unknown_agent_that_fails_becomes_unhealthy() -> None:
    assert run(AgentState(), [bad(1), bad(2)]) == [Transition("unknown", "unhealthy", 2, "timeout")]


def test_degraded_follows_the_agents_word_at_once() -> None:
    assert run(AgentState(), [good(1, "degraded"), good(2), good(3, "degraded")], up_after=1) == [
        Transition("unknown", "degraded", 1),
        Transition("degraded", "healthy", 2),
        Transition("healthy", "degraded", 3),
    ]


def test_a_recovery_takes_as_many_results_as_asked_for() -> None:
    down = AgentState("unhealthy", fail_streak=4)
    assert run(down, [good(1), good(2), bad(3), good(4), good(5), good(6)], up_after=3) == [
        Transition("unhealthy", "healthy", 6)
    ]


def test_the_state_keeps_since_when_it_holds() -> None:
    state = AgentState("healthy", 5, 3)
    down = Flaps(verdict="down")
    state, _ = step(state, bad(9), healthy_after=1, unhealthy_after=2)
    assert state == AgentState("healthy", 5, 0, 1, 9, down)
    state, _ = step(state, bad(10), healthy_after=1, unhealthy_after=2)
    assert state == AgentState("unhealthy", 10, 0, 2, 10, down)


@given(st.lists(st.booleans()), st.integers(1, 4), st.integers(1, 4))
def test_transitions_need_their_streak_and_follow_one_another(oks: list[bool], up_after: int, down_after: int) -> None:
    state, standing = AgentState(), "unknown"
    for ts_us, is_ok in enumerate(oks):
        state, transition = step(
            state, good(ts_us) if is_ok else bad(ts_us), healthy_after=up_after, unhealthy_after=down_after
        )
        if transition is not None:
            assert transition.old == standing != transition.new
            standing = transition.new
            needed = up_after if standing == "healthy" else down_after
            assert oks[: ts_us + 1][-needed:] == [standing == "healthy"] * needed
        assert state.state == standing


def test_a_paused_agent_stays_paused_until_resumed() -> None:
    state, transition = pause(AgentState("healthy", 1, 9, 0, 8), 10)
    assert (state, transition) == (
        AgentState("paused", 10, last_probe_us=8),
        Transition("healthy", "paused", 10, "paused"),
    )
    assert pause(state, 11) == (state, None)
    assert step(state, bad(12), healthy_after=1, unhealthy_after=1) == (
        AgentState("paused", 10, last_probe_us=12),
        None,
    )
    assert resume(state, 20) == (AgentState("unknown", 20), Transition("paused", "unknown", 20, "resumed"))


def test_only_what_is_paused_can_be_resumed() -> None:
    assert resume(AgentState("healthy"), 5) == (AgentState("healthy"), None)


def test_an_agent_that_falls_silent_is_stale_until_it_is_heard_again() -> None:
    state, transition = fall_silent(AgentState("unhealthy", 1, 0, 4, 8), 50)
    assert (state, transition) == (
        AgentState("stale", 50, last_probe_us=8),
        Transition("unhealthy", "stale", 50, "no_heartbeat"),
    )
    _, transition = step(state, good(60), healthy_after=1, unhealthy_after=2)
    assert transition == Transition("stale", "healthy", 60)


@pytest.mark.parametrize("state", ["paused", "stale", "unknown"])
def test_of_whom_nothing_is_known_silence_tells_nothing(state: State) -> None:
    assert fall_silent(AgentState(state, 5), 50) == (AgentState(state, 5), None)


@pytest.mark.parametrize(
    ("state", "now_us", "shown"),
    [
        (AgentState("healthy", last_probe_us=100), 190, "healthy"),
        (AgentState("healthy", last_probe_us=100), 191, "stale"),
        (AgentState("unhealthy", last_probe_us=100), 500, "stale"),
        (AgentState("healthy", last_probe_us=100), 50, "healthy"),
        (AgentState("paused", last_probe_us=100), 500, "paused"),
        (AgentState(), 500, "unknown"),
    ],
)
def test_a_word_that_holds_no_longer_is_stale(state: AgentState, now_us: int, shown: str) -> None:
    assert shown_state(state, now_us, 90) == shown
