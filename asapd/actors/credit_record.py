"""Keeps which credit tiers were configured, from when on, so that a penalty of the past goes by those of then."""

from __future__ import annotations

from collections.abc import Sequence

from asapd import config
from asapd.core.errors import Refusal
from asapd.core.sla import percent_text
from asapd.store import credit_terms
from asapd.store.database import Database, UnitFailedError
from asapd.store.units.promises import CreditTerms, RecordCredits


class CreditKeeper:
    """Tells the store of each change, once; what it did not take is offered again."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._known: list[tuple[str, str]] | None = None
        self._untold: list[CreditTerms] = []

    async def start(self) -> None:
        """Read what the store knows."""
        newest = await self._database.read(credit_terms.newest)
        self._known = None if newest is None else newest.tiers

    async def keep(self, tiers: Sequence[config.SlaCredit], now_us: int) -> None:
        """Say what is given back from now on."""
        told = [(percent_text(tier.below_percent), percent_text(tier.credit_percent)) for tier in tiers]
        if told != self._known:
            self._known = told
            self._untold.append(CreditTerms(now_us, told))
        await self.tell()

    async def tell(self) -> None:
        """Offer the store what it has not taken yet."""
        while self._untold:
            try:
                answer = await self._database.submit(RecordCredits(self._untold[0]))
            except UnitFailedError:
                return
            if isinstance(answer, Refusal):
                return
            del self._untold[0]
