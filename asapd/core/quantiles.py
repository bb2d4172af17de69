"""A histogram of latencies that can be merged, split again, and asked for quantiles within 1 %."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from types import MappingProxyType
from typing import Self

import msgspec

from asapd.core.types import MAX_INT

SUB_BITS = 6
"""Every octave from 128 up is cut into 2**SUB_BITS equal buckets."""

_EXACT = 2 ** (SUB_BITS + 1)
MAX_BUCKET = (MAX_INT.bit_length() - SUB_BITS - 1) * 2**SUB_BITS + _EXACT - 1


class HistogramError(ValueError):
    """A value, bucket or stored form is outside what a histogram can hold; the caller's fault or a damaged row."""


def bucket_of(value_ms: int) -> int:
    """The bucket of a value in 0 .. 2**53-1, itself in 0 .. MAX_BUCKET; larger values never get a smaller bucket.

    Raises:
        HistogramError: the value is outside the range.
    """
    if not 0 <= value_ms <= MAX_INT:
        raise HistogramError(f"value {value_ms} is outside 0 .. {MAX_INT}")
    if value_ms < _EXACT:
        return value_ms
    shift = value_ms.bit_length() - SUB_BITS - 1
    return (shift << SUB_BITS) + (value_ms >> shift)


def representative(bucket: int) -> float:
    """The value that stands for all values of a bucket: the middle between its least and its greatest integer."""
    if bucket < _EXACT:
        return float(bucket)
    shift = (bucket >> SUB_BITS) - 1
    least = (bucket - (shift << SUB_BITS)) << shift
    return least + ((1 << shift) - 1) / 2


class Histogram:
    """Counts by bucket. Merging and subtracting are exact, so figures depend neither on order nor on grouping.

    Relative error of a quantile: below 128 every integer has its own bucket, so there is none. From 128 up
    a bucket holds the integers m * 2**k .. (m+1) * 2**k - 1 with 64 <= m < 128 and k >= 1, and is shown as their
    middle. No member is further from it than (2**k - 1) / 2, and none is less than 64 * 2**k, so the error is
    below (2**k / 2) / (64 * 2**k) = 1/128 = 0.78 %. Buckets are ordered as their values are, so the bucket of a
    nearest rank holds exactly the value of that rank. The arithmetic is in integers: no edge depends on a
    logarithm's rounding.
    """

    __slots__ = ("_counts", "_total")

    def __init__(self) -> None:
        self._counts: dict[int, int] = {}
        self._total = 0

    def __eq__(self, other: object) -> bool:
        return self._counts == other._counts if isinstance(other, Histogram) else NotImplemented

    __hash__ = None  # type: ignore[assignment]  # mutable, so not a key

    def __repr__(self) -> str:
        return f"Histogram({dict(sorted(self._counts.items()))})"

    @property
    def total(self) -> int:
        """How many values are held."""
        return self._total

    @property
    def counts(self) -> Mapping[int, int]:
        """A live, read-only view of bucket -> count; counts are positive."""
        return MappingProxyType(self._counts)

    def add(self, value_ms: int, count: int = 1) -> None:
        """Add a value `count` times.

        Raises:
            HistogramError: the value is outside 0 .. 2**53-1, or more are to be taken out than there are.
        """
        self.add_bucket(bucket_of(value_ms), count)

    def add_bucket(self, bucket: int, count: int) -> None:
        """Add `count` values already folded to a bucket; a negative count takes out values that were added before.

        Raises:
            HistogramError: no such bucket, or it holds fewer values than are to be taken out.
        """
        rest = self._counts.get(bucket, 0) + count
        if not 0 <= bucket <= MAX_BUCKET or rest < 0:
            raise HistogramError(
                f"bucket {bucket} with count {count} is outside 0 .. {MAX_BUCKET}, or would be below 0"
            )
        if rest:
            self._counts[bucket] = rest
        else:
            self._counts.pop(bucket, None)
        self._total += count

    def merge(self, other: Histogram) -> None:
        """Add all that the other holds."""
        counts = self._counts
        for bucket, count in other._counts.items():
            counts[bucket] = counts.get(bucket, 0) + count
        self._total += other._total

    def subtract(self, other: Histogram) -> None:
        """Take away what was merged before; the exact inverse of `merge`.

        Raises:
            HistogramError: the other holds something that this one does not; nothing is changed then.
        """
        counts = self._counts
        for bucket, count in other._counts.items():
            if counts.get(bucket, 0) < count:
                raise HistogramError(f"cannot take {count} from bucket {bucket}: it holds {counts.get(bucket, 0)}")
        total = other._total
        for bucket, count in tuple(other._counts.items()):
            rest = counts[bucket] - count
            if rest:
                counts[bucket] = rest
            else:
                del counts[bucket]
        self._total -= total

    def quantile(self, q: float) -> float | None:
        """The nearest-rank quantile, q in 0 .. 1, as its bucket's representative; None when empty.

        Nearest rank: the smallest value with at least q of all values at or below it. `q` is read through its
        shortest repr, so 0.95 of 20 values is the 19th and not, by a binary rounding, the 20th.

        Raises:
            HistogramError: q is outside 0 .. 1.
        """
        if not 0 <= q <= 1:
            raise HistogramError(f"quantile {q} is outside 0 .. 1")
        share = Fraction(repr(q))
        rank = max(1, -(-share.numerator * self._total // share.denominator))
        for bucket in sorted(self._counts):
            rank -= self._counts[bucket]
            if rank <= 0:
                return representative(bucket)
        return None

    def count_over(self, limit_ms: int) -> int:
        """How many values exceed a limit, as far as buckets tell: those whose representative does."""
        return sum(count for bucket, count in self._counts.items() if representative(bucket) > limit_ms)

    def to_bytes(self) -> bytes:
        """The stored form: a msgpack array of bucket gap, count, gap, count ...; equal histograms give equal bytes."""
        flat: list[int] = []
        last = 0
        for bucket in sorted(self._counts):
            flat += (bucket - last, self._counts[bucket])
            last = bucket
        return msgspec.msgpack.encode(flat)

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Read the stored form.

        Raises:
            HistogramError: the bytes are not a histogram.
        """
        try:
            flat = msgspec.msgpack.decode(data, type=list[int])
        except msgspec.DecodeError as problem:
            raise HistogramError(f"not a stored histogram: {problem}") from None
        if len(flat) % 2:
            raise HistogramError("not a stored histogram: a bucket without a count")
        histogram = cls()
        bucket = 0
        for gap, count in zip(flat[::2], flat[1::2], strict=True):
            bucket += gap
            histogram.add_bucket(bucket, count)
        return histogram
