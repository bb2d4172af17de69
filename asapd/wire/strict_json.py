"""JSON with one meaning only, for what is signed: two readers of one text must never see two values."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Container
from decimal import Decimal, InvalidOperation
from functools import lru_cache
from typing import Any

import msgspec

MAX_NESTING = 32

# Exact amounts of money need 17 digits; the bound keeps every number far from Decimal's rounding.
_MAX_NUMBER_CHARS = 24
_MAX_EXPONENT = 24
# An unclosed string matches to the end as well: were it to fail, every quote in it would be tried anew.
_LONG_NUMBER = re.compile(rb"[0-9]{20}")
_BLANK = b" \t\r\n"
_STRING_OR_BRACKET = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"?|[\[\]{}]', re.DOTALL)


class TokenMalformed(ValueError):  # noqa: N818 -- named after the denial code it becomes
    """The text is not a delegation token, or not strict JSON; whoever made it has to correct what the message names.

    `too_deep` tells a token that only nests more parents than allowed from every other fault; `token` is its id then.
    `parent` says in which token of the chain the fault is: 0 in the one presented, 1 in its parent, and so on.
    """

    def __init__(self, reason: str, *, too_deep: bool = False, parent: int = 0, token: str | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.too_deep = too_deep
        self.parent = parent
        self.token = token


def parse_strict_json(raw: bytes, *, max_nesting: int = MAX_NESTING) -> Any:
    """JSON with one meaning only: no duplicate keys at any depth, no NaN, UTF-8, bounded nesting and numbers.

    Numbers with a fraction or an exponent come back as Decimal, the others as int.

    Raises:
        TokenMalformed: anything else, and nothing else is raised.
    """
    # What is written back byte for byte held nothing twice and nothing in a second spelling. Most tokens are; the
    # rest take the long way, which is ten times as long and says what is wrong.
    if raw.count(b"[") + raw.count(b"{") <= max_nesting and not _LONG_NUMBER.search(raw):
        try:
            value = _DECODER.decode(raw)
            if _ENCODER.encode(value) == raw.strip(_BLANK):
                return value
        except (ValueError, OverflowError, RecursionError, msgspec.MsgspecError):
            pass
    return _parse(raw, max_nesting)


def repeated_key(raw: bytes, opaque: Container[str]) -> str | None:
    """A key that an object of this JSON holds twice, as messages show it; None is none.

    Values of `opaque` keys at the top are passed over.

    Raises:
        ValueError, RecursionError: it is no JSON, or nests too deep to be read.
    """
    # Bytes that are no UTF-8 are for whoever reads the values.
    text = raw.decode("utf-8", "replace")
    pending: list[Any] = [(json.loads(text, object_pairs_hook=_Pairs, parse_int=str, parse_float=str), opaque)]
    while pending:
        value, passed_over = pending.pop()
        if isinstance(value, _Pairs):
            if (twice := _twice(value)) is not None:
                return shown(twice)
            pending += [(member, ()) for key, member in value if key not in passed_over]
        elif isinstance(value, list):
            pending += [(item, ()) for item in value]
    return None


def shown(value: Any) -> str:
    """A value of such JSON for a message: ASCII, at most 80 characters."""
    text = str(value) if isinstance(value, Decimal) else json.dumps(value, default=str)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _parse(raw: bytes, max_nesting: int) -> Any:
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        raise TokenMalformed("is not UTF-8") from None
    _check_nesting(text, max_nesting)
    try:
        return json.loads(
            text,
            object_pairs_hook=_unique_pairs,
            parse_int=_read_int,
            parse_float=_read_decimal,
            parse_constant=_refuse_constant,
        )
    except json.JSONDecodeError as error:
        raise TokenMalformed(f"is not JSON: {error.msg.removesuffix(' at')} at character {error.pos}") from None


def _check_nesting(text: str, max_nesting: int) -> None:
    """Bound the depth before the parser meets it, which would otherwise run into the interpreter's recursion limit."""
    depth = 0
    for match in _STRING_OR_BRACKET.finditer(text):
        if match[0] in ("[", "{"):
            depth += 1
            if depth > max_nesting:
                raise TokenMalformed(f"nests deeper than {max_nesting}")
        elif match[0] in ("]", "}"):
            depth -= 1


def _unique_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise TokenMalformed(f"has the key {shown(_twice(pairs))} twice")
    return values


class _Pairs(list[tuple[str, Any]]):
    """An object as it was written."""


def _twice(pairs: list[tuple[str, Any]]) -> str | None:
    counted = Counter(key for key, _ in pairs).most_common(1)
    return counted[0][0] if counted and counted[0][1] > 1 else None


def _read_int(text: str) -> int:
    if len(text) > _MAX_NUMBER_CHARS:
        raise TokenMalformed(f"holds a number of more than {_MAX_NUMBER_CHARS} characters")
    return int(text)


# Amounts repeat; texts are short, or refused.
@lru_cache(maxsize=1024)
def _decimal(text: str) -> Decimal:
    try:
        number = Decimal(text)
    except InvalidOperation:
        raise TokenMalformed("holds a number that is out of range") from None
    exponent = number.as_tuple().exponent
    if not isinstance(exponent, int) or abs(exponent) > _MAX_EXPONENT:
        raise TokenMalformed("holds a number that is out of range")
    return number


def _read_decimal(text: str) -> Decimal:
    if len(text) > _MAX_NUMBER_CHARS:
        raise TokenMalformed(f"holds a number of more than {_MAX_NUMBER_CHARS} characters")
    return _decimal(text)


def _refuse_constant(text: str) -> Any:
    raise TokenMalformed(f"holds {text}, which is no number of JSON")


_DECODER = msgspec.json.Decoder(float_hook=_read_decimal)
_ENCODER = msgspec.json.Encoder(decimal_format="number")
