"""What the description of one operation is made of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from asapd.core.access import Permission

Schema = Mapping[str, Any]
"""A schema in JSON Schema 2020-12, as OpenAPI 3.1 has them."""
Shape = Schema | type[msgspec.Struct]
"""A schema, or the struct that a body is decoded into."""

JSON = "application/json"
NDJSON = "application/x-ndjson"
EVENTS = "text/event-stream"

ADMINISTER = (Permission.ADMINISTER,)
INGEST = (Permission.INGEST,)
OPERATE = (Permission.OPERATE,)
READ = (Permission.READ,)
READ_ALL = (Permission.READ_ALL,)

TEXT: Schema = {"type": "string"}
OBJECT: Schema = {"type": "object"}
BINARY: Schema = {}


class Answer(msgspec.Struct, frozen=True):
    """An answer that is no refusal. `content` is by media type; an answer without any has no body."""

    status: int
    text: str
    content: Mapping[str, Schema]


class Operation(msgspec.Struct, frozen=True):
    """One method of one path.

    `route` is such as `POST /tasks`; what varies in it stands in braces. `needs` are permissions of which a caller has
    to have one; none is for who has no key. `body` is by media type. `query` are its parameters; of a caller who leaves
    out one of `required` nothing is done.
    """

    route: str
    summary: str
    needs: tuple[Permission, ...]
    answers: tuple[Answer, ...]
    query: Mapping[str, Schema] = msgspec.field(default_factory=dict)
    required: frozenset[str] = frozenset()
    body: Mapping[str, Shape] = msgspec.field(default_factory=dict)
    may_be_empty: bool = False
    idempotency_key: bool = False

    @property
    def method(self) -> str:
        """In capitals."""
        return self.route.partition(" ")[0]

    @property
    def path(self) -> str:
        """With what varies in braces."""
        return self.route.partition(" ")[2]


def reference(name: str) -> Schema:
    """The schema of a component."""
    return {"$ref": f"#/components/schemas/{name}"}


def shows(schema: Schema = OBJECT, text: str = "What was asked for", *, status: int = 200) -> Answer:
    """An answer in JSON."""
    return Answer(status, text, {JSON: schema})


def made(schema: Schema = OBJECT, text: str = "It was made") -> Answer:
    """The answer when something new came of it."""
    return shows(schema, text, status=201)


def page(row: Schema = OBJECT, text: str = "A page of the list") -> Answer:
    """A page of a list."""
    paged = {"data": {"type": "array", "items": row}}
    return shows({"allOf": [reference("Page"), {"type": "object", "properties": paged}]}, text)


def one_of(*words: str) -> Schema:
    """One of several words."""
    return {"type": "string", "enum": list(words)}
