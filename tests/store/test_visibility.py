"""A caller's patterns mean in SQL what they mean in Python."""

from __future__ import annotations

import apsw
from hypothesis import given
from hypothesis import strategies as st

from asapd.core.types import pattern_matches
from asapd.store.visibility import EVERYTHING, Visibility, visible_names, visible_text

texts = st.text("ab*?[]^-", min_size=1, max_size=4)


@given(patterns=st.lists(texts, min_size=1, max_size=3), name=texts)
def test_patterns_match_in_sql_as_in_python(patterns: list[str], name: str) -> None:
    where, values = visible_text(Visibility(None, tuple(patterns)), ("?1",))
    connection = apsw.Connection(":memory:")
    names = {f"v{index}": value for index, value in enumerate(values)}
    sql = " AND ".join(where).replace("?1", ":name") if where else "1"
    for key in names:
        sql = sql.replace("GLOB ?", f"GLOB :{key}", 1)
    found = connection.execute(f"SELECT {sql}", names | {"name": name}).get
    assert bool(found) == any(pattern_matches(pattern, name) for pattern in patterns)


def test_who_may_see_everything_is_not_narrowed() -> None:
    assert visible_names(EVERYTHING, ("agent",)) == visible_text(EVERYTHING, ("agent",)) == ([], [])
