"""The archivist: writes whole prefixes of the audit log into files, verifies these, and has the content erased."""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import trio

from asapd.actors.retired import Retired, Went
from asapd.actors.slow_reads import TAKEN_ANYWAY, ReadTooLongError, refuse_slow
from asapd.core.audit import Fault
from asapd.core.errors import Refusal
from asapd.runtime.clock import Clock
from asapd.store import audit_archive, audit_retention, seals
from asapd.store.audit_archive import Draft
from asapd.store.audit_retention import Archive, Prefix
from asapd.store.database import Database
from asapd.store.seals import SealedAt
from asapd.store.units.audit import KeepArchive, RetireAudit
from asapd.store.units.unit import Taken

BREATH_S = 0.02
"""Between two steps, which take about as long: ingest has at least half of the writer, and of the loop."""


class Archivist:
    """Retires the log, one archive at a time; `covering` gives a checkpoint over so many entries at least."""

    def __init__(
        self,
        database: Database,
        clock: Clock,
        directory: Path,
        covering: Callable[[int], Awaitable[SealedAt | Refusal]],
        log: logging.Logger,
        off_loop: Callable[..., Awaitable[Any]] = trio.to_thread.run_sync,
    ) -> None:
        self._database = database
        self._clock = clock
        self._directory = directory
        self._covering = covering
        self._log = log
        self._off_loop = off_loop
        self._lock = trio.Lock()

    async def due(self, before_us: int) -> dict[str, Any]:
        """What would go of what was written before a time: how much content, of which entries and times."""
        goes = Taken()
        after = await self._retired_through()
        while (prefix := await self._database.read(audit_retention.due, after, before_us)) is not None:
            goes = goes.plus(await self._database.read(audit_retention.counted, prefix.first_seq, prefix.last_seq))
            after = prefix.last_seq
        return audit_retention.shown(before_us, goes)

    async def retire(
        self, before_us: Callable[[], int | None], actor: str, until_s: float = math.inf
    ) -> Retired[int | None] | Refusal:
        """Archive and erase what was written before a time. No archive is begun once it is `until_s` on Trio's clock.

        `before_us` says what is due, None that nothing is. It is asked again before each archive and each step that
        erases: what a reload keeps for longer stays, however long ago this began.

        An archive that has begun is finished: begun anew by each who asks again, it might never be. It can be
        cancelled anywhere: nothing is erased that no verified archive holds, and the next time goes on from there.
        """
        went = Went("audit entries")
        with trio.move_on_at(until_s) as patience:
            await self._lock.acquire()
        if patience.cancelled_caught:
            return Retired(went.taken, before_us(), more=True)

        def due_now_us() -> int | None:
            # No later than at first: of what is written meanwhile there might be no end.
            due_us = before_us()
            return None if due_us is None or first_us is None else min(due_us, first_us)

        try:
            first_us = before_us()
            while True:
                erased, refusal = await self._retire_archived(due_now_us, actor)
                went.add(erased)
                if refusal is None:
                    due_us = due_now_us()
                    if due_us is None:
                        return Retired(went.taken, None, more=False)
                    after = await self._retired_through()
                    prefix = await self._database.read(audit_retention.due, after, due_us)
                    if prefix is None or trio.current_time() >= until_s:
                        return Retired(went.taken, due_us, more=prefix is not None)
                    refusal = await self._archive(prefix, due_us, actor)
                if refusal is not None:
                    return went.refused(refusal)
        except ReadTooLongError as error:
            return went.refused(refuse_slow(error, TAKEN_ANYWAY))
        finally:
            self._lock.release()

    async def _retired_through(self) -> int:
        archive = await self._database.read(audit_retention.newest)
        return 0 if archive is None else archive.through_seq

    async def _retire_archived(self, before_us: Callable[[], int | None], actor: str) -> tuple[Taken, Refusal | None]:
        """Erase what the newest archive holds, as far as that was not done.

        Nothing when its file is not there, or while the archive has what is to be kept for longer by now.
        """
        taken = Taken()
        archive = await self._database.read(audit_retention.newest)
        if archive is None or archive.through_seq >= archive.last_seq or not _is_due(archive, before_us()):
            return taken, None
        if not await self._off_loop(audit_archive.is_whole, self._directory / archive.file, archive.sha256):
            self._log.warning(
                "%s is not there as it was written: what it held that is still in the log is archived anew",
                archive.file,
            )
            return taken, None
        while _is_due(archive, before_us()):
            done = await self._database.submit(RetireAudit(actor, self._clock.now_us()))
            if isinstance(done, Refusal):
                return taken, done
            taken = taken.plus(done.taken)
            if not done.more:
                break
            await trio.sleep(BREATH_S)
        return taken, None

    async def _archive(self, prefix: Prefix, before_us: int, actor: str) -> Refusal | None:
        """Write entries into a file that verifies, and record it."""
        sealed = await self._covering(prefix.last_seq)
        if isinstance(sealed, Refusal):
            return sealed
        wrong = await self._database.read(seals.differs, sealed.size, sealed.root)
        wrong = wrong or await self._database.read(audit_retention.strange_block, prefix.first_seq, prefix.last_seq)
        if wrong is not None:
            return _broken(wrong)
        try:
            written = await self._write(prefix)
        except OSError as error:
            detail = f"the archive of the audit log cannot be written in {self._directory}: {error.strerror or error}"
            return Refusal("storage_failed", f"{detail}; nothing of the log was erased", retry_after_s=60)
        if isinstance(written, Refusal):
            return written
        name, sha256 = written
        unit = KeepArchive(
            prefix.first_seq, prefix.last_seq, prefix.last_hash, before_us, name, sha256, actor, self._clock.now_us()
        )
        kept = await self._database.submit(unit)
        if isinstance(kept, Refusal):
            return kept
        self._log.info("entries %d to %d of the audit log are in %s", prefix.first_seq, prefix.last_seq, name)
        return None

    async def _write(self, prefix: Prefix) -> tuple[str, str] | Refusal:
        """Write and verify the file; its name and digest."""
        draft: Draft = await self._off_loop(Draft, self._directory)
        try:
            after = prefix.first_seq - 1
            while after < prefix.last_seq:
                lines, after = await self._database.read(audit_archive.page, after, prefix.last_seq)
                await self._off_loop(draft.add, lines)
            await self._off_loop(draft.finish)
            fault: Fault | None = None
            checking = draft.verified(prefix)
            while (found := await self._off_loop(next, checking, _END)) is not _END:
                fault = found
                await trio.sleep(BREATH_S)
            if fault is not None:
                return _broken(f"entry {fault.seq}: {fault.reason}")
            name = audit_archive.name_of(prefix)
            return name, await self._off_loop(draft.publish, name)
        finally:
            draft.close()


_END = object()


def _is_due(archive: Archive, before_us: int | None) -> bool:
    return before_us is not None and archive.before_us <= before_us


def _broken(reason: str) -> Refusal:
    return Refusal(
        "log_broken",
        f"nothing of the audit log was erased, because it does not verify, {reason}: run asapctl audit verify",
    )
