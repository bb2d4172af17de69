"""JSON-RPC 2.0 of the live stream: requests are read strictly, and nothing makes the reader raise."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asapd.wire import jsonrpc
from asapd.wire.jsonrpc import Fault, Request, Subscribe, decode_request, decode_subscribe


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


def test_the_parameters_of_a_subscription_are_read_strictly() -> None:
    assert decode_subscribe({}) == Subscribe()
    assert decode_subscribe({"agent_id": "a", "min_severity": "critical", "resume_after": 0}) == Subscribe(
        "a", "critical", 0
    )


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
    assert isinstance(decode_request(text), Request | Fault)
