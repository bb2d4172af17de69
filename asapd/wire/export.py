"""Audit entries as they leave the daemon: rows of `GET /audit/logs`, in a JSON object, a JSON array or one a line."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from datetime import datetime
from itertools import chain
from typing import Any

from asapd.core.audit import Entry
from asapd.core.canonical import LARGEST_WRITTEN, CanonicalError, canonical
from asapd.core.types import MAX_INT, datetime_us, format_us
from asapd.wire.strict_json import TokenMalformed, parse_strict_json

_PAYLOAD = ("actor", "subject", "details", "salt")
_REQUIRED = frozenset({"id", "seq", "timestamp", "event_type", *_PAYLOAD, "payload_hash", "previous_hash", "hash"})
_MARKS = frozenset({"seq", "payload_hash", "previous_hash", "hash"})
_HEX = re.compile(r"(?:[0-9a-f]{2})*\Z")
_SALT_BYTES = 16
_HASH_BYTES = 32


class NotAnExportError(ValueError):
    """The text is something else; whoever chose the file has to choose another. The message says what it is."""


class BadEntryError(ValueError):
    """A row is not what the daemon wrote: it was changed or cut off. `seq` and `id` are None where unreadable."""

    def __init__(self, seq: int | None, entry_id: str | None, reason: str) -> None:
        super().__init__(reason)
        self.seq = seq
        self.id = entry_id
        self.reason = reason


def read_rows(lines: Iterable[bytes]) -> Iterator[Any]:
    """The rows of an export, unread. Of one entry a line, a line at a time is held; JSON is held as a whole.

    Duplicate keys are refused, because readers disagree about which one counts.

    Raises:
        NotAnExportError: before the first row.
        BadEntryError: a later line is not JSON.
    """
    rest = iter(lines)
    first = next((line for line in rest if line.strip()), None)
    if first is None:
        raise NotAnExportError("is empty")
    head = _parsed_or_none(first)
    if _is_entry(head):
        yield head
        for number, line in enumerate(rest, 2):
            if line.strip():
                try:
                    yield parse_strict_json(line)
                except TokenMalformed as error:
                    raise BadEntryError(None, None, f"entry {number} of the file {error.reason}") from None
        return
    try:
        document = parse_strict_json(b"".join(chain([first], rest)))
    except TokenMalformed as error:
        raise NotAnExportError(error.reason) from None
    rows = document.get("data") if isinstance(document, dict) else document
    if _is_entry(document):
        rows = [document]
    if not isinstance(rows, list) or not (rows == [] or _is_entry(rows[0])):
        raise NotAnExportError("holds no audit entries")
    yield from rows


def read_entry(row: Any) -> Entry:
    """An entry from a row; its hashes are not checked here. Fields that are not an entry's are left alone.

    Raises:
        BadEntryError: the row cannot be one that the daemon wrote.
    """
    seq = row.get("seq") if isinstance(row, dict) else None
    entry_id = row.get("id") if isinstance(row, dict) else None
    seq = seq if isinstance(seq, int) and not isinstance(seq, bool) and abs(seq) <= MAX_INT else None
    entry_id = entry_id if isinstance(entry_id, str) else None

    def bad(reason: str) -> BadEntryError:
        return BadEntryError(seq, entry_id, reason)

    if not isinstance(row, dict):
        raise bad("is not an object")
    if missing := sorted(_REQUIRED - row.keys()):
        raise bad(f"{missing[0]} is missing")
    if seq is None:
        raise bad("seq is not a whole number")
    texts = {name: row[name] for name in ("id", "event_type", "timestamp")}
    for name, value in texts.items():
        if not isinstance(value, str):
            raise bad(f"{name} is not text")
    for name in ("actor", "subject"):
        if not isinstance(row[name], str | None):
            raise bad(f"{name} is not text")
    if not isinstance(row["details"], dict | None):
        raise bad("details is not an object")
    try:
        details = None if row["details"] is None else canonical(row["details"], largest=LARGEST_WRITTEN)
        actor, subject = (None if row[name] is None else row[name].encode() for name in ("actor", "subject"))
        for value in texts.values():
            value.encode()
    except (CanonicalError, TypeError, UnicodeEncodeError) as error:
        raise bad(f"payload has no canonical form: {error}") from None
    hashes = {name: _bytes_of(row[name], _HASH_BYTES) for name in ("payload_hash", "previous_hash", "hash")}
    for name, digest in hashes.items():
        if digest is None:
            raise bad(f"{name} is not {_HASH_BYTES} bytes in hex")
    salt = None if row["salt"] is None else _bytes_of(row["salt"], _SALT_BYTES)
    if salt is None and row["salt"] is not None:
        raise bad(f"salt is not {_SALT_BYTES} bytes in hex")
    timestamp_us = _time_us(texts["timestamp"])
    if timestamp_us is None:
        raise bad("timestamp is not in the form 2026-11-20T09:00:01.123456Z")
    return Entry(
        seq,
        texts["id"],
        timestamp_us,
        texts["event_type"],
        actor,
        subject,
        details,
        salt,
        hashes["payload_hash"] or b"",
        hashes["previous_hash"] or b"",
        hashes["hash"] or b"",
    )


def _is_entry(value: Any) -> bool:
    return isinstance(value, dict) and value.keys() >= _MARKS


def _parsed_or_none(line: bytes) -> Any:
    try:
        return parse_strict_json(line)
    except TokenMalformed:
        return None


def _bytes_of(value: Any, length: int) -> bytes | None:
    if not isinstance(value, str) or _HEX.match(value) is None or len(value) != 2 * length:
        return None
    return bytes.fromhex(value)


def _time_us(text: str) -> int | None:
    try:
        time_us = datetime_us(datetime.fromisoformat(text))
    except (ValueError, OverflowError):
        return None
    return time_us if format_us(time_us) == text else None
