"""The description of the whole API, in OpenAPI 3.1."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import msgspec

from asapd.core.access import Caller, Permission
from asapd.core.types import Role
from asapd.edge.description import agents, audit, compatible, delegation, host, metering
from asapd.edge.description.operation import JSON, Answer, Operation, Schema, Shape, reference
from asapd.edge.description.shapes import SHAPES
from asapd.edge.http.usage import TaskStep
from asapd.edge.sessions import COOKIE
from asapd.wire.problem import PROBLEM_JSON
from asapd.wire.usage import WireEvent

SUBJECTS: dict[str, tuple[str, tuple[Operation, ...]]] = {
    "usage": ("Usage, tasks, prices and budgets", metering.OPERATIONS),
    "delegation": ("Delegations and reservations", delegation.OPERATIONS),
    "agents": ("Agents, service levels and alerts", agents.OPERATIONS),
    "audit": ("The audit log", audit.OPERATIONS),
    "daemon": ("The daemon itself", host.OPERATIONS),
    "reference": ("For clients of the reference implementation", compatible.OPERATIONS),
}
"""Operations by tag, each with what the tag says."""

_IN_PATH = {
    "agent": "URN of the agent",
    "event": "id of the event",
    "task": "id of the task",
    "name": "its name",
    "kid": "thumbprint of the key (RFC 7638)",
    "digest": "SHA-256 of the manifest",
    "letter": "number of the dead letter",
    "entry": "id or number of the entry",
}
# A token is text or, as a document, an object; it is looked at as it came, of which a struct says nothing.
_AS_IT_CAME: Schema = {"type": ["string", "object", "null"]}


def document(version: str) -> dict[str, Any]:
    """The description, for a version of asapd."""
    operations = [operation for _, group in SUBJECTS.values() for operation in group]
    paths: dict[str, dict[str, Any]] = {}
    for tag, (_, group) in SUBJECTS.items():
        for operation in group:
            paths.setdefault(operation.path, {})[operation.method.lower()] = _described(operation, tag)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "asapd",
            "version": version,
            "description": "Usage, delegation, health, service levels and audit of the agents of this host.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/"}],
        "tags": [{"name": tag, "description": text} for tag, (text, _) in SUBJECTS.items()],
        "paths": paths,
        "components": {
            "schemas": {**_decoded(operations), **SHAPES},
            "securitySchemes": {
                "key": {"type": "http", "scheme": "bearer", "description": "An API key"},
                "session": {"type": "apiKey", "in": "cookie", "name": COOKIE, "description": "The page's session"},
            },
        },
    }


def roles(needs: tuple[Permission, ...]) -> list[str]:
    """The roles that have one of some permissions."""
    return [role for role in Role if any(Caller("", role).may(permission) for permission in needs)]


def _described(operation: Operation, tag: str) -> dict[str, Any]:
    allowed = roles(operation.needs)
    described: dict[str, Any] = {
        "operationId": re.sub(r"\W+", "_", f"{operation.method.lower()}{operation.path}").rstrip("_"),
        "tags": [tag],
        "summary": operation.summary,
        # Of several requirements one has to be met, and each names a role: OpenAPI 3.1, Security Requirement Object.
        "security": [{"key": [role]} for role in allowed]
        + ([{"session": []}] if operation.method == "GET" and Role.READER in allowed else []),
        "parameters": _parameters(operation),
        "responses": {str(answer.status): _answer(answer) for answer in operation.answers},
    }
    refusal = reference("Detail" if tag == "reference" else "Problem")
    media = JSON if tag == "reference" or operation.path.startswith("/v1/") else PROBLEM_JSON
    if operation.path.startswith("/v1/"):
        refusal = {"type": "object", "description": "google.rpc.Status"}
    described["responses"]["default"] = {"description": "Refused", "content": {media: {"schema": refusal}}}
    if operation.body:
        content = {media: {"schema": _schema(shape)} for media, shape in operation.body.items()}
        described["requestBody"] = {"content": content, "required": not operation.may_be_empty}
    return described


def _parameters(operation: Operation) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [
        {
            "name": name,
            "in": "path",
            "required": True,
            "schema": {"type": "string", "description": _IN_PATH.get(name, f"id of the {name}")},
        }
        for name in re.findall(r"\{(\w+)\}", operation.path)
    ]
    found += [
        {"name": name, "in": "query", "required": name in operation.required, "schema": schema}
        for name, schema in operation.query.items()
    ]
    if operation.idempotency_key:
        key = {"type": "string", "minLength": 1, "maxLength": 255}
        found.append({"name": "Idempotency-Key", "in": "header", "required": False, "schema": key})
    return found


def _answer(answer: Answer) -> dict[str, Any]:
    content = {media: {"schema": schema} for media, schema in answer.content.items()}
    return {"description": answer.text, **({"content": content} if content else {})}


def _schema(shape: Shape) -> Schema:
    return shape if isinstance(shape, Mapping) else reference(shape.__name__)


def _decoded(operations: list[Operation]) -> dict[str, Any]:
    """The schemas of the structs that bodies are decoded into."""
    structs: dict[type[msgspec.Struct], None] = dict.fromkeys((WireEvent, TaskStep))
    for operation in operations:
        structs |= {shape: None for shape in operation.body.values() if isinstance(shape, type)}
    _, components = msgspec.json.schema_components(structs, ref_template="#/components/schemas/{name}")
    for component in components.values():
        for name, schema in component.get("properties", {}).items():
            if schema == {}:
                component["properties"][name] = _AS_IT_CAME
            elif schema.get("type") == "integer" and schema.get("default") is False:
                del schema["default"]  # it stands for a count that was not given, which is not 0 of it
    return components
