"""Units of API keys and of the daemon's own affairs."""

from __future__ import annotations

from typing import Any

import msgspec

from asapd.core.errors import Refusal
from asapd.store.units.unit import RowWritten, Unit


class ApiKey(msgspec.Struct, frozen=True, tag=True):
    """An API key without its secret: `digest` is the SHA-256 of the secret part."""

    id: str
    name: str
    role: str
    agents: list[str]
    tenant: str | None
    may_sign: bool
    digest: bytes
    created_us: int
    revoked_us: int | None = None


class CreateKey(Unit[ApiKey | Refusal], frozen=True):
    """Store a new API key."""

    key: ApiKey
    actor: str
    now_us: int


class RevokeKey(Unit[ApiKey | Refusal], frozen=True):
    """Refuse a key from the next request on."""

    id: str
    actor: str
    now_us: int


class Note(Unit[RowWritten], frozen=True):
    """An audit entry about the daemon itself: started, configuration reloaded, ..."""

    event_type: str
    actor: str
    subject: str
    details: dict[str, Any]
    now_us: int


class SetMasks(Unit[RowWritten], frozen=True):
    """Mask what matches these patterns in the entries of units that come after this one."""

    patterns: list[str]


class Swept(msgspec.Struct, frozen=True, tag=True):
    """What a sweep did, and whether there is more of it to do."""

    reservations_expired: int
    rows_deleted: int
    more: bool
    tasks_abandoned: int = 0


class Sweep(Unit[Swept], frozen=True):
    """Expire lapsed reservations and drop what nothing needs any more, in a small bounded step.

    No usage from before `usage_before_us` can come any more. A task that began before `tasks_before_us` is overdue,
    `task_grace_us` after its start was recorded.
    Tokens that expired before `revocations_before_us` are refused for that alone. Uptime from before `uptime_before_us`
    is old.
    """

    now_us: int
    probes_before_us: int
    idempotency_before_us: int
    limit: int = 500
    usage_before_us: int = 0
    tasks_before_us: int = 0
    task_grace_us: int = 0
    revocations_before_us: int = 0
    uptime_before_us: int = 0
