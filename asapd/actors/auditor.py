"""The auditor: remarks of the daemon about itself."""

from __future__ import annotations

import logging
from collections.abc import Callable

import trio

from asapd.actors.messages import AuditorMessage
from asapd.runtime import mailbox
from asapd.runtime.clock import Clock
from asapd.store.database import Database
from asapd.store.units.house import Note


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
        note = Note(message.event_type, message.actor, message.subject, message.details, clock.now_us())
        message.reply.send(await database.submit(note, urgent=True))

    def failed(message: AuditorMessage, error: Exception) -> None:
        log.error("a %s could not be handled", type(message).__name__, exc_info=error)

    async with inbox:
        task_status.started()
        await mailbox.serve(inbox, handle, failed=failed, concurrency=4, beat=beat)
