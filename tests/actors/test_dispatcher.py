"""The dispatcher over a real store, in virtual time: every alert reaches every target, in order, whatever fails."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import apsw
import pytest
import trio
from trio.testing import MockClock

from asapd.actors.alert_desk import AlertDesk
from asapd.actors.dispatcher import GROUP_WAIT_S, Dispatch, Target, run_dispatcher
from asapd.actors.notifier import Subscription, run_notifier
from asapd.core.access import Caller
from asapd.core.errors import Refusal
from asapd.core.pushing import Failed
from asapd.core.types import HOUR_US, MINUTE_US, SECOND_US, Role
from asapd.runtime.clock import TrioClock
from asapd.runtime.fanout import Feed, Wakeup
from asapd.store.breaches import Alert, alert_bounds
from asapd.store.database import Database, InlineReaders, InlineRunner, Then
from asapd.store.units.alerts import BreachRow, MoveTarget, SyncTargets, WriteBreach
from asapd.store.units.exchange import Answer, AnyUnit
from asapd.store.writer import Writer, open_for_writing

T0 = 1_800_000_000 * SECOND_US
ALL = ("opened", "escalated", "resolved")
log = logging.getLogger("test.dispatcher")
ROOT = Caller("root", Role.ADMIN)


@dataclass
class Receiver:
    """A target that answers as told, and remembers what it took and when it was asked."""

    answer: Callable[[Sequence[Alert]], Failed | None] = lambda alerts: None
    taken: list[int] = field(default_factory=list)
    asked_at_s: list[float] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    takes_s: float = 0.0

    async def __call__(self, alerts: Sequence[Alert], now_us: int) -> Failed | None:
        self.asked_at_s.append(trio.current_time())
        await trio.sleep(self.takes_s)
        failed = self.answer(alerts)
        if failed is None:
            self.taken += [alert.seq for alert in alerts]
            self.sizes.append(len(alerts))
        return failed

    def target(self, name: str = "hook", **options: object) -> Target:
        settings: dict[str, object] = {"events": ALL, "min_severity": "warning", "retry_for_us": HOUR_US, **options}
        return Target(name, "webhook", send=self, **settings)  # type: ignore[arg-type]  # as the test says


def down(alerts: Sequence[Alert]) -> Failed:
    return Failed("refused: nobody there")


@dataclass
class Host:
    """A store, with what follows it while `running`."""

    connection: apsw.Connection
    database: Database
    committed: Wakeup
    dispatch: Dispatch
    written: int = 0
    feeds: list[Feed[Alert]] = field(default_factory=list)

    async def breach(self, event: str = "opened", *, severity: str = "warning", number: int | None = None) -> str:
        """Write a transition of a breach that is this event's own, or of a `number` given before."""
        self.written += number is None
        name = f"brc_{number or self.written}"
        state = "resolved" if event == "resolved" else "open"
        row = BreachRow(
            name,
            f"urn:asap:agent:{number or self.written}",
            "latency",
            HOUR_US,
            "500ms",
            500.0,
            "900ms",
            900.0,
            severity,
            state,
            T0,
            20,
            "default",
        )
        now_us = T0 + round(trio.current_time() * SECOND_US)
        assert not isinstance(await self.database.submit(WriteBreach(event, row, now_us)), Refusal)
        return name

    @property
    def desk(self) -> AlertDesk:
        """Who acknowledges, silences and delivers again."""
        clock = TrioClock(T0 + round(trio.current_time() * SECOND_US))
        return AlertDesk(self.database, clock, self.dispatch, lambda: alert_bounds(self.connection)[1])

    async def standing(self) -> dict[str, object]:
        """The only target, as users see it."""
        (one,) = await self.desk.targets()
        return one

    @asynccontextmanager
    async def running(self, *targets: Target) -> AsyncIterator[None]:
        """A notifier and a dispatcher, which are cancelled in the end as by a crash."""
        feed: Feed[Alert] = Feed(100, last=alert_bounds(self.connection)[1])
        self.feeds.append(feed)
        self.dispatch.replace(targets)
        clock = TrioClock(T0 + round(trio.current_time() * SECOND_US))
        async with trio.open_nursery() as nursery:
            await nursery.start(
                partial(
                    run_notifier,
                    database=self.database,
                    feed=feed,
                    committed=self.committed,
                    beat=lambda: None,
                    log=log,
                )
            )
            await nursery.start(
                partial(
                    run_dispatcher,
                    database=self.database,
                    clock=clock,
                    dispatch=self.dispatch,
                    subscribe=partial(Subscription, self.database, feed),
                    random=lambda: 1.0,
                    beat=lambda: None,
                    log=log,
                )
            )
            yield
            nursery.cancel_scope.cancel()


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    connection = open_for_writing(tmp_path / "asapd.db", synchronous="off")
    committed = Wakeup()
    runner = InlineRunner(Writer(connection), lambda _: committed.notify())
    yield Host(connection, Database(runner, InlineReaders(connection)), committed, Dispatch())
    connection.close()


