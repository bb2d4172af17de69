"""What of a report can be worked out before its transaction: all that asks nothing of the database.

The writer does so for the next commit while the disk is at work on this one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import msgspec

from asapd.core.audit import Chained, Sealed, seal
from asapd.core.types import Outcome
from asapd.core.usage import FLAG_UNTIMED, Cost, UsageEvent, content_digest, identity_key
from asapd.store.rows import Row
from asapd.store.units.usage import RecordUsage

COLUMNS = (
    "seq",
    "id",
    "tenant",
    "source",
    "source_seq",
    "agent",
    "consumer",
    "task_id",
    "timestamp_us",
    "tokens_in",
    "tokens_out",
    "cached_tokens_in",
    "cache_write_tokens",
    "reasoning_tokens",
    "duration_ms",
    "api_calls",
    "outcome",
    "partial",
    "error",
    "model",
    "provider",
    "project",
    "cost_microusd",
    "cost_source",
    "priced_microusd",
    "reported_microusd",
    "price_version",
    "delegation",
    "reservation",
    "action",
    "flags",
    "parent_task_id",
    "labels",
    "trace_id",
    "content",
    "committed_us",
    "reported_by",
    "cache_write_1h_tokens",
)
"""What a row of usage is made of."""

_FOUND = ("seq", "id", "flags", "tenant", "source", "agent", "consumer", "model", "provider", "project")
"""What only the transaction knows of a row: it is bound first, and then what was prepared."""

_BOUND = (*_FOUND, *(column for column in COLUMNS if column not in _FOUND))

# The columns in their order, which a test holds: APSW looks at the whole text again for every row.
INSERT = f"INSERT INTO usage VALUES ({','.join(f'?{_BOUND.index(column) + 1}' for column in COLUMNS)})"
"""Takes what the transaction found and then what was prepared."""

RECORDED = "usage.recorded"
"""What an entry of an event is called."""

_NEVER_US = 2**63 - 1


class UsageNote(msgspec.Struct, frozen=True, gc=False):
    """What the audit log says of an event; its fields stand in the order of their names, so its JSON is canonical.

    What a cost has not (a source, a price) is not said: most events have no such thing, and each byte is hashed. Nor is
    an action, which is part of the content, but where it is that of a reservation.
    """

    action: str | msgspec.UnsetType
    agent: str
    api_calls: int
    consumer: str
    content: str
    cost_microusd: int | None
    cost_source: str | msgspec.UnsetType
    delegation: str | None
    duration_ms: int
    estimate_microusd: int | msgspec.UnsetType | None
    flags: int
    outcome: str
    price_version: str | msgspec.UnsetType
    priced_microusd: int | msgspec.UnsetType
    reservation: str | None
    row: int
    task_id: str
    tenant: str
    timestamp_us: int
    tokens_in: int
    tokens_out: int


_encoder = msgspec.json.Encoder()
_OUTCOMES = {outcome.value: outcome.name.lower() for outcome in Outcome}


class Supposed(NamedTuple):
    """What a report comes to if all its events are new, nothing is debited, and their rows begin with `first_row`."""

    first_row: int
    names_version: int
    rows: list[Row]
    """Of names that had these numbers in that version."""
    sealed: list[Sealed]
    """What their entries say."""
    entries: list[Chained]
    """The entries, behind the head that they are likely to have; none where nobody knows."""


class Prepared(NamedTuple):
    """What is known of a report before its transaction."""

    keys: list[bytes | None]
    """Of the identities of its events; None where the client gave no id."""
    contents: list[bytes]
    is_simple: bool
    """Whether each event has an id, and is under no delegation and no reservation."""
    oldest_us: int
    """The time of the oldest event; far ahead where there is none."""
    supposed: Supposed | None = None


def prepare(unit: RecordUsage) -> Prepared:
    """Work out what holds whatever the database has."""
    tenant, events = unit.tenant, unit.events
    keys = [identity_key(tenant, its.agent, its.source, its.id) if its.id else None for its in events]
    contents = unit.contents or [content_digest(event) for event in events]
    is_simple = unit.attribution is None and None not in keys
    if is_simple:
        for event in events:
            if event.delegation is not None or event.reservation is not None:
                is_simple = False
                break
    oldest_us = min([event.timestamp_us for event in events], default=_NEVER_US)
    return Prepared(keys, contents, is_simple, oldest_us)


def suppose(
    unit: RecordUsage,
    contents: list[bytes],
    first_row: int,
    names_version: int,
    number_of: Callable[[str], int | None],
    salts: bytes,
) -> Supposed | None:
    """Work out what a simple report comes to if all of it is new and its rows begin with one, as most often is so.

    There are 16 bytes of `salts` for each. None if a name has no number. The entries are not chained.
    """
    rows: list[Row] = []
    notes: list[UsageNote] = []
    tenant = number_of(unit.tenant)
    found: dict[tuple[str, ...], tuple[int | None, ...]] = {}
    seq = first_row
    for event, cost, content in zip(unit.events, unit.costs, contents, strict=True):
        called = (event.source, event.agent, event.consumer, event.model, event.provider, event.project)
        numbers = found.get(called)
        if numbers is None:
            numbers = found[called] = tuple(map(number_of, called))
        flags = FLAG_UNTIMED if event.duration_ms is None else 0
        rows.append(row_of(unit, (seq, event.id, flags, tenant, *numbers), event, cost, content))
        notes.append(note_of(unit.tenant, event, cost, content, flags, msgspec.UNSET, seq))
        seq += 1
    if tenant is None or any(None in numbers for numbers in found.values()):
        return None
    said = zip((event.id for event in unit.events), texts_of(notes), strict=True)
    return Supposed(first_row, names_version, rows, seal(unit.actor, said, salts), [])


def row_of(unit: RecordUsage, found: Row, event: UsageEvent, cost: Cost, content: bytes) -> Row:
    """The row of an event, of which the transaction `found` the beginning."""
    return found + (  # noqa: RUF005 -- a list on the way would cost as much again
        event.source_seq,
        event.task_id,
        event.timestamp_us,
        event.tokens_in,
        event.tokens_out,
        event.cached_tokens_in,
        event.cache_write_tokens,
        event.reasoning_tokens,
        event.duration_ms or 0,
        event.api_calls,
        event.outcome,
        event.partial,
        event.error,
        cost.microusd,
        cost.source,
        cost.priced_microusd,
        event.reported_microusd,
        cost.price_version,
        event.delegation,
        event.reservation,
        event.action,
        event.parent_task_id,
        None if event.labels is None else msgspec.json.encode(event.labels, order="sorted").decode(),
        event.trace_id,
        content,
        unit.now_us,
        unit.actor,
        event.cache_write_1h_tokens,
    )


def note_of(
    tenant: str,
    event: UsageEvent,
    cost: Cost,
    content: bytes,
    flags: int,
    estimated: int | msgspec.UnsetType | None,
    row: int,
) -> UsageNote:
    """What the audit log says of an event."""
    return UsageNote(
        event.action if event.is_action_assumed else msgspec.UNSET,
        event.agent,
        event.api_calls,
        event.consumer,
        content.hex(),
        cost.microusd,
        cost.source or msgspec.UNSET,
        event.delegation,
        event.duration_ms or 0,
        estimated,
        flags,
        _OUTCOMES[event.outcome],
        cost.price_version or msgspec.UNSET,
        msgspec.UNSET if cost.priced_microusd is None else cost.priced_microusd,
        event.reservation,
        row,
        event.task_id,
        tenant,
        event.timestamp_us,
        event.tokens_in,
        event.tokens_out,
    )


def texts_of(notes: list[UsageNote]) -> list[bytes]:
    """Notes as the details of entries."""
    return list(map(_encoder.encode, notes))  # sooner than all at once, in lines to be parted again
