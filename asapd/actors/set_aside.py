"""Metrics that are set aside for spans of far fewer tokens: a sign that traces are sampled, and usage is not counted.

Kept in memory: it is a warning, and what counts does not go by it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import msgspec

from asapd.core.types import HOUR_US, MINUTE_US

Tokens = Mapping[bytes, int]
"""Tokens by resource."""

Aside = tuple[bytes, str, int]
"""Of metrics that were set aside: their resource, the id of the event that they make, and its tokens."""

STRETCH_US: Final = 10 * MINUTE_US
"""What is compared. Metrics come each minute and spans every few seconds: the ends matter little over ten minutes."""

FEWER: Final = 2
"""Spans told of far fewer tokens where metrics told of more than so many times theirs: half of a trace is enough."""

SAY_EVERY_US: Final = HOUR_US

MAX_RESOURCES: Final = 10_000
"""Of more, those go that were silent the longest: some 200 bytes each."""


MAX_EVENTS: Final = 20_000
"""Events that are known when they are set aside again; of more, the first go: some 200 bytes each.

Nothing is kept of them in the store, and a sender that heard no answer sends them again within minutes.
"""


class Gap(msgspec.Struct, frozen=True):
    """The tokens of one resource by its spans, which count, and by its metrics, which were set aside for them."""

    agent: str
    spans: int
    metrics: int


class _Stretch(msgspec.Struct):
    since_us: int
    spans: int = 0
    fresh: int = 0
    """Those of `spans` that are not left over from the stretch before."""
    metrics: int = 0
    said_us: int | None = None


class SetAside:
    """Compares what the spans of each resource tell with what its metrics told that were set aside for them.

    `missing_tokens` is by how much metrics were ahead, wherever spans told of far fewer. It only grows.
    """

    def __init__(self) -> None:
        self.missing_tokens = 0
        self._stretches: dict[bytes, _Stretch] = {}
        self._events: dict[str, None] = {}

    def note(self, now_us: int, agents: Mapping[bytes, str], *, spans: Tokens, metrics: Sequence[Aside]) -> list[Gap]:
        """Take in the tokens of one export by resource; returns what is to be said, once a resource and hour."""
        gaps = []
        aside = self._aside(metrics)
        for resource in dict.fromkeys([*spans, *aside]):
            stretch = self._stretches.pop(resource, None) or _Stretch(now_us)
            gap = self._judge(stretch, agents[resource], now_us) if now_us - stretch.since_us >= STRETCH_US else None
            if gap is not None:
                gaps.append(gap)
            stretch.spans += spans.get(resource, 0)
            stretch.fresh += spans.get(resource, 0)
            stretch.metrics += aside.get(resource, 0)
            self._stretches[resource] = stretch  # behind all others: it spoke last
        while len(self._stretches) > MAX_RESOURCES:
            del self._stretches[next(iter(self._stretches))]
        return gaps

    def _aside(self, metrics: Sequence[Aside]) -> Tokens:
        """The tokens of metrics that were not set aside before."""
        tokens: dict[bytes, int] = {}
        for resource, event, number in metrics:
            if event not in self._events:
                self._events[event] = None
                tokens[resource] = tokens.get(resource, 0) + number
        while len(self._events) > MAX_EVENTS:
            del self._events[next(iter(self._events))]
        return tokens

    def _judge(self, stretch: _Stretch, agent: str, now_us: int) -> Gap | None:
        gap = Gap(agent, stretch.spans, stretch.metrics) if stretch.metrics > FEWER * stretch.spans else None
        # Spans whose metrics are still to come are compared with these, and none for longer.
        stretch.spans = min(max(0, stretch.spans - stretch.metrics), stretch.fresh)
        stretch.since_us, stretch.fresh, stretch.metrics = now_us, 0, 0
        if gap is None:
            return None
        self.missing_tokens += gap.metrics - gap.spans
        if stretch.said_us is not None and now_us - stretch.said_us < SAY_EVERY_US:
            return None
        stretch.said_us = now_us
        return gap