async def test_what_happens_after_a_target_is_configured_is_pushed_in_order_and_once(
    host: Host, autojump_clock: MockClock
) -> None:
    await host.breach()
    receiver = Receiver()
    async with host.running(receiver.target()):
        for _ in range(3):
            await host.breach()
        await trio.sleep(1)
        assert receiver.taken == [2, 3, 4]
        standing = await host.standing()
        assert (standing["state"], standing["cursor"], standing["backlog"]) == ("ok", 4, 0)


async def test_a_crash_between_detection_and_delivery_loses_nothing(host: Host, autojump_clock: MockClock) -> None:
    stuck, receiver = Receiver(takes_s=1_000), Receiver()
    async with host.running(stuck.target()):
        for _ in range(3):
            await host.breach()
        await trio.sleep(1)
    assert stuck.taken == []
    await host.breach()
    async with host.running(receiver.target()):
        await trio.sleep(1)
    assert receiver.taken == [1, 2, 3, 4]
    async with host.running(receiver.target()):
        await trio.sleep(1)
    assert receiver.taken == [1, 2, 3, 4]


async def test_a_receiver_that_was_down_gets_all_in_order_and_is_asked_ever_more_rarely(
    host: Host, autojump_clock: MockClock
) -> None:
    receiver = Receiver(down)
    async with host.running(receiver.target()):
        for _ in range(5):
            await host.breach()
        await trio.sleep(600)
        waits = [b - a for a, b in zip(receiver.asked_at_s, receiver.asked_at_s[1:], strict=False)]
        assert waits[:7] == pytest.approx([1, 2, 4, 8, 16, 32, 60])
        assert all(wait == pytest.approx(60) for wait in waits[6:])
        standing = await host.standing()
        assert (standing["state"], standing["backlog"]) == ("failing", 5)
        assert standing["last_error"] == "refused: nobody there"
        receiver.answer = lambda alerts: None
        await trio.sleep(61)
        assert receiver.taken == [1, 2, 3, 4, 5]
        assert (await host.standing())["state"] == "ok"


async def test_a_flapping_receiver_gets_all_in_order(host: Host, autojump_clock: MockClock) -> None:
    receiver = Receiver()
    receiver.answer = lambda alerts: Failed("answered with status 500") if len(receiver.asked_at_s) % 3 else None
    async with host.running(receiver.target()):
        for _ in range(10):
            await host.breach()
        await trio.sleep(120)
    assert receiver.taken == list(range(1, 11))


async def test_a_target_that_fails_or_hangs_delays_no_other(host: Host, autojump_clock: MockClock) -> None:
    failing, hanging, well = Receiver(down), Receiver(takes_s=10_000), Receiver()
    targets = failing.target("failing"), hanging.target("hanging"), well.target("well")
    async with host.running(*targets):
        started_s = trio.current_time()
        for _ in range(5):
            await host.breach()
        await trio.sleep(0.5)
        assert well.taken == [1, 2, 3, 4, 5]
        assert trio.current_time() - started_s < 1
        shown = {one["name"]: one["backlog"] for one in await host.desk.targets()}
        assert shown == {"failing": 5, "hanging": 5, "well": 0}


