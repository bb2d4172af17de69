"""Tokens in compact form: what is read the quick way is read as the long way reads it."""

from __future__ import annotations

import base64
import binascii
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asapd.wire import jws
from asapd.wire.strict_json import TokenMalformed
from tests.wire.hostile_tokens import CASES, payload

HEADER, SIGNATURE = (base64.urlsafe_b64encode(part).rstrip(b"=").decode() for part in (b'{"alg":"EdDSA"}', bytes(64)))


def both(text: str) -> tuple[Any, Any]:
    ways = []
    for read in (jws.read_common, jws.read_jws):
        try:
            ways.append(read(text))
        except TokenMalformed as error:
            ways.append(error.reason)
    return ways[0], ways[1]


def token(raw: bytes) -> str:
    return f"{HEADER}.{base64.urlsafe_b64encode(raw).rstrip(b'=').decode()}.{SIGNATURE}"


claims = st.dictionaries(
    st.sampled_from(["iss", "aud", "jti", "iat", "exp", "nbf", "scp", "x-asap-constraints", "prf", "x"]),
    st.none()
    | st.booleans()
    | st.integers(-1, 2**54)
    | st.floats(0, 10)
    | st.sampled_from(["a", "é", "", "task.*", "a\n"])
    | st.lists(st.sampled_from(["a", "a.*", "*", "é", "a b"]), max_size=3)
    | st.fixed_dictionaries(
        {}, optional={"max_tasks": st.integers(-1, 3) | st.none(), "max_cost_usd": st.floats(0, 3)}
    ),
    max_size=4,
)


@settings(max_examples=400, deadline=None)
@given(claims, st.booleans())
def test_the_quick_way_reads_what_the_long_way_reads_or_leaves_it(changes: dict[str, Any], spaced: bool) -> None:
    text = json.dumps(payload() | changes, separators=(", ", ": ") if spaced else (",", ":"), ensure_ascii=False)
    quick, long = both(token(text.encode()))
    assert quick is None or quick == long


def test_the_quick_way_is_taken_for_the_common_spelling() -> None:
    for changes in ({}, {"prf": "x"}, {"x-asap-constraints": {}}, {"x-asap-constraints": {"max_cost_usd": 2}}):
        quick, long = both(token(json.dumps(payload(**changes), separators=(",", ":")).encode()))
        assert quick == long
        assert quick is not None


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_no_hostile_token_gets_by_on_the_quick_way(case: Any) -> None:
    if case.token.isascii():
        quick, long = both(case.token)
        assert quick is None or quick == long


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_a_token_in_another_spelling_is_left_to_the_long_way(data: st.DataObject) -> None:
    sound = token(json.dumps(payload(), separators=(",", ":")).encode())
    assert both(sound)[0] is not None
    at = data.draw(st.integers(0, len(sound) - 1))
    instead = data.draw(st.text(alphabet='ABCdw019-_+/=.,\\"[]u \n', max_size=8))
    quick, long = both(sound[:at] + instead + sound[at + data.draw(st.integers(0, 3)) :])
    assert quick is None or quick == long


@given(st.text(alphabet='ABCDabcd0123-_+/=\\"u04 1\n', max_size=12))
def test_base64url_has_one_spelling(text: str) -> None:
    try:
        raw = jws.read_base64url(text, "part")
    except TokenMalformed:
        raw = None
    padded = text + "=" * (-len(text) % 4)
    expected: bytes | None
    try:
        expected = base64.b64decode(padded.encode(), altchars=b"-_", validate=True)
    except binascii.Error:
        expected = None
    if expected is not None and base64.urlsafe_b64encode(expected).rstrip(b"=").decode() != text:
        expected = None
    assert raw == expected


@given(st.binary(max_size=40))
def test_any_bytes_are_read_back(raw: bytes) -> None:
    assert jws.read_base64url(base64.urlsafe_b64encode(raw).rstrip(b"=").decode(), "part") == raw
