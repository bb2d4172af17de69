"""The auditor: remarks land in the log, and a walk finds what was tampered with."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import apsw
import pytest
import trio
from trio.testing import MockClock

from asapd.actors import auditor
from asapd.actors.auditor import run_auditor
from asapd.actors.messages import AuditorMessage, Remark, VerifyLog
from asapd.core.audit import Walk
from asapd.runtime.ask import HandlerFailed, ask
from asapd.runtime.clock import TrioClock
from asapd.store.database import Database
from asapd.store.units import RowWritten

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


async def walk(inbox: Inbox) -> Walk:
    found: Walk = await ask(inbox, VerifyLog, deadline_s=5)
    return found


async def test_remarks_are_chained_and_verified(inline_database: Inline, autojump_clock: MockClock) -> None:
    async with running(inline_database) as inbox:
        assert (await walk(inbox)).seq == 0
        assert [(await remark(inbox, number)).seq for number in range(3)] == [1, 2, 3]
        found = await walk(inbox)
        assert (found.seq, found.verified, found.fault) == (3, 3, None)


async def test_a_log_longer_than_a_step_is_walked_to_its_end(
    inline_database: Inline, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auditor, "STEP", 2)
    async with running(inline_database) as inbox:
        for number in range(4):
            await remark(inbox, number)
            assert (await walk(inbox)).seq == number + 1


async def test_a_walk_stops_at_the_first_entry_that_was_changed(
    inline_database: Inline, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auditor, "STEP", 2)
    _, connection = inline_database
    async with running(inline_database) as inbox:
        for number in range(5):
            await remark(inbox, number)
        triggers = [row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'")]
        for trigger in triggers:
            connection.execute(f"DROP TRIGGER {trigger}")
        connection.execute("UPDATE audit SET subject = 'other' WHERE seq = 3")
        found = await walk(inbox)
        assert found.fault is not None
        assert found.fault.seq == 3


async def test_a_remark_that_cannot_be_written_fails_alone(
    inline_database: Inline, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    async with running(inline_database) as inbox:
        with pytest.raises(HandlerFailed):
            await remark(inbox, 1, object())
        assert "a Remark could not be handled" in caplog.text
        assert (await remark(inbox, 2)).seq == 1
