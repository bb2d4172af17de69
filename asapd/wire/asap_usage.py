"""Usage and service levels with exactly the members that the reference implementation writes."""

from __future__ import annotations

import csv
import io
from typing import Any, Final

import msgspec

from asapd.wire.row_formats import Rows, csv_cell

EVENT: Final = (
    "task_id",
    "agent_id",
    "consumer_id",
    "tokens_in",
    "tokens_out",
    "duration_ms",
    "api_calls",
    "timestamp",
)
SUMMARY: Final = (
    "total_tasks",
    "total_tokens",
    "total_duration_ms",
    "unique_agents",
    "unique_consumers",
    "total_api_calls",
)
_SUMS: Final = ("total_tokens", "total_duration_ms", "total_tasks", "total_api_calls")
GROUPS: Final = {
    "agent": ("agent_id", "period", *_SUMS, "avg_tokens_per_task", "avg_duration_ms_per_task"),
    "consumer": ("consumer_id", "period", *_SUMS, "avg_tokens_per_task"),
    "day": ("period", *_SUMS, "unique_agents", "unique_consumers"),
    "week": ("period", *_SUMS, "unique_agents", "unique_consumers"),
}
METRICS: Final = (
    "agent_id",
    "period_start",
    "period_end",
    "uptime_percent",
    "latency_p95_ms",
    "error_rate_percent",
    "tasks_completed",
    "tasks_failed",
)
BREACH: Final = (
    "id",
    "agent_id",
    "breach_type",
    "threshold",
    "actual",
    "severity",
    "detected_at",
    "resolved_at",
)
_encoder = msgspec.json.Encoder(decimal_format="number")


def picked(row: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """Some members of a row, in their order."""
    return {name: row[name] for name in names}


def event(row: dict[str, Any]) -> dict[str, Any]:
    """An event; where nobody knows how long it took, 0 stands, because these clients know nothing else."""
    return {**picked(row, EVENT), "duration_ms": row["duration_ms"] or 0}


class AsapJson:
    """`{"data": [...]}`."""

    content_type = "application/json"

    def __init__(self) -> None:
        self._is_first = True

    def begin(self) -> bytes:
        """The opening of the list."""
        return b'{"data":['

    def rows(self, rows: Rows) -> bytes:
        """Elements of the list."""
        elements = [_encoder.encode(event(row)) for row in rows]
        glue = b"" if self._is_first or not elements else b","
        self._is_first = self._is_first and not elements
        return glue + b",".join(elements)

    def end(self) -> bytes:
        """Its end."""
        return b"]}"


class AsapCsv:
    """Eight columns, times with their offset as `+00:00`."""

    content_type = "text/csv; charset=utf-8"

    def begin(self) -> bytes:
        """The names of the columns."""
        return ",".join(EVENT).encode() + b"\r\n"

    def rows(self, rows: Rows) -> bytes:
        """A line for each."""
        text = io.StringIO(newline="")
        writer = csv.writer(text)
        for row in rows:
            time = row["timestamp"].removesuffix("Z") + "+00:00"
            writer.writerow([*(csv_cell(value) for value in list(event(row).values())[:-1]), time])
        return text.getvalue().encode()

    def end(self) -> bytes:
        """Nothing."""
        return b""
