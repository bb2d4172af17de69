from __future__ import annotations

import csv
import io
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asapd.wire.row_formats import Csv, csv_cell
from asapd.wire.usage_export import COLUMNS

SIGNS = "=+-@|%\t\r\n\uff0b\uff0d\uff1d\uff20"
NUMBERS: dict[str, Any] = {"seq": 1, "tokens_in": -5, "cost_usd": Decimal("-0.25")}
hostile = st.text(st.sampled_from(f"{SIGNS};,'\" aA1"), max_size=12) | st.text(max_size=12)


def written(text: str) -> str:
    """Two records with a text wherever one may be."""
    row = {name: NUMBERS.get(name, text) for name in COLUMNS} | {"labels": {text: text}, "flags": [text]}
    return Csv(COLUMNS).rows([row, row]).decode()


@given(hostile)
def test_no_cell_of_any_spreadsheet_begins_with_a_formula(text: str) -> None:
    table = written(text)
    for record in csv.reader(io.StringIO(table, newline="")):
        for name, cell in zip(COLUMNS, record, strict=True):
            assert name in NUMBERS or not cell.startswith(tuple(SIGNS)), (name, cell)
    # A spreadsheet that separates by semicolons sees quotes only where they begin one of its cells.
    for line in table.replace("\r", "\n").split("\n"):
        for cell in line.split(";"):
            assert not cell.lstrip('"').startswith(tuple(SIGNS)), cell


@given(hostile)
def test_a_text_comes_back_but_for_the_apostrophes(text: str) -> None:
    table = list(csv.reader(io.StringIO(written(text), newline="")))
    assert len(table) == 2
    assert table[0][COLUMNS.index("error")].replace("'", "") == text.replace("'", "")


@pytest.mark.parametrize(
    ("value", "cell"),
    [
        ("=1+1", "'=1+1"),
        ("x;=1", "x;'=1"),
        ('"=1"', '\'"=1"'),
        ("one\n- two", "one\n'- two"),
        ("a-b=c", "a-b=c"),
        (-5, "-5"),
        (Decimal("-0.000001"), "-0.000001"),
        (None, ""),
        (True, "true"),
        (["overrun", "=x"], "overrun =x"),
        ({"=a": "b"}, '{"=a":"b"}'),
    ],
)
def test_a_value_is_written_so_that_nothing_runs_it(value: Any, cell: str) -> None:
    assert csv_cell(value) == cell
