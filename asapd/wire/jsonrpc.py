"""JSON-RPC 2.0 messages of the live alert stream."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar

import msgspec

from asapd.core.types import AGENT_URN
from asapd.wire.mismatch import field_error

PARSE_ERROR = -32700
INVALID_REQUEST = -32600
METHOD_NOT_FOUND = -32601
INVALID_PARAMS = -32602
INTERNAL_ERROR = -32603

Id = str | int | None


class Request(msgspec.Struct, frozen=True):
    """A request; without `id` it is a notification and gets no answer."""

    method: str
    params: dict[str, Any]
    id: Id
    wants_answer: bool


class Fault(msgspec.Struct, frozen=True):
    """What is answered to a message that is no request."""

    code: int
    message: str
    id: Id = None


_CursorName = Annotated[str, msgspec.Meta(min_length=1, max_length=128)]


class Subscribe(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Parameters of `sla.subscribe`."""

    agent_id: str | None = None
    min_severity: Literal["warning", "critical"] | None = None
    resume_after: Annotated[int, msgspec.Meta(ge=0, lt=2**53)] | None = None
    cursor: _CursorName | None = None
    all: bool | None = None
    """Every transition, or only what a client of the reference implementation knows; None is by the address."""


class Ack(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Parameters of `sla.ack`."""

    cursor: _CursorName
    seq: Annotated[int, msgspec.Meta(ge=0, lt=2**53)]


class SubscribeDelegations(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Parameters of `delegation.subscribe`."""

    agent_id: str | None = None
    resume_after: Annotated[int, msgspec.Meta(ge=0, lt=2**53)] | None = None


MOST_IN_BATCH = 100
_LONGEST_BEAT = 100


class _Heartbeat(msgspec.Struct, frozen=True):
    type: Literal["ping", "pong"]


S = TypeVar("S", bound=msgspec.Struct)


def heartbeat(text: str | bytes) -> str | None:
    """`ping` or `pong` of a message that is nothing but that, as clients of the reference implementation beat."""
    if len(text) > _LONGEST_BEAT:
        return None
    try:
        return msgspec.json.decode(text, type=_Heartbeat).type
    except (msgspec.DecodeError, UnicodeError):
        return None


def decode_request(text: str | bytes) -> Request | Fault | tuple[Request | Fault, ...]:
    """A request from its text, or those of a batch (section 6 of the specification); never raises."""
    try:
        raw = msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        return Fault(PARSE_ERROR, f"Parse error: {error}")
    if not isinstance(raw, list):
        return _read(raw)
    if not 0 < len(raw) <= MOST_IN_BATCH:
        return Fault(INVALID_REQUEST, f"Invalid request: a batch has from 1 to {MOST_IN_BATCH} of them")
    return tuple(map(_read, raw))


def _read(raw: Any) -> Request | Fault:
    if not isinstance(raw, dict) or raw.get("jsonrpc") != "2.0" or not isinstance(raw.get("method"), str):
        request_id = raw.get("id") if isinstance(raw, dict) else None
        kept = request_id if isinstance(request_id, str | int) and not isinstance(request_id, bool) else None
        return Fault(INVALID_REQUEST, 'Invalid request: "jsonrpc" must be "2.0" and "method" a string', kept)
    request_id = raw.get("id")
    if isinstance(request_id, bool) or not isinstance(request_id, str | int | None):
        return Fault(INVALID_REQUEST, 'Invalid request: "id" must be a string, a whole number or null')
    params = raw.get("params")
    if params is not None and not isinstance(params, dict):
        return Fault(INVALID_PARAMS, "Invalid params: an object is needed", request_id)
    return Request(raw["method"], params or {}, request_id, "id" in raw)


def decode_subscribe(params: dict[str, Any]) -> Subscribe | str:
    """The parameters of a subscription to alerts, or what is wrong with them."""
    wanted = _convert(params, Subscribe)
    if isinstance(wanted, Subscribe) and wanted.agent_id is not None and AGENT_URN.match(wanted.agent_id) is None:
        return "agent_id must be a URN of the form urn:asap:agent:<name>"
    return wanted


def decode_ack(params: dict[str, Any]) -> Ack | str:
    """The parameters of an acknowledgement, or what is wrong with them."""
    return _convert(params, Ack)


def decode_subscribe_delegations(params: dict[str, Any]) -> SubscribeDelegations | str:
    """The parameters of a subscription to the news of delegations, or what is wrong with them."""
    return _convert(params, SubscribeDelegations)


def _convert(params: dict[str, Any], shape: type[S]) -> S | str:
    try:
        return msgspec.convert(params, shape)
    except msgspec.ValidationError as error:
        wrong = field_error(error, shape)
        return f"{wrong.field} {wrong.reason}"


def result(request_id: Id, value: Any) -> str:
    """The answer to a request."""
    return _text({"jsonrpc": "2.0", "result": value, "id": request_id})


def fault(problem: Fault) -> str:
    """The answer to what went wrong."""
    return _text({"jsonrpc": "2.0", "error": {"code": problem.code, "message": problem.message}, "id": problem.id})


def batch(answers: Sequence[str]) -> str:
    """The answer to a batch, of the answers to its requests."""
    return f"[{','.join(answers)}]"


def notification(method: str, params: Any) -> str:
    """A message that wants no answer."""
    return _text({"jsonrpc": "2.0", "method": method, "params": params})


def _text(value: Any) -> str:
    return msgspec.json.encode(value).decode()
