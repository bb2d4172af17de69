"""The canonical form of JSON (RFC 8785): one value, one sequence of bytes, so that it can be signed."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from json.encoder import encode_basestring
from typing import Any, Final

from asapd.core.types import MAX_INT

MAX_DEPTH = 128
"""Deeper nesting is refused: no document of the protocol comes near, and Python's stack ends at about 1000 frames."""


LARGEST_WRITTEN: Final = 2**64 - 1
"""The largest integer that builds before integers beyond MAX_INT were text may have written, and hashed, as it was."""

_AS_TEXT = re.compile(r"-?[1-9][0-9]{15,19}\Z")


class CanonicalError(ValueError):
    """The value has no canonical form; whoever made the document has to change it. The message says what is wrong."""


def canonical(value: object, *, largest: int = MAX_INT) -> bytes:
    """The canonical form of None, bool, int, float, str, list, tuple and dict, nested up to MAX_DEPTH.

    Keys are sorted by their UTF-16 code units, numbers are written as ECMAScript does (RFC 8785 section 3.2).
    A `largest` of LARGEST_WRITTEN is for what holds entries of the log: those of older builds have to stay as they are.

    Raises:
        CanonicalError: NaN or an infinity, an integer beyond `largest`, a key that is no string, a lone surrogate,
            too deep nesting, another type.
    """
    parts: list[str] = []
    try:
        _write(value, parts, MAX_DEPTH, largest)
        return "".join(parts).encode()
    except UnicodeEncodeError:
        raise CanonicalError("a string holds half of a surrogate pair") from None


def exact(value: Any) -> Any:
    """JSON with each integer beyond MAX_INT as text, however deep: as a number it would not mean the same everywhere.

    Sums of accepted numbers pass that bound, though no accepted number does.
    """
    if isinstance(value, dict):
        return {key: exact(member) for key, member in value.items()}
    if isinstance(value, list | tuple):
        return [exact(item) for item in value]
    return str(value) if type(value) is int and not -MAX_INT <= value <= MAX_INT else value


def is_exact(values: Iterable[Any]) -> bool:
    """Whether `exact` would make text of nothing in these, in a fraction of its time: few entries hold any."""
    for value in values:
        kind = type(value)
        if kind is int:
            if not -MAX_INT <= value <= MAX_INT:
                return False
        elif kind is dict:
            if not is_exact(value.values()):
                return False
        elif kind in (list, tuple) and not is_exact(value):
            return False
    return True


def whole(value: Any) -> Any:
    """What holds numbers alone, of which `exact` made text of some, with those as integers again, in objects too."""
    if isinstance(value, dict):
        return {key: whole(member) for key, member in value.items()}
    if isinstance(value, str) and _AS_TEXT.match(value) is not None and abs(number := int(value)) > MAX_INT:
        return number
    return value


def _write(value: object, parts: list[str], depth: int, largest: int) -> None:
    if value is None:
        parts.append("null")
    elif isinstance(value, bool):
        parts.append("true" if value else "false")
    elif isinstance(value, str):
        # RFC 8785 takes over ECMAScript's escapes, which are those of Python's own encoder without ensure_ascii.
        parts.append(encode_basestring(value))
    elif isinstance(value, int):
        if not -largest <= value <= largest:
            raise CanonicalError(
                f"an integer is beyond 2**{largest.bit_length()}-1, which JSON readers do not keep exact"
            )
        parts.append(int.__repr__(value))
    elif isinstance(value, float):
        parts.append(_number(value))
    elif depth == 0:
        raise CanonicalError(f"nested deeper than {MAX_DEPTH}")
    elif isinstance(value, list | tuple):
        parts.append("[")
        for index, item in enumerate(value):
            if index:
                parts.append(",")
            _write(item, parts, depth - 1, largest)
        parts.append("]")
    elif isinstance(value, dict):
        separator = "{"
        for key in sorted(value, key=_utf16):
            parts.append(f"{separator}{encode_basestring(key)}:")
            _write(value[key], parts, depth - 1, largest)
            separator = ","
        parts.append("}" if value else "{}")
    else:
        raise CanonicalError(f"a value of type {type(value).__name__} is not JSON")


def _utf16(key: object) -> bytes:
    if not isinstance(key, str):
        raise CanonicalError(f"a key of type {type(key).__name__} is not a string")
    return key.encode("utf-16-be")


def _number(value: float) -> str:
    """Number::toString of ECMA-262 (section 6.1.6.1.20), from the shortest digits that read back as the same number."""
    if not math.isfinite(value):
        raise CanonicalError("NaN and infinities are not JSON")
    if value == 0:
        return "0"
    sign = "-" if value < 0 else ""
    mantissa, _, exponent = float.__repr__(abs(value)).partition("e")
    whole, _, rest = mantissa.partition(".")
    digits = (whole + rest).lstrip("0")
    # The value is 0.DIGITS times ten to this power.
    power = int(exponent or "0") + (len(whole) if whole != "0" else len(digits) - len(rest))
    digits = digits.rstrip("0")
    count = len(digits)
    if count <= power <= 21:
        text = digits + "0" * (power - count)
    elif 0 < power <= 21:
        text = f"{digits[:power]}.{digits[power:]}"
    elif -6 < power <= 0:
        text = f"0.{'0' * -power}{digits}"
    else:
        text = f"{digits[0]}{'.' if count > 1 else ''}{digits[1:]}e{power - 1:+d}"
    return sign + text
