"""The schema as an ordered list of scripts, one module a version. A version that was released is never edited."""

from __future__ import annotations

from asapd.store.schema import (
    agent_keys,
    alerts,
    arrival,
    credit_terms,
    days,
    days_by_hour,
    delivery,
    directory,
    erasing,
    horizon,
    identities,
    identity_order,
    namesakes,
    outcomes_unsaid,
    prices,
    promise_record,
    promises,
    refunds,
    reservations,
    retirement,
    revocations,
    sealing_times,
    seals,
    task_stretches,
    v1,
    v2,
)

MIGRATIONS: tuple[str, ...] = (
    v1.SCRIPT,
    v2.SCRIPT,
    arrival.SCRIPT,
    prices.SCRIPT,
    revocations.SCRIPT,
    agent_keys.SCRIPT,
    horizon.SCRIPT,
    identities.SCRIPT,
    directory.SCRIPT,
    delivery.SCRIPT,
    promises.SCRIPT,
    seals.SCRIPT,
    days.SCRIPT,
    refunds.SCRIPT,
    namesakes.SCRIPT,
    alerts.SCRIPT,
    promise_record.SCRIPT,
    retirement.SCRIPT,
    credit_terms.SCRIPT,
    days_by_hour.SCRIPT,
    reservations.SCRIPT,
    sealing_times.SCRIPT,
    outcomes_unsaid.SCRIPT,
    erasing.SCRIPT,
    identity_order.SCRIPT,
    task_stretches.SCRIPT,
)

COUNTED_SINCE = MIGRATIONS.index(erasing.SCRIPT) + 1
"""From this version on the log says what budgets counted; the upgrade to it enters what they had."""
