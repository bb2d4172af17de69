"""What is wrong with a body is said in words that name the field, and what it could be."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Literal

import msgspec
import pytest

from asapd.wire.mismatch import field_error, field_errors


class Colour(StrEnum):
    RED = "red"
    BLUE = "blue"


class Inner(msgspec.Struct, forbid_unknown_fields=True):
    depth: int
    names: list[str] = []


class Sent(msgspec.Struct, forbid_unknown_fields=True):
    name: Annotated[str, msgspec.Meta(min_length=1)]
    colour: Colour = Colour.RED
    size: Literal["small", "large"] | None = None
    inner: Inner | None = None


@pytest.mark.parametrize(
    ("body", "field", "reason"),
    [
        ("{}", "name", "is missing"),
        ('{"zz": 1}', "zz", "is not a field here; there are colour, inner, name, size"),
        ('{"z`z": 1}', "z`z", "is not a field here; there are colour, inner, name, size"),
        ('{"a - at `$.name": 1}', "a - at `$.name", "is not a field here; there are colour, inner, name, size"),
        ('{"name": "n", "inner": {"depth": 1, "a - at `$.b": 2}}', "inner.a - at `$.b", "is not a field here"),
        ('{"name": "n", "inner": {"depth": 1, "a` - at `$.b": 2}}', "inner.a` - at `$.b", "is not a field here"),
        ('{"name": "n", "inner": {}}', "inner.depth", "is missing"),
        ('{"name": "n", "inner": {"depth": 1, "zz": 2}}', "inner.zz", "is not a field here"),
        ('{"name": "n", "inner": {"depth": 1, "names": [1]}}', "inner.names[0]", "must be text, not a number"),
        ('{"name": "n", "colour": "green"}', "colour", "must be one of red, blue"),
        ('{"name": "n", "size": "huge"}', "size", "must be one of small, large"),
        ('{"name": "n", "colour": 1}', "colour", "must be text, not a number"),
        ('{"name": ""}', "name", "must have at least 1 character"),
        ("[]", "body", "must be an object, not an array"),
    ],
)
def test_the_field_and_the_reason_are_told(body: str, field: str, reason: str) -> None:
    with pytest.raises(msgspec.ValidationError) as raised:
        msgspec.json.decode(body, type=Sent)
    wrong = field_error(raised.value, Sent)
    assert (wrong.field, wrong.reason) == (field, reason)


@pytest.mark.parametrize(
    ("body", "fields"),
    [
        ('{"size": "huge", "name": 5, "zz": 1}', ["name", "size", "zz"]),
        ('{"colour": "green"}', ["name", "colour"]),
        ('{"name": "n", "inner": {"names": [""], "zz": 1}}', ["inner.depth", "inner.zz"]),
        ('{"name": "n", "inner": {"depth": 1, "names": ["", 1]}}', ["inner.names[1]"]),
        ('{"name": "n", "inner": 5}', ["inner"]),
        ('{"name": 5, "name": "n"}', []),
        ('{"name": "n"}', []),
        ("[]", []),
    ],
)
def test_every_bad_field_of_a_body_is_told(body: str, fields: list[str]) -> None:
    assert [wrong.field for wrong in field_errors(body.encode(), Sent)] == fields


def test_every_bad_field_is_told_in_the_words_of_one() -> None:
    found = {wrong.field: wrong.reason for wrong in field_errors(b'{"size": "huge", "colour": "green", "zz": 1}', Sent)}
    assert found == {
        "name": "is missing",
        "size": "must be one of small, large",
        "colour": "must be one of red, blue",
        "zz": "is not a field here; there are colour, inner, name, size",
    }
