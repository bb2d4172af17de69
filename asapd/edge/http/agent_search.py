"""The search of the registry: which agents keep what somebody needs, the best first.

A figure that is not known keeps nothing: an agent without it is left out where the figure is asked for, and comes last
where it is sorted by.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, get_args

import msgspec

from asapd.core.health import AgentStatus, State
from asapd.edge.http.parameters import Parameters, bad_parameter, encode_cursor

_STATES: tuple[str, ...] = get_args(State)
_STATUSES: tuple[str, ...] = get_args(AgentStatus)
_PERCENT = re.compile(r"[0-9]{1,3}(\.[0-9]{1,6})?%?\Z")

Position = tuple[float | None, str]
"""Where a row stands in its order: its score, where it is sorted by that, and its id."""


class Wanted(msgspec.Struct, frozen=True):
    """What a search asks for; None does not matter. `after` is the last row of the page before."""

    limit: int
    after: Position | None = None
    offset: int = 0
    min_availability_percent: float | None = None
    max_latency_p95_ms: float | None = None
    state: str | None = None
    status: str | None = None
    flapping: bool | None = None
    by_score: bool = False


def read_wanted(parameters: Parameters) -> Wanted:
    """A search from its query parameters."""
    flapping = parameters.choice("flapping", ("true", "false"))
    return Wanted(
        limit=parameters.limit(),
        after=parameters.cursor(tuple[float | None, str]),
        offset=parameters.offset(),
        min_availability_percent=_percent(parameters, "min_availability"),
        max_latency_p95_ms=parameters.decimal("max_latency_p95_ms"),
        state=parameters.choice("state", _STATES),
        status=parameters.choice("status", _STATUSES),
        flapping=None if flapping is None else flapping == "true",
        by_score=parameters.choice("sort", ("id", "sla_score"), "id") == "sla_score",
    )


def search(rows: Sequence[dict[str, Any]], wanted: Wanted) -> dict[str, Any]:
    """The page of the rows that a search asks for."""
    found = sorted((row for row in rows if _fits(row, wanted)), key=lambda row: _order(_position(row, wanted)))
    if wanted.after is not None:
        behind = _order(wanted.after)
        found = [row for row in found if _order(_position(row, wanted)) > behind]
    else:
        # The position of a page before is behind what was skipped on the first.
        found = found[wanted.offset :]
    shown = found[: wanted.limit]
    more = len(found) > len(shown)
    return {
        "data": shown,
        "count": len(shown),
        "next_cursor": encode_cursor(_position(shown[-1], wanted)) if more else None,
    }


def _fits(row: dict[str, Any], wanted: Wanted) -> bool:
    uptime, latency = row["uptime_percent"], row["latency_p95_ms"]
    least, most = wanted.min_availability_percent, wanted.max_latency_p95_ms
    return (
        (least is None or (uptime is not None and uptime >= least))
        and (most is None or (latency is not None and latency <= most))
        and wanted.state in (None, row["state"])
        and wanted.status in (None, row["agent_status"])
        and wanted.flapping in (None, row["flapping"])
    )


def _position(row: dict[str, Any], wanted: Wanted) -> Position:
    return (row["sla_score"] if wanted.by_score else None), row["id"]


def _order(position: Position) -> tuple[bool, float, str]:
    score, agent = position
    return score is None, 0.0 if score is None else -score, agent


def _percent(parameters: Parameters, name: str) -> float | None:
    text = parameters.text(name)
    if text is None:
        return None
    if _PERCENT.match(text) is None or (percent := float(text.removesuffix("%"))) > 100:
        raise bad_parameter(name, "must be a percentage from 0 to 100, such as 99.5 or 99.5%")
    return percent
