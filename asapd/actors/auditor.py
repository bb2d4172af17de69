"""The auditor: remarks of the daemon about itself, and walks over the whole log."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import assert_never

import trio

from asapd.actors.messages import AuditorMessage, Remark, VerifyLog
from asapd.core.audit import Walk
from asapd.runtime import mailbox
from asapd.runtime.clock import Clock
from asapd.store import audit
from asapd.store.database import Database
from asapd.store.units import Note

# A step of a walk: some tens of milliseconds in a reader's thread, then everybody else has a turn.
STEP = 5_000


async def run_auditor(
    inbox: trio.MemoryReceiveChannel[AuditorMessage],
    *,
    database: Database,
    clock: Clock,
    beat: Callable[[], None],
    log: logging.Logger,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve until the mailbox is closed."""

    async def handle(message: AuditorMessage) -> None:
        match message:
            case Remark():
                note = Note(message.event_type, message.actor, message.subject, message.details, clock.now_us())
                message.reply.send(await database.submit(note, urgent=True))
            case VerifyLog():
                message.reply.send(await _verify(database, beat))
            case _:
                assert_never(message)

    def failed(message: AuditorMessage, error: Exception) -> None:
        log.error("a %s could not be handled", type(message).__name__, exc_info=error)

    async with inbox:
        task_status.started()
        await mailbox.serve(inbox, handle, failed=failed, concurrency=4, beat=beat)


async def _verify(database: Database, beat: Callable[[], None]) -> Walk:
    """Walk from the first entry to the one that is the newest when the walk gets there."""
    walk = Walk()
    while True:
        before = walk.seq
        walk = await database.read(audit.verify_step, walk, STEP)
        beat()
        if walk.fault is not None or walk.seq < before + STEP:
            return walk
