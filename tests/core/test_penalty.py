from decimal import Decimal
from fractions import Fraction

from hypothesis import given
from hypothesis import strategies as st

from asapd.core.penalty import Credit, credit

TIERS = [(Decimal("99.9"), Decimal(10)), (Decimal(99), Decimal(25)), (Decimal(95), Decimal(100))]


def test_the_highest_credit_that_was_missed_is_given() -> None:
    assert credit(999, 1, 1_000_000, TIERS) == Credit(Decimal(0), 0, None)
    assert credit(9989, 11, 1_000_000, TIERS) == Credit(Decimal(10), 100_000, Decimal("99.9"))
    assert credit(98, 2, 1_000_003, TIERS) == Credit(Decimal(25), 250_000, Decimal(99))
    assert credit(0, 1, 7, TIERS) == Credit(Decimal(100), 7, Decimal(95))


def test_what_is_not_known_has_no_credit() -> None:
    assert credit(0, 0, 7, TIERS) is None
    assert credit(1, 1, 7, []) is None
    assert credit(1, 1, None, TIERS) == Credit(Decimal(100), None, Decimal(95))
    assert credit(1, 0, None, TIERS) == Credit(Decimal(0), None, None)


@given(st.integers(0, 10**9), st.integers(1, 10**9), st.integers(0, 10**12), st.integers(0, 100), st.integers(0, 10**8))
def test_amounts_are_exact_and_rounded_down(up: int, down: int, cost: int, below: int, share: int) -> None:
    percent = Decimal(share) / 10**6
    found = credit(up, down, cost, [(Decimal(below), percent)])
    assert found is not None
    is_missed = Fraction(100 * up, up + down) < below
    assert found.microusd == (cost * share // 10**8 if is_missed else 0)
