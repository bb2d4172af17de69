"""JSON with one meaning: the quick way gives what the long way gives, or nothing."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asapd.wire import strict_json
from asapd.wire.strict_json import TokenMalformed, parse_strict_json, repeated_key

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


def long_way(raw: bytes, max_nesting: int = strict_json.MAX_NESTING) -> Any:
    try:
        return strict_json._parse(raw, max_nesting)
    except TokenMalformed as error:
        return error.reason


def quick_way(raw: bytes, max_nesting: int = strict_json.MAX_NESTING) -> Any:
    try:
        return parse_strict_json(raw, max_nesting=max_nesting)
    except TokenMalformed as error:
        return error.reason


def same(left: Any, right: Any) -> bool:
    return left == right and repr(left) == repr(right)


def test_where_text_ends_too_early_is_said_in_one_sentence() -> None:
    assert long_way(b'{"a": "b') == "is not JSON: Unterminated string starting at character 6"
    assert long_way(b'{"a" 1}') == "is not JSON: Expecting ':' delimiter at character 5"


@settings(max_examples=300, deadline=None)
@given(VALUES, st.sampled_from([(",", ":"), (", ", ": ")]), st.booleans())
def test_both_ways_read_the_same_value(value: Any, separators: tuple[str, str], ascii_only: bool) -> None:
    raw = json.dumps(value, separators=separators, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
    assert same(quick_way(raw), long_way(raw))


@settings(max_examples=400, deadline=None)
@given(st.text(alphabet='"\\[]{}:,a1.eE+-0 \nu', max_size=40) | st.binary(max_size=20).map(repr))
def test_both_ways_agree_on_what_is_none(text: str) -> None:
    raw = text.encode()
    assert same(quick_way(raw), long_way(raw))


@pytest.mark.parametrize(
    "raw",
    [
        b'{"a":1,"a":1}',
        b'{"a":1,"\\u0061":1}',
        b'{"a":{"b":1,"b":1}}',
        b"[1.50]",
        b"[1.0]",
        b"[1E5]",
        b"[-0]",
        b"[-0.0]",
        b"[1e25]",
        b"[123456789012345678901234]",
        b"[1234567890123456789012345]",
        b"[0.00000000000000000000000001]",
        b'["\\ud800"]',
        b'["\xed\xa0\x80"]',
        b'["\x7f\\u007f"]',
        b'["\\/"]',
        b"[" * 33 + b"]" * 33,
        b"[" * 32 + b"]" * 32,
        b'{"[":"[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[["}',
        b"\xef\xbb\xbf[]",
        b"",
    ],
)
def test_both_ways_agree_at_the_edges(raw: bytes) -> None:
    assert same(quick_way(raw), long_way(raw))


def test_the_bound_of_nesting_is_the_callers() -> None:
    raw = b"[" * 40 + b"]" * 40
    assert "nests deeper" in quick_way(raw)
    assert same(quick_way(raw, 40), json.loads(raw))


@pytest.mark.parametrize(
    ("raw", "opaque", "twice"),
    [
        (b'{"a":1,"b":[{"a":1e999,"c":-0}]}', (), None),
        (b'{"a":1,"a":1}', (), '"a"'),
        (b'{"a":1,"\\u0061":1}', ("a",), '"a"'),
        (b'{"a":{"b":1,"b":2}}', (), '"b"'),
        (b'{"a":{"b":1,"b":2}}', ("a",), None),
        (b'{"c":[{"a":{"b":1,"b":2}}]}', ("a",), '"b"'),
        (b'{"a":"\xff","b":1}', (), None),
        (b"{}", (), None),
    ],
)
def test_a_key_that_stands_twice_is_found(raw: bytes, opaque: tuple[str, ...], twice: str | None) -> None:
    assert repeated_key(raw, opaque) == twice
