"""What msgspec says of a value that is not what was asked for, in the words of a problem document."""

from __future__ import annotations

import re
from enum import Enum
from typing import get_args

import msgspec

from asapd.core.errors import FieldError

_WORDS = {"Expected": "must be", "`": "", ", got": ", not"}
_WORDING = re.compile("|".join(map(re.escape, _WORDS)))
_FIELD = re.compile(r"Object (missing required|contains unknown) field `(.*)`\Z", re.DOTALL)

# Half of a pair, with less behind it than the other half would have: the reader takes that for a cut.
_HALF_PAIR = re.compile(rb'(?<!\\)(?:\\\\)*\\u[dD][89abAB][0-9a-fA-F]{2}[^\\"]*"')
_TAIL_BYTES = 64


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
    return _WORDING.sub(lambda found: _WORDS[found[0]], str(error).partition(" - at ")[0]).strip()


def field_error(error: msgspec.ValidationError, shape: type[msgspec.Struct]) -> FieldError:
    """The field of a body that is wrong, with dots between levels, and why; `body` stands for all of it."""
    text = str(error)
    what, _, where = text.rpartition(" - at `$")
    if not what or (_FIELD.match(text) and not _FIELD.match(what)):  # nothing is said of where but by the name itself
        what, where = text, ""
    place = where.rstrip("`").lstrip(".")
    types = {field.encode_name: field.type for field in msgspec.structs.fields(shape)}
    named = _FIELD.match(what)
    if named is not None:
        field = f"{place}.{named[2]}" if place else named[2]
        if named[1] == "missing required":
            return FieldError(field, "is missing")
        there_are = "" if place else f"; there are {', '.join(sorted(types)) or 'none'}"
        return FieldError(field, f"is not a field here{there_are}")
    return FieldError(place or "body", reason_of(error, types.get(place)))


def _words(wanted: object) -> list[str]:
    if isinstance(wanted, type) and issubclass(wanted, Enum):
        return [str(word.value) for word in wanted]
    return [word for part in get_args(wanted) for word in ([part] if isinstance(part, str) else _words(part))]
