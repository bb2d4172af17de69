"""What stands over the audit log, wired: sealer, verifier, witnesses, receipts, archives, erasure and backups."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import trio

from asapd import config
from asapd.actors.archivist import Archivist
from asapd.actors.backups import Backups
from asapd.actors.eraser import erase_consumer
from asapd.actors.packs import Packs
from asapd.actors.receipts import Receipts
from asapd.actors.retirer import Retirer
from asapd.actors.sealer import Sealer, run_sealer
from asapd.actors.verifier import Verifier, run_verifier
from asapd.actors.witnesses import Witnesses
from asapd.core.errors import Refusal
from asapd.core.types import SECOND_US
from asapd.daemon.boot import Premises
from asapd.daemon.versions import Versions
from asapd.runtime.clock import Clock
from asapd.runtime.posting import post_text
from asapd.runtime.supervisor import Actor
from asapd.store.database import Database
from asapd.store.erasure import PSEUDONYM


class Auditing:
    """The parts, made once; `adopt` gives them the settings of a reload."""

    def __init__(
        self,
        database: Database,
        clock: Clock,
        premises: Premises,
        settings: config.Audit,
        log: logging.Logger,
        new_id: Callable[[str, int], str],
    ) -> None:
        identity = premises.identity
        self.sealer = Sealer(database, clock, identity, premises.checkpoints, settings, log)
        self.verifier = Verifier(
            database, clock, premises.database, premises.checkpoints, bytes(identity.verify_key), settings, log
        )
        self.archivist = Archivist(database, clock, premises.archives, self.sealer.covering, log)
        self.retirer = Retirer(database, clock, log)
        self.witnesses = Witnesses(database, clock, identity, settings, log, post_text)
        self.receipts = Receipts(database, clock, self.sealer)
        self.backups = Backups(database, clock, self.sealer, premises.database, premises.backup)
        self.packs = Packs(database, clock, self.sealer, identity)
        self._versions = Versions(premises.versions)
        self._database = database
        self._clock = clock
        self._log = log
        self._new_id = new_id
        self._erasing = trio.Lock()
        """Held by the one erasure under way: two of one consumer would each give it a pseudonym."""

    def adopt(self, settings: config.Audit) -> None:
        """Go by these settings from now on."""
        self.sealer.settings = self.verifier.settings = settings
        self.witnesses.adopt(settings)

    def loops(self, beater: Callable[[str], Callable[[], None]]) -> list[Actor]:
        """What seals and verifies until it is cancelled."""

        async def sealer(*, task_status: trio.TaskStatus[None]) -> None:  # noqa: ASYNC128 -- the actor calls it
            tell, remind, beat = self.witnesses.tell, self.witnesses.remind, beater("sealer")
            await run_sealer(self.sealer, tell=tell, remind=remind, beat=beat, log=self._log, task_status=task_status)

        async def verifier(*, task_status: trio.TaskStatus[None]) -> None:  # noqa: ASYNC128 -- the actor calls it
            await run_verifier(self.verifier, clock=self._clock, beat=beater("verifier"), task_status=task_status)

        return [Actor("sealer", sealer), Actor("verifier", verifier)]

    async def seal_last(self, within_s: float) -> None:
        """A checkpoint over all that was entered, now that nobody enters any more."""
        with trio.move_on_after(within_s) as patience:
            sealed = await self.sealer.seal()
            if isinstance(sealed, Refusal):
                self._log.warning("no last checkpoint was made: %s", sealed.detail)
        if patience.cancelled_caught:
            self._log.warning("no last checkpoint was made: it took longer than %g s", within_s)

    async def erase(self, consumer: str, reason: str, actor: str, dry_run: bool) -> dict[str, Any] | Refusal:
        """Erase what is kept of a consumer, or with `dry_run` say how much that is.

        `versions` are those of the configuration that have its name: the files are the operator's to delete. It is None
        where they cannot be read, which is no reason to erase nothing.
        """
        erase = partial(erase_consumer, self._database, self._clock, consumer=consumer, reason=reason, actor=actor)
        async with self._erasing:
            versions: list[int] | None = None
            try:
                versions = await trio.to_thread.run_sync(self._versions.holding, consumer)
            except OSError as error:
                self._log.warning("versions of the configuration cannot be looked through: %s", error)
            done = await erase(pseudonym=self._new_id(PSEUDONYM, self._clock.now_us()), dry_run=dry_run)
        return done if isinstance(done, Refusal) else {**done, "versions": versions}

    async def status(self) -> dict[str, Any]:
        """What the daemon's status says besides the head of the log."""
        sealed = await self.sealer.newest()
        since_us = await self.sealer.waiting_since_us(sealed)
        waited_s = None if since_us is None else max(0.0, (self._clock.now_us() - since_us) / SECOND_US)
        return {
            "checkpoint": None if sealed is None else sealed.size,
            "unsealed_seconds": waited_s,
            "alarms": [*self.sealer.alarms, *self.witnesses.alarms.values(), *self.retirer.alarms],
            "witness_failures": self.witnesses.failures,
            "verified": self.verifier.status(),
            "without_verdict": self.verifier.without_verdict(),
        }
