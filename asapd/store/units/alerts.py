"""Units of breaches and of the delivery of alerts."""

from __future__ import annotations

from typing import Any

import msgspec

from asapd.core.errors import Refusal
from asapd.store.units.unit import RowWritten, Unit


class BreachRow(msgspec.Struct, frozen=True):
    """A breach as users see it; thresholds and values both as the reference's text and as numbers.

    It is of an agent, or of a budget.
    """

    id: str
    agent_id: str | None
    breach_type: str
    window_us: int
    threshold: str
    threshold_value: float
    actual: str | None
    actual_value: float | None
    severity: str
    state: str
    detected_at_us: int
    samples: int
    tenant: str
    resolved_at_us: int | None = None
    resolve_reason: str | None = None
    evidence: dict[str, Any] = {}
    budget: str | None = None


class AlertWritten(msgspec.Struct, frozen=True, tag=True):
    """The number of a breach transition on this host; None when an equal transition was already there."""

    seq: int | None


class WriteBreach(Unit[AlertWritten], frozen=True):
    """One transition of a breach (`opened`, `escalated`, `resolved`), its alert and its audit entry."""

    event: str
    breach: BreachRow
    now_us: int


class CursorMoved(msgspec.Struct, frozen=True, tag=True):
    """Where a named cursor stands."""

    seq: int


class MoveCursor(Unit[CursorMoved | Refusal], frozen=True):
    """Acknowledge alerts up to `seq` under a name; with `is_open` only make the cursor, where there is none."""

    owner: str
    name: str
    seq: int
    is_open: bool
    now_us: int


class SyncTargets(Unit[RowWritten], frozen=True):
    """Keep a place for exactly these push targets."""

    names: list[str]


class MoveTarget(Unit[RowWritten], frozen=True):
    """A push target has come through `seq`; `error` is of the last attempt, `dead` are the numbers it gave up."""

    name: str
    seq: int
    now_us: int
    error: str | None = None
    dead: tuple[int, ...] = ()


class PassTarget(Unit[RowWritten], frozen=True):
    """A push target wants nothing up to `seq` that it has not taken."""

    name: str
    seq: int


class AlertsRetired(msgspec.Struct, frozen=True, tag=True):
    """Alerts that a step of retention took, and whether there may be more that are due."""

    rows: int
    more: bool


class RetireAlerts(Unit[AlertsRetired], frozen=True):
    """Drop at most `limit` of the oldest alerts from before `before_us` that every push target has come past."""

    before_us: int
    actor: str
    now_us: int
    limit: int = 500


class Redeliver(Unit[RowWritten | Refusal], frozen=True):
    """Have a dead letter delivered again."""

    id: int
    actor: str
    now_us: int


class EndRedelivery(Unit[RowWritten], frozen=True):
    """A dead letter was delivered, or met another error."""

    id: int
    error: str | None


class BreachAcked(msgspec.Struct, frozen=True, tag=True):
    """Who acknowledged a breach, as users see it; `created` is whether nobody had before."""

    acknowledged: dict[str, Any]
    created: bool


class AckBreach(Unit[BreachAcked | Refusal], frozen=True):
    """Acknowledge an open breach."""

    breach: str
    comment: str
    actor: str
    now_us: int


class Silence(msgspec.Struct, frozen=True, tag=True):
    """What is not pushed until `ends_us`; None in `agent`, `breach_type`, `severity` or `tenant` fits any."""

    id: str
    agent: str | None
    breach_type: str | None
    severity: str | None
    tenant: str | None
    created_us: int
    ends_us: int
    author: str
    comment: str


class AddSilence(Unit[Silence | Refusal], frozen=True):
    """Put a silence in force; its id and time of creation are given by the store."""

    silence: Silence
    actor: str
    now_us: int
    forget_before_us: int


class RemoveSilence(Unit[Silence | Refusal], frozen=True):
    """End a silence."""

    id: str
    actor: str
    now_us: int
