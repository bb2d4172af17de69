"""What reports of OpenTelemetry are judged by: when usage may have been, which signal counts, for whom one tells."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, Protocol

import msgspec

from asapd.actors.set_aside import Aside, Tokens
from asapd.core.access import Caller
from asapd.core.usage import UsageEvent
from asapd.store.units.usage import RecordUsage
from asapd.wire.otlp import digest

MakeUnit = Callable[[list[UsageEvent]], RecordUsage]


TOO_LATE = "ended too long ago"


class Compare(Protocol):
    """Hears what the spans of resources told, and the metrics that were set aside for them, and whose they are."""

    def __call__(self, agents: Mapping[bytes, str], *, spans: Tokens, metrics: Sequence[Aside]) -> None: ...


Counts = Literal["both", "spans", "metrics"]
"""Which signal is counted; with both, spans win."""


class Times(msgspec.Struct, frozen=True):
    """When usage may have been (microseconds), and how near a span makes the metrics of its resource void."""

    horizon_us: int
    latest_us: int
    spans_win_us: int

    def reason(self, time_us: int) -> str | None:
        """What is wrong with a time."""
        if time_us < self.horizon_us:
            return TOO_LATE
        return "is in the future: check the clock" if time_us > self.latest_us else None

    @property
    def forget_before_us(self) -> int:
        """What was last heard of before this has no part in what may still come."""
        return self.horizon_us - self.spans_win_us - (self.latest_us - self.horizon_us)


def told_of(resource: bytes, caller: Caller) -> bytes:
    """A resource or family as a caller tells of it: whose patterns leave agents out does so for itself alone.

    Anybody can name a resource, and what better telemetry of it outranks is voided: usage of agents of other keys too.
    And when a family was first heard says whether the totals of its other streams count.
    """
    return resource if "*" in caller.agents else digest([resource, sorted(caller.agents)])


def not_counted(what: str, number: int, counts: Counts) -> tuple[str, ...]:
    """The note on records of the signal that does not count."""
    if not number:
        return ()
    return (f'{number} {what} are not counted: metering.otlp.counts is "{counts}"; send none, or change it',)
