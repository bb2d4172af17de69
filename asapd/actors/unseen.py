"""Time that does not count in any agent's figures: where it was not looked, and where nothing was promised."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC

from asapd.actors.promises import HeldTo, read_support_hours
from asapd.core.exclusions import Exclusions
from asapd.core.intervals import Interval, joined
from asapd.core.support_hours import ALWAYS
from asapd.core.types import DAY_US
from asapd.store.maintenance import effect
from asapd.store.units import Maintenance

AHEAD_US = 2 * DAY_US
"""How far ahead support hours are laid out: events that a sender's clock puts into the future are minutes ahead."""


class Unseen:
    """What is blind and what is under maintenance within a span of time, for all agents.

    `start_us` and `end_us` bound what is laid out; whoever goes past the end makes a new one.
    """

    def __init__(
        self,
        start_us: int = 0,
        end_us: int = 0,
        blind: Sequence[Interval] = (),
        maintenance: Sequence[Maintenance] = (),
    ) -> None:
        self.start_us = start_us
        self.end_us = end_us
        self.blind = joined(blind)
        self._maintenance: dict[str | None, list[Interval]] = {}
        for window in maintenance:
            self._maintenance.setdefault(window.agent, []).append(effect(window))

    def exclusions_of(self, agent: str, held: HeldTo) -> Exclusions:
        """What is taken out of an agent's time."""
        windows = joined([*self._maintenance.get(None, []), *self._maintenance.get(agent, [])])
        hours, zone = read_support_hours(held.promise.support_hours) or (ALWAYS, UTC)
        return Exclusions(hours, zone, tuple(windows))

    def excluded(self, exclusions: Exclusions) -> list[Interval]:
        """The same, laid out; maintenance as far as it was declared."""
        far_us = max([self.end_us, *(end_us for _, end_us in exclusions.maintenance)])
        if not exclusions.hours.ranges:
            return exclusions.between(self.start_us, far_us)
        near = exclusions.between(self.start_us, self.end_us)
        return joined([*near, *exclusions.maintenance])
