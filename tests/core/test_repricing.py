"""What costs something else by the table in force is corrected to exactly that; the rest stays as it is."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asapd.core.pricing import Price, PriceTable
from asapd.core.repricing import Correction, CostedEvent, ModelChange, changes, correction, undone
from asapd.core.types import Outcome
from asapd.core.usage import UsageEvent

TABLE = PriceTable("v2", (Price("m", input_pico=2_000_000), Price("n", input_pico=1_000_000)))


def costed(microusd: int | None, priced: int | None = None, *, tokens: int = 10, model: str = "m") -> CostedEvent:
    return CostedEvent(7, UsageEvent("", "", "", 0, tokens_in=tokens, model=model), microusd, priced)


def reported(microusd: int | None, priced: int | None) -> CostedEvent:
    return CostedEvent(7, UsageEvent("", "", "", 0, tokens_in=10, model="m", reported_microusd=5), microusd, priced)


def untold(microusd: int | None, *, reported: int | None = None, outcome: int = Outcome.COMPLETED) -> CostedEvent:
    event = UsageEvent("", "", "", 0, outcome=outcome, model="m", reported_microusd=reported, tells_tokens=False)
    return CostedEvent(7, event, microusd, None)


@pytest.mark.parametrize(
    ("event", "prefer", "change"),
    [
        (costed(None), "priced", Correction(7, None, 20, "priced", 20)),
        (costed(15, 15), "priced", Correction(7, 15, 20, "priced", 5)),
        (costed(0, 0), "priced", Correction(7, 0, 20, "priced", 20)),
        (costed(20, 20), "priced", None),
        (costed(None, tokens=0), "priced", Correction(7, None, 0, "priced", 0)),
        (costed(15, 15, model="gone"), "priced", None),
        (costed(None, model=""), "priced", None),
        (untold(None), "priced", None),
        (untold(5, reported=5), "priced", None),
        (untold(None, outcome=Outcome.FAILED), "priced", Correction(7, None, 0, "priced", 0)),
        (reported(5, None), "priced", Correction(7, 5, 20, "priced", 20)),
        (reported(5, 15), "reported", None),
        (reported(15, 15), "reported", Correction(7, 15, 5, "reported", 5)),
    ],
)
def test_an_event_is_corrected_where_the_table_says_something_else(
    event: CostedEvent, prefer: str, change: Correction | None
) -> None:
    assert correction(event, TABLE, prefer=prefer) == change


def test_changes_are_told_by_model() -> None:
    rows = [costed(None), costed(15, 15), costed(20, 20), costed(3, model="gone"), costed(None, model="gone")]
    found, corrections = changes(rows, TABLE, prefer="priced")
    assert [one.was_microusd for one in corrections] == [None, 15]
    assert found == {
        "m": ModelChange("m", 3, 2, 1, 0, 1, 0, 35, 60),
        "gone": ModelChange("gone", 2, 0, 0, 2, 1, 1, 3, 3),
    }


def test_what_tells_no_tokens_is_in_the_table_and_keeps_having_no_cost() -> None:
    found, corrections = changes([untold(None)], TABLE, prefer="priced")
    assert corrections == []
    assert found == {"m": ModelChange("m", events=1, unpriced_before=1, unpriced_after=1)}


some = st.builds(
    costed, st.none() | st.integers(0, 9), tokens=st.integers(0, 4), model=st.sampled_from(("m", "n", "o"))
)


@given(st.lists(some, max_size=9), st.integers(0, 9))
def test_parts_add_up_and_corrections_that_were_not_made_leave_no_trace(rows: list[CostedEvent], cut: int) -> None:
    whole, corrections = changes(rows, TABLE, prefer="priced")
    parts = [changes(part, TABLE, prefer="priced")[0] for part in (rows[:cut], rows[cut:])]
    added = dict(parts[0])
    for name, change in parts[1].items():
        added[name] = added[name].plus(change) if name in added else change
    assert added == whole
    left_alone = changes(rows, PriceTable(), prefer="priced")[0]
    models = iter([row.event.model for row in rows if correction(row, TABLE, prefer="priced") is not None])
    for one in corrections:
        name = next(models)
        whole[name] = whole[name].plus(undone(one, name))
    for name, change in whole.items():
        assert (change.changed, change.first_priced) == (0, 0)
        assert change.after_microusd == change.before_microusd == left_alone[name].before_microusd
        assert change.unpriced_after == change.unpriced_before
