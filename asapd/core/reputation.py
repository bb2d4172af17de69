"""Reputation: one number for how an agent has been, in which what is long ago counts for less."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from msgspec import Struct

from asapd.core.sla import Metrics
from asapd.core.types import DAY_US

HALF_LIFE_US = 7 * DAY_US
SPAN_US = 30 * DAY_US
"""What is older does not count at all."""
FLOOR = 100
"""Below so many tasks and probes together a reputation is provisional."""

WEIGHTS = {"availability": 35, "success": 25, "latency": 20, "breaches": 20}
_COST = {"warning": 10, "critical": 30}


class PastBreach(Struct, frozen=True):
    """A breach as it counts against a reputation: its highest severity, and when it ended; None is not yet."""

    severity: Literal["warning", "critical"]
    ended_us: int | None


class Component(Struct, frozen=True):
    """One part of a reputation, 0 .. 100, or None without data; `weight` is its share in percent of all parts."""

    name: str
    value: float | None
    weight: int


class Reputation(Struct, frozen=True):
    """0 .. 100, or None without data. `samples` are tasks and probes, undecayed."""

    score: float | None
    provisional: bool
    samples: int
    components: tuple[Component, ...]


def reputation(
    windows: Sequence[Metrics], breaches: Sequence[PastBreach], now_us: int, *, is_latency_promised: bool
) -> Reputation:
    """Judge an agent by its nested windows, in the order of their length, and by its breaches.

    Between the starts of two windows lies a ring of time, and everything in it counts with 2 ** -(age of its middle /
    half-life). Availability, success and latency (the share of samples within the promise) are decayed shares;
    breaches take 10 points for a warning and 30 for a critical one off 100, each decayed by its end. Parts without data
    leave their weight to the others.
    """
    sums = dict.fromkeys(("up", "known", "completed", "tasks", "within", "samples"), 0.0)
    before: Metrics | None = None
    for window in windows:
        near_us = 0 if before is None else before.window_us
        weight = _decay((near_us + window.window_us) // 2)
        for name, value in _counts(window).items():
            sums[name] += weight * max(0, value - (0 if before is None else _counts(before)[name]))
        before = window
    taken = sum(
        _COST[one.severity] * _decay(0 if one.ended_us is None else max(0, now_us - one.ended_us)) for one in breaches
    )
    values = {
        "availability": _share(sums["up"], sums["known"]),
        "success": _share(sums["completed"], sums["tasks"]),
        "latency": _share(sums["within"], sums["samples"]) if is_latency_promised else None,
    }
    has_data = any(value is not None for value in values.values())
    values["breaches"] = max(0.0, round(100 - taken, 6)) if has_data else None
    parts = tuple(Component(name, values[name], weight) for name, weight in WEIGHTS.items())
    known = [(part.value, part.weight) for part in parts if part.value is not None]
    weights = sum(weight for _, weight in known)
    score = round(sum(value * weight for value, weight in known) / weights, 6) if known else None
    samples = 0 if before is None else before.tasks + before.probes
    return Reputation(score, samples < FLOOR, samples, parts)


def _decay(age_us: int) -> float:
    return float(2.0 ** (-age_us / HALF_LIFE_US))


def _share(part: float, whole: float) -> float | None:
    return round(100 * part / whole, 6) if whole else None


def _counts(metrics: Metrics) -> dict[str, int]:
    return {
        "up": metrics.up_us,
        "known": metrics.up_us + metrics.down_us,
        "completed": metrics.tasks_completed,
        "tasks": metrics.tasks,
        "within": metrics.samples - metrics.over_promise,
        "samples": metrics.samples,
    }
