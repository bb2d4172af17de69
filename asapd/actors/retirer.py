"""The retirer: usage goes hour by hour, none before its sums agreed with its events and were entered into the log.

An hour whose sums somebody altered keeps its events: they are all that shows it. The others go on.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

import trio

from asapd.actors.retired import Retired, Went
from asapd.actors.slow_reads import TAKEN_ANYWAY, ReadTooLongError, refuse_slow
from asapd.core.errors import Refusal
from asapd.core.types import HOUR_US
from asapd.runtime.clock import Clock
from asapd.store import audit, retention, usage_hours
from asapd.store.database import Database
from asapd.store.times import hour_us
from asapd.store.units.audit import SealHours
from asapd.store.units.unit import Taken
from asapd.store.units.usage import RetireUsage

BREATH_S = 0.02
"""Between two steps, which take about as long: ingest has at least half of the writer."""

TRIES = 3
"""How often hours are read again that changed before they were sealed; then it is left to the next minute."""

AGAIN_US = HOUR_US
"""An hour that does not agree is looked at again only so often: to read one with many events takes a while."""

STUCK_AFTER_S = 100.0
"""Nothing could be taken for so long, by the third of the janitor's rounds: it does not pass by itself any more."""

_FIRST = -(2**63)

_ALARM = "the sums of an hour are not those of its events, which retention keeps"
_STUCK = "retention takes no usage events, and they become more and more"
_DAMAGED = (
    "an entry of the audit log cannot be read, so retention keeps the events of each hour that it may have told of and "
    "whose sums are not those of its events; what is wrong with it asapctl audit verify says"
)


