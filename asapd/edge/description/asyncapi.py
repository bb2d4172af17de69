"""The description of what is live, in AsyncAPI 3.0: WebSockets and server-sent events."""

from __future__ import annotations

from typing import Any

import msgspec

from asapd.edge.description.operation import OBJECT, TEXT, Schema, one_of, reference
from asapd.edge.description.shapes import SHAPES, record
from asapd.wire.jsonrpc import MOST_IN_BATCH, Ack, Subscribe, SubscribeDelegations

_NUMBER: Schema = {"type": "integer", "minimum": 0}
_TEXT_OR_NULL: Schema = {"type": ["string", "null"]}
_SUBSCRIBED = record("The subscription begins.", {"subscribed": {"const": True}, "seq": _NUMBER})
_UNSUBSCRIBED = record("It ended.", {"unsubscribed": {"const": True}})
_GAP = record("Nothing is kept any more of these.", {"first_missing": _NUMBER, "last_missing": _NUMBER})
_RESET = record("No transition has the number that was to be resumed after; it goes on from now.", {"after": _NUMBER})
_TRANSITION: dict[str, Schema] = {"event": one_of("opened", "escalated", "resolved"), "seq": _NUMBER}
_BREACH = record(
    "A breach was opened, escalated or resolved.",
    {**_TRANSITION, "breach": reference("Breach"), "silence": {}, "acknowledged": {}},
)
_KNOWN_BREACH = record("The same, in the members that reference clients know.", {**_TRANSITION, "breach": OBJECT})
_GOODBYE = record("The stream ends.", {}, {"reason": TEXT})

ASKED: dict[str, tuple[type[msgspec.Struct] | None, Schema]] = {
    "sla.subscribe": (Subscribe, _SUBSCRIBED),
    "sla.unsubscribe": (None, _UNSUBSCRIBED),
    "sla.ack": (Ack, record("The cursor stands there.", {"cursor": TEXT, "acknowledged": _NUMBER})),
    "delegation.subscribe": (SubscribeDelegations, _SUBSCRIBED),
    "delegation.unsubscribe": (None, _UNSUBSCRIBED),
    "ping": (None, record("It is there.", {"pong": {"const": True}})),
}
"""Methods that a client calls over a WebSocket, each with its parameters and its result."""

TOLD: dict[str, Schema] = {
    "sla.breach": _BREACH,
    "gap": _GAP,
    "reset": _RESET,
    "delegation.revoked": record(
        "Tokens were revoked.",
        {
            "seq": _NUMBER,
            "cause": _TEXT_OR_NULL,
            "reason": _TEXT_OR_NULL,
            "source": _TEXT_OR_NULL,
            "revoked_at": TEXT,
            "delegations": {"type": "array", "items": OBJECT},
        },
    ),
    "delegation.unauthorised": record(
        "Usage came under a token that does not hold.",
        {"seq": _NUMBER, "events": {"type": "array", "items": OBJECT}},
    ),
    "delegation.gap": _GAP,
}
"""Notifications over a WebSocket, each with its parameters."""

STREAMED: dict[str, dict[str, Schema]] = {
    "/events": {"sla.breach": _BREACH, "gap": _GAP, "reset": _RESET, "goodbye": _GOODBYE},
    "/usage/stream": {
        "usage": reference("StoredEvent"),
        "gap": record("Retention took some behind this.", {"after": _NUMBER}),
        "reset": record("No row ever had this number; it goes on from now.", {"after": _NUMBER}),
        "goodbye": _GOODBYE,
    },
}
"""Server-sent events by address, each with its data."""

_BEATS: dict[str, Schema] = {
    "heartbeat": record("The client is there.", {"type": {"const": "ping"}}),
    "heartbeat.answer": record("So is asapd.", {"type": {"const": "pong"}}),
}
"""How clients of the reference implementation see whether the connection holds."""

_BATCHES: dict[str, Schema] = {
    "batch": {"type": "array", "items": OBJECT, "minItems": 1, "maxItems": MOST_IN_BATCH},
    "batch.answer": {"type": "array", "items": OBJECT, "minItems": 1},
}
"""Several requests at once, and their answers in one array; notifications have none."""

