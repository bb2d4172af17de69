from typing import get_args

from hypothesis import given
from hypothesis import strategies as st

from asapd.core.flapping import MEMORY, Flaps, Verdict, fold
from asapd.core.health import AgentState, ProbeResult, Transition, step

AFTER, SETTLED = 6, 12
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)


def run(verdicts: list[Verdict], after: int = AFTER, settled: int = SETTLED) -> list[Flaps]:
    flaps, seen = Flaps(), []
    for now_us, verdict in enumerate(verdicts):
        flaps = fold(flaps, verdict, now_us, flapping_after=after, settled_after=settled)
        seen.append(flaps)
    return seen


def result(verdict: Verdict, ts_us: int) -> ProbeResult:
    if verdict == "down":
        return ProbeResult(ts_us, False, reason="timeout")
    return ProbeResult(ts_us, True, verdict)


def transitions(
    verdicts: list[Verdict], after: int = AFTER, up: int = 1, down: int = 1, settled: int = SETTLED
) -> list[Transition]:
    state, found = AgentState(), []
    for ts_us, verdict in enumerate(verdicts):
        state, transition = step(
            state,
            result(verdict, ts_us),
            healthy_after=up,
            unhealthy_after=down,
            flapping_after=after,
            settled_after=settled,
        )
        if transition is not None:
            found.append(transition)
    return found


def test_an_agent_flaps_with_the_change_that_is_one_too_many_and_until_it_has_settled() -> None:
    seen = run(["healthy", "down"] * 4 + ["healthy"] * 20)
    since = [flaps.since_us for flaps in seen]
    assert since[:6] == [None] * 6
    # The eighth change is its last, at 8; twelve results without one follow.
    assert since[6:20] == [6] * 14
    assert since[20:] == [None] * 8


def test_degraded_and_healthy_in_turn_flap_as_down_and_up_do() -> None:
    assert run(["healthy", "degraded"] * 4)[-1].since_us == 6


def test_a_steady_agent_never_flaps_and_one_that_comes_back_is_no_flapper() -> None:
    assert {flaps.since_us for flaps in run(["healthy"] * 100)} == {None}
    assert {flaps.since_us for flaps in run(["healthy"] * 5 + ["down"] * 30 + ["healthy"] * 30)} == {None}


def test_what_changed_long_ago_is_forgotten() -> None:
    once: list[Verdict] = ["healthy"] * 30 + ["down"]
    assert {flaps.since_us for flaps in run(once * 10)} == {None}
    assert all(flaps.changed < 1 << MEMORY for flaps in run(once * 10))


def test_with_zero_nothing_flaps_and_what_flapped_does_no_more() -> None:
    assert {flaps.since_us for flaps in run(["healthy", "down"] * 100, after=0)} == {None}
    flapping = run(["healthy", "down"] * 4)[-1]
    assert fold(flapping, "healthy", 9, flapping_after=0, settled_after=12).since_us is None


def test_the_state_of_one_that_flaps_is_held_at_degraded_and_tells_why() -> None:
    found = transitions(["healthy", "down"] * 4 + ["down"] * 20)
    assert [(one.old, one.new, one.reason) for one in found[-2:]] == [
        ("unhealthy", "degraded", "flapping"),
        ("degraded", "unhealthy", "timeout"),
    ]
    found = transitions(["healthy", "down"] * 4 + ["healthy"] * 20)
    assert (found[-1].new, found[-1].reason) == ("healthy", "settled")


@given(st.integers(1, 11), st.integers(1, 3), st.integers(1, 3))
def test_whoever_comes_and_goes_in_a_rhythm_changes_state_seven_times_and_no_more(
    period: int, up: int, down: int
) -> None:
    rhythm: list[Verdict] = ["healthy"] * period + ["down"] * period
    assert len(transitions(rhythm * 200, up=up, down=down)) <= AFTER + 1


@given(
    st.lists(st.sampled_from(VERDICTS), max_size=400),
    st.integers(1, 10),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 30),
)
def test_transitions_are_bounded_whatever_an_agent_does(
    verdicts: list[Verdict], after: int, up: int, down: int, settled: int
) -> None:
    """Among any `MEMORY` results in a row there are at most `after`, and two for each time it settled in between."""
    at = [one.at_us for one in transitions(verdicts, after, up, down, settled)]
    bound = after + 1 + 2 * (MEMORY // settled + 1)
    for first, start_us in enumerate(at):
        assert sum(start_us <= later_us < start_us + MEMORY for later_us in at[first:]) <= bound


@given(st.lists(st.sampled_from(VERDICTS), max_size=200))
def test_without_a_limit_the_state_is_what_it_was_before_flapping_was_known(verdicts: list[Verdict]) -> None:
    found = transitions(verdicts, after=0, up=1, down=1)
    names = {"down": "unhealthy", "healthy": "healthy", "degraded": "degraded"}
    standing, expected = "unknown", []
    for verdict in verdicts:
        if names[verdict] != standing:
            expected.append((standing, names[verdict]))
            standing = names[verdict]
    assert [(one.old, one.new) for one in found] == expected
