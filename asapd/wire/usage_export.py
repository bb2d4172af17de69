"""Exports of usage: each format as bytes to begin with, bytes for some rows, and bytes to end with."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable
from datetime import datetime
from decimal import Decimal
from importlib import import_module
from typing import Any, Protocol

import msgspec

COLUMNS = (
    "seq",
    "id",
    "source",
    "source_seq",
    "task_id",
    "agent_id",
    "consumer_id",
    "tokens_in",
    "tokens_out",
    "duration_ms",
    "api_calls",
    "cached_tokens_in",
    "cache_write_tokens",
    "reasoning_tokens",
    "timestamp",
    "outcome",
    "partial",
    "untimed",
    "error",
    "model",
    "provider",
    "project",
    "cost_usd",
    "cost_source",
    "reported_cost_usd",
    "price_version",
    "delegation",
    "reservation",
    "action",
    "flags",
    "parent_task_id",
    "labels",
    "trace_id",
    "recorded_at",
    "voids",
    "cache_write_1h_tokens",
    "reprices",
    "voided_by",
    "repriced_by",
)
"""What an export holds of a row, all of it as of the export's snapshot."""

Rows = list[dict[str, Any]]

_encoder = msgspec.json.Encoder(decimal_format="number")
# At the start of a cell a spreadsheet runs it. Where a semicolon separates cells, it and line ends start one as well,
# quoted or not; signs of full width are signs in some languages.
_FORMULA = re.compile(r'(^|[;\t\r\n])(?="*[-=+@|%\t\r\n\uFF0B\uFF0D\uFF1D\uFF20])')
_INTEGERS = frozenset(
    {
        "seq",
        "source_seq",
        "tokens_in",
        "tokens_out",
        "duration_ms",
        "api_calls",
        "cached_tokens_in",
        "cache_write_tokens",
        "reasoning_tokens",
        "cache_write_1h_tokens",
    }
)
_TIMES = frozenset({"timestamp", "recorded_at"})
_MONEY = frozenset({"cost_usd", "reported_cost_usd"})


class NotInstalledError(Exception):
    """Nobody's bug: the format needs a package that is not there. Install `asapd[parquet]`, or take another format."""


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


def _picked(row: dict[str, Any]) -> dict[str, Any]:
    return {name: row[name] for name in COLUMNS}


class Ndjson:
    """One JSON object a line."""

    content_type = "application/x-ndjson"

    def begin(self) -> bytes:
        """Nothing."""
        return b""

    def rows(self, rows: Rows) -> bytes:
        """A line for each."""
        return b"".join(_encoder.encode(_picked(row)) + b"\n" for row in rows)

    def end(self) -> bytes:
        """Nothing."""
        return b""


class Json:
    """One JSON document: `data`, one row a line, then `count`."""

    content_type = "application/json"

    def __init__(self) -> None:
        self._count = 0

    def begin(self) -> bytes:
        """The opening of the list."""
        return b'{"data":['

    def rows(self, rows: Rows) -> bytes:
        """Elements of the list."""
        written = b"".join(
            (b",\n" if self._count + index else b"\n") + _encoder.encode(_picked(row)) for index, row in enumerate(rows)
        )
        self._count += len(rows)
        return written

    def end(self) -> bytes:
        """The count, which only a whole export has."""
        return b'\n],"count":%d,"next_cursor":null}\n' % self._count


class Csv:
    """RFC 4180 with a header; what a spreadsheet would take for a formula has an apostrophe before it."""

    content_type = "text/csv; charset=utf-8"

    def begin(self) -> bytes:
        """The header."""
        return csv_records([COLUMNS])

    def rows(self, rows: Rows) -> bytes:
        """A record for each."""
        return csv_records([csv_cell(row[name]) for name in COLUMNS] for row in rows)

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


class Parquet:
    """Apache Parquet, a row group for each call of `rows`; money as decimal(18, 6), times in UTC microseconds."""

    content_type = "application/vnd.apache.parquet"

    def __init__(self) -> None:
        try:
            self._arrow: Any = import_module("pyarrow")
            parquet: Any = import_module("pyarrow.parquet")
        except ImportError:
            raise NotInstalledError("Parquet needs pyarrow: pip install 'asapd[parquet]', or take ndjson") from None
        self._schema = self._arrow.schema([(name, self._type(name)) for name in COLUMNS])
        self._sink = _Sink()
        self._writer = parquet.ParquetWriter(self._sink, self._schema)

    def _type(self, name: str) -> Any:
        arrow = self._arrow
        if name in _INTEGERS:
            return arrow.int64()
        if name in _TIMES:
            return arrow.timestamp("us", tz="UTC")
        if name in _MONEY:
            return arrow.decimal128(18, 6)
        if name == "flags":
            return arrow.list_(arrow.string())
        return arrow.bool_() if name in {"partial", "untimed"} else arrow.string()

    def begin(self) -> bytes:
        """The magic number."""
        return self._sink.take()

    def rows(self, rows: Rows) -> bytes:
        """A row group."""
        if rows:
            columns = {name: [_arrow_value(name, row[name]) for row in rows] for name in COLUMNS}
            self._writer.write_table(self._arrow.table(columns, schema=self._schema))
        return self._sink.take()

    def end(self) -> bytes:
        """The footer, without which a reader takes none of it."""
        self._writer.close()
        return self._sink.take()


def _arrow_value(name: str, value: Any) -> Any:
    if value is None:
        return None
    if name in _TIMES:
        return datetime.fromisoformat(value)
    return _encoder.encode(value).decode() if name == "labels" else value


class _Sink(io.RawIOBase):
    """A file that is read while it is written: what was written since is taken out."""

    def __init__(self) -> None:
        super().__init__()
        self._parts: list[bytes] = []
        self._size = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        part = bytes(data)
        self._parts.append(part)
        self._size += len(part)
        return len(part)

    def tell(self) -> int:
        return self._size

    def take(self) -> bytes:
        taken = b"".join(self._parts)
        self._parts.clear()
        return taken


FORMATS: dict[str, Callable[[], Format]] = {"json": Json, "ndjson": Ndjson, "csv": Csv, "parquet": Parquet}
"""Formats by name; making one may raise `NotInstalledError`."""
