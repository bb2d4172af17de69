"""Units of promises and of the time that does not count towards them."""

from __future__ import annotations

from typing import Any

import msgspec

from asapd.core.errors import Refusal
from asapd.store.units.unit import RowWritten, Unit


class Maintenance(msgspec.Struct, frozen=True, tag=True):
    """Time that does not count, of an agent or with None of all; `ended_us` when it was ended before `end_us`."""

    id: str
    agent: str | None
    start_us: int
    end_us: int
    reason: str
    declared_us: int
    declared_by: str
    ended_us: int | None = None
    ended_by: str | None = None


class DeclareMaintenance(Unit[Maintenance | Refusal], frozen=True):
    """Take a stretch of time out of an agent's figures, or with None of everybody's."""

    agent: str | None
    start_us: int
    end_us: int
    reason: str
    actor: str
    now_us: int


class EndMaintenance(Unit[Maintenance | Refusal], frozen=True):
    """End a maintenance window now, or call it off."""

    id: str
    actor: str
    now_us: int


class KeepAlive(Unit[RowWritten], frozen=True):
    """A sign that the daemon was running."""

    now_us: int


class RecordBlind(Unit[RowWritten], frozen=True):
    """The daemon did not look in a stretch of time; `cause` is `stopped`, `held_up` or `clock_set`."""

    start_us: int
    end_us: int
    cause: str


class UndoJump(Unit[RowWritten], frozen=True):
    """The clock was put from `before_us` forward to `after_us` by mistake, and is back since.

    What was written of uptime at times from `after_us` on goes, and from `before_us` to `now_us` nobody looked.
    """

    before_us: int
    after_us: int
    now_us: int


class BreachHold(msgspec.Struct, frozen=True):
    """Since when a term is `pending` or `resolving`; with `phase` None it is neither any more."""

    agent: str
    breach_type: str
    phase: str | None
    since_us: int = 0
    threshold: str | None = None


class KeepHolds(Unit[RowWritten], frozen=True):
    """Remember the holds that began, and forget those that ended."""

    holds: list[BreachHold]


class PromiseRecord(msgspec.Struct, frozen=True):
    """What an agent is held to from a time on, in the form of a manifest's SLA block; `source` None is nothing."""

    agent: str
    tenant: str
    since_us: int
    source: str | None
    sla: dict[str, Any] | None
    manifest_digest: str | None = None
    error: str | None = None


class RecordPromises(Unit[RowWritten], frozen=True):
    """Remember what agents are held to from now on."""

    promises: list[PromiseRecord]


class CreditTerms(msgspec.Struct, frozen=True):
    """What is given back from a time on: pairs of percentages, below which availability and what share of the cost."""

    since_us: int
    tiers: list[tuple[str, str]]


class RecordCredits(Unit[RowWritten], frozen=True):
    """Remember what is given back from now on."""

    terms: CreditTerms
