from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from asapd.runtime.ask import AnswererGone, HandlerFailed, Reply, ask
from asapd.runtime.mailbox import TooManyFailures, serve
from asapd.runtime.supervisor import Actor, BootFailed, RestartLimit, RestartLimitExceeded, Supervisor

LOG = logging.getLogger("test.supervisor")
IGNORED = trio.TASK_STATUS_IGNORED


def supervise(
    *actors: Actor, limit: RestartLimit | None = None, random: Callable[[], float] = lambda: 1.0, **options: float
) -> Supervisor:
    return Supervisor(actors, limit=limit or RestartLimit(), random=random, log=LOG, **options)


def idle(name: str, log: list[str] | None = None) -> Actor:
    """Works until it is cancelled, noting both."""

    async def run(*, task_status: trio.TaskStatus[None] = IGNORED) -> None:
        if log is not None:
            log.append(f"{name} up")
        task_status.started()
        try:
            await trio.sleep_forever()
        finally:
            if log is not None:
                log.append(f"{name} down")

    return Actor(name, run)


def scripted(name: str, steps: Sequence[object], starts_s: list[float]) -> Actor:
    """Each incarnation takes the next step: an exception to raise a second after the start, or None to work on."""
    left = list(steps)

    async def run(*, task_status: trio.TaskStatus[None] = IGNORED) -> None:
        starts_s.append(round(trio.current_time(), 6))
        task_status.started()
        step = left.pop(0) if left else None
        if step is None:
            await trio.sleep_forever()
        await trio.sleep(1)
        assert isinstance(step, BaseException)
        raise step

    return Actor(name, run)


def crashes(caplog: pytest.LogCaptureFixture) -> list[tuple[str, str]]:
    return [(record.getMessage(), str(record.exc_info[1])) for record in caplog.records if record.exc_info]


