import itertools

from hypothesis import given
from hypothesis import strategies as st

from asapd.core.intervals import cut, holds, joined, total_us, without

intervals = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), max_size=6)


def moments(found: list[tuple[int, int]]) -> set[int]:
    return {at for start, end in found for at in range(start, end)}


@given(intervals, st.integers(0, 40), st.integers(0, 40))
def test_intervals_are_the_sets_of_their_moments(given: list[tuple[int, int]], start: int, end: int) -> None:
    found = joined(given)
    span = set(range(start, end))
    assert moments(found) == moments(given)
    assert all(first[1] < second[0] for first, second in itertools.pairwise(found))
    assert moments(cut(found, start, end)) == moments(found) & span
    assert moments(without(start, end, found)) == span - moments(found)
    assert total_us(found) == len(moments(found))
    assert {at for at in range(45) if holds(found, at)} == moments(found)
