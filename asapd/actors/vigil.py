"""The vigil: notices when the daemon itself did not look, so that such time is never held against an agent."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable

import trio

from asapd.core.errors import Refusal
from asapd.core.types import DAY_US, SECOND_US
from asapd.runtime.clock import Clock
from asapd.store import watching
from asapd.store.database import Database, UnitFailedError
from asapd.store.units.promises import KeepAlive, RecordBlind, UndoJump

TICK_S = 1.0
LATE_US = 2 * SECOND_US
"""A tick so late means that probes were held up as well: less than half of the default timeout of one."""
ALIVE_EVERY = 10
"""Ticks between two signs of life: what a killed daemon loses is at most so many seconds of known uptime."""
STOPPED_US = 5 * SECOND_US
"""A restart that takes less has missed no probe."""


async def notice_stop(database: Database, clock: Clock, log: logging.Logger) -> None:
    """Record how long the daemon was not running; to be called once, before anything is judged."""
    alive_us, now_us = await database.read(watching.last_alive), clock.now_us()
    if alive_us is not None and now_us - alive_us > STOPPED_US:
        log.info("nobody looked for %d s before this start: that time is unknown", (now_us - alive_us) // SECOND_US)
        await _submit(database, RecordBlind(alive_us, now_us, "stopped"))
    else:
        await _submit(database, KeepAlive(now_us))


async def keep_vigil(
    database: Database,
    clock: Clock,
    *,
    noticed: Callable[[], Awaitable[None]],
    undone: Callable[[], Awaitable[None]],
    log: logging.Logger,
) -> None:
    """Watch the clock until cancelled.

    `noticed` is awaited after a stretch of blindness was recorded, `undone` after what probes said while the clock was
    ahead was taken back.
    """
    wall_us, mono_s = clock.now_us(), clock.monotonic_s()
    missed: list[RecordBlind] = []
    jumps: list[RecordBlind] = []
    ticks = 0
    while True:
        await trio.sleep(TICK_S)
        now_us, now_s = clock.now_us(), clock.monotonic_s()
        elapsed_us = round((now_s - mono_s) * SECOND_US)
        if elapsed_us > TICK_S * SECOND_US + LATE_US and now_us > wall_us:
            missed.append(RecordBlind(wall_us, now_us, "held_up"))
        elif now_us - wall_us - elapsed_us > LATE_US:
            # A host that slept, or whose clock was put forward.
            missed.append(RecordBlind(wall_us, now_us, "clock_set"))
            jumps.append(missed[-1])
            jumps = [jump for jump in jumps if now_us - jump.end_us < DAY_US] + missed[-1:]
        elif wrong := next((jump for jump in jumps if jump.start_us <= now_us < jump.end_us), None):
            if not await _submit(database, UndoJump(wrong.start_us, wrong.end_us, now_us)):
                continue
            log.warning("the clock was %.1f s ahead: what was seen by it is taken back", (wall_us - now_us) / 1e6)
            jumps.remove(wrong)
            missed.clear()
            await undone()
        wall_us, mono_s = now_us, now_s
        ticks += 1
        if missed:
            log.warning("nobody looked for %.1f s: that time is unknown", (missed[0].end_us - missed[0].start_us) / 1e6)
            if await _submit(database, missed[0]):
                missed.pop(0)
                await noticed()
        elif ticks % ALIVE_EVERY == 0:
            await _submit(database, KeepAlive(now_us))


async def last_sign(database: Database, clock: Clock) -> None:
    """Say when the daemon stopped in good order."""
    with trio.move_on_after(1):
        await _submit(database, KeepAlive(clock.now_us()))


async def _submit(database: Database, unit: KeepAlive | RecordBlind | UndoJump) -> bool:
    try:
        return not isinstance(await database.submit(unit, urgent=True), Refusal)
    except UnitFailedError:
        return False
