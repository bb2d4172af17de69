"""Rows written out for others: each format as bytes to begin with, bytes for some rows, and bytes to end with."""

from __future__ import annotations

import codecs
import csv
import io
import re
from collections.abc import Sequence
from decimal import Decimal
from typing import Any, Protocol

import msgspec

Rows = list[dict[str, Any]]

_encoder = msgspec.json.Encoder(decimal_format="number")
# At the start of a cell a spreadsheet runs it. Where a semicolon separates cells, it and line ends start one as well,
# quoted or not; signs of full width are signs in some languages.
_FORMULA = re.compile(r'(^|[;\t\r\n])(?="*[-=+@|%\t\r\n\uFF0B\uFF0D\uFF1D\uFF20])')


class Format(Protocol):
    """Writes one export. `rows` may run in another thread than the rest, never beside it."""

    content_type: str

    def begin(self) -> bytes:
        """What stands before the first row."""
        ...

    def rows(self, rows: Rows) -> bytes:
        """Some rows."""
        ...

    def end(self) -> bytes:
        """What stands behind the last row."""
        ...


class Ndjson:
    """One JSON object a line, of these columns, or of all that a row has."""

    content_type = "application/x-ndjson"

    def __init__(self, columns: Sequence[str] | None = None) -> None:
        self._columns = columns

    def begin(self) -> bytes:
        """Nothing."""
        return b""

    def rows(self, rows: Rows) -> bytes:
        """A line for each."""
        return b"".join(_encoder.encode(_picked(row, self._columns)) + b"\n" for row in rows)

    def end(self) -> bytes:
        """Nothing."""
        return b""


class Json:
    """One JSON document: `data`, one row a line, then `count`."""

    content_type = "application/json"

    def __init__(self, columns: Sequence[str] | None = None) -> None:
        self._columns = columns
        self._count = 0

    def begin(self) -> bytes:
        """The opening of the list."""
        return b'{"data":['

    def rows(self, rows: Rows) -> bytes:
        """Elements of the list."""
        written = b"".join(
            (b",\n" if self._count + index else b"\n") + _encoder.encode(_picked(row, self._columns))
            for index, row in enumerate(rows)
        )
        self._count += len(rows)
        return written

    def end(self) -> bytes:
        """The count, which only a whole export has."""
        return b'\n],"count":%d,"next_cursor":null}\n' % self._count


class Csv:
    """RFC 4180; what a spreadsheet would take for a formula has an apostrophe before it.

    With a header, but where the records go on from some that were had before. Before it stands, with `bom`, the mark by
    which Excel knows UTF-8.
    """

    content_type = "text/csv; charset=utf-8"

    def __init__(self, columns: Sequence[str], *, goes_on: bool = False, bom: bool = False) -> None:
        self._columns = columns
        self._goes_on = goes_on
        self._mark = codecs.BOM_UTF8 if bom else b""

    def begin(self) -> bytes:
        """The header."""
        return b"" if self._goes_on else self._mark + csv_records([self._columns])

    def rows(self, rows: Rows) -> bytes:
        """A record for each; what has a structure as JSON in one cell."""
        return csv_records([csv_cell(row[name]) for name in self._columns] for row in rows)

    def end(self) -> bytes:
        """Nothing."""
        return b""


def csv_records(records: Any) -> bytes:
    """Records of RFC 4180."""
    out = io.StringIO(newline="")
    csv.writer(out, lineterminator="\r\n").writerows(records)
    return out.getvalue().encode()


def csv_cell(value: Any) -> str:
    """A value as a cell: numbers plain, nothing as nothing, text so that no spreadsheet runs it."""
    match value:
        case None:
            return ""
        case bool():
            return "true" if value else "false"
        case int() | float():
            return str(value)
        case Decimal():
            return format(value, "f")
        case list():
            text = " ".join(value)
        case dict():
            text = _encoder.encode(value).decode()
        case _:
            text = str(value)
    return _FORMULA.sub(r"\1'", text)


def _picked(row: dict[str, Any], columns: Sequence[str] | None) -> dict[str, Any]:
    return row if columns is None else {name: row[name] for name in columns}
