import math

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asapd.core.quantiles import MAX_BUCKET, Histogram, HistogramError, bucket_of, representative
from asapd.core.types import MAX_INT

values = st.one_of(
    st.integers(0, 300),
    st.integers(0, MAX_INT),
    st.integers(0, 53).flatmap(lambda bits: st.integers(max(0, 2**bits - 2), min(MAX_INT, 2**bits + 2))),
)


def histogram_of(items: list[int]) -> Histogram:
    histogram = Histogram()
    for item in items:
        histogram.add(item)
    return histogram


@given(values)
def test_a_value_is_within_one_percent_of_its_buckets_representative(value: int) -> None:
    assert abs(representative(bucket_of(value)) - value) * 128 <= value


@given(values, values)
def test_a_larger_value_never_gets_a_smaller_bucket(one: int, other: int) -> None:
    low, high = sorted((one, other))
    assert bucket_of(low) <= bucket_of(high)


def test_buckets_run_without_a_hole_from_zero_to_the_last() -> None:
    assert bucket_of(0) == 0
    assert bucket_of(MAX_INT) == MAX_BUCKET
    assert [bucket_of(value) for value in range(128)] == list(range(128))
    assert sorted({bucket_of(value) for value in range(1 << 14)}) == list(range(bucket_of((1 << 14) - 1) + 1))
    assert [bucket_of(int(representative(bucket))) for bucket in range(MAX_BUCKET + 1)] == list(range(MAX_BUCKET + 1))


@given(st.lists(values, min_size=1), st.sampled_from([0.0, 0.01, 0.07, 0.5, 0.9, 0.95, 0.99, 1.0]))
def test_a_quantile_is_the_nearest_rank_within_one_percent(items: list[int], q: float) -> None:
    percent = round(q * 100)
    true = sorted(items)[max(1, -(-percent * len(items) // 100)) - 1]
    shown = histogram_of(items).quantile(q)
    assert shown is not None
    assert abs(shown - true) * 128 <= true


def test_a_rank_does_not_slip_by_a_binary_rounding() -> None:
    assert math.ceil(0.07 * 100) == 8
    assert histogram_of(list(range(1, 101))).quantile(0.07) == 7


def test_an_empty_histogram_has_no_quantile() -> None:
    assert Histogram().quantile(0.95) is None


@pytest.mark.parametrize("q", [-0.1, 1.1, math.nan])
def test_a_quantile_outside_zero_to_one_is_refused(q: float) -> None:
    with pytest.raises(HistogramError):
        Histogram().quantile(q)


@given(st.lists(values), st.lists(values))
def test_merging_is_the_same_as_adding_all_and_subtracting_undoes_it(one: list[int], other: list[int]) -> None:
    left, right = histogram_of(one), histogram_of(other)
    left.merge(right)
    assert left == histogram_of(one + other)
    assert left.total == len(one) + len(other) == sum(left.counts.values())
    left.subtract(right)
    assert left == histogram_of(one)
    assert left.total == len(one)
    assert all(left.counts.values())


@given(st.lists(values).flatmap(lambda items: st.tuples(st.just(items), st.permutations(items))))
def test_order_of_arrival_changes_nothing(orders: tuple[list[int], list[int]]) -> None:
    one, other = map(histogram_of, orders)
    assert one == other
    assert one.to_bytes() == other.to_bytes()
    assert repr(one) == repr(other)


@given(st.lists(values))
def test_the_stored_form_reads_back(items: list[int]) -> None:
    histogram = histogram_of(items)
    again = Histogram.from_bytes(histogram.to_bytes())
    assert again == histogram
    assert again.total == histogram.total


@given(st.one_of(st.binary(), st.lists(st.integers(-5, 2**64 - 1)).map(msgspec.msgpack.encode)))
def test_reading_any_bytes_gives_a_histogram_or_its_own_error(data: bytes) -> None:
    try:
        histogram = Histogram.from_bytes(data)
    except HistogramError:
        return
    assert histogram.total == sum(histogram.counts.values())


def test_an_odd_list_is_no_stored_form() -> None:
    with pytest.raises(HistogramError, match="without a count"):
        Histogram.from_bytes(msgspec.msgpack.encode([1, 2, 3]))


def test_a_histogram_can_be_merged_with_and_taken_from_itself() -> None:
    histogram = histogram_of([1, 500, 500])
    histogram.merge(histogram)
    assert histogram == histogram_of([1, 500, 500] * 2)
    histogram.subtract(histogram)
    assert histogram == Histogram()
    assert histogram.total == 0


def test_taking_away_what_is_not_there_is_refused_and_changes_nothing() -> None:
    histogram = histogram_of([1, 2])
    with pytest.raises(HistogramError, match="cannot take"):
        histogram.subtract(histogram_of([1, 3]))
    assert histogram == histogram_of([1, 2])


@pytest.mark.parametrize("value", [-1, MAX_INT + 1])
def test_a_value_outside_the_range_is_refused(value: int) -> None:
    with pytest.raises(HistogramError):
        bucket_of(value)


@pytest.mark.parametrize(("bucket", "count"), [(-1, 1), (MAX_BUCKET + 1, 1), (0, -1)])
def test_a_bucket_or_count_outside_the_range_is_refused(bucket: int, count: int) -> None:
    with pytest.raises(HistogramError):
        Histogram().add_bucket(bucket, count)


def test_a_count_of_zero_leaves_no_trace() -> None:
    histogram = Histogram()
    histogram.add(5, 0)
    assert not histogram.counts


def test_counts_cannot_be_written_through_the_view() -> None:
    with pytest.raises(TypeError):
        histogram_of([1]).counts[1] = 2  # type: ignore[index]  # that it fails is the test


def test_values_over_a_limit_are_counted_by_their_buckets() -> None:
    assert histogram_of([1, 100, 101, 5000]).count_over(100) == 2


def test_a_histogram_differs_from_other_things() -> None:
    assert Histogram() != {}
