"""The notifier and its subscribers over a real store, in virtual time."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import apsw
import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import MockClock, wait_all_tasks_blocked

from asapd.actors import notifier
from asapd.actors.notifier import Gap, Subscription, run_notifier
from asapd.core.types import HOUR_US, SECOND_US
from asapd.runtime.fanout import Feed, FeedClosed, Wakeup
from asapd.store.breaches import Alert
from asapd.store.database import Database, InlineReaders, InlineRunner
from asapd.store.units.alerts import BreachRow, WriteBreach
from asapd.store.writer import Writer, open_for_writing

A, B = "urn:asap:agent:a", "urn:asap:agent:b"
T0 = 1_800_000_000 * SECOND_US
log = logging.getLogger("test.notifier")


@dataclass
class Host:
    """A store, and breaches to write into it."""

    connection: apsw.Connection
    database: Database
    committed: Wakeup
    written: int = 0

    async def breach(self, event: str = "opened", agent: str | None = None, number: int | None = None) -> None:
        """Write a transition of a breach that is this event's own, or of a `number` given before."""
        self.written += 1
        state = "resolved" if event == "resolved" else "open"
        row = BreachRow(
            f"brc_{number or self.written}",
            agent or f"urn:asap:agent:{number or self.written}",
            "latency",
            HOUR_US,
            "500ms",
            500.0,
            "900ms",
            900.0,
            "critical" if event == "escalated" else "warning",
            state,
            T0,
            20,
            "default",
            T0 if state == "resolved" else None,
        )
        await self.database.submit(WriteBreach(event, row, T0), urgent=True)

    def retire(self, through_seq: int) -> None:
        """Drop the oldest transitions, as retention does."""
        self.connection.execute("UPDATE retention_gate SET open = 1")
        self.connection.execute("DELETE FROM alert WHERE seq <= ?", (through_seq,))
        self.connection.execute("UPDATE retention_gate SET open = 0")


def opened(path: Path) -> Host:
    connection = open_for_writing(path, synchronous="off")
    committed = Wakeup()
    return Host(
        connection,
        Database(InlineRunner(Writer(connection), lambda _: committed.notify()), InlineReaders(connection)),
        committed,
    )


@pytest.fixture(name="host")
def open_host(tmp_path: Path) -> Iterator[Host]:
    host = opened(tmp_path / "asapd.db")
    yield host
    host.connection.close()


@asynccontextmanager
async def notifying(host: Host, feed: Feed[Alert], beat: Callable[[], None] = lambda: None) -> AsyncIterator[None]:
    async with trio.open_nursery() as nursery:
        run = partial(run_notifier, database=host.database, feed=feed, committed=host.committed, beat=beat, log=log)
        await nursery.start(run)
        yield
        nursery.cancel_scope.cancel()


def published(feed: Feed[Alert]) -> list[int]:
    held = feed.after(0)
    assert held is not None
    return [alert.seq for _, alert in held]


def everything(alert: Alert) -> bool:
    return True


def shown(found: list[Alert | Gap]) -> list[int | tuple[int, int]]:
    return [item.seq if isinstance(item, Alert) else (item.first_missing, item.last_missing) for item in found]


# --- publishing


async def test_each_transition_is_published_once_and_in_order(autojump_clock: MockClock, host: Host) -> None:
    feed = Feed[Alert](100)
    await host.breach()
    async with notifying(host, feed):
        assert published(feed) == [1]
        for _ in range(3):
            await host.breach()
        await wait_all_tasks_blocked()
        assert published(feed) == [1, 2, 3, 4]


async def test_an_incarnation_goes_on_where_the_last_one_was(
    autojump_clock: MockClock, host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notifier, "PAGE", 2)
    for _ in range(3):
        await host.breach()
    feed = Feed[Alert](100, last=3)
    async with notifying(host, feed):
        await host.breach()
        await wait_all_tasks_blocked()
    for _ in range(5):
        await host.breach()
    async with notifying(host, feed):
        held = feed.after(3)
        assert held is not None
        assert [seq for seq, _ in held] == [4, 5, 6, 7, 8, 9]


