"""Exports of usage: each format as bytes to begin with, bytes for some rows, and bytes to end with."""

from __future__ import annotations

import io
from collections.abc import Callable
from datetime import datetime
from functools import partial
from importlib import import_module
from typing import Any

import msgspec

from asapd.wire.row_formats import Csv, Format, Json, Ndjson, Rows

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
    "priced_cost_usd",
)
"""What an export holds of a row, all of it as of its snapshot; a new column is the last, for who counts them."""

_encoder = msgspec.json.Encoder(decimal_format="number")
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
_MONEY = frozenset({"cost_usd", "reported_cost_usd", "priced_cost_usd"})


class NotInstalledError(Exception):
    """Nobody's bug: the format needs a package that is not there. Install `asapd[parquet]`, or take another format."""


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


FORMATS: dict[str, Callable[[], Format]] = {
    "json": partial(Json, COLUMNS),
    "ndjson": partial(Ndjson, COLUMNS),
    "csv": partial(Csv, COLUMNS),
    "parquet": Parquet,
}
"""Formats by name; making one may raise `NotInstalledError`."""