async def test_what_is_not_taken_in_its_time_becomes_a_dead_letter_that_can_be_delivered_again(
    host: Host, autojump_clock: MockClock
) -> None:
    receiver = Receiver(down)
    async with host.running(receiver.target(retry_for_us=MINUTE_US)):
        await host.breach()
        await host.breach()
        await trio.sleep(300)
        letters = await host.desk.dead_letters(None, 10, None)
        assert sorted(one["seq"] for one in letters) == [1, 2]
        assert letters[0]["error"] == "refused: nobody there"
        assert (await host.standing())["backlog"] == 0
        # One attempt that fails leaves it dead; one that succeeds takes it from the list.
        oldest = min(letters, key=lambda one: one["seq"])
        for answer, left in ((down, 2), (lambda alerts: None, 1)):
            receiver.answer = answer
            assert not isinstance(await host.desk.redeliver(ROOT, oldest["id"]), Refusal)
            await trio.sleep(1)
            assert len(await host.desk.dead_letters("hook", 10, None)) == left
        assert receiver.taken == [1]
        assert (await host.desk.dead_letters("other", 10, None)) == []
        gone = await host.desk.redeliver(ROOT, oldest["id"])
        assert isinstance(gone, Refusal)
        assert gone.code == "dead_letter_not_found"
        await host.breach()
        await trio.sleep(1)
        assert receiver.taken == [1, 3]
    async with host.running():
        refused = await host.desk.redeliver(ROOT, letters[0]["id"])
        assert isinstance(refused, Refusal)
        assert refused.code == "target_gone"


async def test_a_message_that_is_refused_for_good_does_not_block_those_behind_it(
    host: Host, autojump_clock: MockClock
) -> None:
    receiver = Receiver()
    receiver.answer = lambda alerts: Failed("answered with status 422", is_final=True) if alerts[0].seq == 1 else None
    async with host.running(receiver.target()):
        await host.breach()
        await host.breach()
        await trio.sleep(60)
        assert receiver.taken == [2]
        assert [one["seq"] for one in await host.desk.dead_letters(None, 10, None)] == [1]


