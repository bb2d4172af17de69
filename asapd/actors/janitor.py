"""The janitor: small steps of housekeeping, each a unit of its own."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import trio

from asapd import config
from asapd.actors.archivist import BREATH_S, Archivist
from asapd.actors.retirer import Retirer
from asapd.core.errors import Refusal
from asapd.core.types import DAY_US, HOUR_US, MINUTE_US
from asapd.runtime.clock import Clock
from asapd.store import alert_retention, audit_retention, retention, usage_days
from asapd.store.database import Database
from asapd.store.units.alerts import RetireAlerts
from asapd.store.units.delegations import RecoverReservations
from asapd.store.units.house import Sweep
from asapd.store.units.usage import AddUpDays

IDEMPOTENCY_US = DAY_US
"""An Idempotency-Key is kept for 24 hours."""

EVERY_S = 1.0
"""A lapsed reservation refuses nothing by itself for longer than this."""

TOLD_LATE_US = 5 * MINUTE_US
"""Between a start that is told late and its end: a spool sent again after an outage has both, but not at once."""

RETIRE_EVERY_S = 60.0
"""To events that are kept for days, and to days that are to be added up, a minute is nothing; a look each second is."""

SETTLED_US = HOUR_US
"""After its end a day is still reported of for a while; what comes once it is added up is written twice."""

APPLY_S = 20.0
"""How long one request applies retention before it answers that there is more."""


@dataclass
class JanitorSettings:
    """What the janitor goes by; the daemon changes it at a reload."""

    retention: config.Retention
    metering: config.Metering = field(default_factory=config.Metering)


def retired_before_us(settings: JanitorSettings, now_us: int) -> int:
    """Events from before this are due: whole hours, so that a sum over hours never needs a raw row that is gone.

    Never one that may still come again: its identity goes with it.
    """
    kept_us = max(settings.retention.usage_us, settings.metering.late_max_us)
    return (now_us - kept_us) // HOUR_US * HOUR_US


def audit_before_us(settings: JanitorSettings, now_us: int) -> int | None:
    """Entries from before this lose their content when somebody asks for it; None never."""
    kept_us = settings.retention.audit_us
    return None if kept_us is None else now_us - kept_us


async def run_janitor(
    *,
    database: Database,
    clock: Clock,
    settings: JanitorSettings,
    archivist: Archivist,
    retirer: Retirer,
    beat: Callable[[], None],
    log: logging.Logger,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Sweep until cancelled."""
    task_status.started()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_sweep, database, clock, settings, beat, log)
        nursery.start_soon(_retire, database, clock, settings, retirer, log)
        nursery.start_soon(_archive, archivist, clock, settings, log)
        nursery.start_soon(_add_up, database, clock, log)


async def recover_reservations(database: Database, clock: Clock) -> int | Refusal:
    """Close the reservations whose time came before this start; how many. To be called before anybody can ask."""
    total = 0
    while True:
        recovered = await database.submit(RecoverReservations(clock.now_us()), urgent=True)
        if isinstance(recovered, Refusal):
            return recovered
        total += recovered.reservations
        if not recovered.more:
            return total


async def _sweep(
    database: Database, clock: Clock, settings: JanitorSettings, beat: Callable[[], None], log: logging.Logger
) -> None:
    while True:
        now_us = clock.now_us()
        unit = Sweep(
            now_us,
            now_us - settings.retention.probes_us,
            now_us - IDEMPOTENCY_US,
            usage_before_us=now_us - settings.metering.late_max_us,
            tasks_before_us=now_us - settings.metering.task_timeout_us,
            task_grace_us=min(TOLD_LATE_US, settings.metering.task_timeout_us),
            revocations_before_us=now_us - settings.metering.clock_skew_max_us,
            # A few stretches a day: kept as long as what they are billed with.
            uptime_before_us=now_us - max(settings.retention.usage_us, settings.retention.probes_us),
        )
        swept = await database.submit(unit)
        beat()
        if isinstance(swept, Refusal):
            log.info("nothing was swept: %s", swept.detail)
        elif swept.reservations_expired:
            log.info("%d reservations expired", swept.reservations_expired)
        more = not isinstance(swept, Refusal) and swept.more
        await trio.sleep(0 if more else EVERY_S)


