"""Routes of metering."""

from __future__ import annotations

from typing import Annotated, Any, Literal
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import msgspec
from quart import Response, request
from quart_trio import QuartTrio

from asapd.actors.messages import ReportTask, TaskEvent
from asapd.actors.reads import GROUPS, TIME_GROUPS, places
from asapd.actors.usage_reads import Wholeness
from asapd.core.access import Permission
from asapd.core.errors import FieldError, Refusal
from asapd.core.types import AGENT_URN, format_us
from asapd.edge.asking import ask_actor
from asapd.edge.decisions import Name
from asapd.edge.http.context import idempotency, raw_body, require, sent_json
from asapd.edge.http.parameters import Parameters, RefusedError, bad_parameter, decode_body, page
from asapd.edge.http.replies import refuse, reply
from asapd.edge.services import Services
from asapd.edge.usage_request import DELEGATION_HEADER, UsageRequest, answer
from asapd.wire.usage import CONTROL, parse_timestamp, party_of


class GroupPlace(msgspec.Struct, frozen=True, array_like=True):
    """Behind which group a page goes on: the last of the page before."""

    last: tuple[Annotated[int, msgspec.Meta(ge=-(2**53), le=2**53)] | str, ...]


class TaskStep(msgspec.Struct, forbid_unknown_fields=True):
    """One step in the life of a task."""

    task_id: str
    state: Literal["started", "completed", "failed"]
    timestamp: str | int | float
    agent: Name | None = None
    agent_id: Name | None = None
    consumer: Name | None = None
    consumer_id: Name | None = None
    error: Annotated[str, msgspec.Meta(max_length=2000)] | None = None
    parent_task_id: str | None = None


def usage_filters(parameters: Parameters) -> dict[str, Any]:
    """Which events, as every route of usage is asked."""
    start_us, end_us = parameters.period_us()
    return {
        "agent": parameters.text("agent", "agent_id"),
        "consumer": parameters.text("consumer", "consumer_id"),
        "task": parameters.text("task", "task_id"),
        "model": parameters.text("model"),
        "project": parameters.text("project"),
        "outcome": parameters.outcome(),
        "delegation": parameters.text("delegation"),
        "start_us": start_us,
        "end_us": end_us,
    }


def time_zone(parameters: Parameters) -> ZoneInfo:
    """The zone by whose clocks periods are told; UTC unless named."""
    name = parameters.text("timezone") or "UTC"
    try:
        return ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        raise bad_parameter("timezone", "must be the name of a time zone, such as Europe/Berlin") from None