_WEBSOCKETS = {"live": "/ws", "reference": "/asap/ws"}


def document(version: str) -> dict[str, Any]:
    """The description, for a version of asapd."""
    channels: dict[str, Any] = {}
    operations: dict[str, Any] = {}
    for channel, address in _WEBSOCKETS.items():
        told = TOLD if channel == "live" else {**TOLD, "sla.breach": _KNOWN_BREACH}
        messages = {name: _message(name, schema) for name, schema in _frames(told).items()}
        channels[channel] = {"address": address, "messages": messages, "bindings": {"ws": {"method": "GET"}}}
        channels[channel]["messages"] |= {name: _message(name, schema) for name, schema in _BATCHES.items()}
        operations[f"{channel}.batch"] = _answered(channel, "batch", "batch.answer")
        for method in ASKED:
            operations[f"{channel}.{method}"] = _answered(channel, method, f"{method}.result", f"{method}.error")
        operations |= {f"{channel}.{name}": _operation("send", channel, name) for name in TOLD}
    channels["reference"]["messages"] |= {name: _message(name, schema) for name, schema in _BEATS.items()}
    operations["reference.heartbeat"] = _answered("reference", "heartbeat", "heartbeat.answer")
    for address, events in STREAMED.items():
        channel = address.strip("/").replace("/", ".")
        messages = {name: _message(name, schema) for name, schema in events.items()}
        channels[channel] = {"address": address, "messages": messages, "bindings": {"http": {}}}
        operations |= {f"{channel}.{name}": _operation("send", channel, name) for name in events}
    _, components = msgspec.json.schema_components(
        [shape for shape, _ in ASKED.values() if shape is not None], ref_template="#/components/schemas/{name}"
    )
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": "asapd",
            "version": version,
            "description": "What asapd tells as it happens. /openapi.json describes the rest.",
            "license": {"name": "Apache-2.0"},
        },
        "defaultContentType": "application/json",
        "channels": channels,
        "operations": operations,
        "components": {"schemas": components | {name: SHAPES[name] for name in ("Breach", "StoredEvent")}},
    }


def _frames(told: dict[str, Schema]) -> dict[str, Schema]:
    """Every message of a WebSocket by name, in JSON-RPC 2.0, with the notifications that it sends."""
    version: dict[str, Schema] = {"jsonrpc": {"const": "2.0"}}
    answered: dict[str, Schema] = {**version, "id": {"type": ["string", "integer", "null"]}}
    failed = record(
        "It was refused.", {**answered, "error": record("Why.", {"code": {"type": "integer"}, "message": TEXT})}
    )
    frames: dict[str, Schema] = {}
    for method, (shape, result) in ASKED.items():
        params = OBJECT if shape is None else reference(shape.__name__)
        needed: dict[str, Schema] = {"params": params} if shape is Ack else {}
        frames[method] = record(
            "A request.",
            {**version, "method": {"const": method}, **needed},
            {"params": params, "id": answered["id"]},
        )
        frames[f"{method}.result"] = record("Its answer.", {**answered, "result": result})
        frames[f"{method}.error"] = failed
    for name, params in told.items():
        frames[name] = record("A notification.", {**version, "method": {"const": name}, "params": params})
    return frames


def _message(name: str, schema: Schema) -> dict[str, Any]:
    return {"name": name, "payload": schema}


def _answered(channel: str, message: str, *answers: str) -> dict[str, Any]:
    """An operation that a client begins."""
    replies = [{"$ref": f"#/channels/{channel}/messages/{answer}"} for answer in answers]
    reply = {"channel": {"$ref": f"#/channels/{channel}"}, "messages": replies}
    return {**_operation("receive", channel, message), "reply": reply}


def _operation(action: str, channel: str, message: str) -> dict[str, Any]:
    return {
        "action": action,
        "channel": {"$ref": f"#/channels/{channel}"},
        "messages": [{"$ref": f"#/channels/{channel}/messages/{message}"}],
    }
