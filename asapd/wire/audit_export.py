"""Exports of the audit log: each format as bytes to begin with, bytes for some rows, and bytes to end with."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Protocol

import msgspec

from asapd.wire.usage_export import csv_cell, csv_records

COLUMNS = (
    "seq",
    "id",
    "timestamp",
    "event_type",
    "actor",
    "subject",
    "details",
    "salt",
    "payload_hash",
    "previous_hash",
    "hash",
)

Rows = list[dict[str, Any]]
_encode = msgspec.json.encode


class Format(Protocol):
    """Writes one export."""

    content_type: str

    def begin(self) -> bytes:
        """What stands before the first entry."""
        ...

    def rows(self, rows: Rows) -> bytes:
        """Some entries."""
        ...

    def end(self) -> bytes:
        """What stands behind the last entry."""
        ...


class Ndjson:
    """One entry a line, as `asapd verify` reads it."""

    content_type = "application/x-ndjson"

    def begin(self) -> bytes:
        """Nothing."""
        return b""

    def rows(self, rows: Rows) -> bytes:
        """A line for each."""
        return b"".join(_encode(row) + b"\n" for row in rows)

    def end(self) -> bytes:
        """Nothing."""
        return b""


class Json:
    """One document: `data`, one entry a line, then `count`; `asapd verify` reads it as well."""

    content_type = "application/json"

    def __init__(self) -> None:
        self._count = 0

    def begin(self) -> bytes:
        """The opening of the list."""
        return b'{"data":['

    def rows(self, rows: Rows) -> bytes:
        """Elements of the list."""
        written = b"".join((b",\n" if self._count + index else b"\n") + _encode(row) for index, row in enumerate(rows))
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
        """A record for each; details as JSON in one cell."""
        return csv_records([csv_cell(row[name]) for name in COLUMNS] for row in rows)

    def end(self) -> bytes:
        """Nothing."""
        return b""


_PRIORITY = 13 * 8 + 6
"""Facility `log audit`, severity informational."""

# The number is the one that RFC 5612 keeps for documentation: asapd has none of its own.
_ELEMENT = "asapd@32473"
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


class Syslog:
    """Lines of RFC 5424, one an entry: its fields as structured data, its details as the message."""

    content_type = "text/plain; charset=utf-8"

    def begin(self) -> bytes:
        """Nothing."""
        return b""

    def rows(self, rows: Rows) -> bytes:
        """A line for each."""
        return b"".join(_syslog_line(row) for row in rows)

    def end(self) -> bytes:
        """Nothing."""
        return b""


def _syslog_line(row: dict[str, Any]) -> bytes:
    names = ("seq", "id", "actor", "subject", "hash")
    fields = " ".join(f'{name}="{_parameter(row[name])}"' for name in names if row[name] is not None)
    # A message of UTF-8 would begin with a byte order mark; in ASCII none is needed.
    details = "" if row["details"] is None else " " + _ascii(_encode(row["details"]).decode())
    kind = row["event_type"][:32]
    return f"<{_PRIORITY}>1 {row['timestamp']} - asapd - {kind} [{_ELEMENT} {fields}]{details}\n".encode()


def _parameter(value: Any) -> str:
    """A value of structured data: characters with a meaning have a backslash, control characters are named."""
    text = re.sub(r'(["\\\]])', r"\\\1", str(value))
    return _CONTROL.sub(lambda found: f"\\\\u{ord(found[0]):04x}", text)


def _ascii(text: str) -> str:
    """JSON with everything beyond printable ASCII escaped, by UTF-16 code units as JSON has it."""
    if text.isascii() and "\x7f" not in text:
        return text
    units = ((sign,) if ord(sign) < 127 else [f"\\u{unit:04x}" for unit in _units(sign)] for sign in text)
    return "".join(part for parts in units for part in parts)


def _units(sign: str) -> tuple[int, ...]:
    raw = sign.encode("utf-16-be")
    return tuple(int.from_bytes(raw[at : at + 2], "big") for at in range(0, len(raw), 2))


FORMATS: dict[str, Callable[[], Format]] = {"json": Json, "ndjson": Ndjson, "csv": Csv, "syslog": Syslog}
"""Formats by name."""