async def test_an_alert_that_meets_a_bug_stops_neither_those_behind_it_nor_other_targets(
    host: Host, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    def buggy(alerts: Sequence[Alert]) -> Failed | None:
        return None if alerts[0].seq > 1 else Failed(str(alerts[1]))

    receiver, well = Receiver(buggy), Receiver()
    async with host.running(receiver.target(), well.target("well")):
        await host.breach()
        await host.breach()
        await trio.sleep(60)
        assert (receiver.taken, well.taken) == ([2], [1, 2])
        (letter,) = await host.desk.dead_letters(None, 10, None)
        assert "IndexError" in letter["error"]
    assert "met a bug" in caplog.text


async def test_what_a_target_does_not_want_is_not_its_backlog_and_does_not_come_when_it_wants_more(
    host: Host, autojump_clock: MockClock
) -> None:
    picky, keen = Receiver(), Receiver()
    async with host.running(picky.target(min_severity="critical")):
        for _ in range(3):
            await host.breach()
        await trio.sleep(2)
        standing = await host.standing()
        assert (standing["cursor"], standing["backlog"]) == (3, 0)
    async with host.running(keen.target()):
        await host.breach()
        await trio.sleep(2)
    assert (picky.taken, keen.taken) == ([], [4])


async def test_a_place_does_not_pass_what_is_still_tried(host: Host, autojump_clock: MockClock) -> None:
    failing = Receiver(down)
    async with host.running(failing.target(events=("opened",))):
        name = await host.breach()
        await host.breach("resolved", number=int(name.removeprefix("brc_")))
        await trio.sleep(30)
        assert (await host.standing())["cursor"] == 0
        failing.answer = lambda alerts: None
        await trio.sleep(100)
        assert failing.taken == [1]
        assert (await host.standing())["cursor"] == 2


async def test_alerts_that_are_no_longer_kept_are_told_in_the_log_and_the_rest_is_pushed(
    host: Host, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    async with host.running(Receiver(down).target()):
        pass
    for _ in range(3):
        await host.breach()
    host.connection.execute("UPDATE retention_gate SET open = 1")
    host.connection.execute("DELETE FROM alert WHERE seq <= 2")
    host.connection.execute("UPDATE retention_gate SET open = 0")
    receiver = Receiver()
    async with host.running(receiver.target()):
        await trio.sleep(1)
    assert receiver.taken == [3]
    assert "no longer kept" in caplog.text


async def test_a_store_that_is_away_is_waited_for_and_what_was_taken_is_not_pushed_again(
    host: Host, autojump_clock: MockClock
) -> None:
    """As while the writer process is started again."""
    away, inner = [0], host.database._runner

    class Runner:
        async def post(self, unit: AnyUnit, then: Then, **options: Any) -> None:
            await inner.post(unit, then, **options)

        async def execute(self, unit: AnyUnit, **options: Any) -> Answer | Refusal:
            if isinstance(unit, MoveTarget | SyncTargets) and away[0]:
                away[0] -= 1
                return Refusal("writer_unavailable", "the writer is being restarted", retry_after_s=1)
            return await inner.execute(unit, **options)

    host.database._runner = Runner()
    receiver = Receiver()
    away[0] = 2
    async with host.running(receiver.target()):
        away[0] = 3
        await host.breach()
        await trio.sleep(2)
        assert (await host.standing())["backlog"] == 1
        await host.breach()
        await trio.sleep(2)
        assert receiver.taken == [1, 2]
        assert (await host.standing())["backlog"] == 0


async def test_at_shutdown_nothing_more_is_begun(host: Host, autojump_clock: MockClock) -> None:
    receiver = Receiver()
    async with host.running(receiver.target()):
        await host.breach()
        await trio.sleep(1)
        host.feeds[-1].close()
        await trio.sleep(1)
        assert receiver.taken == [1]


async def test_filters_choose_and_what_waits_together_goes_together(host: Host, autojump_clock: MockClock) -> None:
    critical, ends, group = Receiver(), Receiver(), Receiver()
    async with host.running(
        critical.target("critical", min_severity="critical"),
        ends.target("ends", events=("resolved",)),
        group.target("group", in_groups=True),
    ):
        await host.breach()
        await host.breach("escalated", severity="critical", number=1)
        await host.breach("resolved", severity="critical", number=1)
        await trio.sleep(GROUP_WAIT_S + 0.1)
        assert critical.taken == [2, 3]
        assert ends.taken == [3]
        assert (group.taken, group.sizes) == ([1, 2, 3], [3])


async def test_each_alert_of_a_group_has_its_own_time(host: Host, autojump_clock: MockClock) -> None:
    group = Receiver(down)
    async with host.running(group.target("group", in_groups=True, retry_for_us=2 * MINUTE_US)):
        await host.breach()
        await trio.sleep(100)
        # Both wait behind the first, and then go together.
        await host.breach()
        await trio.sleep(70)
        await host.breach()
        await trio.sleep(35)
        (first,) = await host.desk.dead_letters("group", 10, None)
        assert first["seq"] == 1
        await trio.sleep(60)
        assert [one["seq"] for one in await host.desk.dead_letters("group", 10, None)] == [2, 1]
        assert (await host.standing())["cursor"] == 2
        group.answer = lambda alerts: None
        await trio.sleep(65)
        assert group.taken == [3]
        assert (await host.standing())["cursor"] == 3


async def test_a_reload_adds_changes_and_removes_targets(host: Host, autojump_clock: MockClock) -> None:
    first, second = Receiver(), Receiver(down)
    async with host.running(first.target("first"), second.target("second")):
        await host.breach()
        await trio.sleep(10)
        # What a target has not taken yet goes to its new address.
        moved, third = Receiver(), Receiver()
        host.dispatch.replace((moved.target("second"), third.target("third")))
        await trio.sleep(1)
        assert (moved.taken, third.taken) == ([1], [])
        await host.breach()
        await trio.sleep(1)
        assert (first.taken, moved.taken, third.taken) == ([1], [1, 2], [2])
        assert [one["name"] for one in await host.desk.targets()] == ["second", "third"]


async def test_what_is_silenced_or_acknowledged_is_not_pushed_but_its_end_is_where_its_beginning_was(
    host: Host, autojump_clock: MockClock
) -> None:
    receiver = Receiver()
    async with host.running(receiver.target()):
        first = await host.breach()
        assert not isinstance(await host.desk.acknowledge(ROOT, first, "mine"), Refusal)
        await host.breach("escalated", severity="critical", number=1)
        await host.breach("resolved", severity="critical", number=1)
        silence = await host.desk.silence(
            ROOT,
            agent="urn:asap:agent:2*",
            breach_type=None,
            severity=None,
            ends_us=T0 + 24 * HOUR_US,
            author=None,
            comment="",
        )
        assert not isinstance(silence, Refusal)
        await host.breach()
        await host.breach("resolved", number=2)
        await host.breach()
        await trio.sleep(1)
        assert receiver.taken == [1, 3, 6]
        alerts = dict(host.connection.execute("SELECT seq, CAST(body AS TEXT) FROM alert").fetchall())
        assert '"silence":"sil_' in alerts[4]
        assert '"acknowledged":{' in alerts[2]
        # Over, by its time or by hand, it holds nothing back.
        ended = await host.desk.unsilence(ROOT, silence["id"])
        assert not isinstance(ended, Refusal)
        host.written = 20
        await host.breach()
        await trio.sleep(1)
        assert receiver.taken == [1, 3, 6, 7]
