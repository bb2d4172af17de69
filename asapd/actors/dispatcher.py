"""The dispatcher: pushes alerts to webhooks and commands, each target from a place of its own in the store.

A target's place moves only behind what was delivered or given up, so that after any crash each alert is pushed at
least once, in order. What a target did not take in its time becomes a dead letter. A target that fails, or is slow,
holds up nobody but itself.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Protocol

import trio

from asapd.actors.notifier import Gap, Subscription
from asapd.core.errors import Refusal
from asapd.core.pushing import Failed, gives_up, wait_s, wants
from asapd.core.types import format_us
from asapd.runtime.clock import Clock
from asapd.runtime.fanout import FeedClosed, Wakeup
from asapd.store.breaches import Alert
from asapd.store.database import Database
from asapd.store.delivery import TargetRow, asked_again, targets
from asapd.store.units.alerts import EndRedelivery, MoveTarget, PassTarget, SyncTargets
from asapd.store.units.unit import RowWritten, Unit

GROUP_WAIT_S = 0.5
"""How long a target that takes several at once waits for more."""

MOST_IN_GROUP = 100
_PAGE = 100
_BEAT_EVERY_S = 1.0
_STORE_RETRY_S = 1.0


class Sender(Protocol):
    """One way to push; compared by what it pushes to and how."""

    async def __call__(self, alerts: Sequence[Alert], now_us: int) -> Failed | None:
        """Push these, in order; None when they were taken."""
        ...


@dataclass(frozen=True)
class Target:
    """Where to push, and what. `in_groups`: whether what waits together goes together."""

    name: str
    kind: str
    events: tuple[str, ...]
    min_severity: str
    retry_for_us: int
    send: Sender
    in_groups: bool = False

    def wanted(self, alert: Alert) -> bool:
        """Whether an alert is for this target."""
        return wants(self.events, self.min_severity, event=alert.event, severity=alert.severity, held=alert.held)


@dataclass
class Standing:
    """How one target does, for people to see; `seq` counts on over what it does not want."""

    seq: int
    delivered_us: int | None
    failing_since_us: int | None
    failed_us: int | None
    error: str | None

    def shown(self, target: Target, newest: int, dead: int) -> dict[str, object]:
        """The standing as users see it."""
        return {
            "name": target.name,
            "kind": target.kind,
            "state": "ok" if self.failing_since_us is None else "failing",
            "cursor": self.seq,
            "backlog": max(0, newest - self.seq),
            "delivered_at": _time(self.delivered_us),
            "failing_since": _time(self.failing_since_us),
            "last_error": self.error,
            "last_error_at": _time(self.failed_us),
            "dead_letters": dead,
        }


def _time(at_us: int | None) -> str | None:
    return None if at_us is None else format_us(at_us)


@dataclass
class Dispatch:
    """What the dispatcher works by: the targets in force, what wakes it, and how each does."""

    targets: tuple[Target, ...] = ()
    changed: Wakeup = field(default_factory=Wakeup)
    redelivery: Wakeup = field(default_factory=Wakeup)
    standings: dict[str, Standing] = field(default_factory=dict)

    def replace(self, found: tuple[Target, ...]) -> None:
        """Push to exactly these from now on."""
        self.targets = found
        self.changed.notify()


class Subscribe(Protocol):
    """Opens a cursor over breach transitions."""

    def __call__(self, *, resume_after: int | None, wanted: Callable[[Alert], bool]) -> Subscription:
        """From behind `resume_after`."""
        ...


async def run_dispatcher(
    *,
    database: Database,
    clock: Clock,
    dispatch: Dispatch,
    subscribe: Subscribe,
    random: Callable[[], float],
    beat: Callable[[], None],
    log: logging.Logger,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Push until cancelled; started once every target has its place."""
    running: dict[str, tuple[_Pusher, trio.CancelScope, trio.Event]] = {}
    store = _Store(database, beat)
    is_started = False
    async with trio.open_nursery() as nursery:
        while True:
            beat()
            seen = dispatch.changed.count
            wanted = {target.name: target for target in dispatch.targets}
            for name in [name for name, (pusher, *_) in running.items() if wanted.get(name) != pusher.target]:
                _, scope, ended = running.pop(name)
                scope.cancel()
                await ended.wait()
            if set(wanted) != set(await database.read(targets)):
                await store.write(SyncTargets(sorted(wanted)))
            places = await database.read(targets)
            for name, target in wanted.items():
                if name not in running:
                    pusher = _Pusher(target, places[name], store, clock, dispatch, subscribe, random, log)
                    scope, ended = trio.CancelScope(), trio.Event()
                    running[name] = pusher, scope, ended
                    nursery.start_soon(_run, pusher, scope, ended)
            for name in set(dispatch.standings) - set(wanted):
                del dispatch.standings[name]
            if not is_started:
                task_status.started()
                is_started = True
            while dispatch.changed.count == seen:
                beat()
                with trio.move_on_after(_BEAT_EVERY_S):
                    await dispatch.changed.wait(seen)
                for pusher, *_ in running.values():
                    await pusher.pass_unwanted()


async def _run(pusher: _Pusher, scope: trio.CancelScope, ended: trio.Event) -> None:
    try:
        with scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(pusher.follow)
                nursery.start_soon(pusher.redeliver)
    finally:
        ended.set()


