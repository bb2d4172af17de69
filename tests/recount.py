"""Totals of usage as a plain loop counts them: what every figure of the daemon is held to."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

from asapd.core.money import to_usd
from asapd.core.types import EPOCH
from asapd.core.usage import Cost, UsageEvent

TIME_GROUPS = ("minute", "hour", "day", "week", "month")
GROUPS = ("agent", "consumer", "model", "project", "outcome", *TIME_GROUPS)
UTC = ZoneInfo("UTC")

Stored = tuple[str, UsageEvent, Cost]
"""A tenant, an event of it, and what that cost."""

_SUMS = (
    "tokens_in",
    "tokens_out",
    "cached_tokens_in",
    "cache_write_tokens",
    "cache_write_1h_tokens",
    "reasoning_tokens",
    "duration_ms",
    "api_calls",
)


def totals(rows: Sequence[Stored]) -> dict[str, Any]:
    """The totals of a row of `/usage/aggregate`, and of `/usage/summary`."""
    events = [event for _, event, _ in rows]
    known = [cost.microusd for _, _, cost in rows if cost.microusd is not None]
    tasks = sum(not event.partial for event in events)
    sums = {field: sum(getattr(event, field) for event in events) for field in _SUMS}
    tokens = sums["tokens_in"] + sums["tokens_out"]
    return {
        **{f"total_{field}": value for field, value in sums.items()},
        "total_tasks": tasks,
        "total_tokens": tokens,
        "total_cost_usd": None if rows and not known else to_usd(sum(known)),
        "unpriced_events": len(rows) - len(known),
        "total_events": len(rows),
        "avg_tokens_per_task": tokens / tasks if tasks else None,
        "avg_duration_ms_per_task": sums["duration_ms"] / tasks if tasks else None,
        "unique_agents": len({event.agent for event in events}),
        "unique_consumers": len({event.consumer for event in events}),
    }


def aggregate(rows: Iterable[Stored], groups: Sequence[str], zone: ZoneInfo = UTC) -> list[dict[str, Any]]:
    """The rows of `/usage/aggregate`, in their order."""
    parts: defaultdict[tuple[tuple[int, str], ...], list[Stored]] = defaultdict(list)
    for row in rows:
        # Beside the order stands the label: within one group both are the same.
        parts[tuple(_order_of(group, row[1], zone) for group in groups)].append(row)
    period = {} if set(groups) & set(TIME_GROUPS) else {"period": "all"}
    return [
        {
            **period,
            **dict(_group_of(group, parts[key][0][1], zone) for group in groups),
            **totals(parts[key]),
        }
        for key in sorted(parts)
    ]


def _offset_text(moment: datetime) -> str:
    text = f"{moment:%z}"
    return f"{text[:3]}:{text[3:]}"


def _hour_of(moment: datetime) -> datetime:
    """When the hour began that clocks show: on the hour, or when they were changed within it."""
    begin = moment.astimezone(UTC).replace(second=0, microsecond=0)
    while True:
        before = (begin - timedelta(minutes=1)).astimezone(moment.tzinfo)
        if (before.hour, before.utcoffset()) != (moment.hour, moment.utcoffset()):
            return begin.astimezone(moment.tzinfo)
        begin -= timedelta(minutes=1)


def _group_of(group: str, event: UsageEvent, zone: ZoneInfo) -> tuple[str, str | None]:
    moment = (EPOCH + timedelta(microseconds=event.timestamp_us)).astimezone(zone)
    offset = "Z" if zone.key == "UTC" else _offset_text(moment)
    match group:
        case "minute":
            return "period", f"{moment:%Y-%m-%dT%H:%M}:00{offset}"
        case "hour":
            return "period", f"{_hour_of(moment):%Y-%m-%dT%H:%M}:00{offset}"
        case "day":
            return "period", f"{moment:%Y-%m-%d}"
        case "week":
            return "period", f"{moment:%G-W%V}"
        case "month":
            return "period", f"{moment:%Y-%m}"
        case "agent" | "consumer":
            return f"{group}_id", getattr(event, group)
        case "outcome":
            return group, "completed" if event.outcome == 1 else "failed"
        case _:
            return group, getattr(event, group) or None


def _order_of(group: str, event: UsageEvent, zone: ZoneInfo) -> tuple[int, str]:
    """Periods in the order of time, an hour that clocks show twice too; the rest by name."""
    span_s = {"minute": 60, "hour": 3600}.get(group)
    if span_s is None:
        return 0, _group_of(group, event, zone)[1] or ""
    at_s = event.timestamp_us // 1_000_000
    offset = datetime.fromtimestamp(at_s, zone).utcoffset()
    assert offset is not None
    offset_s = int(offset.total_seconds())
    return (at_s + offset_s) // span_s * span_s - offset_s, ""
