"""Delegations as documents: signed over their canonical form, read as what that form says and nothing else."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest
import rfc8785
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from nacl.signing import SigningKey

from asapd.core.delegation import Claims
from asapd.core.types import AGENT_URN
from asapd.wire.delegation_document import read_document
from asapd.wire.token import SignedToken, TokenMalformed, decode, lineage, sign, sign_document, verify
from tests.wire.hostile_tokens import KEYS, NOW_US, PARENT, A, B, C, doc, document

PUBLIC = bytes(KEYS[A].verify_key)
CLAIMS = Claims("d1", A, B, ("task.*", "data.read"), 5, 1_500_000, NOW_US, NOW_US + 3_600_000_001, NOW_US + 1)


def published(inner: dict[str, Any], key: SigningKey, *, whole: bool = False) -> str:
    """A document signed with the published implementation of RFC 8785."""
    signature = key.sign(rfc8785.dumps({"delegation": inner} if whole else inner)).signature
    return json.dumps({"delegation": {**inner, "signature": base64.b64encode(signature).decode()}})


def read(text: str) -> SignedToken | str:
    """The token, or the reason why it is none; whatever else is raised fails the test."""
    try:
        return decode(text)
    except TokenMalformed as error:
        return error.reason


@pytest.mark.parametrize("whole", [False, True])
def test_a_document_says_what_its_members_say(whole: bool) -> None:
    token = decode(doc(whole=whole, issued_at="2027-01-15T07:00:00.5Z"))
    assert token.claims == Claims(
        "doc-a-b",
        A,
        B,
        ("task.*", "data.read"),
        5,
        1_500_000,
        NOW_US - 3_599_500_000,
        NOW_US + 3_600_000_000,
        None,
    )
    assert verify(token, PUBLIC)
    assert not verify(token, bytes(KEYS[B].verify_key))
    assert (token.parent, token.parent_id, token.kid) == (None, None, None)


def test_a_written_document_is_its_own_canonical_form() -> None:
    text = sign_document(CLAIMS, KEYS[A])
    assert rfc8785.dumps(json.loads(text)).decode() == text
    token = decode(text)
    assert (token.text, token.claims) == (text, CLAIMS)
    assert verify(token, PUBLIC)


def test_white_space_order_and_spelling_of_numbers_make_no_other_token() -> None:
    made = document(constraints={"max_cost_usd": 10.0, "max_tasks": 5, "expires_at": "2027-01-15T09:00:00Z"})
    honest = decode(json.dumps(made))
    for text in (
        json.dumps(made, indent=3),
        json.dumps(made, sort_keys=True, separators=(",", ":")),
        json.dumps(made).replace("10.0", "10"),
        json.dumps(made).replace("10.0", "1e1"),
        json.dumps(made).replace("10.0", "10.000"),
        json.dumps(made).replace("task.*", "\\u0074ask.*"),
        "\n " + json.dumps(made) + "\t",
    ):
        token = decode(text)
        assert (token.text, token.digest, token.claims) == (honest.text, honest.digest, honest.claims)
        assert verify(token, PUBLIC)


def test_an_amount_that_doubles_cannot_tell_apart_is_one_amount() -> None:
    """Both texts have one canonical form, so one signature fits both: they have to mean the same."""
    made = document(constraints={"max_cost_usd": 9007199253.740991, "expires_at": "2027-01-15T09:00:00Z"})
    text = json.dumps(made)
    other = text.replace(repr(9007199253.740991), "9007199253.740991")
    assert text != other
    assert decode(other).claims == decode(text).claims
    assert verify(decode(other), PUBLIC)


@pytest.mark.parametrize(
    ("parent", "ids"),
    [(document(), ["doc-a-b", "d2"]), (PARENT, ["a-b", "d2"]), (doc(), ["doc-a-b", "d2"])],
    ids=["an object", "a JWS", "a document as text"],
)
def test_a_parent_comes_whole_in_either_form(parent: Any, ids: list[str]) -> None:
    token = decode(json.dumps(document(B, C, id="d2", parent=parent)))
    assert [link.claims.id for link in lineage(token)] == ids
    assert token.parent is not None
    assert verify(token.parent, PUBLIC)
    assert verify(token, bytes(KEYS[B].verify_key))


@pytest.mark.parametrize("name", ["d1", "a.b.c", "x" * 256, "https://example.com/1"])
def test_a_parent_may_be_only_named(name: str) -> None:
    token = decode(json.dumps(document(B, C, parent=name)))
    assert (token.parent, token.parent_id) == (None, name)


@pytest.mark.parametrize("parent", [None, "d0", "whole"])
def test_a_document_is_written_under_a_parent(parent: str | None) -> None:
    root = sign_document(CLAIMS, KEYS[A])
    text = sign_document(replace(CLAIMS, id="d2"), KEYS[B], parent=root if parent == "whole" else parent)
    token = decode(text)
    assert token.parent_id == ("d0" if parent == "d0" else None)
    assert (token.parent is None) == (parent != "whole")


def test_chains_mix_both_forms() -> None:
    root = sign(replace(CLAIMS, issued_at_us=NOW_US, expires_at_us=NOW_US + 5_000_000, not_before_us=None), KEYS[A])
    middle = sign_document(replace(CLAIMS, id="d2"), KEYS[B], parent=root)
    leaf = sign(replace(CLAIMS, id="d3"), KEYS[C], parent=middle)
    assert [link.claims.id for link in lineage(decode(leaf))] == ["d1", "d2", "d3"]


def test_a_jws_needs_a_time_of_issue_which_a_document_does_not() -> None:
    claims = replace(CLAIMS, issued_at_us=None)
    assert decode(sign_document(claims, KEYS[A])).claims == claims
    with pytest.raises(TokenMalformed, match="iat"):
        sign(claims, KEYS[A])


@pytest.mark.parametrize(
    ("changes", "parent"),
    [
        ({"id": ""}, None),
        ({"scopes": ("a b",)}, None),
        ({"max_tasks": 2**60}, None),
        ({"expires_at_us": 0}, None),
        ({}, "x y"),
        ({}, "{"),
        ({}, '{"\ud800'),
        ({"id": "é"}, None),
        ({"id": "\ud800"}, None),
        ({}, '{"delegation":1}'),
    ],
)
def test_what_would_not_decode_is_not_signed(changes: dict[str, Any], parent: str | None) -> None:
    with pytest.raises(TokenMalformed):
        sign_document(replace(CLAIMS, **changes), KEYS[A], parent=parent)


def test_a_fault_in_a_parent_says_which_parent() -> None:
    made = document(C, A, parent=document(B, C, parent=document(constraints={})))
    assert read(json.dumps(made)) == "parent 2: expires_at: is missing"


agents = st.from_regex(AGENT_URN, fullmatch=True)
names = st.text(alphabet=[chr(code) for code in range(0x21, 0x7F)], min_size=1, max_size=30)
times = st.integers(1, 253_402_300_799_999_999)
claims_values = st.builds(
    Claims,
    id=names,
    delegator=agents,
    delegate=agents,
    scopes=st.lists(st.sampled_from(["a", "a.*", "b.c", "*"]), min_size=1, unique=True).map(tuple),
    max_tasks=st.none() | st.integers(0, 2**53 - 1),
    max_cost_microusd=st.none() | st.integers(0, 9_007_199_254_000_000),
    issued_at_us=st.none() | times,
    expires_at_us=times,
    not_before_us=st.none() | times,
)


@settings(deadline=None)
@given(claims_values)
def test_whatever_is_signed_reads_back_exactly_and_is_canonical(claims: Claims) -> None:
    text = sign_document(claims, KEYS[A])
    assert rfc8785.dumps(json.loads(text)).decode() == text
    token = decode(sign_document(claims, KEYS[B], parent=text))
    assert token.claims == claims
    assert token.parent == decode(text)


floats = st.floats(0, 9_007_199_254, allow_nan=False).map(lambda value: round(value, 6))


@settings(max_examples=200, deadline=None)
@given(floats, st.booleans())
def test_any_amount_verifies_as_the_published_implementation_signed_it(cost: float, whole: bool) -> None:
    inner = {k: v for k, v in document()["delegation"].items() if k != "signature"}
    inner["constraints"] = {"max_cost_usd": cost, "expires_at": "2027-01-15T09:00:00Z"}
    token = read(published(inner, KEYS[A], whole=whole))
    # An amount that needs more than six decimals even in its shortest form is refused for that.
    assert isinstance(token, str) or verify(token, PUBLIC)
    if isinstance(token, str):
        assert token.startswith("max_cost_usd: must have at most six decimals")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
members = st.sampled_from(
    ["id", "delegator", "delegate", "scopes", "constraints", "parent", "issued_at", "signature", "x"]
)
limits = st.dictionaries(st.sampled_from(["max_tasks", "max_cost_usd", "expires_at", "not_before", "x"]), json_values)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(members, json_values, max_size=3), st.none() | limits)
def test_any_json_in_any_member_is_read_or_malformed(
    changes: dict[str, Any], constraints: dict[str, Any] | None
) -> None:
    inner = {**document()["delegation"], **changes}
    if constraints is not None:
        inner["constraints"] = {"expires_at": NOW_US // 1_000_000, **constraints}
    token = read(json.dumps({"delegation": inner}))
    assert isinstance(token, SignedToken | str)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_mutated_document_is_malformed_or_does_not_verify_or_is_the_same(data: st.DataObject) -> None:
    honest = decode(json.dumps(document(B, C, parent=document())))
    raw = bytearray(honest.text.encode())
    start = data.draw(st.integers(0, len(raw) - 1))
    raw[start : start + data.draw(st.integers(0, 3))] = data.draw(
        st.binary(max_size=3) | st.sampled_from([b'"', b"\\", b"{", b"[[", b"1e9", b"\\ud800", b'"x":1,', b" "])
    )
    token = read(bytes(raw).decode("latin-1"))
    if isinstance(token, SignedToken):
        both = verify(token, bytes(KEYS[B].verify_key)) and token.parent is not None and verify(token.parent, PUBLIC)
        assert token.text == honest.text or not both


@given(st.text(alphabet='{}[]":,delgation 1\\', max_size=40).map(lambda text: "{" + text))
def test_arbitrary_text_is_malformed(text: str) -> None:
    assert isinstance(read(text), str)


def test_a_level_is_read_without_its_parent() -> None:
    level = read_document(json.dumps(document(B, C, parent=PARENT)))
    assert (level.parent_text, level.parent_id) == (PARENT, None)