class _Store:
    """Writes that have to succeed: where a target stands is told only once it is so."""

    def __init__(self, database: Database, beat: Callable[[], None]) -> None:
        self.database = database
        self._beat = beat

    async def write(self, unit: Unit[RowWritten]) -> None:
        while isinstance(await self.database.submit(unit), Refusal):
            # The store says in its own log what ails it.
            self._beat()
            await trio.sleep(_STORE_RETRY_S)


class _Pusher:
    """One target at work."""

    def __init__(
        self,
        target: Target,
        place: TargetRow,
        store: _Store,
        clock: Clock,
        dispatch: Dispatch,
        subscribe: Subscribe,
        random: Callable[[], float],
        log: logging.Logger,
    ) -> None:
        self.target = target
        self._store = store
        self._clock = clock
        self._dispatch = dispatch
        self._random = random
        self._log = log
        self._seq = place.seq
        self._in_hand = False
        self._standing = Standing(place.seq, place.delivered_us, place.failing_since_us, place.failed_us, place.error)
        dispatch.standings[target.name] = self._standing
        self._subscription = subscribe(resume_after=place.seq, wanted=target.wanted)
        # Dead letters that are delivered again go between the others, never beside them.
        self._sending = trio.Lock()

    async def follow(self) -> None:
        """Push what comes."""
        is_open = True
        while is_open:
            found: list[Alert | Gap] = []
            try:
                found += await self._subscription.next_alerts()
                self._in_hand = True
                if self.target.in_groups:
                    with trio.move_on_after(GROUP_WAIT_S):
                        while len(found) < MOST_IN_GROUP:
                            found += await self._subscription.next_alerts()
            except FeedClosed:
                is_open = False
            alerts = [one for one in found if isinstance(one, Alert)]
            if len(alerts) < len(found):
                self._log.error("%s: alerts are no longer kept that were not pushed yet", self.target.name)
            size = MOST_IN_GROUP if self.target.in_groups else 1
            for start in range(0, len(alerts), size):
                await self._push(alerts[start : start + size])
            self._in_hand = False

    async def pass_unwanted(self) -> None:
        """Put the place behind what the target does not want, as far as everything else was taken.

        A target that is configured to want more begins here, and retention takes nothing from before any place only.
        """
        through = self._subscription.cursor
        if not self._in_hand and through > self._seq:
            self._seq = self._standing.seq = through
            await self._store.write(PassTarget(self.target.name, through))

    async def _push(self, alerts: list[Alert]) -> None:
        failures = 0
        through = alerts[-1].seq
        while True:
            failed = await self._attempt(alerts)
            now_us = self._clock.now_us()
            if failed is None:
                await self._store.write(MoveTarget(self.target.name, through, now_us))
                self._succeeded(through, now_us)
                return
            failures += 1
            dead = self._given_up(alerts, failed, failures, now_us)
            place = dead[-1] if dead else self._seq
            await self._store.write(MoveTarget(self.target.name, place, now_us, failed.error, dead))
            if dead:
                self._log.error("%s: gave up alerts %d to %d: %s", self.target.name, dead[0], place, failed.error)
                self._seq = self._standing.seq = place
            self._failed(failed, now_us)
            alerts = alerts[len(dead) :]
            if not alerts:
                return
            await trio.sleep(wait_s(failures, failed.retry_after_s, self._random()))

    def _given_up(self, alerts: list[Alert], failed: Failed, failures: int, now_us: int) -> tuple[int, ...]:
        """The numbers of those that have had their time; in order, as the place moves only behind what is over."""

        def is_over(alert: Alert) -> bool:
            age_us = now_us - alert.at_us
            return gives_up(failed, failures, age_us=age_us, retry_for_us=self.target.retry_for_us)

        return tuple(alert.seq for alert in takewhile(is_over, alerts))

    async def _attempt(self, alerts: Sequence[Alert]) -> Failed | None:
        async with self._sending:
            try:
                return await self.target.send(alerts, self._clock.now_us())
            except Exception as error:  # noqa: BLE001 -- one alert that meets a bug must not stop those of every target
                self._log.error("%s: alert %d met a bug", self.target.name, alerts[0].seq, exc_info=error)
                return Failed(f"a bug in asapd, which is in the log: {type(error).__name__}", is_final=True)

    def _succeeded(self, through: int, now_us: int) -> None:
        if self._standing.failing_since_us is not None:
            self._log.info("%s takes alerts again", self.target.name)
        self._seq = self._standing.seq = through
        self._standing.delivered_us, self._standing.failing_since_us = now_us, None

    def _failed(self, failed: Failed, now_us: int) -> None:
        standing = self._standing
        if standing.failing_since_us is None:
            # Said once; how it goes on is in the status.
            self._log.warning("%s does not take alerts: %s", self.target.name, failed.error)
            standing.failing_since_us = now_us
        standing.error, standing.failed_us = failed.error, now_us

    async def redeliver(self) -> None:
        """Push dead letters that somebody asked for, one attempt each."""
        while True:
            seen = self._dispatch.redelivery.count
            while letters := await self._store.database.read(asked_again, self.target.name, _PAGE):
                for letter in letters:
                    failed = await self._attempt([letter.alert])
                    await self._store.write(EndRedelivery(letter.id, None if failed is None else failed.error))
            await self._dispatch.redelivery.wait(seen)
