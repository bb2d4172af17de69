"""What entries of the log say of rows of usage."""

from __future__ import annotations

from typing import Any

import msgspec


class SaysInRow(msgspec.Struct, frozen=True):
    """What an entry says of a row of usage; what it does not say is UNSET."""

    row: int
    action: Any = msgspec.UNSET
    agent: Any = msgspec.UNSET
    api_calls: Any = msgspec.UNSET
    consumer: Any = msgspec.UNSET
    content: Any = msgspec.UNSET
    cost_microusd: Any = msgspec.UNSET
    cost_source: Any = msgspec.UNSET
    delegation: Any = msgspec.UNSET
    duration_ms: Any = msgspec.UNSET
    flags: Any = msgspec.UNSET
    outcome: Any = msgspec.UNSET
    price_version: Any = msgspec.UNSET
    priced_microusd: Any = msgspec.UNSET
    reservation: Any = msgspec.UNSET
    task_id: Any = msgspec.UNSET
    tenant: Any = msgspec.UNSET
    timestamp_us: Any = msgspec.UNSET
    tokens_in: Any = msgspec.UNSET
    tokens_out: Any = msgspec.UNSET


class Says(SaysInRow, frozen=True):
    """The same, and what is said of the row as a whole and of its companions in other tables."""

    row_digest: Any = msgspec.UNSET
    estimate_microusd: Any = msgspec.UNSET
    voids_row: Any = msgspec.UNSET
    reason: Any = msgspec.UNSET
    superseded: Any = msgspec.UNSET
    withheld: Any = msgspec.UNSET
    reprices_row: Any = msgspec.UNSET
    was_microusd: Any = msgspec.UNSET
    in_ledger: Any = msgspec.UNSET


read_says = msgspec.json.Decoder(Says).decode
"""What an entry says, from its details."""

FIELDS = SaysInRow.__struct_fields__[1:]
"""What is said of single columns."""


class UsageEntry(msgspec.Struct, frozen=True):
    """An entry about a row of usage."""

    seq: int
    kind: str
    subject: str
    actor: str
    timestamp_us: int
    says: Says
