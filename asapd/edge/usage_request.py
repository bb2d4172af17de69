"""A request that reports usage, and its answer, the same behind every HTTP door."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final
from urllib.parse import parse_qsl

import msgspec

from asapd.actors.messages import Attribution, Idempotency
from asapd.core.access import Caller, Permission
from asapd.core.errors import Refusal
from asapd.edge import idempotency
from asapd.edge.http.parameters import Parameters, RefusedError
from asapd.edge.json_body import foreign_charset
from asapd.edge.reporting import BinaryEvent, Written, attribute, report, report_nowait, validate
from asapd.edge.services import Services
from asapd.edge.unpacking import unpack_beside
from asapd.wire.cloudevents import BATCH_TYPE, HEADERS, STRUCTURED_TYPE, is_binary

PATHS: Final = ("/usage", "/usage/batch", "/usage/validate")
DELEGATION_HEADER: Final = "x-asap-delegation-token"
"""A token under which the whole request reports."""

_SPECIAL = ("content-encoding", "idempotency-key", DELEGATION_HEADER)
_FORMATS: dict[str, Written] = {
    "": "json",
    "application/json": "json",
    "application/x-ndjson": "ndjson",
    "application/ndjson": "ndjson",
    "application/msgpack": "msgpack",
    "application/x-msgpack": "msgpack",
    "application/vnd.msgpack": "msgpack",
    STRUCTURED_TYPE: "cloudevent",
    BATCH_TYPE: "cloudevents",
}


class UsageRequest(msgspec.Struct, frozen=True):
    """A POST to one of `PATHS` as it came: the names of `headers` in lower case, `query` without the `?`."""

    path: str
    query: bytes
    headers: Mapping[str, str]
    body: bytes


def written_as(headers: Mapping[str, str]) -> Written | Refusal:
    """How a body is written, by its content type, or as a CloudEvent in binary mode by its `ce-*` headers."""
    content_type = headers.get("content-type", "")
    kind = content_type.partition(";")[0].strip().lower()
    if ";" in content_type and _FORMATS.get(kind) != "msgpack":
        foreign = foreign_charset(content_type)
        if foreign is not None:
            return foreign
    if not kind.startswith("application/cloudevents") and is_binary(headers):
        return BinaryEvent(headers)
    if kind not in _FORMATS:
        detail = f"{kind} is not taken: send application/json, application/x-ndjson or application/msgpack"
        return Refusal("unsupported_media_type", f"{detail}, or CloudEvents as {STRUCTURED_TYPE} or {BATCH_TYPE}")
    return _FORMATS[kind]


async def answer(
    services: Services, caller: Caller, request: UsageRequest, *, patient: bool = False
) -> tuple[int, dict[str, Any]] | Refusal:
    """Record what the request reports, or only look at it, and say what became of it: status and reply.

    With `patient` the caller bounds the wait for the meter, which is refused at once otherwise when it has no room.
    """
    if (denied := _denied(caller)) is not None:
        return denied
    only_validate = request.path == PATHS[2]
    partial = False
    if request.query and not only_validate:
        try:
            parameters = Parameters(parse_qsl(request.query.decode("latin1"), keep_blank_values=True))
            partial = parameters.flag("partial")
            parameters.done()
        except RefusedError as error:
            return error.refusal
    written = written_as(request.headers)
    most_bytes = services.settings().http.max_body_bytes
    body = await unpack_beside(request.body, request.headers.get("content-encoding"), most_bytes)
    for unread in (written, body):
        if isinstance(unread, Refusal):
            if not only_validate or unread.retry_after_s is not None:
                return unread
            # A validation always has an answer, which may be that nothing could be read.
            return 200, {"valid": False, "error": unread.detail, "code": unread.code}
    assert not isinstance(written, Refusal)
    assert not isinstance(body, Refusal)
    if only_validate:
        found = await validate(services, caller, body, written)
        return found if isinstance(found, Refusal) else (200, found)
    key = _bound(services, caller, request, written, body)
    if isinstance(key, Refusal):
        return key
    attribution: Attribution | None = None
    token = request.headers.get(DELEGATION_HEADER)
    if token:
        under = await attribute(services, caller, token, patient=patient)
        if isinstance(under, Refusal):
            return under
        attribution = under
    outcome = await report(
        services,
        caller,
        body,
        written,
        partial=partial,
        idempotency=key,
        patient=patient,
        attribution=attribution,
    )
    return outcome if isinstance(outcome, Refusal) else (201, outcome)


def is_bare(query: bytes, headers: Mapping[str, str]) -> bool:
    """Whether a request is no more than its body."""
    return not query and all(headers.get(name) is None for name in _SPECIAL)


def is_plain(path: str, query: bytes, headers: Mapping[str, str]) -> bool:
    """Whether a request with this head reports JSON, and asks for nothing but that: `answer_nowait` is for these."""
    return path == PATHS[0] and is_bare(query, headers) and written_as(headers) == "json"


def answer_nowait(
    services: Services,
    caller: Caller,
    request: UsageRequest,
    told: Callable[[tuple[int, dict[str, Any]] | Refusal], None],
) -> bool:
    """`answer` to a plain request without a wait: `told` hears it, now or later; false when that cannot be.

    An actor that crashes never tells, so the caller keeps a deadline.
    """
    if not caller.may(Permission.INGEST) or len(request.body) > services.settings().http.max_body_bytes:
        return False
    return report_nowait(services, caller, request.body, told)


def _denied(caller: Caller) -> Refusal | None:
    if caller.may(Permission.INGEST):
        return None
    detail = f"a caller with role {caller.role} may not do this, which needs the right to {Permission.INGEST}"
    return Refusal("forbidden", detail)


def _bound(
    services: Services, caller: Caller, request: UsageRequest, written: Written, body: bytes
) -> Idempotency | Refusal | None:
    """The request's Idempotency-Key, bound to the header fields too that say what is reported; None without one."""
    headers = request.headers
    key = headers.get("idempotency-key")
    if key is None:
        return None
    names = [DELEGATION_HEADER, *(HEADERS if isinstance(written, BinaryEvent) else ())]
    told = {name: value for name in names if (value := headers.get(name))}
    now_us = services.clock.now_us()
    return idempotency.bind(key, caller, "POST", request.path, request.query, body, now_us, told)
