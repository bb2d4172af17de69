"""JSON-RPC 2.0 of the live stream: requests are read strictly, and nothing makes the reader raise."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asapd.wire import jsonrpc
from asapd.wire.jsonrpc import MOST_IN_BATCH, Fault, Request, Subscribe, decode_request, decode_subscribe


def request(**fields: Any) -> str:
    return json.dumps({"jsonrpc": "2.0", "method": "ping", "id": 1, **fields})


def test_a_request_and_a_notification_are_told_apart() -> None:
    assert decode_request(request(params={"a": 1})) == Request("ping", {"a": 1}, 1, True)
    assert decode_request(request(id="x")) == Request("ping", {}, "x", True)
    assert decode_request(request(id=None)) == Request("ping", {}, None, True)
    assert decode_request(b'{"jsonrpc":"2.0","method":"ping"}') == Request("ping", {}, None, False)


@pytest.mark.parametrize(
    ("text", "code", "id_"),
    [
        ("", jsonrpc.PARSE_ERROR, None),
        ("{", jsonrpc.PARSE_ERROR, None),
        (b"\xff", jsonrpc.PARSE_ERROR, None),
        ("[" * 100_000, jsonrpc.PARSE_ERROR, None),
        ("[]", jsonrpc.INVALID_REQUEST, None),
        ("5", jsonrpc.INVALID_REQUEST, None),
        ('{"method":"ping","id":3}', jsonrpc.INVALID_REQUEST, 3),
        ('{"method":"ping","id":true}', jsonrpc.INVALID_REQUEST, None),
        (request(jsonrpc="1.0"), jsonrpc.INVALID_REQUEST, 1),
        (request(method=5), jsonrpc.INVALID_REQUEST, 1),
        (request(id=True), jsonrpc.INVALID_REQUEST, None),
        (request(id=[1]), jsonrpc.INVALID_REQUEST, None),
        (request(id=1.5), jsonrpc.INVALID_REQUEST, None),
        (request(params=[1]), jsonrpc.INVALID_PARAMS, 1),
        (request(params="x"), jsonrpc.INVALID_PARAMS, 1),
    ],
)
def test_what_is_no_request_is_a_fault_with_its_code(text: str | bytes, code: int, id_: int | None) -> None:
    found = decode_request(text)
    assert isinstance(found, Fault)
    assert (found.code, found.id) == (code, id_)


def test_a_batch_is_read_one_by_one_and_bounded() -> None:
    assert decode_request(f"[{request()},5]") == (
        Request("ping", {}, 1, True),
        Fault(jsonrpc.INVALID_REQUEST, 'Invalid request: "jsonrpc" must be "2.0" and "method" a string'),
    )
    whole = [json.loads(request())] * MOST_IN_BATCH
    assert isinstance(decode_request(json.dumps(whole)), tuple)
    for wrong in ([], [*whole, 1]):
        found = decode_request(json.dumps(wrong))
        assert isinstance(found, Fault)
        assert (found.code, "from 1 to 100" in found.message) == (jsonrpc.INVALID_REQUEST, True)
    assert json.loads(jsonrpc.batch([jsonrpc.result(1, 2), jsonrpc.fault(Fault(3, "x"))]))[0]["result"] == 2


def test_the_parameters_of_a_subscription_are_read_strictly() -> None:
    assert decode_subscribe({}) == Subscribe()
    agent = "urn:asap:agent:a"
    assert decode_subscribe({"agent_id": agent, "min_severity": "critical", "resume_after": 0}) == Subscribe(
        agent, "critical", 0
    )


@pytest.mark.parametrize("agent", ["x", "", "urn:asap:agent:", "urn:asap:agent:a*"])
def test_a_subscription_to_what_can_be_no_agent_is_refused(agent: str) -> None:
    assert "agent_id must be a URN" in str(decode_subscribe({"agent_id": agent}))


@pytest.mark.parametrize(
    "params", [{"agent": "a"}, {"min_severity": "mild"}, {"resume_after": -1}, {"resume_after": 2**60}, {"agent_id": 1}]
)
def test_a_wrong_parameter_is_named(params: dict[str, Any]) -> None:
    assert isinstance(decode_subscribe(params), str)


def test_answers_are_json_rpc() -> None:
    assert json.loads(jsonrpc.result(1, {"a": 1})) == {"jsonrpc": "2.0", "result": {"a": 1}, "id": 1}
    assert json.loads(jsonrpc.fault(Fault(-1, "no", "x"))) == {
        "jsonrpc": "2.0",
        "error": {"code": -1, "message": "no"},
        "id": "x",
    }
    assert json.loads(jsonrpc.notification("gap", {})) == {"jsonrpc": "2.0", "method": "gap", "params": {}}


@given(st.binary() | st.text())
def test_no_text_makes_the_reader_raise(text: bytes | str) -> None:
    assert isinstance(decode_request(text), Request | Fault | tuple)
