"""The janitor: small steps of housekeeping, each a unit of its own."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import trio

from asapd import config
from asapd.actors.archivist import BREATH_S, Archivist
from asapd.actors.retired import Retired, Went, refused
from asapd.actors.retirer import Retirer
from asapd.actors.slow_reads import SLOW, TAKEN_ANYWAY, ReadTooLongError, refuse_slow
from asapd.core.errors import Refusal
from asapd.core.types import DAY_US, HOUR_US, MINUTE_US
from asapd.runtime.clock import Clock
from asapd.store import alert_retention, audit_retention, retention, usage_days
from asapd.store.database import Database
from asapd.store.units.alerts import RetireAlerts
from asapd.store.units.delegations import RecoverReservations
from asapd.store.units.house import Sweep
from asapd.store.units.unit import Taken
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
"""How long one request takes usage and alerts, and then entries, before it answers that there is more."""


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


async def recover_reservations(database: Database, clock: Clock, log: logging.Logger) -> int | Refusal:
    """Close the reservations whose time came before this start; how many. To be called before anybody can ask.

    With a full disk they wait for the sweep, which closes them once there is room: nobody can use what is past its
    time, and what is only read is there.
    """
    total = 0
    while True:
        recovered = await database.submit(RecoverReservations(clock.now_us()), urgent=True)
        if isinstance(recovered, Refusal) and recovered.code == "storage_full":
            log.warning("reservations from before are not closed yet, and hold what they held: %s", recovered.detail)
            return total
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
        elif done.taken.count:
            log.info("retention took %d usage events", done.taken.count)
        gone = await _retire_alerts(database, clock, settings, "asapd")
        if isinstance(gone, Refusal):
            log.info("retention was not applied to alerts: %s", gone.detail)
        elif gone.taken.count:
            log.info("retention took %d alerts", gone.taken.count)
        await trio.sleep(RETIRE_EVERY_S)


async def _archive(archivist: Archivist, clock: Clock, settings: JanitorSettings, log: logging.Logger) -> None:
    def before() -> int | None:
        # By whole days: an archive a day, not one a minute.
        before_us = audit_before_us(settings, clock.now_us())
        return None if before_us is None else before_us // DAY_US * DAY_US

    while True:
        done = await archivist.retire(before, "asapd")
        if isinstance(done, Refusal):
            log.warning("the audit log was not retired: %s", done.detail)
        elif done.taken.count:
            log.info("retention took the content of %d audit entries", done.taken.count)
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


async def _retire_alerts(
    database: Database, clock: Clock, settings: JanitorSettings, actor: str, until_s: float = math.inf
) -> Retired[int] | Refusal:
    """Retire the alerts that are due and that every push target has come past, at least a step of them."""
    went, more = Went("alerts"), True
    try:
        while True:
            now_us = clock.now_us()
            before_us = now_us - settings.retention.alerts_us
            if not more or not await database.read(alert_retention.is_due, before_us):
                return Retired(went.taken, before_us, more=False)
            if went.taken.count and trio.current_time() >= until_s:
                return Retired(went.taken, before_us, more=True)
            done = await database.submit(RetireAlerts(before_us, actor, now_us))
            if isinstance(done, Refusal):
                return went.refused(done)
            went.add(Taken(done.rows))
            more = done.more
            await trio.sleep(BREATH_S)
    except ReadTooLongError as error:
        return went.refused(refuse_slow(error, TAKEN_ANYWAY))


async def apply_retention(
    database: Database,
    clock: Clock,
    settings: JanitorSettings,
    archivist: Archivist,
    retirer: Retirer,
    log: logging.Logger,
    actor: str,
    dry_run: bool,
) -> dict[str, Any] | Refusal:
    """Apply retention now and say what this took, or what would go.

    `more` is true when it did not come to its end in time. However long it takes to look, each takes something away,
    but where the time went by waiting for the janitor, which takes it meanwhile.

    Events of hours that keep them are not counted as going: as far as hours were looked at, which a dry run leaves to
    the janitor.
    """
    done = await _apply(database, clock, settings, archivist, retirer, actor, dry_run)
    if isinstance(done, Refusal) and done.code == SLOW:
        log.warning("retention that was asked for: %s", done.detail)  # the janitor's own rounds say it themselves
    return done


async def _apply(
    database: Database,
    clock: Clock,
    settings: JanitorSettings,
    archivist: Archivist,
    retirer: Retirer,
    actor: str,
    dry_run: bool,
) -> dict[str, Any] | Refusal:
    now_us = clock.now_us()
    probes_before_us = now_us - settings.retention.probes_us  # these go by the sweep of every second
    if dry_run:
        entries_before_us = audit_before_us(settings, now_us)
        try:
            usage_due = await database.read(
                retention.due, retired_before_us(settings, now_us), probes_before_us, retirer.kept
            )
            alerts_due = await database.read(alert_retention.due, now_us - settings.retention.alerts_us)
            never = audit_retention.shown(None, Taken())
            audit_due = never if entries_before_us is None else await archivist.due(entries_before_us)
        except ReadTooLongError as error:
            return refuse_slow(error, TAKEN_ANYWAY)
        return {"dry_run": True, **usage_due, "alerts": alerts_due, "audit": audit_due, "more": False}
    started_s = trio.current_time()
    usage = await retirer.retire(partial(retired_before_us, settings), actor, APPLY_S)
    alerts = await _retire_alerts(database, clock, settings, actor, started_s + APPLY_S)

    def entries_before() -> int | None:
        return audit_before_us(settings, clock.now_us())

    audit: Retired[int | None] | Refusal = Retired(Taken(), entries_before(), more=False)
    if isinstance(usage, Refusal) or not usage.more:
        # In a time of its own: usage whose hours take long to look at would keep it from ever beginning.
        audit = await archivist.retire(entries_before, actor, trio.current_time() + APPLY_S)
    if isinstance(usage, Refusal) or isinstance(alerts, Refusal) or isinstance(audit, Refusal):
        parts = {"usage events": usage, "alerts": alerts, "audit entries": audit}
        no = next(part for part in parts.values() if isinstance(part, Refusal))
        return refused(no, {what: part.taken.count for what, part in parts.items() if isinstance(part, Retired)})
    try:
        went = await database.read(retention.told, usage.before_us, usage.taken, probes_before_us, retirer.kept)
    except ReadTooLongError as error:
        taken = {"usage events": usage.taken, "alerts": alerts.taken, "audit entries": audit.taken}
        return refused(refuse_slow(error, TAKEN_ANYWAY), {what: part.count for what, part in taken.items()})
    return {
        "dry_run": False,
        **went,
        "alerts": alert_retention.shown(alerts.before_us, alerts.taken.count),
        "audit": audit_retention.shown(audit.before_us, audit.taken),
        "more": usage.more or alerts.more or audit.more,
    }
