"""What msgspec says of a value that is not what was asked for, in the words of a problem document."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from enum import Enum
from itertools import islice
from typing import Any, get_args

import msgspec

from asapd.core.errors import FieldError

_EXPECTED = re.compile(
    r"Expected `(?P<kinds>[^`]*)`(?: of length (?P<size>[<>]=) (?P<length>\d+)| (?P<bound>[<>]=) (?P<number>\S+))?"
    r"(?:, got `(?P<got>[^`]*)`)?"
)
_KINDS = {
    "str": "text",
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "object": "an object",
    "array": "an array",
}
# Whole numbers of more than 64 bits are read as floats.
_GOT = {"int": "a number", "float": "a fraction or a number beyond 64 bits"}
_PARTS = {"str": "character", "object": "entry", "array": "entry"}
_BOUNDS = {"<=": "at most", ">=": "at least"}
_FIELD = re.compile(r"Object (missing required|contains unknown) field `(.*)`\Z", re.DOTALL)

# Half of a pair, with less behind it than the other half would have: the reader takes that for a cut.
_HALF_PAIR = re.compile(rb'(?<!\\)(?:\\\\)*\\u[dD][89abAB][0-9a-fA-F]{2}[^\\"]*"')
_TAIL_BYTES = 64

_MISSING = "is missing"
_MOST_WITHIN = 100
"""Bad fields named of an object inside a body: as many as of any body."""


def why_unreadable(error: Exception, body: bytes) -> str:
    """Why a decoder could not read a body at all, in words for who wrote it."""
    if not body.strip():
        return "it is empty"
    if "truncated" not in str(error):
        return str(error)
    if _HALF_PAIR.search(body[-_TAIL_BYTES:]):
        return "a \\u escape is half of a surrogate pair, which is no character"
    return "it ends too early, in the middle of a value"


def reason_of(error: msgspec.ValidationError, wanted: object) -> str:
    """What is wrong, without where; with the words there are, where `wanted`, a type, is of some."""
    words = _words(wanted)
    if words and str(error).startswith("Invalid enum value"):
        return f"must be one of {', '.join(words)}"
    text = str(error).partition(" - at ")[0]
    found = _EXPECTED.fullmatch(text)
    return text.replace("Expected", "must be").replace("`", "") if found is None else _in_words(found)


def _in_words(found: re.Match[str]) -> str:
    kinds = found["kinds"].split(" | ")
    if found["size"]:
        part = _PARTS.get(kinds[0], "byte")
        parts = part if found["length"] == "1" else f"{part.removesuffix('y')}ies" if part[-1] == "y" else f"{part}s"
        return f"must have {_BOUNDS[found['size']]} {found['length']} {parts}"
    if "float" in kinds and "int" in kinds:
        kinds.remove("int")
    *before, last = [_KINDS.get(kind, kind) for kind in kinds]
    wanted = f"{', '.join(before)} or {last}" if before else last
    bound = f", {_BOUNDS[found['bound']]} {found['number']}" if found["bound"] else ""
    got = _GOT.get(found["got"], _KINDS.get(found["got"], found["got"]))
    return f"must be {wanted}{bound}" + (f", not {got}" if got else "")


def field_error(error: msgspec.ValidationError, shape: type[msgspec.Struct], within: str = "") -> FieldError:
    """The field of a body that is wrong, with dots between levels, and why; `body` stands for all of it.

    `within` names the field of the body whose value alone was read.
    """
    text = str(error)
    what, _, where = text.rpartition(" - at `$")
    if not what or (_FIELD.match(text) and not _FIELD.match(what)):  # nothing is said of where but by the name itself
        what, where = text, ""
    place = f"{within}{where.rstrip('`')}".lstrip(".")
    types = {field.encode_name: field.type for field in msgspec.structs.fields(shape)}
    named = _FIELD.match(what)
    if named is not None:
        field = f"{place}.{named[2]}" if place else named[2]
        if named[1] == "missing required":
            return FieldError(field, _MISSING)
        return FieldError(field, "is not a field here" if place else _unknown(types))
    return FieldError(place or "body", reason_of(error, types.get(place)))


def field_errors(
    body: bytes, shape: type[msgspec.Struct], either: Iterable[tuple[str, ...]] = ()
) -> Iterator[FieldError]:
    """Each field that keeps a JSON object from being a struct that takes no others; nothing of another value.

    Of the names in each of `either` one is required.
    """
    if body.lstrip()[:1] != b"{":
        return
    parts = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
    fields = {field.encode_name: field for field in msgspec.structs.fields(shape)}
    for name, field in fields.items():
        if name in parts:
            yield from _value_errors(bytes(parts[name]), field.type, shape, name)
        elif field.required:
            yield FieldError(name, _MISSING)
    yield from (FieldError(names[0], _MISSING) for names in either if parts.keys().isdisjoint(names))
    yield from (FieldError(name, _unknown(fields)) for name in parts if name not in fields)


def _value_errors(value: bytes, wanted: Any, shape: type[msgspec.Struct], name: str) -> Iterator[FieldError]:
    try:
        msgspec.json.decode(value, type=wanted)
    except msgspec.ValidationError as error:
        inner = _struct_in(wanted)
        within = [] if inner is None else [*islice(field_errors(value, inner), _MOST_WITHIN)]
        yield from (FieldError(f"{name}.{bad.field}", bad.reason) for bad in within)
        if not within:
            yield field_error(error, shape, name)


def _unknown(there_are: Iterable[str]) -> str:
    return f"is not a field here; there are {', '.join(sorted(there_are)) or 'none'}"


def _struct_in(wanted: Any) -> type[msgspec.Struct] | None:
    kinds = (wanted, *get_args(wanted))
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, msgspec.Struct)), None)


def _words(wanted: object) -> list[str]:
    if isinstance(wanted, type) and issubclass(wanted, Enum):
        return [str(word.value) for word in wanted]
    return [word for part in get_args(wanted) for word in ([part] if isinstance(part, str) else _words(part))]