async def _retire(
    database: Database, clock: Clock, settings: JanitorSettings, retirer: Retirer, log: logging.Logger
) -> None:
    while True:
        done = await retirer.retire(partial(retired_before_us, settings), "asapd")
        if isinstance(done, Refusal):
            log.info("retention was not applied: %s", done.detail)
        elif done:
            log.info("retention took %d usage events", done)
        gone = await _retire_alerts(database, clock, settings, "asapd")
        if isinstance(gone, Refusal):
            log.info("retention was not applied to alerts: %s", gone.detail)
        elif gone:
            log.info("retention took %d alerts", gone)
        await trio.sleep(RETIRE_EVERY_S)


async def _archive(archivist: Archivist, clock: Clock, settings: JanitorSettings, log: logging.Logger) -> None:
    while True:
        before_us = audit_before_us(settings, clock.now_us())
        if before_us is not None:
            # By whole days: an archive a day, not one a minute.
            done = await archivist.retire(before_us // DAY_US * DAY_US, "asapd")
            if isinstance(done, Refusal):
                log.warning("the audit log was not retired: %s", done.detail)
            elif done.entries:
                log.info("retention took the content of %d audit entries", done.entries)
        await trio.sleep(RETIRE_EVERY_S)


async def _add_up(database: Database, clock: Clock, log: logging.Logger) -> None:
    """Add up the days that are over, step by step."""
    while True:
        before_us = clock.now_us() - SETTLED_US
        more = await database.read(usage_days.is_due, before_us)
        while more:
            done = await database.submit(AddUpDays(before_us))
            if isinstance(done, Refusal):
                log.info("days were not added up: %s", done.detail)
            more = not isinstance(done, Refusal) and done.more
            await trio.sleep(BREATH_S)
        await trio.sleep(RETIRE_EVERY_S)


async def _retire_alerts(database: Database, clock: Clock, settings: JanitorSettings, actor: str) -> int | Refusal:
    """Retire the alerts that are due and that every push target has come past; returns how many went."""
    total = 0
    while True:
        now_us = clock.now_us()
        before_us = now_us - settings.retention.alerts_us
        if not await database.read(alert_retention.is_due, before_us):
            return total
        done = await database.submit(RetireAlerts(before_us, actor, now_us))
        if isinstance(done, Refusal):
            return done
        total += done.rows
        if not done.more:
            return total
        await trio.sleep(BREATH_S)


async def apply_retention(
    database: Database,
    clock: Clock,
    settings: JanitorSettings,
    archivist: Archivist,
    retirer: Retirer,
    actor: str,
    dry_run: bool,
) -> dict[str, Any] | Refusal:
    """Apply retention now, or say what would go; `more` is true when it did not come to its end in time.

    Events of hours that keep them are not counted as going: as far as hours were looked at, which a dry run leaves to
    the janitor.
    """
    now_us = clock.now_us()
    before_us, entries_before_us = retired_before_us(settings, now_us), audit_before_us(settings, now_us)
    usage: dict[str, Any] = {}
    others = {
        "alerts": await database.read(alert_retention.due, now_us - settings.retention.alerts_us),
        "audit": (
            audit_retention.shown(None, {}) if entries_before_us is None else await archivist.due(entries_before_us)
        ),
    }

    async def count() -> None:
        usage.update(await database.read(retention.due, before_us, now_us - settings.retention.probes_us, retirer.kept))

    if dry_run:
        await count()
        return {"dry_run": True, **usage, **others, "more": False}
    # Counting is not in it: however long that takes, each request takes something away.
    until_s = trio.current_time() + APPLY_S
    retired: int | Refusal = 0
    with trio.move_on_at(until_s) as patience:
        retired = await retirer.retire(partial(retired_before_us, settings), actor, count)
        if not isinstance(retired, Refusal):
            retired = await _retire_alerts(database, clock, settings, actor)
    if isinstance(retired, Refusal):
        return retired
    if not usage:
        await count()
    more = patience.cancelled_caught
    if entries_before_us is not None and not more:
        archived = await archivist.retire(entries_before_us, actor, until_s)
        if isinstance(archived, Refusal):
            return archived
        more = archived.more
    # Probes go by the sweep of every second.
    return {"dry_run": False, **usage, **others, "more": more}
