"""Query parameters that several operations have."""

from __future__ import annotations

from typing import get_args

from asapd.core.health import AgentStatus, State
from asapd.edge.description.operation import TEXT, Schema, one_of
from asapd.edge.http.parameters import BREACH_TYPES, DEFAULT_LIMIT, MAX_LIMIT, SEVERITIES

FLAG: Schema = {"type": "string", "enum": ["true", "false", "1", "0"], "default": "false"}
TIME: Schema = {"type": "string", "description": "RFC 3339, UTC where it has no offset; or an epoch in seconds"}
NUMBER: Schema = {"type": "integer", "minimum": 0}


def named(description: str) -> Schema:
    """A text, and what it names."""
    return {**TEXT, "description": description}


def formats(*words: str) -> dict[str, Schema]:
    """What an answer is written in: the first, unless another is asked for."""
    return {"format": {**one_of(*words), "default": words[0]}}


AGENT: dict[str, Schema] = {"agent": named("URN of an agent"), "agent_id": named("another name for agent")}
CONSUMER: dict[str, Schema] = {
    "consumer": named("for whom the work was done"),
    "consumer_id": named("another name for consumer"),
}
TASK: dict[str, Schema] = {"task": named("id of a task"), "task_id": named("another name for task")}
PERIOD: dict[str, Schema] = {"start": TIME, "end": {**TIME, "description": "Before this; RFC 3339 or an epoch"}}
PAGE: dict[str, Schema] = {
    "limit": {"type": "integer", "minimum": 1, "maximum": MAX_LIMIT, "default": DEFAULT_LIMIT},
    "cursor": named("next_cursor of the page before"),
}
OFFSET: dict[str, Schema] = {"offset": {**NUMBER, "default": 0, "description": "rows to leave out; prefer cursor"}}
ORDER: dict[str, Schema] = {"order": {**one_of("asc", "desc"), "default": "asc"}}
WINDOW: dict[str, Schema] = {"window": named("one of sla.windows, such as 1h, 24h, 7d, 30d")}
MIN_SEVERITY: dict[str, Schema] = {"min_severity": one_of(*SEVERITIES)}
PARTIAL: dict[str, Schema] = {"partial": {**FLAG, "description": "leave wrong events out instead of refusing all"}}
DRY_RUN: dict[str, Schema] = {"dry_run": {**FLAG, "description": "only say what would come of it"}}
LAST_EVENT: dict[str, Schema] = {"last_event_id": {**NUMBER, "description": "stands in for Last-Event-ID"}}
BREACHES: dict[str, Schema] = {
    "severity": one_of(*SEVERITIES),
    "type": one_of(*BREACH_TYPES),
    "breach_type": one_of(*BREACH_TYPES),
    "state": one_of("open", "resolved"),
    **PERIOD,
}
USAGE: dict[str, Schema] = {
    **AGENT,
    **CONSUMER,
    **TASK,
    "model": TEXT,
    "project": TEXT,
    "outcome": one_of("completed", "failed"),
    "delegation": named("id of a delegation"),
    **PERIOD,
}
SEARCH: dict[str, Schema] = {
    "min_availability": named("uptime_percent at least, with or without a percent sign"),
    "max_latency_p95_ms": {"type": "number", "minimum": 0},
    "state": one_of(*get_args(State)),
    "status": one_of(*get_args(AgentStatus)),
    "flapping": one_of("true", "false"),
    "sort": {**one_of("id", "sla_score"), "default": "id"},
    **WINDOW,
}
HISTORY: dict[str, Schema] = {
    "resolution": {**one_of("minute", "hour", "day"), "default": "hour"},
    **PERIOD,
    **PAGE,
    **OFFSET,
}
