"""Operations of usage, tasks, prices and budgets."""

from __future__ import annotations

from asapd.edge.description.operation import (
    BINARY,
    EVENTS,
    INGEST,
    JSON,
    NDJSON,
    OBJECT,
    OPERATE,
    READ,
    READ_ALL,
    TEXT,
    Answer,
    Operation,
    Schema,
    Shape,
    made,
    one_of,
    page,
    reference,
    shows,
)
from asapd.edge.description.queries import (
    AGENT,
    CONSUMER,
    DRY_RUN,
    FLAG,
    LAST_EVENT,
    NUMBER,
    OFFSET,
    ORDER,
    PAGE,
    PARTIAL,
    PERIOD,
    TIME,
    USAGE,
    formats,
    named,
)
from asapd.edge.http.usage_more import VoidReason

_SUMS = {**USAGE, "timezone": {**TEXT, "default": "UTC"}, **PAGE, **OFFSET}
_EVENTS: dict[str, Shape] = {
    JSON: reference("Usage"),
    NDJSON: TEXT,
    "application/msgpack": BINARY,
    "application/cloudevents+json": OBJECT,
    "application/cloudevents-batch+json": {"type": "array", "items": OBJECT},
}
_OTLP: dict[str, Schema] = {"application/x-protobuf": BINARY, JSON: OBJECT}
_TAKEN = Answer(200, "An OTLP response, with partial_success if something was left out", _OTLP)

OPERATIONS = (
    Operation(
        "POST /usage",
        "Record usage events: all or none",
        INGEST,
        (made(reference("Recorded"), "Recorded, after the commit"),),
        query=PARTIAL,
        body=_EVENTS,
        idempotency_key=True,
    ),
    Operation(
        "POST /usage/batch",
        "The same, for clients of the reference implementation",
        INGEST,
        (made(reference("Recorded"), "Recorded, after the commit"),),
        query=PARTIAL,
        body=_EVENTS,
        idempotency_key=True,
    ),
    Operation(
        "POST /usage/validate",
        "Say whether events would be taken, recording nothing",
        INGEST,
        (shows(reference("Validation"), "The verdict"),),
        body=_EVENTS,
    ),
    Operation(
        "GET /usage", "List events", READ, (page(reference("StoredEvent")),), {**USAGE, **PAGE, **OFFSET, **ORDER}
    ),
    Operation(
        "GET /usage/aggregate",
        "Sum up by groups and periods",
        READ,
        (page(reference("Group")),),
        {
            **_SUMS,
            "group_by": named(
                "agent, consumer, model, project, outcome, and one of minute, hour, day, week, month, with commas"
            ),
        },
    ),
    Operation("GET /usage/agents", "Sum up by agent", READ, (page(reference("Group")),), _SUMS),
    Operation("GET /usage/consumers", "Sum up by consumer", READ, (page(reference("Group")),), _SUMS),
    Operation("GET /usage/summary", "Sum up everything", READ, (shows(reference("Totals")),), USAGE),
    Operation("GET /usage/stats", "How much there is, and since when", READ, (shows(),)),
    Operation(
        "GET /usage/sources",
        "What each source delivered, and its gaps",
        READ,
        (page(),),
        {**AGENT, "source": TEXT, **PAGE},
    ),
    Operation(
        "GET /usage/export",
        "Export all events that fit, as a stream",
        READ,
        (
            Answer(
                200,
                "The events",
                {JSON: OBJECT, NDJSON: TEXT, "text/csv": TEXT, "application/vnd.apache.parquet": BINARY},
            ),
        ),
        {
            **USAGE,
            **formats("ndjson", "json", "csv", "parquet"),
            "export_format": {**one_of("ndjson", "json", "csv", "parquet"), "description": "another name for format"},
            "limit": {"type": "integer", "minimum": 1, "description": "all of them unless given"},
            "bom": {**FLAG, "description": "CSV with the mark by which Excel knows UTF-8"},
            "after": {**NUMBER, "description": "seq of the last row that is known"},
            "through": {**NUMBER, "description": "seq of the last row that is wanted, 0 for none"},
        },
    ),
    Operation(
        "GET /usage/stream",
        "Follow events as they commit",
        READ,
        (Answer(200, "Server-sent events `usage`, `gap`, `reset`, `goodbye`", {EVENTS: TEXT}),),
        {**USAGE, **LAST_EVENT},
    ),
    Operation(
        "POST /usage/{event}/void",
        "Take an event out of every sum",
        OPERATE,
        (made(OBJECT, "It was voided"),),
        {**AGENT, "source": TEXT, "seq": {**NUMBER, "description": "the row, where several events have the id"}},
        body={JSON: VoidReason},
        idempotency_key=True,
    ),
    Operation(
        "POST /tasks",
        "Report one step in the life of a task",
        INGEST,
        (made(OBJECT, "Recorded"),),
        body={JSON: reference("Step")},
        idempotency_key=True,
    ),
    Operation(
        "GET /tasks",
        "List tasks known from their life",
        READ,
        (page(),),
        {
            **AGENT,
            **CONSUMER,
            "state": one_of("started", "completed", "failed", "abandoned"),
            **PAGE,
            **ORDER,
        },
    ),
    Operation("GET /tasks/{task}", "Show a task with its totals and those of its descendants", READ, (shows(),)),
    Operation("GET /tasks/{task}/receipt", "A signed statement of what the task used and cost", READ, (shows(),)),
    Operation("POST /v1/traces", "Take spans of OpenTelemetry", INGEST, (_TAKEN,), body=_OTLP),
    Operation("POST /v1/metrics", "Take metrics of OpenTelemetry", INGEST, (_TAKEN,), body=_OTLP),
    Operation("GET /budgets", "List the budgets with their current period", READ, (page(),), PAGE),
    Operation("GET /budgets/{name}", "Show a budget", READ, (shows(),)),
    Operation(
        "GET /prices",
        "Show the price table in force, or the row that would price an event",
        READ_ALL,
        (page(),),
        {"model": TEXT, "provider": TEXT, "at": TIME, **PAGE},
    ),
    Operation(
        "POST /prices/reprice",
        "Price again what was recorded; a dry run needs an operator, the rest an admin",
        OPERATE,
        (shows(OBJECT, "What changed, by model"),),
        {**DRY_RUN, **PERIOD, "model": named("may end in *"), "cursor": named("next_cursor of the part before")},
    ),
)