class Retirer:
    """Takes usage that is past its time, for one caller at a time."""

    def __init__(self, database: Database, clock: Clock, log: logging.Logger) -> None:
        self._database = database
        self._clock = clock
        self._log = log
        self._lock = trio.Lock()
        self._unlike: dict[int, str] = {}
        self._stuck: tuple[float, float, str] | None = None
        """Since when nothing could be taken, when that was so for the last time, and why."""
        self._told: set[int] = set()
        """Entries that cannot be read, of which that was said."""
        self._looked_us = 0
        """When a look at all hours that was brought to its end began."""
        self._known: usage_hours.Log | None = None
        """What the log says of hours: read once it is asked for, for it may be long."""
        self._added_up: usage_hours.AddedUp | None = None
        """A large hour that is not sealed yet: whoever is cut off leaves it to the next."""

    @property
    def alarms(self) -> list[str]:
        """Which hours keep their events because their sums are not what these come to, and why else nothing goes."""
        known = self._known
        found = []
        if self._stuck is not None:
            since_s, at_s, why = self._stuck
            found += [f"{_STUCK}: {why}"] if at_s - since_s >= STUCK_AFTER_S else []
        if known is not None and known.unreadable:
            found.append(f"{_DAMAGED}: entry {known.unreadable[0]}")
        if self._unlike:
            first = self._unlike[min(self._unlike)]
            more = "" if len(self._unlike) == 1 else f" (and {len(self._unlike) - 1} more hours)"
            found.append(f"{_ALARM}: {first}{more}")
        return found

    @property
    def kept(self) -> list[int]:
        """The hours that keep their events, in order."""
        return sorted(self._unlike)

    async def retire(
        self, before_us: Callable[[int], int], actor: str, for_s: float = math.inf
    ) -> Retired[int] | Refusal:
        """Retire all that is due, step by step; what went, by which time, and whether more is due after so long.

        `before_us` says of a moment what is due. It is asked again before each step: what a reload keeps for longer
        stays, however long ago this began. An earlier time needs no hour sealed that was not.

        Who waited for another may have taken nothing when the time is over; who did not takes a step in any case,
        however long it takes to seal the first hours: begun anew by each who asks again, that might never come to it.
        """
        until_s = trio.current_time() + for_s
        with trio.move_on_at(until_s) as patience:
            await self._lock.acquire()
        if patience.cancelled_caught:
            return Retired(Taken(), before_us(self._clock.now_us()), more=True)
        went = Went("usage events")
        try:
            return await self._retire(before_us, actor, until_s, went)
        except ReadTooLongError as error:
            slow = refuse_slow(error, TAKEN_ANYWAY)
            return went.refused(slow) if went.taken.count else self._is_stuck(slow)
        finally:
            self._lock.release()

    async def _retire(
        self, before_us: Callable[[int], int], actor: str, until_s: float, went: Went
    ) -> Retired[int] | Refusal:
        due_us = before_us(self._clock.now_us())
        # What comes behind it may be of an hour that was empty when it was looked at: the next time seals that.
        _, newest = await self._database.read(usage_hours.newest_of)
        sealed = await self._seal(due_us, actor, until_s, newest)
        if isinstance(sealed, Refusal):
            return self._is_stuck(sealed)
        more = sealed < due_us
        due_us = sealed
        is_begun = False
        kept = self.kept
        while True:
            due_us = min(due_us, before_us(self._clock.now_us()))
            if not await self._database.read(retention.is_due, due_us, kept, newest):
                self._stuck = None
                return Retired(went.taken, due_us, more)
            if is_begun and trio.current_time() >= until_s:
                return Retired(went.taken, due_us, more=True)
            unit = RetireUsage(due_us, actor, self._clock.now_us(), kept=kept, through_row=newest)
            done = await self._database.submit(unit)
            if isinstance(done, Refusal):
                return went.refused(done) if is_begun else self._is_stuck(done)
            self._stuck = None
            went.add(done.taken)
            is_begun = True
            await trio.sleep(BREATH_S)

    def _is_stuck(self, refusal: Refusal) -> Refusal:
        now_s = trio.current_time()
        self._stuck = (now_s if self._stuck is None else self._stuck[0], now_s, refusal.detail)
        return refusal

    async def _seal(self, before_us: int, actor: str, until_s: float, newest: int) -> int | Refusal:
        """Enter the sums of hours that ended before a time, where they agree with the events; up to which time.

        That is earlier once it is `until_s`, if an event up to the row `newest` may go by then.
        """
        now_us = self._clock.now_us()
        before = frozenset(self._unlike)
        skipped = before
        is_anew = not 0 <= now_us - self._looked_us < AGAIN_US
        if is_anew:
            skipped = frozenset()
            if self._known is not None and self._known.unreadable:
                self._known = usage_hours.Log()  # it may have been mended
        unlike = set(skipped)
        at, tries = _FIRST, 0
        while True:
            found = await self._examine(at, before_us, skipped)
            if found.is_unclear and self._known is None:
                self._known = usage_hours.Log()
                continue
            if found.large is not None and found.at == at:
                tries += self._added_up is not None
                if tries == TRIES:
                    self._added_up = None
                    return Refusal("invalid", "an hour changed whenever its events were added up: they go later")
                self._added_up = await self._add_up(found.large)
                continue
            if found.agreed:
                unit = SealHours(found.agreed, actor, self._clock.now_us(), found.head, found.newest)
                sealed = await self._database.submit(unit)
                if isinstance(sealed, Refusal):
                    tries += 1
                    if sealed.code != "invalid" or tries == TRIES:
                        return sealed
                    await trio.sleep(BREATH_S)
                    continue
            tries, self._added_up = 0, None
            for hour, _, _ in found.agreed:
                self._unlike.pop(hour, None)
            for hour, what in found.unlike.items():
                if hour not in before:
                    self._log.error("%s: %s", _ALARM, what)
                self._unlike[hour] = what
                unlike.add(hour)
            if found.is_last:
                # What this look did not find agrees by now, or is no longer due; what the log has was sealed, whoever
                # was told so.
                unlike -= set() if self._known is None else self._known.digests.keys()
                self._unlike = {hour: what for hour, what in self._unlike.items() if hour in unlike}
                if is_anew:
                    self._looked_us = now_us
                return before_us
            at = found.at
            _, looked_us = hour_us(at)
            if trio.current_time() >= until_s and await self._database.read(
                retention.is_due, looked_us, self.kept, newest
            ):
                return looked_us
            await trio.sleep(BREATH_S)

    async def _add_up(self, hour: int) -> usage_hours.AddedUp:
        """What the events of a large hour come to, in parts: of what comes meanwhile the next look tells."""
        head, newest = await self._database.read(usage_hours.newest_of)
        found = usage_hours.AddedUp(hour, {}, head, newest)
        for part in range(usage_hours.PARTS):
            await self._database.read(usage_hours.add_part, found, part)
        return found

    async def _examine(self, at: int, before_us: int, skipped: frozenset[int]) -> usage_hours.Examined:
        read = self._database.read
        if self._known is not None:
            # In windows: a log of many millions of entries takes longer to look through than a read may.
            head, _ = await read(audit.head)
            while self._known.after < head:
                through = min(head, self._known.after + audit.WINDOW)
                self._known.take(await read(usage_hours.said, self._known.after, through), through)
                for entry in set(self._known.unreadable) - self._told:
                    self._told.add(entry)
                    self._log.error("%s: entry %d", _DAMAGED, entry)
        return await read(usage_hours.examine, at, before_us, self._known, skipped, self._added_up)
