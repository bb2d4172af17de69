import json
import math
import struct
from enum import IntEnum

import pytest
import rfc8785
from hypothesis import given
from hypothesis import strategies as st

from asapd.core.canonical import LARGEST_WRITTEN, MAX_DEPTH, CanonicalError, canonical, exact, is_exact, whole
from asapd.core.types import MAX_INT

floats = st.one_of(
    st.floats(allow_nan=False, allow_infinity=False),
    st.floats(-1e22, 1e22),
    st.floats(-1e-5, 1e-5),
    st.integers(-(10**21), 10**21).map(float),
)
text = st.text(st.characters(codec="utf-8"))
documents = st.recursive(
    st.none() | st.booleans() | st.integers(-MAX_INT, MAX_INT) | floats | text,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(text, inner, max_size=5),
    max_leaves=20,
)


@given(documents)
def test_the_form_is_that_of_the_reference_package(document: object) -> None:
    assert canonical(document) == rfc8785.dumps(document)  # type: ignore[arg-type]  # JSON by construction


@given(documents)
def test_the_form_reads_back_as_the_same_value_and_canonicalises_to_itself(document: object) -> None:
    # JSON has one kind of number: what was 1e20 is read back from its digits, and is a double all the same.
    again = json.loads(canonical(document), parse_int=float)
    assert again == document
    assert canonical(again) == canonical(document)


@given(floats)
def test_a_number_reads_back_as_the_same_number(value: float) -> None:
    assert float(canonical(value)) == value


@pytest.mark.parametrize(
    ("bits", "expected"),
    [
        ("0000000000000000", "0"),
        ("8000000000000000", "0"),
        ("0000000000000001", "5e-324"),
        ("8000000000000001", "-5e-324"),
        ("7fefffffffffffff", "1.7976931348623157e+308"),
        ("ffefffffffffffff", "-1.7976931348623157e+308"),
        ("4340000000000000", "9007199254740992"),
        ("c340000000000000", "-9007199254740992"),
        ("4430000000000000", "295147905179352830000"),
        ("44b52d02c7e14af5", "9.999999999999997e+22"),
        ("44b52d02c7e14af6", "1e+23"),
        ("44b52d02c7e14af7", "1.0000000000000001e+23"),
        ("444b1ae4d6e2ef4e", "999999999999999700000"),
        ("444b1ae4d6e2ef4f", "999999999999999900000"),
        ("444b1ae4d6e2ef50", "1e+21"),
        ("3eb0c6f7a0b5ed8c", "9.999999999999997e-7"),
        ("3eb0c6f7a0b5ed8d", "0.000001"),
        ("41b3de4355555553", "333333333.3333332"),
        ("41b3de4355555554", "333333333.33333325"),
        ("41b3de4355555555", "333333333.3333333"),
        ("41b3de4355555556", "333333333.3333334"),
        ("41b3de4355555557", "333333333.33333343"),
        ("becbf647612f3696", "-0.0000033333333333333333"),
        ("43143ff3c1cb0959", "1424953923781206.2"),
    ],
)
def test_the_samples_of_rfc_8785_appendix_b(bits: str, expected: str) -> None:
    assert canonical(struct.unpack(">d", bytes.fromhex(bits))[0]) == expected.encode()


def test_the_sample_of_rfc_8785_section_3_2_2() -> None:
    document = {
        "numbers": [333333333.33333329, 1e30, 4.50, 2e-3, 0.000000000000000000000000001],
        "string": "\u20ac$\u000f\u000aA'\u0042\u0022\u005c\\\"/",
        "literals": [None, True, False],
    }
    assert (
        canonical(document)
        == (
            '{"literals":[null,true,false],"numbers":[333333333.3333333,1e+30,4.5,0.002,1e-27],'
            '"string":"\u20ac$\\u000f\\nA\'B\\"\\\\\\\\\\"/"}'
        ).encode()
    )


def test_keys_are_sorted_by_utf_16_code_units() -> None:
    keys = ["\u20ac", "\r", "\ufb33", "1", "\U0001f600", "\u0080", "\u00f6"]
    form = canonical(dict.fromkeys(keys, 0)).decode()
    assert list(json.loads(form)) == ["\r", "1", "\u0080", "\u00f6", "\u20ac", "\U0001f600", "\ufb33"]


class Colour(IntEnum):
    RED = 1


def test_a_number_with_a_name_is_a_number_and_a_tuple_is_a_list() -> None:
    assert canonical((Colour.RED, ())) == b"[1,[]]"


@pytest.mark.parametrize(
    "value",
    [
        math.nan,
        math.inf,
        -math.inf,
        2**53,
        -(2**53),
        {1: 2},
        {"a": 1, 2: 3},
        {None: 1},
        "\ud800",
        {"\udfff": 1},
        ["\ud83d"],
        b"bytes",
        {1, 2},
        object(),
    ],
)
def test_what_has_no_canonical_form_is_refused(value: object) -> None:
    with pytest.raises(CanonicalError):
        canonical(value)


def nested(depth: int) -> object:
    value: object = 1
    for _ in range(depth):
        value = [value]
    return value


def test_nesting_is_bounded() -> None:
    assert canonical(nested(MAX_DEPTH)) == b"[" * MAX_DEPTH + b"1" + b"]" * MAX_DEPTH
    with pytest.raises(CanonicalError, match="nested deeper"):
        canonical(nested(MAX_DEPTH + 1))


@given(st.integers())
def test_an_integer_that_not_every_reader_keeps_is_text_and_comes_back(number: int) -> None:
    made = exact({"a": [number, (number, {"b": number})], "c": True, "d": 0.5})
    shown = str(number) if abs(number) > MAX_INT else number
    assert made == {"a": [shown, [shown, {"b": shown}]], "c": True, "d": 0.5}
    assert is_exact([{"a": ({"b": number}, [number])}]) == (abs(number) <= MAX_INT)
    if abs(number) < 2**64:
        assert whole({"a": {"b": shown}}) == {"a": {"b": number}}


@pytest.mark.parametrize("value", ["5", str(MAX_INT), "09007199254740992", "9007199254740992 ", "9" * 21, "x", 7, None])
def test_what_is_no_integer_made_text_stays_what_it_is(value: object) -> None:
    assert whole(value) is value


def test_what_older_builds_hashed_has_a_form_on_request() -> None:
    assert canonical({"a": [2**53, -(2**63), 2**64 - 1]}, largest=LARGEST_WRITTEN) == (
        b'{"a":[9007199254740992,-9223372036854775808,18446744073709551615]}'
    )
    with pytest.raises(CanonicalError, match="beyond 2\\*\\*64-1"):
        canonical([2**64], largest=LARGEST_WRITTEN)