async def test_the_log_tells_what_broke_and_what_recovered(
    autojump_clock: MockClock, host: Host, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, log.name)
    async with notifying(host, Feed[Alert](100)):
        await host.breach("opened", A, 1)
        await host.breach("escalated", A, 1)
        await host.breach("resolved", A, 1)
        await wait_all_tasks_blocked()
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("WARNING", f"latency breach of {A} opened: promised 500ms, actual 900ms (alert 1, warning)"),
        ("WARNING", f"latency breach of {A} escalated: promised 500ms, actual 900ms (alert 2, critical)"),
        ("INFO", f"latency breach of {A} resolved: promised 500ms, actual 900ms (alert 3, warning)"),
    ]


async def test_the_notifier_beats_while_nothing_happens(autojump_clock: MockClock, host: Host) -> None:
    beats: list[float] = []
    async with notifying(host, Feed[Alert](1), lambda: beats.append(trio.current_time())):
        await trio.sleep(10)
    assert len(beats) >= 10


# --- following


async def test_without_resuming_only_what_comes_next_is_heard(autojump_clock: MockClock, host: Host) -> None:
    feed = Feed[Alert](100)
    await host.breach()
    async with notifying(host, feed):
        subscription = Subscription(host.database, feed, wanted=everything)
        assert subscription.cursor == 1
        await host.breach()
        assert shown(await subscription.next_alerts()) == [2]
        assert subscription.cursor == 2
        with trio.move_on_after(5) as patience:
            await subscription.next_alerts()
        assert patience.cancelled_caught


@pytest.mark.parametrize("capacity", [2, 100], ids=["from the store", "from memory"])
async def test_resuming_replays_all_that_is_later_once_and_in_order(
    autojump_clock: MockClock, host: Host, monkeypatch: pytest.MonkeyPatch, capacity: int
) -> None:
    monkeypatch.setattr(notifier, "PAGE", 3)
    feed = Feed[Alert](capacity)
    async with notifying(host, feed):
        for _ in range(10):
            await host.breach()
        await wait_all_tasks_blocked()
        subscription = Subscription(host.database, feed, wanted=everything, resume_after=1)
        heard: list[int | tuple[int, int]] = []
        while len(heard) < 9:
            heard += shown(await subscription.next_alerts())
        await host.breach()
        heard += shown(await subscription.next_alerts())
        assert heard == [2, 3, 4, 5, 6, 7, 8, 9, 10, 11]


async def test_filters_leave_holes_and_are_waited_through(
    autojump_clock: MockClock, host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notifier, "PAGE", 2)
    feed = Feed[Alert](1)
    async with notifying(host, feed):
        await host.breach("opened", A, 1)
        for _ in range(6):
            await host.breach()
        await wait_all_tasks_blocked()
        subscription = Subscription(host.database, feed, wanted=lambda alert: alert.agent_id == A, resume_after=0)
        assert shown(await subscription.next_alerts()) == [1]
        with trio.move_on_after(1):
            await subscription.next_alerts()
        assert subscription.cursor == 7
        await host.breach("resolved", A, 1)
        assert shown(await subscription.next_alerts()) == [8]


async def test_what_is_no_longer_kept_is_told_as_a_gap(autojump_clock: MockClock, host: Host) -> None:
    for _ in range(6):
        await host.breach()
    host.retire(4)
    feed = Feed[Alert](100, last=6)
    subscription = Subscription(host.database, feed, wanted=everything, resume_after=1)
    assert shown(await subscription.next_alerts()) == [(2, 4), 5, 6]
    nothing_missed = Subscription(host.database, feed, wanted=everything, resume_after=4)
    assert shown(await nothing_missed.next_alerts()) == [5, 6]
    host.retire(6)
    all_missed = Subscription(host.database, feed, wanted=everything, resume_after=5)
    assert shown(await all_missed.next_alerts()) == [(6, 6)]


