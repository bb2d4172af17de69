"""Refusals as problem documents (RFC 9457)."""

from __future__ import annotations

from decimal import Decimal

import msgspec
import pytest

from asapd.core.delegation import Denied, Reason
from asapd.core.errors import FieldError, Refusal
from asapd.wire.problem import CODES, denied_as_refusal, encode_json, problem, status_of, usd


@pytest.mark.parametrize("code", CODES)
def test_every_code_makes_a_whole_document(code: str) -> None:
    document = problem(Refusal(code, "what and why"))
    status, title = CODES[code]
    assert document == {
        "type": f"urn:asapd:problem:{code}",
        "title": title,
        "status": status,
        "detail": "what and why",
        "code": code,
    }
    assert 400 <= status_of(code) < 600


def test_errors_extra_and_another_status_are_taken_in() -> None:
    refusal = Refusal("invalid", "no", (FieldError("a", "is bad"), FieldError("b", "too", 3)), {"remaining": None})
    document = msgspec.json.decode(encode_json(problem(refusal, status=403)))
    assert document["status"] == 403
    assert document["remaining"] is None
    assert document["errors"] == [{"field": "a", "reason": "is bad"}, {"field": "b", "reason": "too", "index": 3}]


@pytest.mark.parametrize("reason", Reason)
def test_every_denial_is_a_refusal_with_its_own_code(reason: Reason) -> None:
    document = problem(denied_as_refusal(Denied(reason, "why", "tok")))
    assert document["code"] == reason
    assert document["token_id"] == "tok"


def test_money_is_a_number_with_its_exact_decimals() -> None:
    assert encode_json({"cost_usd": usd(250_000), "none": usd(None)}) == b'{"cost_usd":0.25,"none":null}'
    assert usd(1) == Decimal("0.000001")
