"""The auditor: remarks land in the log."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import apsw
import pytest
import trio
from trio.testing import MockClock

from asapd.actors.auditor import run_auditor
from asapd.actors.messages import AuditorMessage, Remark
from asapd.runtime.ask import HandlerFailed, ask
from asapd.runtime.clock import TrioClock
from asapd.store import verifying
from asapd.store.database import Database
from asapd.store.units.unit import RowWritten

Inline = tuple[Database, apsw.Connection]
Inbox = trio.MemorySendChannel[AuditorMessage]


@asynccontextmanager
async def running(inline: Inline) -> AsyncIterator[Inbox]:
    send, receive = trio.open_memory_channel[AuditorMessage](10)

    async def run(*, task_status: trio.TaskStatus[None]) -> None:
        await run_auditor(
            receive,
            database=inline[0],
            clock=TrioClock(1_800_000_000_000_000),
            beat=lambda: None,
            log=logging.getLogger("test.auditor"),
            task_status=task_status,
        )

    async with trio.open_nursery() as nursery:
        await nursery.start(run)
        yield send
        send.close()


async def remark(inbox: Inbox, number: int, details: object = None) -> RowWritten:
    entry = {"number": number} if details is None else {"details": details}
    outcome: RowWritten = await ask(
        inbox, lambda to: Remark("config.reloaded", "uid:0", f"s{number}", entry, to), deadline_s=5
    )
    return outcome


async def test_remarks_are_chained(inline_database: Inline, autojump_clock: MockClock) -> None:
    async with running(inline_database) as inbox:
        assert [(await remark(inbox, number)).seq for number in range(3)] == [1, 2, 3]
    found = verifying.report(inline_database[1], verifying.Request())
    assert (found.walk.verified, found.is_valid) == (3, True)


async def test_a_remark_that_cannot_be_written_fails_alone(
    inline_database: Inline, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    async with running(inline_database) as inbox:
        with pytest.raises(HandlerFailed):
            await remark(inbox, 1, object())
        assert "a Remark could not be handled" in caplog.text
        assert (await remark(inbox, 2)).seq == 1