async def test_a_crash_restarts_the_actor_with_backoff_and_leaves_its_siblings_alone(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    log: list[str] = []
    starts_s: list[float] = []
    errors = [OSError("one"), OSError("two"), OSError("three"), OSError("four")]
    supervisor = supervise(
        idle("sibling", log),
        scripted("fragile", errors, starts_s),
        limit=RestartLimit(restarts=5, within_s=60, backoff_base_s=2, backoff_cap_s=5),
        random=lambda: 0.5,
    )
    async with trio.open_nursery() as nursery:
        await nursery.start(supervisor.run)
        await trio.sleep(1.5)
        assert supervisor.status()["fragile"].state == "backoff"
        assert supervisor.status()["fragile"].started_at_s is None
        await trio.sleep(98.5)
        # One second of work each, then half of 2, 4 and twice the cap of 5.
        assert starts_s == [0, 2, 5, 8.5, 12]
        assert log == ["sibling up"]
        status = supervisor.status()["fragile"]
        assert (status.state, status.restarts, status.last_error) == ("running", 4, "OSError: four")
        assert status.started_at_s == pytest.approx(12)
        assert supervisor.status()["sibling"].restarts == 0
        nursery.cancel_scope.cancel()
    assert crashes(caplog) == [("actor fragile crashed", str(error)) for error in errors]
    assert {status.state for status in supervisor.status().values()} == {"stopped"}


async def test_the_limit_ends_the_run_and_the_siblings(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    log: list[str] = []
    starts_s: list[float] = []
    supervisor = supervise(
        idle("sibling", log),
        scripted("broken", [OSError(f"crash {number}") for number in range(9)], starts_s),
        limit=RestartLimit(restarts=2),
    )
    with pytest.raises(RestartLimitExceeded, match=r"broken.*OSError: crash 2") as caught:
        await supervisor.run()
    assert caught.value.name == "broken"
    assert str(caught.value.__cause__) == "crash 2"
    assert len(starts_s) == 3
    assert log == ["sibling up", "sibling down"]
    assert len(crashes(caplog)) == 3
    assert {name: status.state for name, status in supervisor.status().items()} == {
        "sibling": "stopped",
        "broken": "failed",
    }


async def test_crashes_that_are_long_past_do_not_count(autojump_clock: MockClock) -> None:
    starts_s: list[float] = []
    supervisor = supervise(
        scripted("fragile", [OSError(number) for number in range(20)], starts_s),
        limit=RestartLimit(restarts=3, within_s=10, backoff_base_s=4, backoff_cap_s=4),
    )
    async with trio.open_nursery() as nursery:
        await nursery.start(supervisor.run)
        await trio.sleep(1000)
        assert len(starts_s) == 21
        nursery.cancel_scope.cancel()


async def test_a_very_generous_limit_stays_within_the_cap(autojump_clock: MockClock) -> None:
    starts_s: list[float] = []
    supervisor = supervise(
        scripted("fragile", [OSError(number) for number in range(1500)], starts_s),
        limit=RestartLimit(restarts=5000, within_s=1e9, backoff_cap_s=1),
    )
    async with trio.open_nursery() as nursery:
        await nursery.start(supervisor.run)
        await trio.sleep(3001)
        assert len(starts_s) == 1501
        nursery.cancel_scope.cancel()


async def test_two_actors_over_the_limit_at_once_are_both_reported(autojump_clock: MockClock) -> None:
    supervisor = supervise(
        *(scripted(name, [OSError(name)], []) for name in ("one", "two")), limit=RestartLimit(restarts=0)
    )
    with pytest.raises(ExceptionGroup) as caught:
        await supervisor.run()
    assert {error.name for error in caught.value.exceptions} == {"one", "two"}


async def test_actors_start_one_after_the_other(autojump_clock: MockClock) -> None:
    order: list[str] = []

    def slow(name: str) -> Actor:
        async def run(*, task_status: trio.TaskStatus[None] = IGNORED) -> None:
            order.append(f"{name} starting")
            await trio.sleep(1)
            order.append(f"{name} started")
            task_status.started()
            await trio.sleep_forever()

        return Actor(name, run, mailbox_depth=lambda: 7)

    supervisor = supervise(slow("a"), slow("b"))
    async with trio.open_nursery() as nursery:
        assert supervisor.restart("a") is False
        nursery.start_soon(supervisor.run)
        await trio.sleep(0.5)
        assert [status.state for status in supervisor.status().values()] == ["starting", "starting"]
        assert supervisor.restart("b") is False
        await trio.sleep(1)
        assert [status.state for status in supervisor.status().values()] == ["running", "starting"]
        await trio.sleep(1)
        assert [status.state for status in supervisor.status().values()] == ["running", "running"]
        assert supervisor.status()["a"].mailbox == 7
        nursery.cancel_scope.cancel()
    assert order == ["a starting", "a started", "b starting", "b started"]


@pytest.mark.parametrize("failure", ["raises", "crashes at once", "returns", "hangs"])
async def test_an_actor_that_fails_at_boot_stops_the_boot(
    failure: str, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    log: list[str] = []

    async def run(*, task_status: trio.TaskStatus[None] = IGNORED) -> None:
        match failure:
            case "raises":
                await trio.sleep(1)
                raise OSError("no such disk")
            case "crashes at once":
                raise OSError("no such disk")
            case "returns":
                return
            case "hangs":
                await trio.sleep_forever()

    supervisor = supervise(idle("first", log), Actor("bad", run), idle("never", log), boot_deadline_s=5)
    reason = {"returns": "task_status.started", "hangs": "not ready within 5 s"}.get(failure, "OSError: no such disk")
    with pytest.raises(BootFailed, match=f"bad.*{reason}") as caught:
        await supervisor.run()
    assert caught.value.name == "bad"
    assert caught.value.__cause__ is not None
    assert log == ["first up", "first down"]
    assert crashes(caplog) == []
    assert supervisor.status()["bad"].state == "failed"


async def test_a_boot_failure_reaches_whoever_waits_for_the_start_bare() -> None:
    async def run(*, task_status: trio.TaskStatus[None] = IGNORED) -> None:
        raise OSError("no such disk")

    async with trio.open_nursery() as nursery:
        with pytest.raises(BootFailed):
            await nursery.start(supervise(Actor("bad", run)).run)


async def test_an_actor_may_crash_and_recover_while_others_still_boot(autojump_clock: MockClock) -> None:
    starts_s: list[float] = []

    async def slow(*, task_status: trio.TaskStatus[None] = IGNORED) -> None:
        await trio.sleep(10)
        task_status.started()
        await trio.sleep_forever()

    supervisor = supervise(scripted("fragile", [OSError("early")], starts_s), Actor("slow", slow))
    async with trio.open_nursery() as nursery:
        await nursery.start(supervisor.run)
        assert trio.current_time() == pytest.approx(10)
        assert starts_s == [0, 1.1]
        nursery.cancel_scope.cancel()


async def test_a_restart_that_fails_to_start_is_one_more_crash(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    attempts = 0

    async def run(*, task_status: trio.TaskStatus[None] = IGNORED) -> None:
        nonlocal attempts
        attempts += 1
        if attempts == 2:
            raise OSError("still locked")
        if attempts == 3:
            await trio.sleep_forever()
        task_status.started()
        if attempts == 1:
            await trio.sleep(1)
            raise OSError("lost")
        await trio.sleep_forever()

    supervisor = supervise(Actor("locker", run), boot_deadline_s=5)
    async with trio.open_nursery() as nursery:
        await nursery.start(supervisor.run)
        await trio.sleep(60)
        assert supervisor.status()["locker"].state == "running"
        assert supervisor.status()["locker"].restarts == 3
        nursery.cancel_scope.cancel()
    assert [text for _, text in crashes(caplog)] == ["lost", "still locked", "not ready within 5 s"]


async def test_it_returns_when_all_actors_have_finished(autojump_clock: MockClock) -> None:
    def finite(name: str, seconds: float) -> Actor:
        async def run(*, task_status: trio.TaskStatus[None] = IGNORED) -> None:
            task_status.started()
            await trio.sleep(seconds)

        return Actor(name, run)

    supervisor = supervise(finite("short", 1), finite("long", 5))
    async with trio.open_nursery() as nursery:
        await nursery.start(supervisor.run)
        await trio.sleep(2)
        assert {name: status.state for name, status in supervisor.status().items()} == {
            "short": "stopped",
            "long": "running",
        }
        assert supervisor.restart("short") is False
    assert trio.current_time() == pytest.approx(5)
    assert supervisor.status()["short"].restarts == 0


async def test_nothing_to_supervise_is_done_at_once() -> None:
    await supervise().run()


def crashes_on_cancellation(name: str, *, started: bool = True) -> Actor:
    async def run(*, task_status: trio.TaskStatus[None] = IGNORED) -> None:
        async def clean_up_badly() -> None:
            try:
                await trio.sleep_forever()
            finally:
                raise OSError("clean-up")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(clean_up_badly)
            nursery.start_soon(trio.sleep_forever)
            if started:
                task_status.started()

    return Actor(name, run)


@pytest.mark.parametrize("started", [True, False])
async def test_a_crash_during_cancellation_is_logged_and_the_cancellation_goes_on(
    started: bool, caplog: pytest.LogCaptureFixture
) -> None:
    supervisor = supervise(crashes_on_cancellation("untidy", started=started))
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(supervisor.run)
            await wait_all_tasks_blocked()
            scope.cancel()
    assert scope.cancelled_caught
    [record] = caplog.records
    assert record.exc_info is not None
    assert "clean-up" in caplog.text
    assert supervisor.status()["untidy"].state == "stopped"
    assert supervisor.status()["untidy"].last_error == "OSError: clean-up"


async def test_a_sibling_that_crashes_while_the_limit_ends_the_run_is_logged_too(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    supervisor = supervise(
        crashes_on_cancellation("untidy"), scripted("broken", [OSError("end")], []), limit=RestartLimit(restarts=0)
    )
    with pytest.raises(RestartLimitExceeded, match="broken"):
        await supervisor.run()
    assert [record.getMessage() for record in caplog.records] == ["actor broken crashed", "actor untidy crashed"]


async def test_what_is_no_exception_is_not_restarted(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    starts_s: list[float] = []
    supervisor = supervise(idle("sibling"), scripted("hit", [KeyboardInterrupt()], starts_s))
    with pytest.raises(BaseExceptionGroup) as caught:
        await supervisor.run()
    assert caught.group_contains(KeyboardInterrupt)
    assert starts_s == [0]
    assert caplog.records == []


@pytest.mark.parametrize("name", ["worker", "untidy"])
async def test_an_operators_restart_replaces_the_incarnation_and_does_not_count(
    name: str, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    log: list[str] = []
    supervisor = supervise(idle("worker", log), crashes_on_cancellation("untidy"), limit=RestartLimit(restarts=0))
    async with trio.open_nursery() as nursery:
        await nursery.start(supervisor.run)
        for _ in range(3):
            assert supervisor.restart(name) is True
            await trio.sleep(1)
        assert supervisor.status()[name].state == "running"
        assert supervisor.status()[name].restarts == 3
        assert len(caplog.records) == (3 if name == "untidy" else 0)
        assert log == (["worker up"] if name == "untidy" else ["worker up", *["worker down", "worker up"] * 3])
        nursery.cancel_scope.cancel()


async def test_an_operators_restart_cuts_the_backoff_short(autojump_clock: MockClock) -> None:
    starts_s: list[float] = []
    supervisor = supervise(
        scripted("fragile", [OSError("one")], starts_s), limit=RestartLimit(backoff_base_s=50, backoff_cap_s=50)
    )
    async with trio.open_nursery() as nursery:
        await nursery.start(supervisor.run)
        await trio.sleep(5)
        assert supervisor.status()["fragile"].state == "backoff"
        assert supervisor.restart("fragile") is True
        await trio.sleep(1)
        assert starts_s == [0, 5]
        assert supervisor.status()["fragile"].restarts == 1
        nursery.cancel_scope.cancel()


async def test_an_operators_restart_at_boot_starts_the_actor_again(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    attempts = 0

    async def run(*, task_status: trio.TaskStatus[None] = IGNORED) -> None:
        nonlocal attempts
        attempts += 1
        if attempts == 1:
            try:
                await trio.sleep_forever()
            finally:
                raise OSError("gave up")
        task_status.started()

    supervisor = supervise(Actor("stuck", run))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(supervisor.run)
        await trio.sleep(1)
        assert supervisor.restart("stuck") is True
    assert attempts == 2
    assert [text for _, text in crashes(caplog)] == ["gave up"]


async def test_a_restart_asked_of_an_actor_that_finishes_just_then_leaves_it_finished() -> None:
    async def run(*, task_status: trio.TaskStatus[None] = IGNORED) -> None:
        task_status.started()
        with trio.CancelScope(shield=True):
            await finish.wait()

    finish = trio.Event()
    supervisor = supervise(Actor("last", run))
    async with trio.open_nursery() as nursery:
        await nursery.start(supervisor.run)
        await wait_all_tasks_blocked()
        assert supervisor.restart("last") is True
        finish.set()
    assert supervisor.status()["last"].state == "stopped"
    assert supervisor.status()["last"].restarts == 0


async def test_unknown_and_double_names_are_refused() -> None:
    supervisor = supervise(idle("one"))
    assert supervisor.restart("two") is False
    with pytest.raises(KeyError):
        supervisor.beater("two")
    with pytest.raises(KeyError):
        supervisor.beat("two")
    with pytest.raises(ValueError, match="same name"):
        supervise(idle("one"), idle("one"))


async def test_actors_that_stop_beating_are_stale(autojump_clock: MockClock) -> None:
    supervisor = supervise(
        idle("quiet"),
        idle("lively"),
        scripted("away", [OSError("gone")], []),
        limit=RestartLimit(backoff_base_s=100, backoff_cap_s=100),
    )
    beat = supervisor.beater("lively")
    async with trio.open_nursery() as nursery:
        await nursery.start(supervisor.run)
        assert supervisor.stale(10) == []
        for _ in range(4):
            await trio.sleep(4)
            beat()
        assert supervisor.status()["away"].state == "backoff"
        assert supervisor.stale(10) == ["quiet"]
        supervisor.beat("quiet")
        assert supervisor.stale(10) == []
        await trio.sleep(11)
        assert supervisor.stale(10) == ["quiet", "lively"]
        supervisor.restart("quiet")
        await trio.sleep(0.1)
        assert supervisor.stale(10) == ["lively"]
        nursery.cancel_scope.cancel()


@dataclass(frozen=True)
class Order:
    what: str
    reply: Reply[str]


def order(what: str) -> Callable[[Reply[str]], Order]:
    return lambda reply: Order(what, reply)


class Kitchen:
    """A supervised actor behind a mailbox that outlives it; `fire` crashes it from outside its messages."""

    def __init__(self) -> None:
        self.send, self.receive = trio.open_memory_channel[Order](10)
        self.fire = trio.Event()
        self.incarnations = 0
        self.failed: list[str] = []
        self.actor = Actor("kitchen", self.run, lambda: self.receive.statistics().current_buffer_used)

    async def run(self, *, task_status: trio.TaskStatus[None] = IGNORED) -> None:
        self.incarnations += 1
        async with self.receive.clone() as mailbox, trio.open_nursery() as nursery:
            nursery.start_soon(self.watch_for_fire)
            task_status.started()
            await serve(
                mailbox,
                self.handle,
                failed=lambda message, error: self.failed.append(message.what),
                max_failures_in_a_row=3,
            )
            nursery.cancel_scope.cancel()

    async def watch_for_fire(self) -> None:
        await self.fire.wait()
        self.fire = trio.Event()
        raise OSError("fire")

    async def handle(self, message: Order) -> None:
        match message.what:
            case "poison":
                raise ValueError("poison")
            case "slow":
                await trio.sleep_forever()
            case what:
                message.reply.send(f"{what} served")


async def test_a_request_in_hand_fails_at_once_and_queued_ones_are_served_after_the_restart(
    autojump_clock: MockClock,
) -> None:
    kitchen = Kitchen()
    supervisor = supervise(kitchen.actor)
    outcomes: dict[str, object] = {}

    async def customer(what: str) -> None:
        try:
            outcomes[what] = (await ask(kitchen.send, order(what), deadline_s=30), trio.current_time())
        except AnswererGone as error:
            outcomes[what] = (type(error), trio.current_time())

    async with trio.open_nursery() as nursery:
        await nursery.start(supervisor.run)
        for what in ("slow", "soup", "bread"):
            nursery.start_soon(customer, what)
            await wait_all_tasks_blocked()
        assert supervisor.status()["kitchen"].mailbox == 2
        kitchen.fire.set()
        await trio.sleep(1)
        assert outcomes == {
            "slow": (AnswererGone, 0),
            "soup": ("soup served", pytest.approx(0.1)),
            "bread": ("bread served", pytest.approx(0.1)),
        }
        assert kitchen.incarnations == 2
        await kitchen.send.aclose()
    assert supervisor.status()["kitchen"].state == "stopped"


async def test_a_poison_message_does_not_restart_the_actor_but_many_in_a_row_do(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    kitchen = Kitchen()
    supervisor = supervise(kitchen.actor)
    async with trio.open_nursery() as nursery:
        await nursery.start(supervisor.run)
        for _ in range(5):
            with pytest.raises(HandlerFailed):
                await ask(kitchen.send, order("poison"), deadline_s=1)
            assert await ask(kitchen.send, order("soup"), deadline_s=1) == "soup served"
        assert kitchen.incarnations == 1
        assert caplog.records == []
        for _ in range(3):
            with pytest.raises(HandlerFailed):
                await ask(kitchen.send, order("poison"), deadline_s=1)
        assert await ask(kitchen.send, order("soup"), deadline_s=1) == "soup served"
        assert kitchen.incarnations == 2
        assert kitchen.failed == ["poison"] * 8
        assert supervisor.status()["kitchen"].last_error == f"{TooManyFailures.__name__}: 3 messages failed in a row"
        await kitchen.send.aclose()