def register(app: QuartTrio, services: Services) -> None:
    """Add the routes."""

    @app.post("/usage")
    @app.post("/usage/batch")
    async def post_usage() -> Response:
        return await answered()

    @app.post("/usage/validate")
    async def post_validate() -> Response:
        return await answered()

    async def answered() -> Response:
        caller = require(Permission.INGEST)
        headers = {name.lower(): value for name, value in request.headers.items()}
        if DELEGATION_HEADER in headers and len(request.headers.getlist(DELEGATION_HEADER)) > 1:
            return refuse(Refusal("malformed", f"{DELEGATION_HEADER} is given twice: send one token"))
        sent = UsageRequest(request.path.rstrip("/"), request.query_string, headers, await raw_body())
        outcome = await answer(services, caller, sent)
        return reply(outcome) if isinstance(outcome, Refusal) else reply(outcome[1], outcome[0])

    @app.get("/usage")
    async def get_usage() -> Response:
        caller = require(Permission.READ)
        parameters = Parameters()
        filters, limit, offset = usage_filters(parameters), parameters.limit(), parameters.offset()
        descending = parameters.choice("order", ("asc", "desc"), "asc") == "desc"
        after = parameters.cursor_of("usage", tuple[int, int])
        parameters.done()
        # The position of a page before is behind what was skipped on the first.
        skipped = offset if after is None else 0
        rows = await services.reads.usage.rows(
            caller, filters, limit=limit, after=after, offset=skipped, descending=descending
        )
        position = None
        if rows:
            position = (parse_timestamp(rows[-1]["timestamp"]), rows[-1]["seq"])
        return reply(page(rows, limit, parameters.place("usage", position)))

    @app.get("/usage/aggregate")
    async def get_aggregate() -> Response:
        caller = require(Permission.READ)
        parameters = Parameters()
        return await aggregate(parameters, parameters.text("group_by") or "agent", caller)

    @app.get("/usage/agents")
    async def get_usage_by_agent() -> Response:
        return await aggregate(Parameters(), "agent", require(Permission.READ))

    @app.get("/usage/consumers")
    async def get_usage_by_consumer() -> Response:
        return await aggregate(Parameters(), "consumer", require(Permission.READ))

    async def aggregate(parameters: Parameters, group_by: str, caller: Any) -> Response:
        groups = tuple(dict.fromkeys(group.strip() for group in group_by.split(",")))
        unknown = [group for group in groups if group not in GROUPS]
        if unknown:
            raise bad_parameter("group_by", f"must be any of {', '.join(GROUPS)}, not {unknown[0]}")
        if len(TIME_GROUPS.intersection(groups)) > 1:
            raise bad_parameter("group_by", "can hold one of minute, hour, day, week and month")
        zone = time_zone(parameters)
        filters, limit, offset = usage_filters(parameters), parameters.limit(), parameters.offset()
        kind = f"usage by {','.join(groups)}"
        after: GroupPlace | None = parameters.cursor_of(kind, GroupPlace)
        parameters.done()
        if after is not None and len(after.last) != len(places(groups)):
            raise bad_parameter("cursor", "must be the next_cursor of the page before")
        grouped, wholeness = await services.reads.usage.aggregate(
            caller,
            filters,
            groups,
            limit=limit,
            offset=offset if after is None else 0,
            zone=zone,
            after=None if after is None else after.last,
        )
        shown = {"group_by": group_by, "timezone": zone.key, **_shown(wholeness)}
        position = None if grouped.last is None else GroupPlace(grouped.last)
        return reply({**shown, **page(grouped.rows, limit, parameters.place(kind, position))})

    @app.get("/usage/summary")
    async def get_summary() -> Response:
        caller = require(Permission.READ)
        parameters = Parameters()
        filters = usage_filters(parameters)
        parameters.done()
        totals, wholeness = await services.reads.usage.summary(caller, filters)
        return reply({**totals, **_shown(wholeness)})

    @app.get("/usage/stats")
    async def get_stats() -> Response:
        caller = require(Permission.READ)
        Parameters().done()
        retention_s = services.settings().retention.usage_us // 1_000_000
        return reply({**await services.reads.usage.stats(caller), "retention_ttl_seconds": retention_s})

    @app.post("/tasks")
    async def post_task() -> Response:
        caller = require(Permission.INGEST)
        Parameters().done()
        body = await sent_json()
        sent = decode_body(body, TaskStep, (("agent", "agent_id"), ("consumer", "consumer_id")))
        task = _task_event(sent)
        if not caller.may_touch(task.agent):
            raise RefusedError(Refusal("forbidden", f"this caller may not report for {task.agent}"))
        key = idempotency(caller, body, services.clock.now_us())
        outcome = await ask_actor(services.mailboxes.meter, lambda reply_to: ReportTask(caller, task, key, reply_to))
        if isinstance(outcome, Refusal):
            return reply(outcome)
        return reply({"status": "recorded", "task_id": task.task_id, "state": task.state}, 201)


def raw_since(retired_before_us: int) -> str | None:
    """From when on all raw events are there, as it is shown; None when none was retired."""
    return format_us(retired_before_us) if retired_before_us else None


def _shown(wholeness: Wholeness) -> dict[str, Any]:
    return {
        "raw_since": raw_since(wholeness.raw_since_us),
        "incomplete": [
            {"start": None if low is None else format_us(low), "end": None if high is None else format_us(high)}
            for low, high in wholeness.incomplete
        ],
    }


def _task_event(sent: TaskStep) -> TaskEvent:
    errors: list[FieldError] = []
    agent, consumer = party_of(sent, "agent", errors), party_of(sent, "consumer", errors)
    errors += [
        FieldError(name, "must have 1 to 256 characters, none of them a control character")
        for name, text in (("task_id", sent.task_id), ("parent_task_id", sent.parent_task_id))
        if text is not None and (not 1 <= len(text) <= 256 or CONTROL.search(text))
    ]
    if CONTROL.search(consumer):
        errors.append(FieldError("consumer", "must not hold control characters"))
    if agent and not AGENT_URN.match(agent):
        errors.append(FieldError("agent", "must be a URN of the form urn:asap:agent:<name>"))
    timestamp_us = 0
    try:
        timestamp_us = parse_timestamp(sent.timestamp)
    except ValueError as error:
        errors.append(FieldError("timestamp", str(error)))
    if errors:
        detail = f"nothing was recorded: {errors[0].field} {errors[0].reason}"
        raise RefusedError(Refusal("invalid", detail, tuple(errors)))
    return TaskEvent(sent.task_id, agent, consumer, sent.state, timestamp_us, sent.error, sent.parent_task_id)
