"""Recorded rows that cannot be read any more: a changed byte may leave no text, no JSON, or a time that is none."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import apsw
import msgspec

from asapd.core.types import format_us
from asapd.store.rows import fetch

STEP = 2_000

TABLES: dict[str, dict[str, tuple[str, ...]]] = {
    "usage": {
        "usage": ("seq", "id", "task_id", "error", "delegation", "reservation", "action", "parent_task_id", "labels",
                  "trace_id", "reported_by"),
        "name": ("id", "name"),
    },
    "task": {"task": ("seq", "task_id", "state"), "name": ("id", "name")},
    "usage_identity": {"usage": ("seq", "id"), "name": ("id", "name")},
    "usage_task": {"usage": ("seq", "id", "task_id")},
    "usage_party": {"usage": ("seq", "id")},
    "usage_hour": {"name": ("id", "name")},
    "task_outcome": {"task_outcome": ("seq", "task_id"), "name": ("id", "name")},
    "credit_terms": {"credit_terms": ("seq", "tiers")},
    "audit_archive": {"audit_archive": ("first_seq", "file", "sha256")},
    "audit_witnessed": {"audit_witnessed": ("CAST(origin AS BLOB)", "origin")},
    "ledger": {
        "delegation": ("account", "id", "delegate"),
        "reservation": ("CAST(id AS BLOB)", "id", "task_id", "state", "reason", "action", "created_by", "tenant",
                        "delegate", "project", "consumer"),
    },
    "budget_period": {
        "budget": ("id", "name"),
        "budget_task": ("CAST(period || ' ' || task_id AS BLOB)", "task_id"),
        "reservation_budget": ("CAST(period || ' ' || reservation AS BLOB)", "reservation"),
    },
    "delegation": {"delegation": ("account", "id", "delegator", "delegate", "scopes", "expires_us")},
    "api_key": {"api_key": ("CAST(id AS BLOB)", "id", "name", "role", "agents", "tenant")},
    "agent": {"agent": ("CAST(id AS BLOB)", "id", "url", "tenant", "origin", "public_key", "tier", "sla", "health")},
    "agent_key": {"agent_key": ("CAST(agent AS BLOB)", "agent", "source", "state")},
    "agent_event": {"agent_event": ("seq", "agent", "tenant", "event", "actor", "old_state", "new_state", "reason",
                                    "details")},
    "manifest": {"manifest": ("seq", "agent", "digest", "verification", "sla", "sla_error", "public_key")},
    "promise": {"promise": ("seq", "agent", "tenant", "source", "sla", "manifest_digest", "error")},
    "maintenance": {"maintenance": ("CAST(id AS BLOB)", "id", "agent", "reason", "declared_by", "ended_by")},
    "silence": {
        "silence": ("CAST(id AS BLOB)", "id", "agent", "breach_type", "severity", "tenant", "author", "comment"),
    },
    "breach_ack": {"breach_ack": ("CAST(breach AS BLOB)", "breach", "actor", "comment")},
    "blind": {"blind": ("start_us", "cause")},
    "revocation": {"revocation": ("number", "issuer", "jti")},
    "breach": {"breach": ("CAST(id AS BLOB)", "id", "state", "severity"), "alert": ("seq", "breach", "event")},
}  # fmt: skip
"""What a comparison with the log reads beside it: tables, the number of a row, and columns that can be unreadable."""


def _is_json(value: bytes | int) -> None:
    msgspec.json.decode(str(value) if isinstance(value, int) else value)


def _is_time(value: bytes | int) -> None:
    format_us(int(value))


def _is_text(value: bytes | int) -> None:
    if isinstance(value, bytes):
        value.decode()


_READERS: dict[str, tuple[Callable[[bytes | int], None], str]] = {
    "labels": (_is_json, "JSON"),
    "scopes": (_is_json, "JSON"),
    "agents": (_is_json, "JSON"),
    "sla": (_is_json, "JSON"),
    "expires_us": (_is_time, "a time"),
}


def unreadable(connection: apsw.Connection, compared: str) -> Iterator[str]:
    """The rows that a comparison cannot read, each with its table, its number and the column."""
    for table, (number, *columns) in TABLES[compared].items():
        # Text is taken as bytes; integers stay what they are.
        shown = ", ".join(
            f"CASE typeof({name}) WHEN 'text' THEN CAST({name} AS BLOB) ELSE {name} END" for name in columns
        )
        after = -(2**63)
        while rows := fetch(
            connection, f"SELECT {number}, {shown} FROM {table} WHERE {number} > ? ORDER BY {number} LIMIT ?",
            (after, STEP),
        ):  # fmt: skip
            for seq, *values in rows:
                for column, value in zip(columns, values, strict=True):
                    if value is not None and (wrong := _wrong(column, value)) is not None:
                        row = seq.decode(errors="replace") if isinstance(seq, bytes) else seq
                        yield f"{table} row {row}: {column} {wrong}"
            after = rows[-1][0]


def _wrong(column: str, value: bytes | int) -> str | None:
    read, form = _READERS.get(column, (_is_text, "UTF-8 text"))
    try:
        read(value)
    except (ValueError, OverflowError):  # what decodes JSON and text raises kinds of ValueError
        return f"is not {form} any more: the row was damaged or altered"
    return None
