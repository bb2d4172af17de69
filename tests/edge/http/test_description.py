"""The description of the API, held to the routes, the parameters, the bodies and the answers that there are."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from asapd.core.types import MAX_INT, Role
from asapd.edge.description.openapi import SUBJECTS, document, roles
from asapd.edge.description.operation import Operation
from asapd.edge.sessions import COOKIE
from tests.edge.house import Edge, Reply

AGENT = "urn:asap:agent:a"
DOCUMENT = document("1.2.3")
OPERATIONS = [operation for _, group in SUBJECTS.values() for operation in group]
METHODS = {"GET", "POST", "PUT", "DELETE", "PATCH"}
BODIES = [
    (operation, shape) for operation in OPERATIONS for shape in operation.body.values() if isinstance(shape, type)
]
# Reads the checkpoints of its body before its parameters, which are those of the GET.
BODY_FIRST = "POST /audit/verify"
# What takes no notice of parameters: what needs no key, validations, exporters of OpenTelemetry, a WebSocket.
NO_NOTICE = {
    *(operation.route for operation in OPERATIONS if not operation.needs),
    *("POST /usage/validate", "POST /asap/usage/validate", "POST /v1/traces", "POST /v1/metrics"),
    *("GET /ws", "GET /asap/ws"),
}


@pytest.fixture
async def edge(edge: Edge) -> Edge:
    """With an agent in the directory, since much is only asked of one that is there."""
    assert (await edge.post("/agents", {"id": AGENT, "url": "http://127.0.0.1:9"})).status == 201
    return edge


def every_object(value: Any) -> Iterator[dict[str, Any]]:
    """Every object in the document."""
    if isinstance(value, dict):
        yield value
        for one in value.values():
            yield from every_object(one)
    elif isinstance(value, list):
        for one in value:
            yield from every_object(one)


def address(operation: Operation) -> str:
    """A path with something in it for everything that varies."""
    known = {"agent": AGENT, "letter": "1"}
    return re.sub(r"\{(\w+)\}", lambda found: known.get(found[1], "none"), operation.path)


def with_required(operation: Operation) -> dict[str, str]:
    """Values for what has to be given."""
    values = {"id": "1", "from": "1", "agent": AGENT, "start": "2026-01-01T00:00:00Z", "group_by": "agent"}
    return {name: values[name] for name in sorted(operation.required)}


async def ask(edge: Edge, operation: Operation, parameters: dict[str, str], body: Any = b"") -> Reply:
    query = "&".join(f"{name}={value}" for name, value in parameters.items())
    return await edge.call(operation.method, f"{address(operation)}?{query}", body)


def refusal(reply: Reply, status: int) -> str:
    """What a refusal says, in either form."""
    assert reply.status == status, reply
    detail: str = reply.json["detail"]
    return detail


async def test_every_route_is_described_and_every_described_one_exists(edge: Edge) -> None:
    there = set()
    for rule in edge.app.url_map.iter_rules():
        choice = re.search(r"<any\(([^)]+)\):\w+>", rule.rule)
        for option in choice[1].split(", ") if choice else [""]:
            path = re.sub(r"<(?:\w+:)?(\w+)>", r"{\1}", rule.rule.replace(choice[0], option) if choice else rule.rule)
            there |= {f"{method} {path}" for method in METHODS & set(rule.methods or {"GET"})}
    assert sorted(operation.route for operation in OPERATIONS) == sorted(there)


def test_the_document_is_whole() -> None:
    components = DOCUMENT["components"]["schemas"]
    references = {one["$ref"] for one in every_object(DOCUMENT) if isinstance(one.get("$ref"), str)}
    assert references <= {f"#/components/schemas/{name}" for name in components}
    names = [operation["operationId"] for methods in DOCUMENT["paths"].values() for operation in methods.values()]
    assert len(set(names)) == len(names) == len(OPERATIONS)
    for operation in OPERATIONS:
        assert operation.required <= set(operation.query)
        assert operation.answers
    for one in every_object(components):
        if isinstance(one.get("required"), list) and "properties" in one:
            assert set(one["required"]) <= set(one["properties"])


def test_a_count_of_tokens_that_is_left_out_is_not_said_to_be_zero() -> None:
    counts = [DOCUMENT["components"]["schemas"][name]["properties"] for name in ("WireEvent", "WireMetrics")]
    whole = {"type": "integer", "minimum": 0, "maximum": MAX_INT}
    assert [one[name] for one in counts for name in ("tokens_in", "tokens_out")] == [whole] * 4


async def test_the_parameters_of_an_operation_are_those_that_it_knows(edge: Edge) -> None:
    for operation in OPERATIONS:
        if operation.route in NO_NOTICE or operation.route == BODY_FIRST:
            continue
        given = with_required(operation)
        detail = refusal(await ask(edge, operation, {**given, "nonsense": "1"}), 400)
        known = re.search(r"nonsense is not a parameter here; there are (.*)", detail)
        assert known is not None, (operation.route, detail)
        assert sorted(operation.query) == ([] if known[1] == "none" else known[1].split(", ")), operation.route
        for name in operation.required:
            without = {other: value for other, value in given.items() if other != name}
            assert name in refusal(await ask(edge, operation, without), 400), operation.route


def test_a_walk_over_the_log_has_the_same_parameters_with_checkpoints_as_without() -> None:
    by_route = {operation.route: operation for operation in OPERATIONS}
    assert by_route[BODY_FIRST].query == by_route["GET /audit/verify"].query


async def test_the_words_that_a_parameter_may_be_are_those_that_are_taken(edge: Edge) -> None:
    for operation in OPERATIONS:
        for name, schema in operation.query.items():
            if "enum" in schema and operation.route != BODY_FIRST:
                detail = refusal(await ask(edge, operation, {**with_required(operation), name: "moon"}), 400)
                words = re.search(r"must be one of:? (.*)", detail)
                assert words is not None, (operation.route, detail)
                assert sorted(words[1].split(", ")) == sorted(schema["enum"]), (operation.route, name)


async def test_a_body_has_the_members_that_are_described(edge: Edge) -> None:
    for operation, shape in BODIES:
        schema = DOCUMENT["components"]["schemas"][shape.__name__]
        unknown = (await ask(edge, operation, {}, {"nonsense": 1})).refused(422)
        assert unknown["errors"][0]["field"] in {"nonsense", *schema["required"]}, operation.route
        for name in schema["properties"]:
            # No member is a list of a list of nothing, so each is refused, but none as unknown.
            answer = await ask(edge, operation, {}, {name: [[]]})
            assert answer.status >= 400, (operation.route, name)
            assert f"{name} is not a field" not in answer.json["detail"], operation.route


async def test_a_body_may_be_left_out_where_that_is_said(edge: Edge) -> None:
    for operation, shape in BODIES:
        status = (await ask(edge, operation, {})).status
        assert (status not in {400, 422}) == operation.may_be_empty, (operation.route, shape)


async def test_what_takes_no_body_refuses_a_member_by_its_name(edge: Edge) -> None:
    without = [operation for operation in OPERATIONS if operation.method == "POST" and not operation.body]
    assert {"POST /login", "POST /reload"} <= {operation.route for operation in without}
    for operation in without:
        problem = (await ask(edge, operation, {}, {"nonsense": 1})).refused(422)
        assert problem["errors"] == [{"field": "nonsense", "reason": "is not a field here; there are none"}]
        assert "takes no body" in problem["detail"], operation.route
        assert (await ask(edge, operation, {}, b"{} x")).refused(400)["code"] == "malformed", operation.route
    assert edge.calls == []


async def test_the_roles_of_an_operation_are_those_that_get_further(edge: Edge) -> None:
    for operation in OPERATIONS:
        if "WebSocket" in operation.answers[0].text or "stream" in operation.answers[0].content:
            continue
        for role in Role:
            # What is sent is wrong, where there is anything to do wrong: it is a matter of who gets so far.
            mild = "dry_run=true&" if "dry_run" in operation.query else ""
            answer = await edge.call(operation.method, f"{address(operation)}?{mild}nonsense=1", b"", key=role)
            further = answer.status != 403
            assert further == (not operation.needs or role in roles(operation.needs)), (operation.route, role)


async def test_it_is_open_and_says_of_which_version_it_is(edge: Edge) -> None:
    answer = (await edge.get("/openapi.json", key="")).ok()
    assert answer == msgspec.json.decode(msgspec.json.encode(document("0")))
    page = await edge.get("/docs", key="")
    text = page.body.decode()
    assert (page.status, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
    parts = re.findall(r'(?:src|href)="(/[^"]*)"', text)
    assert "/web/docs.js" in parts
    for part in parts:
        assert (await edge.get(part, key="")).status == 200, part


STREAMS = {"/events", "/usage/stream", "/ws", "/asap/ws"}


async def test_the_session_of_the_page_is_named_where_it_is_served(edge: Edge) -> None:
    owner = edge.services.ring.find(edge.keys["admin"])
    assert owner is not None
    fields = {"Cookie": f"{COOKIE}={edge.services.sessions.open(owner)[0]}"}
    for operation in OPERATIONS:
        if not operation.needs or operation.path in STREAMS:
            continue
        described = DOCUMENT["paths"][operation.path][operation.method.lower()]
        answer = await edge.call(operation.method, address(operation), key=None, headers=fields)
        assert (answer.status not in {401, 403}) is ({"session": []} in described["security"]), operation.route
