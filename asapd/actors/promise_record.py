"""Keeps what agents are held to, from when on, so that the past is judged by the promise of then."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from asapd.actors.promises import HeldTo, record_of, recorded
from asapd.core.errors import Refusal
from asapd.store import promises
from asapd.store.agents import DirectoryAgent
from asapd.store.database import Database, UnitFailedError
from asapd.store.units.promises import PromiseRecord, RecordPromises

# A unit holds up the others in its commit: some milliseconds for so many.
_AT_ONCE = 100


class PromiseKeeper:
    """Tells the store of each change, once; what it did not take is offered again."""

    def __init__(self, database: Database, log: logging.Logger) -> None:
        self._database = database
        self._log = log
        self._known: dict[tuple[str, str], HeldTo] = {}
        self._untold: list[PromiseRecord] = []

    async def start(self) -> None:
        """Read what the store knows."""
        for record in await self._database.read(promises.newest):
            self._known[record.agent, record.tenant] = recorded(record)

    async def keep(self, held: Mapping[str, tuple[DirectoryAgent, HeldTo]], now_us: int) -> None:
        """Say what the agents of the directory are held to from now on."""
        for agent, holds in held.values():
            key = (agent.id, agent.tenant)
            known = self._known.get(key)
            if known == holds:
                continue
            if holds.error is not None and (known is None or known.error != holds.error):
                self._log.warning("agent %s: of what it promises something does not count: %s", agent.id, holds.error)
            self._known[key] = holds
            self._untold.append(record_of(agent, holds, now_us))
        await self.tell()

    async def tell(self) -> None:
        """Offer the store what it has not taken yet."""
        while self._untold:
            part = self._untold[:_AT_ONCE]
            try:
                answer = await self._database.submit(RecordPromises(part))
            except UnitFailedError:
                return
            if isinstance(answer, Refusal):
                return
            del self._untold[: len(part)]
