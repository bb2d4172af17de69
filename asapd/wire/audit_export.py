"""Exports of the audit log: each format as bytes to begin with, bytes for some rows, and bytes to end with."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import msgspec

from asapd.wire.row_formats import Csv, Format, Json, Ndjson, Rows

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
    details = "" if row["details"] is None else " " + _ascii(msgspec.json.encode(row["details"]).decode())
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


FORMATS: dict[str, Callable[[], Format]] = {
    "json": Json,
    "ndjson": Ndjson,
    "csv": partial(Csv, COLUMNS),
    "syslog": Syslog,
}
"""Formats by name; `asapd verify` reads the first two."""
