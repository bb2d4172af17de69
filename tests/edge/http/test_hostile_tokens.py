"""Every hostile token through the doors: its code, never a 500, wherever a token is taken."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Raw
from trio.testing import wait_all_tasks_blocked

from asapd.edge.http.carried import token_in
from asapd.edge.http.parameters import RefusedError
from asapd.wire.keys import public_base64
from tests.edge.house import Edge
from tests.wire.hostile_tokens import CASES, HONEST, KEYS, LEARNED, Case


async def teach(edge: Edge, tenant: str = "default") -> None:
    """Have the daemon know the keys that the table takes as known."""
    for agent in LEARNED:
        key = public_base64(bytes(KEYS[agent].verify_key))
        sent = {"id": agent, "url": "http://127.0.0.1:9", "public_key": key, "tenant": tenant}
        assert (await edge.post("/agents", sent)).ok(201)
    await wait_all_tasks_blocked()


def bodies(case: Case) -> list[bytes]:
    """The request, with a document both as text and as the object it is."""
    asked: dict[str, Any] = {"action": case.action, "delegate": case.delegate}
    written = [json.dumps(case.token)]
    if case.token.startswith("{"):
        written.append(case.token)
    rest = json.dumps(asked)[1:]
    return [f'{{"token": {text}, {rest}'.encode() for text in written]


async def test_every_hostile_token_is_refused_by_validate_with_its_code(edge: Edge) -> None:
    await teach(edge)
    wrong = []
    for case in CASES:
        for body in bodies(case):
            answer = await edge.post("/delegations/validate", body)
            said = answer.json.get("code")
            # What is no JSON or no UTF-8 makes the request malformed, before there is a token.
            fits = answer.status == 200 or (answer.status == 400 and case.code == "malformed")
            if not fits or said != case.code:
                wrong.append((case.name, answer.status, said))
            elif answer.status == 200:
                document = answer.json
                assert document["valid"] is False
                assert document["explain"]["rule"]
                assert document["explain"]["remedy"]
                if case.position is not None:
                    assert document["explain"]["position"] == case.position
                    assert document["explain"]["token"] == document["token_id"]
    assert wrong == []
    assert (await edge.get("/delegations")).ok()["count"] == 0


async def test_the_honest_ones_beside_them_are_valid(edge: Edge) -> None:
    await teach(edge)
    for case in HONEST:
        for body in bodies(case):
            verdict = (await edge.post("/delegations/validate", body)).ok()
            assert (case.name, verdict["valid"], verdict["code"]) == (case.name, True, None)
            assert verdict["explain"] is None


SOME = [case for case in (*CASES[::12], *CASES[-40:]) if case.action]


async def test_hostile_tokens_are_denied_and_not_registered_by_the_other_routes(edge: Edge) -> None:
    """A part of the table, through every route that takes a token."""
    await teach(edge)
    for case in SOME:
        asked = {"token": case.token, "task_id": "t", "estimate": {"cost_usd": 0.01}}
        asked |= {"action": case.action, "delegate": case.delegate}
        answer = await edge.post("/delegations/authorize", json.dumps(asked).encode())
        assert answer.status in {400, 403}, (case.name, answer.body)
        assert answer.json["code"] == case.code, case.name
        if answer.status == 403:
            assert answer.json["explain"]["rule"]
        if case.action != "task.execute" or case.delegate is not None:
            continue  # neither is asked when a token is registered
        terms = {"delegator": "urn:asap:agent:a", "delegate": "urn:asap:agent:b", "scopes": ["task.x"]}
        terms |= {"constraints": {"expires_at": "2027-01-15T08:30:00Z"}}
        for sent in ({"token": case.token}, {**terms, "parent": case.token}):
            answer = await edge.post("/delegations", json.dumps(sent).encode())
            assert 400 <= answer.status < 500, (case.name, answer.body)
            assert answer.json["code"] == case.code or "parent" in sent, case.name
    assert (await edge.get("/delegations")).ok()["count"] == 0


@given(st.binary(max_size=60))
def test_any_bytes_in_the_place_of_a_token_are_text_or_refused(raw: bytes) -> None:
    found: str | None = None
    with suppress(RefusedError):
        found = token_in(Raw(raw), "token")
    assert found is None or isinstance(found, str)


@pytest.mark.parametrize("body", [b'{"token": "\\ud800"}', b'{"token": "\xff"}', b'{"token": {"delegation": "\xff"}}'])
async def test_what_is_no_text_is_malformed(edge: Edge, body: bytes) -> None:
    answer = await edge.post("/delegations/validate", body)
    assert answer.json["code"] == "malformed"


@pytest.mark.parametrize("token", [b"5", b"true", b"[]", b"null"])
async def test_what_is_neither_text_nor_a_document_is_invalid(edge: Edge, token: bytes) -> None:
    problem = (await edge.post("/delegations/validate", b'{"token": %s}' % token)).refused(422)
    assert problem["errors"][0]["field"] == "token"
