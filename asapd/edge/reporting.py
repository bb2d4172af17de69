"""Reporting usage: the one path from a body to the meter and to its reply, behind every door."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial as partially
from typing import Any, Literal, cast

import msgspec
import trio

from asapd.actors.messages import Attribute, Attribution, Idempotency, Recorded, Report
from asapd.actors.meter import clash, untimely
from asapd.core.access import Caller, Permission
from asapd.core.errors import FieldError, Refusal
from asapd.core.usage import UsageEvent
from asapd.edge.asking import ask_actor, post_to_actor, post_to_actor_nowait
from asapd.edge.services import Services
from asapd.runtime.ask import Reply
from asapd.wire.cloudevents import USAGE_TYPES, decode_batch, decode_binary, decode_structured
from asapd.wire.problem import encode_json, refused_frame
from asapd.wire.usage import MAX_ERRORS, BodyFormat, Events, decode_event, decode_events, decode_steps

LARGE_BYTES = 32_768
"""From here on bodies are decoded one at a time, a millisecond at a stretch: eight at once held the loop for 50 ms."""


class BinaryEvent(msgspec.Struct, frozen=True):
    """A CloudEvent in binary mode: its attributes are in these headers, with names in lower case."""

    headers: Mapping[str, str]


Written = BodyFormat | Literal["cloudevent", "cloudevents"] | BinaryEvent
"""How a body is written."""


async def report(
    services: Services,
    caller: Caller,
    body: bytes,
    written: Written,
    *,
    partial: bool = False,
    idempotency: Idempotency | None = None,
    patient: bool = False,
    attribution: Attribution | None = None,
) -> dict[str, Any] | Refusal:
    """Record what a body holds and return the reply, after the commit.

    Without `partial` one bad event refuses the whole body; with it the bad ones are left out and named. An
    `attribution` says under which delegation all of it is, and why not if it is under none.
    """
    prepared = await _prepare(services, caller, body, written, partial=partial, attribution=attribution)
    if isinstance(prepared, Refusal):
        return prepared
    recorded = await ask_actor(
        services.mailboxes.meter, partially(prepared.message, caller, idempotency), patient=patient
    )
    if isinstance(recorded, Refusal):
        return recorded
    if idempotency is not None:  # a repeat of the request is answered with this reply, and records nothing
        recorded = msgspec.structs.replace(recorded, unprotected=0)
    return prepared.reply(recorded)


def report_nowait(
    services: Services, caller: Caller, body: bytes, told: Callable[[tuple[int, dict[str, Any]] | Refusal], None]
) -> bool:
    """Send what a small JSON body holds on its way; `told` hears, now or after the commit, what `report` would return.

    With it comes its status, which is always 201.

    False when the body is large or the meter has no room: nothing was done then. A meter that crashes with the report
    in its mailbox never tells, so the caller keeps a deadline.
    """
    if len(body) >= LARGE_BYTES:
        return False
    prepared: _Prepared | Refusal | None = _prepared_one(caller, body)
    if prepared is None:
        decoded = decode_events(body)
        prepared = decoded if isinstance(decoded, Refusal) else _prepared(decoded, caller)
    if isinstance(prepared, Refusal):
        told(prepared)
        return True

    def answered(recorded: Recorded | Refusal) -> None:
        told(recorded if isinstance(recorded, Refusal) else (201, prepared.reply(recorded)))

    return post_to_actor_nowait(services.mailboxes.meter, partially(prepared.message, caller, None), answered)


class _Prepared(msgspec.Struct, frozen=True):
    """What a body reports, ready for the meter; `errors` names what is left out of it.

    `tasks` are those of all events by their places, where some may be left out.
    """

    events: list[UsageEvent]
    places: list[int]
    tasks: dict[int, str]
    errors: list[FieldError]
    is_batch: bool
    partial: bool
    attribution: Attribution | None = None

    def message(self, caller: Caller, idempotency: Idempotency | None, reply: Reply[Recorded | Refusal]) -> Report:
        """The message to the meter."""
        places = self.places if self.is_batch or self.partial else None
        return Report(caller, self.events, places, self.partial, idempotency, reply, self.attribution)

    def reply(self, recorded: Recorded) -> dict[str, Any]:
        """What the client is told."""
        reply: dict[str, Any] = {
            "status": "recorded",
            "recorded": recorded.recorded,
            "duplicates": recorded.duplicates,
            "unprotected": recorded.unprotected,
            "ids": recorded.ids,
        }
        if recorded.places is None:
            tasks = [event.task_id for event in self.events]
        else:
            tasks = [self.tasks[place] for place in recorded.places]
        if self.is_batch:
            reply["count"] = len(recorded.ids)
            reply["task_ids"] = tasks
        elif tasks:
            reply["task_id"] = tasks[0]
        under = self.attribution
        if under is not None:
            reply["delegation"] = under.delegation
            reply["denied"] = None if under.code is None else {"code": under.code, "reason": under.detail}
        if under is not None or recorded.unauthorised:
            reply["unauthorised"] = recorded.unauthorised
        if self.partial:
            reply["places"] = self.places if recorded.places is None else recorded.places
            ids = dict(zip(self.places, (event.id for event in self.events), strict=True))
            errors = [*self.errors, *(FieldError("timestamp", reason, place) for place, reason in recorded.late)]
            errors += [
                FieldError("id", clash(str(ids.get(place)), was_reported=bool(seq)), place)
                for place, seq in recorded.conflicts
            ]
            reply["refused"] = len({error.index for error in errors})
            reply["errors"] = errors[:MAX_ERRORS]
        return reply


async def _prepare(
    services: Services,
    caller: Caller,
    body: bytes,
    written: Written,
    *,
    partial: bool = False,
    attribution: Attribution | None = None,
) -> _Prepared | Refusal:
    if not caller.may(Permission.INGEST):
        return Refusal("forbidden", f"a key with role {caller.role} may not report usage: use one with role ingest")
    decoded = await _decoded(services, body, written)
    if isinstance(decoded, Refusal):
        return decoded
    return _prepared(decoded, caller, partial=partial, attribution=attribution)


def _prepared(
    decoded: Events, caller: Caller, *, partial: bool = False, attribution: Attribution | None = None
) -> _Prepared | Refusal:
    elsewhere = [] if attribution is None else _under_another(decoded, attribution)
    refusal = decoded.refusal or _check_agents(decoded, caller) or _conflict(elsewhere)
    if refusal is not None and not partial:
        return refusal
    events, places = decoded.events, decoded.places
    errors = list(decoded.errors)
    if partial:
        events, places, foreign = _own(decoded, caller)
        errors += foreign
        if elsewhere:
            errors += elsewhere
            events, places = _without(events, places, elsewhere)
    tasks = {}
    if partial:
        tasks = {place: event.task_id for place, event in zip(decoded.places, decoded.events, strict=True)}
    return _Prepared(events, places, tasks, errors, decoded.is_batch, partial, attribution)


def _prepared_one(caller: Caller, body: bytes) -> _Prepared | None:
    """A body that is one event, which needs little of what is seen to where there may be many; None for all else."""
    event = decode_event(body)
    if event is None or not (caller.sees_everything or caller.may_touch(event.agent)):
        return None
    return _Prepared([event], [0], {}, [], is_batch=False, partial=False)


async def attribute(services: Services, caller: Caller, token: str, *, patient: bool = False) -> Attribution | Refusal:
    """Under which delegation a report is that came with a token; a refusal only when that cannot be told now."""
    return await ask_actor(
        services.mailboxes.registry, lambda reply: Attribute(caller, token.strip(), reply), patient=patient
    )


def _under_another(decoded: Events, attribution: Attribution) -> list[FieldError]:
    """The events that name a delegation themselves, which is not the one of the token."""
    if attribution.delegation is None:
        return []
    same = {None, attribution.delegation, attribution.token_id}
    return [
        FieldError(
            "delegation",
            f"is {event.delegation}, and X-ASAP-Delegation-Token is a token of {attribution.delegation}: "
            "send what is under another delegation by itself",
            place if decoded.is_batch else None,
        )
        for event, place in zip(decoded.events, decoded.places, strict=True)
        if event.delegation not in same
    ]


def _conflict(elsewhere: list[FieldError]) -> Refusal | None:
    if not elsewhere:
        return None
    return Refusal("invalid", f"nothing was recorded: delegation {elsewhere[0].reason}", tuple(elsewhere[:MAX_ERRORS]))


def _without(
    events: list[UsageEvent], places: list[int], errors: list[FieldError]
) -> tuple[list[UsageEvent], list[int]]:
    """The events that no error is about, and their places."""
    # A request that is one event names no place in its errors.
    bad = {0 if error.index is None else error.index for error in errors}
    kept = [(event, place) for event, place in zip(events, places, strict=True) if place not in bad]
    return [event for event, _ in kept], [place for _, place in kept]


async def _decoded(services: Services, body: bytes, written: Written) -> Events | Refusal:
    if len(body) < LARGE_BYTES:
        return _decode(services, body, written)
    async with services.decoding:
        if isinstance(written, BinaryEvent) or written in {"cloudevent", "cloudevents"}:
            return _decode(services, body, written)
        steps = decode_steps(body, cast("BodyFormat", written))
        while True:
            try:
                next(steps)
            except StopIteration as end:
                decoded: Events | Refusal = end.value
                return decoded
            await trio.lowlevel.checkpoint()


def _decode(services: Services, body: bytes, written: Written) -> Events | Refusal:
    if not isinstance(written, BinaryEvent) and written in {"json", "ndjson", "msgpack"}:
        return decode_events(body, written)
    types: dict[str, Literal["usage"]] = dict(USAGE_TYPES)
    types |= dict.fromkeys(services.settings().metering.cloudevents.types, "usage")
    if isinstance(written, BinaryEvent):
        return decode_binary(written.headers, body, types)
    return (decode_structured if written == "cloudevent" else decode_batch)(body, types)


def _check_agents(decoded: Events, caller: Caller) -> Refusal | None:
    _, _, foreign = _own(decoded, caller)
    if not foreign:
        return None
    detail = f"nothing was recorded: {foreign[0].field} {foreign[0].reason}"
    return Refusal("forbidden", detail, tuple(foreign[:MAX_ERRORS]))


def _own(decoded: Events, caller: Caller) -> tuple[list[UsageEvent], list[int], list[FieldError]]:
    """The events of agents that the caller may report for, their places, and errors for the others."""
    if caller.sees_everything:
        return decoded.events, decoded.places, []
    events: list[UsageEvent] = []
    places: list[int] = []
    foreign: list[FieldError] = []
    for event, place in zip(decoded.events, decoded.places, strict=True):
        if caller.may_touch(event.agent):
            events.append(event)
            places.append(place)
        else:
            reason = f"{event.agent} is not one that this caller may report for"
            foreign.append(FieldError("agent", reason, place if decoded.is_batch else None))
    return events, places, foreign


async def _untimely(services: Services, decoded: Events) -> list[FieldError]:
    metering = services.settings().metering
    now_us = services.clock.now_us()
    # The edge does not move back when `late_max` grows.
    earliest_us = max(now_us - metering.late_max_us, await services.reads.usage.horizon())
    found = untimely(decoded.events, earliest_us, now_us + metering.clock_skew_max_us)
    places = decoded.places
    return [FieldError("timestamp", reason, places[index] if decoded.is_batch else None) for index, reason in found]


async def validate(services: Services, caller: Caller, body: bytes, written: Written) -> dict[str, Any] | Refusal:
    """Say what reporting a body would say, recording nothing; always an answer, never a refusal of it."""
    if not caller.may(Permission.INGEST):
        return Refusal("forbidden", f"a key with role {caller.role} may not report usage: use one with role ingest")
    decoded = await _decoded(services, body, written)
    if isinstance(decoded, Refusal):
        verdict = {"valid": False, "error": decoded.detail, "code": decoded.code}
        return {**verdict, "errors": decoded.errors} if decoded.errors else verdict
    foreign = _check_agents(decoded, caller)
    late = await _untimely(services, decoded)
    errors = [*decoded.errors, *(foreign.errors if foreign is not None else ()), *late]
    if errors:
        first = errors[0]
        return {
            "valid": False,
            "error": f"{first.field} {first.reason}",
            # In the order in which a report is judged.
            "code": "forbidden" if foreign is not None and not decoded.errors else decoded.code,
            "errors": errors[:MAX_ERRORS],
        }
    repeats = await services.reads.usage.repeats(caller, decoded.events)
    new = set()
    conflicts = []
    for event, place, repeat in zip(decoded.events, decoded.places, repeats, strict=True):
        identity = event.agent, event.source, event.id
        if repeat is None:
            new.add(identity)
        elif not repeat:
            reason = clash(event.id, was_reported=identity not in new)
            conflicts.append(FieldError("id", reason, place if decoded.is_batch else None))
    if conflicts:
        error = f"id {conflicts[0].reason}; give a new event a new id"
        return {"valid": False, "error": error, "code": "usage_conflict", "errors": conflicts[:MAX_ERRORS]}
    reply: dict[str, Any] = {"valid": True, "count": len(decoded.events), "duplicates": repeats.count(True)}
    if not decoded.is_batch:
        event = decoded.events[0]
        reply |= {"task_id": event.task_id, "agent_id": event.agent, "consumer_id": event.consumer}
    return reply


async def post_frame(services: Services, caller: Caller | None, body: bytes, answer: Callable[[bytes], None]) -> None:
    """Take one frame of the ingest socket: JSON when it begins with `{` or `[`, else msgpack.

    `answer` is called with the answer, after the commit if there is one. Waits only for room with the meter.
    """
    if caller is None:
        answer(refused_frame(Refusal("forbidden", "no [[ingest.allow]] rule admits this user")))
        return
    if services.throttle is not None and (too_many := services.throttle.refusal(caller)) is not None:
        answer(refused_frame(too_many))
        return
    body_format: BodyFormat = "json" if body[:1] in {b"{", b"["} else "msgpack"
    prepared: _Prepared | Refusal | None = None
    if caller.may(Permission.INGEST) and len(body) < LARGE_BYTES:
        prepared = _prepared_one(caller, body)
    if prepared is None:
        prepared = await _prepare(services, caller, body, body_format)
    if isinstance(prepared, Refusal):
        if prepared.code == "malformed" and body_format == "msgpack":
            detail = f"{prepared.detail}; it was read as MessagePack, for a frame of JSON begins with {{ or ["
            prepared = msgspec.structs.replace(prepared, detail=detail)
        answer(refused_frame(prepared))
        return

    def told(recorded: Recorded | Refusal) -> None:
        if isinstance(recorded, Refusal):
            answer(refused_frame(recorded))
            return
        reply = prepared.reply(recorded)
        del reply["status"]
        answer(encode_json({"ok": True, **reply}))

    await post_to_actor(services.mailboxes.meter, partially(prepared.message, caller, None), told)
