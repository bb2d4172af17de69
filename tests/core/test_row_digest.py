"""What a record holds beside its entry: any other value has another digest."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from asapd.core.row_digest import row_digest

rows = st.lists(st.none() | st.integers(-(2**63), 2**63 - 1) | st.text() | st.floats(allow_nan=False), max_size=4)


@given(rows, rows)
def test_a_digest_is_of_these_values_in_this_order(first: list[Any], second: list[Any]) -> None:
    assert row_digest(first) == row_digest(tuple(first))
    assert (row_digest(first) == row_digest(second)) is (repr(first) == repr(second))


def test_bytes_have_one_as_well() -> None:
    assert row_digest([b"a"]) != row_digest([b"b"])
