"""What replies look like: the members that a client can rely on. Replies may have more, and get more in time."""

from __future__ import annotations

from typing import Any

from asapd.edge.description.operation import OBJECT, TEXT, Schema, one_of, reference
from asapd.edge.http.parameters import BREACH_TYPES, SEVERITIES
from asapd.wire.problem import CODES

_COUNT: Schema = {"type": "integer", "minimum": 0}
_NUMBER: Schema = {"type": "number"}
_TRUTH: Schema = {"type": "boolean"}
_TIME: Schema = {"type": "string", "format": "date-time"}
_TEXTS: Schema = {"type": "array", "items": TEXT}
_USD: Schema = {"type": "number", "description": "US dollars, with their exact decimals"}
_HASH: Schema = {"type": "string", "pattern": "^[0-9a-f]{64}$"}
_PARTIES: tuple[Schema, ...] = tuple(
    {"anyOf": [{"required": [name]}, {"required": [f"{name}_id"]}]} for name in ("agent", "consumer")
)


def _or_null(schema: Schema) -> Schema:
    return {**schema, "type": [schema["type"], "null"]}


def _each(schema: Schema) -> Schema:
    return {"type": "array", "items": schema}


def record(description: str, members: dict[str, Schema], optional: dict[str, Schema] | None = None) -> dict[str, Any]:
    """An object that has all of `members`, and may have those that are optional."""
    return {
        "type": "object",
        "description": description,
        "required": list(members),
        "properties": members | (optional or {}),
    }


_REMAINING: Schema = record(
    "what is left, the least of all that limits it; null without a limit",
    {"cost_usd": _or_null(_USD), "tasks": _or_null({"type": "integer"})},
    {"tokens": _or_null({"type": "integer"})},
)
_FIELD_ERROR: Schema = record("One thing that is wrong.", {"field": TEXT, "reason": TEXT}, {"index": _or_null(_COUNT)})
_SLA: Schema = {
    "type": ["object", "null"],
    "properties": {
        "availability": _or_null(TEXT),
        "max_latency_p95_ms": _or_null(_NUMBER),
        "max_error_rate": _or_null(TEXT),
        "support_hours": _or_null(TEXT),
    },
}
_FIGURES: dict[str, Schema] = {
    "agent_id": TEXT,
    "period_start": _TIME,
    "period_end": _TIME,
    "uptime_percent": _or_null(_NUMBER),
    "latency_p95_ms": _or_null(_NUMBER),
    "error_rate_percent": _or_null(_NUMBER),
    "tasks_completed": _COUNT,
    "tasks_failed": _COUNT,
}
_TOTALS: dict[str, Schema] = {
    "total_tasks": _COUNT,
    "total_tokens": {"type": "integer"},
    "total_duration_ms": {"type": "integer"},
    "total_api_calls": {"type": "integer"},
    "total_cost_usd": _USD,
    "unpriced_events": _COUNT,
    "total_events": _COUNT,
    "unique_agents": _COUNT,
    "unique_consumers": _COUNT,
}
_DENIAL: dict[str, Schema] = {"code": TEXT, "reason": TEXT}

