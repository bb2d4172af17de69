"""What conformance makes of answers about delegations: what cannot be seen is never taken for well."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nacl.signing import SigningKey

from asapd.core.delegation import Claims
from asapd.core.types import SECOND_US
from asapd.wire import conformance_delegations as delegations
from asapd.wire.conformance import FINDINGS, Answer, Finding
from asapd.wire.conformance_delegations import FORGED, Asked
from asapd.wire.token import TokenMalformed, decode, sign, sign_document

A, B = "urn:asap:agent:a", "urn:asap:agent:b"
KEY, OTHER = SigningKey(bytes([1]) * 32), SigningKey(bytes([2]) * 32)
NOW_US = 1_800_000_000 * SECOND_US
ASKED = Asked(B, ("task.execute",), 1, 60)
NO_ANSWER = Answer(0, trouble="no_answer", detail="silence")


def raw(key: SigningKey) -> bytes:
    return bytes(key.verify_key)


def ok(value: Any) -> Answer:
    return Answer(200, "application/json", json.dumps(value).encode())


def created(value: Any) -> Answer:
    return Answer(201, "application/json", json.dumps(value).encode())


def codes(found: Any) -> list[str]:
    return [one.code for one in found]


@pytest.mark.parametrize(
    ("status", "lenient", "strict"),
    [
        (401, [], []),
        (403, [], []),
        (404, [], []),
        (405, [], []),
        (501, [], []),
        (400, [], ["delegation_refusal_unclear"]),
        (422, [], ["delegation_refusal_unclear"]),
        (429, [], ["delegation_refusal_unclear"]),
        (200, ["delegation_open"], ["delegation_open"]),
        (201, ["delegation_open"], ["delegation_open"]),
        (500, ["delegation_error"], ["delegation_error"]),
        (503, ["delegation_error"], ["delegation_error"]),
    ],
)
def test_what_must_be_refused_is_judged(status: int, lenient: list[str], strict: list[str]) -> None:
    assert codes(delegations.judge_refusal(Answer(status), "GET", "delegation_open")) == lenient
    assert codes(delegations.judge_closed(Answer(status), "POST", "delegation_open")) == strict


def test_silence_is_no_refusal() -> None:
    assert codes(delegations.judge_refusal(NO_ANSWER, "GET", "delegation_open")) == ["delegation_no_answer"]
    assert codes(delegations.judge_closed(NO_ANSWER, "POST", "delegation_open")) == ["delegation_no_answer"]
    assert delegations.is_offered(NO_ANSWER)


def claims(delegator: str = A, **said: Any) -> Claims:
    return Claims(
        said.get("id", "j"),
        delegator,
        said.get("delegate", B),
        said.get("scopes", ASKED.scopes),
        said.get("max_tasks", 1),
        None,
        said.get("issued_at_us", NOW_US),
        said.get("expires_at_us", NOW_US + 60 * SECOND_US),
        said.get("not_before_us"),
    )


def token(delegator: str = A, key: SigningKey = KEY, **said: Any) -> str:
    return sign(claims(delegator, **said), key)


AGO_US = 200 * SECOND_US


@pytest.mark.parametrize(
    ("answer", "issued", "expected"),
    [
        (created({"token": token()}), "j", []),
        (created({"token": token(not_before_us=NOW_US)}), "j", []),
        # Its clock is half a minute behind, and then ahead.
        (created({"token": token(issued_at_us=NOW_US - AGO_US // 8, expires_at_us=NOW_US + AGO_US // 8)}), "j", []),
        (created({"token": token(issued_at_us=NOW_US + AGO_US, expires_at_us=NOW_US + AGO_US)}), "j", []),
        (NO_ANSWER, None, ["delegation_not_issued"]),
        (ok({"token": token()}), None, ["delegation_not_issued"]),
        (Answer(404), None, ["delegation_not_issued"]),
        (created({"token": "x.y.z"}), None, ["delegation_token_malformed"]),
        (created({"token": FORGED}), None, ["delegation_token_malformed"]),
        (created({"token": 5}), None, ["delegation_token_malformed"]),
        (created([]), None, ["delegation_token_malformed"]),
        (created({"token": sign_document(claims(), KEY)}), "j", ["delegation_token_form"]),
        (created({"token": sign_document(claims(issued_at_us=None), KEY)}), "j", ["delegation_token_form"]),
        (created({"token": token(scopes=("*",))}), "j", ["delegation_token_differs"]),
        (created({"token": token(max_tasks=None)}), "j", ["delegation_token_differs"]),
        (created({"token": token(delegate=A)}), "j", ["delegation_token_differs"]),
        (created({"token": token(expires_at_us=NOW_US + AGO_US)}), "j", ["delegation_token_differs"]),
        (created({"token": token(not_before_us=NOW_US + AGO_US // 8)}), "j", ["delegation_token_differs"]),
        (created({"token": token(issued_at_us=NOW_US - 2 * AGO_US)}), "j", ["delegation_token_differs"]),
        (
            created({"token": token(issued_at_us=NOW_US - AGO_US, expires_at_us=NOW_US - AGO_US + 60 * SECOND_US)}),
            "j",
            ["delegation_token_expired"],
        ),
        (created({"token": token(expires_at_us=NOW_US)}), "j", ["delegation_token_expired"]),
    ],
)
def test_what_was_issued_is_held_to_what_was_asked(answer: Answer, issued: str | None, expected: list[str]) -> None:
    found_token, found = delegations.judge_issued(answer, ASKED, NOW_US)
    assert (found_token and found_token.claims.id, codes(found)) == (issued, expected)


@pytest.mark.parametrize(
    ("id_", "plain"),
    [
        ("del_01M7W4Y2P43K1RX387DR155YGC", True),
        ("urn:uuid:6ba7b810-9dad-11d1-80b4-00c04fd430c8", True),
        ("a..b", True),
        ("...", True),
        (".", False),
        ("..", False),
        ("../../admin/erase?all=1", False),
        ("/", False),
        ("#x", False),
        ("%2e%2e", False),
        ("a;b", False),
        ("a\\b", False),
    ],
)
def test_an_id_that_would_lead_a_request_elsewhere_is_told(id_: str, plain: bool) -> None:
    _, found = delegations.judge_issued(created({"token": token(id=id_)}), ASKED, NOW_US)
    assert codes(found) == ([] if plain else ["delegation_id_unsafe"])
    assert delegations.is_plain_id(id_) is plain


@pytest.mark.parametrize(
    ("said", "key", "expected"),
    [
        (token(), raw(KEY), []),
        (token(), raw(OTHER), ["delegation_token_signature"]),
        (sign_document(claims(), KEY), raw(KEY), []),
        (sign_document(claims(), KEY), raw(OTHER), ["delegation_token_signature"]),
        (token(), None, []),
        (token(B), raw(KEY), ["delegation_token_foreign"]),
        (token(B, OTHER), None, ["delegation_token_foreign"]),
        (token(B, OTHER), raw(KEY), ["delegation_token_foreign", "delegation_token_signature"]),
    ],
)
def test_a_token_has_to_be_from_the_delegator_by_their_key(said: str, key: bytes | None, expected: list[str]) -> None:
    assert codes(delegations.judge_signer(decode(said), A, key)) == expected


def test_an_issued_delegation_is_listed_and_shown() -> None:
    assert codes(delegations.judge_listed(ok([{"id": "j"}]), "j")) == []
    for answer in (ok([]), ok({"data": []}), ok([1]), Answer(401), NO_ANSWER):
        assert codes(delegations.judge_listed(answer, "j")) == ["delegation_not_listed"]
    assert codes(delegations.judge_shown(ok({"id": "j", "active": True}), "j")) == []
    for answer in (
        ok({"id": "j", "active": False}),
        ok({"id": "k", "active": True}),
        ok({"id": "j", "active": "yes"}),
        ok([]),
        Answer(404),
        Answer(500),
        NO_ANSWER,
    ):
        assert codes(delegations.judge_shown(answer, "j")) == ["delegation_not_shown"]


def test_only_a_revocation_that_is_seen_is_one() -> None:
    gone, ended = Answer(204), ok({"id": "j", "active": False})
    for shown in (ended, Answer(404), Answer(410)):
        assert codes(delegations.judge_revoked(gone, shown, "j")) == []
    for revoked, shown, detail in (
        (gone, ok({"id": "j", "active": True}), "shown as active"),
        (gone, ok({"id": "k", "active": False}), "cannot be seen: GET was answered 200"),
        (gone, ok({"id": "j", "active": 0}), "cannot be seen"),
        (gone, ok([]), "cannot be seen"),
        (gone, Answer(200, "application/json", b"x"), "cannot be seen"),
        (gone, Answer(500), "cannot be seen: GET was answered 500"),
        (gone, Answer(401), "cannot be seen: GET was answered 401"),
        (gone, NO_ANSWER, "cannot be seen: silence"),
        (Answer(200), ended, "DELETE was answered 200"),
        (NO_ANSWER, ended, "silence"),
    ):
        (found,) = delegations.judge_revoked(revoked, shown, "j")
        assert (found.check, found.code) == ("revocation", "delegation_not_revoked")
        assert detail in found.detail


def test_the_forged_token_is_one_that_nobody_may_accept() -> None:
    with pytest.raises(TokenMalformed):
        decode(FORGED)
    assert msgspec.json.decode(ASKED.body()) == {
        "delegate": B,
        "scopes": ["task.execute"],
        "max_tasks": 1,
        "expires_in_seconds": 60,
    }


_member = st.sampled_from(["id", "token", "active"])
_value = st.none() | st.booleans() | st.integers() | st.text(max_size=8) | st.just("j") | st.just(token(id="../j"))
_json = st.recursive(
    _value, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_member, inner, max_size=3), max_leaves=8
)


@given(st.binary(max_size=60) | _json.map(lambda value: json.dumps(value).encode()), st.sampled_from([200, 201, 503]))
def test_nothing_an_agent_sends_breaks_the_judge(body: bytes, status: int) -> None:
    answer = Answer(status, "application/json", body)
    issued, found = delegations.judge_issued(answer, ASKED, NOW_US)
    if issued is not None:
        found += delegations.judge_signer(issued, B, raw(KEY))
    found += [*delegations.judge_listed(answer, "j"), *delegations.judge_shown(answer, "j")]
    found += [
        *delegations.judge_revoked(Answer(204), answer, "j"),
        *delegations.judge_closed(answer, "POST", "delegation_open"),
    ]
    assert all(isinstance(one, Finding) and one.code in FINDINGS for one in found)
