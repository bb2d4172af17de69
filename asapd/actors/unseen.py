"""Time that does not count in any agent's figures: where it was not looked, and where nothing was promised."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, tzinfo
from itertools import pairwise

from asapd.actors.promises import HeldTo
from asapd.core.exclusions import Exclusions, Hours
from asapd.core.intervals import Interval, joined
from asapd.core.support_hours import ALWAYS, SupportHours
from asapd.core.types import DAY_US
from asapd.store.maintenance import effect
from asapd.store.units.promises import Maintenance
from asapd.wire.hours import read_support_hours

AHEAD_US = 2 * DAY_US
"""How far ahead support hours are laid out: events that a sender's clock puts into the future are minutes ahead."""


class Unseen:
    """What is blind and what is under maintenance within a span of time, for all agents.

    `start_us` and `end_us` bound what is laid out; whoever goes past the end makes a new one. `support_hours` has, of
    agents with more than one, each as it was promised and from when on; `laid_out` what is known between these bounds.
    """

    def __init__(
        self,
        start_us: int = 0,
        end_us: int = 0,
        blind: Sequence[Interval] = (),
        maintenance: Sequence[Maintenance] = (),
        support_hours: Mapping[str, Sequence[tuple[int, str | None]]] | None = None,
        laid_out: Mapping[Exclusions, list[Interval]] | None = None,
    ) -> None:
        self.start_us = start_us
        self.end_us = end_us
        self.blind = joined(blind)
        self._maintenance: dict[str | None, list[Interval]] = {}
        for window in maintenance:
            self._maintenance.setdefault(window.agent, []).append(effect(window))
        self._support_hours = support_hours or {}
        self._laid_out = dict(laid_out or {})

    def exclusions_of(self, agent: str, held: HeldTo) -> Exclusions:
        """What is taken out of an agent's time."""
        windows = joined([*self._maintenance.get(None, []), *self._maintenance.get(agent, [])])
        *past, (_, text) = self.hours_of(agent, held, self.start_us)
        earlier = tuple(Hours(until_us, *_read(before)) for until_us, before in past if until_us is not None)
        return Exclusions(*_read(text), tuple(windows), earlier)

    def hours_of(self, agent: str, held: HeldTo, since_us: int) -> list[tuple[int | None, str | None]]:
        """An agent's support hours behind a time, each with when it ended; the last are those of now."""
        past = pairwise(self._support_hours.get(agent, ()))
        earlier = [(until_us, text) for (_, text), (until_us, _) in past if until_us > since_us]
        return [*earlier, (None, held.promise.support_hours)]

    def excluded(self, exclusions: Exclusions) -> list[Interval]:
        """The same, laid out; maintenance as far as it was declared."""
        known = self._laid_out.get(exclusions)
        if known is None:
            known = joined([*exclusions.between(self.start_us, self.end_us), *exclusions.maintenance])
            self._laid_out[exclusions] = known
        return known


def _read(text: str | None) -> tuple[SupportHours, tzinfo]:
    return read_support_hours(text) or (ALWAYS, UTC)