SHAPES: dict[str, Schema] = {
    "Page": record(
        "A page of a list.",
        {"data": _each({}), "count": _COUNT, "next_cursor": _or_null(TEXT)},
    ),
    "Problem": record(
        "Why a request is refused (RFC 9457).",
        {
            "type": TEXT,
            "title": TEXT,
            "status": {"type": "integer"},
            "detail": TEXT,
            "code": one_of(*CODES),
        },
        {"errors": _each(_FIELD_ERROR)},
    ),
    "UsageEvent": {
        "description": "One event, nested or flat.",
        "allOf": [
            reference("WireEvent"),
            {"required": ["task_id", "timestamp"]},
            *_PARTIES,
        ],
    },
    "Step": {"description": "One step in the life of a task.", "allOf": [reference("TaskStep"), *_PARTIES]},
    "Usage": {
        "description": "One event, an array, or an object that holds either.",
        "anyOf": [
            reference("UsageEvent"),
            _each(reference("UsageEvent")),
            record("One event, wrapped.", {"usage": reference("UsageEvent")}),
            record("Several events.", {"events": _each(reference("UsageEvent"))}),
        ],
    },
    "Recorded": record(
        "What became of reported events, after their commit.",
        {"status": one_of("recorded"), "recorded": _COUNT, "duplicates": _COUNT, "unprotected": _COUNT, "ids": _TEXTS},
        {
            "task_id": TEXT,
            "task_ids": _TEXTS,
            "count": _COUNT,
            "refused": _COUNT,
            "places": _each(_COUNT),
            "errors": _each(_FIELD_ERROR),
        },
    ),
    "Validation": record(
        "Whether events would be taken.",
        {"valid": _TRUTH},
        {"code": TEXT, "error": TEXT, "errors": _each(_FIELD_ERROR), "count": _COUNT, "duplicates": _COUNT},
    ),
    "StoredEvent": record(
        "An event as it is kept.",
        {
            "seq": _COUNT,
            "id": TEXT,
            "source": _or_null(TEXT),
            "task_id": TEXT,
            "agent_id": TEXT,
            "consumer_id": TEXT,
            "tokens_in": {"type": "integer"},
            "tokens_out": {"type": "integer"},
            "duration_ms": {"type": "integer"},
            "api_calls": {"type": "integer"},
            "timestamp": _TIME,
            "outcome": one_of("completed", "failed"),
            "partial": _TRUTH,
            "model": _or_null(TEXT),
            "provider": _or_null(TEXT),
            "project": _or_null(TEXT),
            "cost_usd": _or_null(_USD),
            "cost_source": _or_null(one_of("priced", "reported")),
            "reported_cost_usd": _or_null(_USD),
            "priced_cost_usd": _or_null(_USD),
            "price_version": _or_null(TEXT),
            "delegation": _or_null(TEXT),
            "reservation": _or_null(TEXT),
            "flags": _TEXTS,
            "recorded_at": _TIME,
        },
    ),
    "Totals": record("Sums of usage.", _TOTALS),
    "Group": record("Sums of the usage of one group.", _TOTALS, {"period": TEXT, "agent_id": TEXT}),
    "Delegation": record(
        "A delegation, and what is spent of it.",
        {
            "id": TEXT,
            "delegator": TEXT,
            "delegate": TEXT,
            "scopes": _TEXTS,
            "constraints": OBJECT,
            "state": one_of("active", "revoked", "expired"),
            "parent": _or_null(TEXT),
            "children": _TEXTS,
            "spent_usd": _USD,
            "tasks_used": _COUNT,
            "remaining": _REMAINING,
        },
    ),
    "Issued": record("A delegation and its token.", {"id": TEXT, "token": TEXT, "delegation": reference("Delegation")}),
    "TokenVerdict": record(
        "Whether a token holds.",
        {
            "valid": _TRUTH,
            **{name: _or_null(TEXT) for name in ("code", "reason", "delegator", "delegate")},
            "scopes": {"type": ["array", "null"], "items": TEXT},
            "chain": _each(OBJECT),
            "remaining": {"anyOf": [_REMAINING, {"type": "null"}]},
        },
    ),
    "Authorization": record(
        "A reservation was made.",
        {
            "decision": one_of("allow"),
            "delegation": TEXT,
            "reservation": record("What is held.", {"id": TEXT, "expires_at": _TIME}),
            "remaining": _REMAINING,
        },
    ),
    "Denial": {
        "description": "A problem document that says no to an authorisation.",
        "allOf": [
            reference("Problem"),
            record("What the no is.", {"decision": one_of("deny"), **_DENIAL}, {"remaining": {}}),
        ],
    },
    "Reservation": record(
        "A reservation.",
        {
            "id": TEXT,
            "state": one_of("open", "settled", "released", "expired"),
            "reason": _or_null(TEXT),
            "held_usd": _or_null(_USD),
            "used_usd": _USD,
            "refunded_usd": _USD,
            "overrun_usd": _or_null(_USD),
            "expires_at": _TIME,
        },
        {
            "remaining": {"anyOf": [_REMAINING, {"type": "null"}]},
            "refunded_to": {"type": "array", "items": TEXT},
            "refunded_to_budgets": {"type": "array", "items": TEXT},
        },
    ),
    "Agent": record(
        "A row of the directory.",
        {
            "id": TEXT,
            "url": _or_null(TEXT),
            "tenant": TEXT,
            "state": one_of("healthy", "degraded", "unhealthy", "stale", "unknown", "paused"),
            "sla": _SLA,
            "uptime_percent": _or_null(_NUMBER),
            "sla_score": _or_null(_NUMBER),
            "last_probe": _or_null(OBJECT),
        },
    ),
    "Figures": record("What was measured in a period, null where there is no data.", _FIGURES),
    "ServiceLevel": record(
        "How an agent keeps its promise.",
        {
            "agent_id": TEXT,
            "window": TEXT,
            "metrics": reference("Figures"),
            "sla": _SLA,
            "compliance": OBJECT,
            "compliance_percent": _or_null(_NUMBER),
            "sla_score": _or_null(_NUMBER),
            "open_breaches": _each(reference("Breach")),
        },
    ),
    "Breach": record(
        "A promise that was broken, or a budget.",
        {
            "id": TEXT,
            "agent_id": _or_null(TEXT),
            "breach_type": one_of(*BREACH_TYPES),
            "window": _or_null(TEXT),
            "threshold": TEXT,
            "threshold_value": _NUMBER,
            "actual": TEXT,
            "actual_value": _NUMBER,
            "severity": one_of(*SEVERITIES),
            "state": one_of("open", "resolved"),
            "detected_at": _TIME,
            "resolved_at": _or_null(_TIME),
            "duration_seconds": _or_null(_NUMBER),
            "samples": _or_null(_COUNT),
            "seq": _COUNT,
        },
    ),
    "Entry": record(
        "An entry of the audit log; null where it was erased.",
        {
            "id": TEXT,
            "seq": _COUNT,
            "timestamp": _TIME,
            "event_type": TEXT,
            "actor": _or_null(TEXT),
            "subject": _or_null(TEXT),
            "details": _or_null(OBJECT),
            "salt": _or_null(TEXT),
            "payload_hash": _HASH,
            "previous_hash": _HASH,
            "hash": _HASH,
        },
    ),
    "Status": record(
        "How the daemon is.",
        {
            "version": TEXT,
            "ready": _TRUTH,
            "uptime_seconds": _NUMBER,
            "actors": {
                "type": "object",
                "additionalProperties": record(
                    "A part of the daemon.",
                    {"state": TEXT, "restarts": _COUNT, "mailbox": _COUNT, "last_error": _or_null(TEXT)},
                ),
            },
            "store": OBJECT,
            "config": record(
                "The configuration.",
                {"state": one_of("ok", "error"), "errors": _TEXTS, "loaded_at": _TIME, "path": _or_null(TEXT)},
            ),
        },
    ),
    "Delegated": record("A token.", {"token": TEXT}),
    "Detail": record("A refusal as the reference implementation has it.", {"detail": {}}),
}
"""The components that no struct says."""