async def test_a_cursor_from_before_a_restore_does_not_hide_what_comes_now(
    autojump_clock: MockClock, host: Host
) -> None:
    await host.breach()
    feed = Feed[Alert](100)
    async with notifying(host, feed):
        subscription = Subscription(host.database, feed, wanted=everything, resume_after=50)
        with trio.move_on_after(1):
            await subscription.next_alerts()
        assert subscription.cursor == 1
        await host.breach()
        assert shown(await subscription.next_alerts()) == [2]


async def test_a_cursor_that_is_ahead_of_the_notifier_alone_is_kept(autojump_clock: MockClock, host: Host) -> None:
    feed = Feed[Alert](100)
    for _ in range(2):
        await host.breach()
    subscription = Subscription(host.database, feed, wanted=everything, resume_after=2)
    with trio.move_on_after(1):
        await subscription.next_alerts()
    async with notifying(host, feed):
        await host.breach()
        assert shown(await subscription.next_alerts()) == [3]


async def test_at_shutdown_the_rest_is_handed_out_and_then_the_feed_ends(autojump_clock: MockClock, host: Host) -> None:
    feed = Feed[Alert](100)
    async with notifying(host, feed):
        subscription = Subscription(host.database, feed, wanted=everything)
        await host.breach()
        await wait_all_tasks_blocked()
        feed.close()
        assert shown(await subscription.next_alerts()) == [1]
        with pytest.raises(FeedClosed):
            await subscription.next_alerts()


async def test_a_cancelled_wait_loses_nothing(autojump_clock: MockClock, host: Host) -> None:
    feed = Feed[Alert](1)
    async with notifying(host, feed):
        subscription = Subscription(host.database, feed, wanted=everything, resume_after=0)
        for _ in range(4):
            await host.breach()
        await wait_all_tasks_blocked()
        heard: list[int | tuple[int, int]] = []
        checkpoints = 0
        while not heard:
            with trio.CancelScope() as scope:
                await cancel_after(checkpoints, scope, subscription, heard)
            checkpoints += 1
        assert heard == [1, 2, 3, 4]


async def cancel_after(
    checkpoints: int, scope: trio.CancelScope, subscription: Subscription, heard: list[int | tuple[int, int]]
) -> None:
    """Let a call to `next_alerts` pass so many turns of the loop before it is cancelled."""

    async def cut() -> None:
        for _ in range(checkpoints):
            await trio.lowlevel.checkpoint()
        scope.cancel()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(cut)
        heard += shown(await subscription.next_alerts())


@settings(max_examples=25, deadline=None)
@given(
    plan=st.lists(st.sampled_from(["write", "read", "restart"]), max_size=25),
    capacity=st.integers(1, 4),
    resume_after=st.integers(0, 3),
)
def test_a_subscriber_hears_every_number_once_however_slow_it_is(
    tmp_path_factory: pytest.TempPathFactory, plan: list[str], capacity: int, resume_after: int
) -> None:
    """Whatever is in memory, whatever restarts: the numbers heard are those behind the cursor, in order."""
    host = opened(tmp_path_factory.mktemp("store") / "asapd.db")

    async def main() -> None:
        for _ in range(3):
            await host.breach()
        feed = Feed[Alert](capacity, last=3)
        subscription = Subscription(host.database, feed, wanted=everything, resume_after=resume_after)
        heard: list[int | tuple[int, int]] = []
        rest = [*plan, "restart", "read"]
        while rest:
            async with notifying(host, feed):
                while rest and (step := rest.pop(0)) != "restart":
                    if step == "write":
                        await host.breach()
                        continue
                    with trio.move_on_after(1):
                        while True:
                            heard += shown(await subscription.next_alerts())
        assert heard == list(range(resume_after + 1, host.written + 1))

    try:
        trio.run(main, clock=MockClock(autojump_threshold=0))
    finally:
        host.connection.close()
