"""The notifier: publishes every breach transition once and in order, to the live feed and the log.

Subscribers follow with a cursor of their own, over the feed's memory and the store behind it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import msgspec
import trio

from asapd.runtime.fanout import Feed, Wakeup
from asapd.store.breaches import (
    Alert as Alert,  # noqa: PLC0414 -- handed on to the doors, which do not know the store
)
from asapd.store.breaches import alert_bounds, alerts_after
from asapd.store.database import Database

PAGE = 500
_BEAT_EVERY_S = 1.0


async def run_notifier(
    *,
    database: Database,
    feed: Feed[Alert],
    committed: Wakeup,
    beat: Callable[[], None],
    log: logging.Logger,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Publish what is committed until cancelled; started once nothing older is left to publish.

    The feed's `last` says how far an earlier incarnation came, so nothing is published twice.
    """
    started = False
    while True:
        beat()
        seen = committed.count
        while alerts := await database.read(alerts_after, feed.last, PAGE):
            for alert in alerts:
                feed.publish(alert.seq, alert)
                _log(alert, log)
            beat()
        if not started:
            task_status.started()
            started = True
        with trio.move_on_after(_BEAT_EVERY_S):
            await committed.wait(seen)


def _log(alert: Alert, log: logging.Logger) -> None:
    breach = alert.params["breach"]
    log.log(
        logging.INFO if alert.event == "resolved" else logging.WARNING,
        "%s breach of %s %s: promised %s, actual %s (alert %d, %s)",
        breach["breach_type"],
        alert.agent_id or breach["budget"] or breach["id"],
        alert.event,
        breach["threshold"],
        breach["actual"],
        alert.seq,
        alert.severity,
    )


class Gap(msgspec.Struct, frozen=True):
    """Transitions that the subscriber has missed for good: the store no longer keeps those from first to last."""

    first_missing: int
    last_missing: int


class Subscription:
    """One subscriber's place in the stream of transitions.

    With `resume_after` everything later that is kept comes first, then what follows live; without it only what
    comes after now. A subscriber that reads slowly costs nobody anything: it is served from the store.
    """

    __slots__ = ("_cursor", "_database", "_feed", "_wanted")

    def __init__(
        self,
        database: Database,
        feed: Feed[Alert],
        *,
        wanted: Callable[[Alert], bool],
        resume_after: int | None = None,
    ) -> None:
        self._database = database
        self._feed = feed
        self._wanted = wanted
        self._cursor = feed.last if resume_after is None else max(0, resume_after)

    @property
    def cursor(self) -> int:
        """The number up to which everything was handed out or not wanted: where to resume."""
        return self._cursor

    async def settle(self) -> int | None:
        """The place that was asked for when nothing has that number, as after a restore: it follows from now then."""
        if self._cursor <= self._feed.last:
            return None
        _, newest = await self._database.read(alert_bounds)
        asked, self._cursor = self._cursor, min(self._cursor, newest)
        return asked if asked > newest else None

    async def next_alerts(self) -> list[Alert | Gap]:
        """The next wanted transitions in order, at least one; a gap comes in the place of what is missing.

        Cancelling loses nothing: the cursor moves only with what is returned.

        Raises:
            FeedClosed: at shutdown, once all that was published has been handed out.
        """
        if self._cursor < self._feed.last:
            await trio.lowlevel.checkpoint()
        # A cursor from before a restore is ahead of this log: it must not hide what comes now.
        await self.settle()
        while True:
            if self._cursor >= self._feed.last:
                await self._feed.wait_after(self._cursor)
            found = await self._take()
            if found:
                return found

    async def _take(self) -> list[Alert | Gap]:
        held = self._feed.after(self._cursor)
        if held is not None:
            self._cursor = max(self._cursor, self._feed.last)
            return [alert for _, alert in held if self._wanted(alert)]
        alerts = await self._database.read(alerts_after, self._cursor, PAGE)
        reached = alerts[-1].seq if alerts else self._feed.last
        # Numbers are contiguous, so what is missing before the first was retired.
        first_kept = alerts[0].seq if alerts else reached + 1
        found: list[Alert | Gap] = [Gap(self._cursor + 1, first_kept - 1)] if first_kept > self._cursor + 1 else []
        found += [alert for alert in alerts if self._wanted(alert)]
        self._cursor = reached
        return found
