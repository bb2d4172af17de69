"""The janitor: small steps of housekeeping, each a unit of its own."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import trio

from asapd import config
from asapd.core.errors import Refusal
from asapd.core.types import DAY_US
from asapd.runtime.clock import Clock
from asapd.store.database import Database
from asapd.store.units import Sweep

IDEMPOTENCY_US = DAY_US
"""CONTRACT: an Idempotency-Key is kept for 24 hours."""

EVERY_S = 1.0
"""A lapsed reservation refuses nothing by itself for longer than this."""


@dataclass
class JanitorSettings:
    """What the janitor goes by; the daemon changes it at a reload."""

    retention: config.Retention


async def run_janitor(
    *,
    database: Database,
    clock: Clock,
    settings: JanitorSettings,
    beat: Callable[[], None],
    log: logging.Logger,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Sweep until cancelled."""
    task_status.started()
    while True:
        now_us = clock.now_us()
        unit = Sweep(now_us, now_us - settings.retention.probes_us, now_us - IDEMPOTENCY_US)
        swept = await database.submit(unit)
        beat()
        if isinstance(swept, Refusal):
            log.info("nothing was swept: %s", swept.detail)
        elif swept.reservations_expired:
            log.info("%d reservations expired", swept.reservations_expired)
        more = not isinstance(swept, Refusal) and swept.more
        await trio.sleep(0 if more else EVERY_S)
