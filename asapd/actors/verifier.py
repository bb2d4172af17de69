"""The verifier: walks the log when it is asked to, and by itself at intervals, beside the work of everybody else."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

import trio

from asapd import config
from asapd.core.errors import Refusal
from asapd.core.types import SECOND_US, format_us
from asapd.runtime.beating import beating
from asapd.runtime.clock import Clock
from asapd.store import audit, excuses, outcomes_unsaid, verifying
from asapd.store.database import Database, ReadTooLongError
from asapd.store.excuses import Excuse
from asapd.store.units.house import Note
from asapd.store.verifying import CannotVerifyError, Progress, Report, Request
from asapd.store.verifying_process import VerifierDiedError, verify_apart
from asapd.wire.keys import load_public

SHORT = 20_000
"""Entries, or rows, that a thread of a reader walks in a tenth of a second; a longer walk has a process of its own."""

AT_ONCE = 2
"""Walks under way that somebody asked for: each may take a core for minutes."""

VOUCHED_NAMED = 100
"""Entries that are named of those that an operator vouches for."""

DAY_S = 86_400.0

FIRST_AFTER_S = 5.0
"""The first walk by itself begins when the start is over."""

__all__ = ["Progress", "Report", "Verifier", "run_verifier"]


class Verifier:
    """Verifies the log of a database file, of the daemon with this public key."""

    def __init__(
        self,
        database: Database,
        clock: Clock,
        path: Path,
        checkpoints: Path,
        public_key: bytes,
        settings: config.Audit,
        log: logging.Logger,
    ) -> None:
        self.settings = settings
        self.last: tuple[int, Report] | None = None
        """When the newest walk over everything, or on from it, ended, and what it found."""
        self._without_verdict: tuple[int, Refusal] | None = None
        """When the newest walk ended, and why it found nothing out, if it did not."""
        self._database = database
        self._clock = clock
        self._path = path
        self._checkpoints = checkpoints
        self._public_key = public_key
        self._log = log
        self._limiter = trio.CapacityLimiter(AT_ONCE)
        self._own = trio.CapacityLimiter(1)

    async def verify(
        self, since: int = 0, remembered: tuple[str, ...] = (), *, reconcile: bool = True, gives_way: bool = False
    ) -> Report | Refusal:
        """Walk the log behind an entry and hold it to every checkpoint, the remembered ones (notes) too."""
        async with aclosing(self.steps(since, remembered, reconcile=reconcile, gives_way=gives_way)) as steps:
            async for step in steps:
                if not isinstance(step, Progress):
                    return step
        raise AssertionError("a walk ends with a report")

    async def steps(
        self, since: int, remembered: tuple[str, ...], *, reconcile: bool, gives_way: bool = False
    ) -> AsyncGenerator[Progress | Report | Refusal, None]:
        """Like `verify`, with the progress of a long walk before its outcome."""
        former = self._former_keys()
        witnesses = tuple(load_public(witness.public_key) for witness in self.settings.witnesses)
        kept = str(self._checkpoints)
        request = Request(since, remembered, kept, self._public_key, reconcile, former, witnesses, gives_way)
        walk = object()  # two requests that ask the same are equal, and each has a place of its own
        limiter = self._own if gives_way else self._limiter  # one that rests keeps nobody waiting
        await limiter.acquire_on_behalf_of(walk)
        try:
            short = await self._walked_at_once(request)
            if short is not None:
                yield short
                return
            async with aclosing(verify_apart(self._path, request)) as steps:
                async for step in steps:
                    yield step  # noqa: ASYNC119 -- Trio ends a generator that is left, and the process with it
        except CannotVerifyError as error:
            self._log.error("%s", error)
            yield Refusal("verifying_failed", str(error), retry_after_s=5)
        except VerifierDiedError as error:
            self._log.error("%s", error)
            yield Refusal("verifying_failed", f"{error}: ask again", retry_after_s=5)
        finally:
            limiter.release_on_behalf_of(walk)

    async def _walked_at_once(self, request: Request) -> Report | None:
        """The report over a short log; None when it is long, or takes a reader too long on a busy disk."""
        with contextlib.suppress(ReadTooLongError), verifying.reading():
            if await self._database.read(verifying.length, request) <= SHORT:
                return await self._database.read(verifying.report, request)
        return None

    async def entry_before(self, time_us: int) -> int:
        """The number of the last entry before a time."""
        return await self._database.read(verifying.entry_at, time_us)

    async def watch(self, since: int) -> int:
        """Verify what came since a walk that was good; up to which entry all is good now (0 when it is not)."""
        found = await self.verify(since, reconcile=not since, gives_way=True)
        if isinstance(found, Refusal):
            self._without_verdict = (self._clock.now_us(), found)
            return since
        self._without_verdict = None
        was_good = self.last is None or self.last[1].is_valid
        self.last = (self._clock.now_us(), found)
        if found.is_valid:
            return found.walk.seq
        reason = why(found)
        self._log.error("the audit log does not verify: %s", reason)
        if was_good:
            note = Note("log.alarm", "asapd", "audit", {"reason": reason}, self._clock.now_us())
            await self._database.submit(note, urgent=True)
        return 0

    def _former_keys(self) -> tuple[bytes, ...]:
        return tuple(load_public(key) for key in self.settings.former_keys)

    async def vouch(self, reason: str, actor: str, *, dry_run: bool) -> dict[str, Any] | Refusal:
        """Take the word of an operator for entries that explain gaps and that older builds did not sign, or make."""
        told = await self._excuses()
        found = excuses.from_before(told)
        vouches = [one.details for one in told if one.kind == excuses.VOUCHED and one.details is not None]
        unsaid = None
        if not any(outcomes_unsaid.vouched_in(details) for details in vouches):
            unsaid = outcomes_unsaid.only(await self._database.read(outcomes_unsaid.counted))
        if (found or unsaid) and not dry_run:
            details: dict[str, Any] = {
                "count": len(found),
                "first_seq": found[0].seq if found else 0,
                "last_seq": found[-1].seq if found else 0,
                "reason": reason,
            }
            if unsaid:
                details["task_outcomes"] = unsaid
            note = Note(excuses.VOUCHED, actor, "audit", details, self._clock.now_us())
            written = await self._database.submit(note, urgent=True)
            if isinstance(written, Refusal):
                return written
        named = [f"entry {one.seq} ({one.kind} {one.subject}): {one.what}" for one in found[:VOUCHED_NAMED]]
        if unsaid:
            named.append(f"no entry: {unsaid['count']} rows of task_outcome are gone, before_us {unsaid['before_us']}")
        return {
            "dry_run": dry_run,
            "count": len(found),
            "first_seq": found[0].seq if found else None,
            "last_seq": found[-1].seq if found else None,
            "named": named,
        }

    async def _excuses(self) -> list[Excuse]:
        """All entries that explain why something is gone, read in steps: there may be millions of entries."""
        keys = (self._public_key, *self._former_keys())
        head, _ = await self._database.read(audit.head)
        found: list[Excuse] = []
        for after in range(0, head, audit.WINDOW):
            found += await self._database.read(excuses.read, keys, after, after + audit.WINDOW)
        return found

    def status(self) -> dict[str, Any] | None:
        """The newest walk, for the daemon's status."""
        if self.last is None:
            return None
        at_us, found = self.last
        return {
            "at": format_us(at_us),
            "seq": found.walk.seq,
            "valid": found.is_valid,
            "reason": None if found.is_valid else why(found),
        }

    def without_verdict(self) -> dict[str, str] | None:
        """Why the newest walk found nothing out, for the daemon's status; None when it did."""
        if self._without_verdict is None:
            return None
        at_us, refusal = self._without_verdict
        return {"at": format_us(at_us), "reason": refusal.detail}


def why(report: Report) -> str:
    """The first thing that is wrong."""
    fault = report.walk.fault
    if fault is not None:
        return str(fault)
    return next((tally.named[0] for tally in report.tallies or () if tally.named), "")


async def run_verifier(
    verifier: Verifier,
    *,
    clock: Clock,
    beat: Callable[[], None],
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Verify everything once a day and what is new at every interval, until cancelled."""
    task_status.started()
    good, whole_s = 0, clock.monotonic_s()
    wait_us = int(FIRST_AFTER_S * SECOND_US)
    while True:
        waited_us = 0
        # In seconds, so that a changed setting counts at once and the actor is seen to live.
        while waited_us < min(wait_us, verifier.settings.verify_every_us):
            beat()
            await trio.sleep(1.0)
            waited_us += SECOND_US
        wait_us = verifier.settings.verify_every_us
        # By the monotonic clock: one that was ahead and was set back would put it off.
        if clock.monotonic_s() - whole_s >= DAY_S:
            good = 0
        if not good:
            whole_s = clock.monotonic_s()
        async with beating(beat):
            good = await verifier.watch(good)
