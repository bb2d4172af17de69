"""Operations for clients of the reference implementation, in its shapes."""

from __future__ import annotations

from asapd.edge.description.operation import (
    INGEST,
    JSON,
    OBJECT,
    OPERATE,
    READ,
    TEXT,
    Answer,
    Operation,
    Shape,
    made,
    one_of,
    reference,
    shows,
)
from asapd.edge.description.queries import AGENT, CONSUMER, FLAG, HISTORY, OFFSET, PARTIAL, PERIOD, TASK, WINDOW
from asapd.edge.http.parameters import MAX_LIMIT, SEVERITIES

_FILTERS = {**AGENT, **CONSUMER, **TASK, **PERIOD}
_EVENTS: dict[str, Shape] = {JSON: reference("Usage")}
_WANTED: dict[str, Shape] = {
    JSON: {
        "type": "object",
        "required": ["delegate", "scopes"],
        "properties": {
            "delegate": TEXT,
            "scopes": {"type": "array", "items": TEXT},
            "expires_in_seconds": {"type": "integer", "minimum": 1, "default": 86_400},
            "max_tasks": {"type": ["integer", "null"]},
            "max_cost_usd": {"type": ["number", "string", "null"]},
            "parent": {"type": ["string", "null"]},
            "delegator": {"type": ["string", "null"]},
        },
    }
}

OPERATIONS = (
    Operation(
        "POST /asap/delegations",
        "Issue a delegation",
        OPERATE,
        (made(reference("Delegated"), "The token"),),
        body=_WANTED,
        idempotency_key=True,
    ),
    Operation(
        "GET /asap/delegations",
        "List what the key's agent gave",
        READ,
        (shows({"type": "array", "items": OBJECT}),),
        {"active": {**FLAG, "default": "true"}},
    ),
    Operation("GET /asap/delegations/{delegation}", "Show a delegation", READ, (shows(),)),
    Operation(
        "DELETE /asap/delegations/{delegation}",
        "Revoke a delegation with its descendants",
        OPERATE,
        (Answer(204, "It is revoked", {}),),
    ),
    Operation("POST /asap/usage", "Record one event", INGEST, (made(),), PARTIAL, body=_EVENTS, idempotency_key=True),
    Operation(
        "POST /asap/usage/batch", "Record events", INGEST, (made(),), PARTIAL, body=_EVENTS, idempotency_key=True
    ),
    Operation("POST /asap/usage/validate", "Say whether an event would be taken", INGEST, (shows(),), body=_EVENTS),
    Operation(
        "GET /asap/usage",
        "List events",
        READ,
        (shows(),),
        {
            **_FILTERS,
            "limit": {"type": "integer", "minimum": 1, "maximum": MAX_LIMIT, "default": MAX_LIMIT},
            **OFFSET,
        },
    ),
    Operation(
        "GET /asap/usage/aggregate",
        "Sum up by groups",
        READ,
        (shows(),),
        {**_FILTERS, "group_by": one_of("agent", "consumer", "day", "week")},
        frozenset({"group_by"}),
    ),
    Operation("GET /asap/usage/agents", "Sum up by agent", READ, (shows(),), _FILTERS),
    Operation("GET /asap/usage/consumers", "Sum up by consumer", READ, (shows(),), _FILTERS),
    Operation("GET /asap/usage/summary", "Sum up everything", READ, (shows(),), _FILTERS),
    Operation("GET /asap/usage/stats", "How much there is", READ, (shows(),)),
    Operation(
        "GET /asap/usage/export",
        "Export events",
        READ,
        (Answer(200, "The events", {JSON: OBJECT, "text/csv": TEXT}),),
        {
            **_FILTERS,
            "export_format": {**one_of("json", "csv"), "default": "json"},
            "limit": {"type": "integer", "minimum": 1, "description": "all of them unless given"},
        },
    ),
    Operation("GET /asap/sla", "Service levels of agents", READ, (shows(),), {**AGENT, **WINDOW}),
    Operation(
        "GET /asap/sla/history",
        "Figures of the past, agent by agent",
        READ,
        (shows(),),
        {**AGENT, **{name: schema for name, schema in HISTORY.items() if name != "cursor"}},
    ),
    Operation(
        "GET /asap/sla/breaches",
        "Breaches of agents",
        READ,
        (shows(),),
        {**AGENT, "severity": one_of(*SEVERITIES), **PERIOD},
    ),
)
