"""Query parameters and JSON bodies of requests, read strictly: what is not understood is refused by name."""

from __future__ import annotations

import base64
import binascii
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from functools import lru_cache
from hashlib import blake2b
from itertools import islice
from typing import Any, TypeVar

import msgspec
from quart import Response, request

from asapd.core.errors import FieldError, Refusal
from asapd.core.money import MoneyError, parse_usd
from asapd.core.types import Outcome
from asapd.wire.mismatch import field_error, field_errors, why_unreadable
from asapd.wire.usage import MAX_ERRORS, parse_timestamp

DEFAULT_LIMIT = 100
MAX_LIMIT = 1_000
_MAX_DIGITS = 18
_MAX_POSITION = 2**63 - 1
S = TypeVar("S", bound=msgspec.Struct)


class RefusedError(Exception):
    """Carries a refusal from a helper to the application's error handler; never a bug."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.detail)
        self.refusal = refusal


def bad_parameter(name: str, reason: str) -> RefusedError:
    """The refusal of one query parameter."""
    return RefusedError(Refusal("bad_parameter", f"{name} {reason}", (FieldError(name, reason),)))


class _Place(msgspec.Struct, frozen=True, array_like=True):
    """A position in the answers to one question."""

    question: str
    position: msgspec.Raw


class Parameters:
    """Query parameters, of the request at hand unless given; `done` refuses those that nobody asked for."""

    def __init__(self, arguments: Iterable[tuple[str, str]] | None = None) -> None:
        self._args: dict[str, str] = {}
        for name, value in request.args.items(multi=True) if arguments is None else arguments:
            if name in self._args:
                raise bad_parameter(name, "is given more than once: give it once")
            self._args[name] = value
        self._known: set[str] = set()

    def text(self, *names: str) -> str | None:
        """What is given under one of several names for the same thing; under two of them it must be the same."""
        self._known.update(names)
        given = {name: value for name in names if (value := self._args.get(name)) is not None}
        if len(set(given.values())) > 1:
            reason = "say different things: give one of them"
            errors = tuple(FieldError(name, f"says something else than {_others(name, given)}") for name in given)
            raise RefusedError(Refusal("bad_parameter", f"{' and '.join(given)} {reason}", errors))
        return next(iter(given.values()), None)

    def time_us(self, name: str) -> int | None:
        """A time: RFC 3339 or an epoch."""
        value = self.text(name)
        if value is None:
            return None
        try:
            # A + in a query string arrives as a space; between time and offset it can only have been a +.
            mended = f"{value[:-6]}+{value[-5:]}" if len(value) > 16 and value[-6] == " " else value
            return parse_timestamp(float(value) if _is_digits(value.replace(".", "", 1)) else mended)
        except ValueError as error:
            raise bad_parameter(name, str(error)) from None

    def period_us(self) -> tuple[int | None, int | None]:
        """`start` and `end`, as far as given; there is nothing between equal ones, and none ends before it starts."""
        start_us, end_us = self.time_us("start"), self.time_us("end")
        if start_us is not None and end_us is not None and start_us > end_us:
            raise bad_parameter("start", "must not be after end: exchange them, or leave one out")
        return start_us, end_us

    def number(self, name: str, default: int, low: int, high: int) -> int:
        """A whole number in a range."""
        value = self.text(name)
        if value is None:
            return default
        if not (value.isascii() and value.isdecimal()) or len(value) > _MAX_DIGITS or not low <= int(value) <= high:
            raise bad_parameter(name, f"must be a whole number from {low} to {high}")
        return int(value)

    def decimal(self, name: str) -> float | None:
        """A number, with or without a percent sign."""
        value = self.text(name)
        if value is None:
            return None
        try:
            number = float(value.removesuffix("%"))
        except ValueError:
            raise bad_parameter(name, "must be a number") from None
        if not 0 <= number < 2**53:
            raise bad_parameter(name, "must be a number that is not negative")
        return number

    def choice(self, name: str, choices: Iterable[str], default: str | None = None, *others: str) -> str | None:
        """One of several words, given under its name or one of the others."""
        value = self.text(name, *others)
        allowed = list(choices)
        if value is None or value == "":
            return default
        if value not in allowed:
            given = next(one for one in (name, *others) if one in self._args)
            raise bad_parameter(given, f"must be one of {', '.join(allowed)}")
        return value

    def flag(self, name: str) -> bool:
        """true or false."""
        return self.choice(name, ("true", "false", "1", "0"), "false") in {"true", "1"}

    def limit(self) -> int:
        """How many rows: 1 to 1000, 100 unless given."""
        return self.number("limit", DEFAULT_LIMIT, 1, MAX_LIMIT)

    def offset(self) -> int:
        """How many rows to skip, as clients of the reference implementation page."""
        return self.number("offset", 0, 0, 10**9)

    def cursor(self, shape: type[Any]) -> Any:
        """Where the page before ended, None on the first."""
        value = self.text("cursor")
        if value is None:
            return None
        try:
            return _position(base64.urlsafe_b64decode(value.encode("ascii") + b"=" * (-len(value) % 4)), shape)
        except (msgspec.DecodeError, binascii.Error, UnicodeError):
            raise bad_parameter("cursor", "must be the next_cursor of the page before") from None

    def cursor_of(self, kind: str, shape: type[Any]) -> Any:
        """Where the page before ended, None on the first; refused unless that page was of this `kind` and question."""
        place: _Place | None = self.cursor(_Place)
        if place is None:
            return None
        if place.question != self._question(kind):
            raise bad_parameter("cursor", "is of a page with other parameters: repeat those, or begin without a cursor")
        try:
            return _position(place.position, shape)
        except msgspec.DecodeError:
            raise bad_parameter("cursor", "must be the next_cursor of the page before") from None

    def place(self, kind: str, position: Any | None) -> Any | None:
        """A position that `cursor_of` takes for this question only; None stays None."""
        return None if position is None else _Place(self._question(kind), msgspec.Raw(msgspec.json.encode(position)))

    def _question(self, kind: str) -> str:
        """What is asked for, but for how much of it and from where on."""
        asked = sorted(item for item in self._args.items() if item[0] not in {"limit", "offset", "cursor"})
        return blake2b(msgspec.json.encode((kind, asked)), digest_size=9).hexdigest()

    def outcome(self) -> int | None:
        """An outcome as stored."""
        word = self.choice("outcome", ("completed", "failed"))
        return None if word is None else int(Outcome[word.upper()])

    def done(self) -> None:
        """Refuse parameters that were not asked for: a typo must not silently widen a query."""
        for name in self._args:
            if name not in self._known:
                raise bad_parameter(
                    name, f"is not a parameter here; there are {', '.join(sorted(self._known)) or 'none'}"
                )


def _position(raw: bytes | msgspec.Raw, shape: type[Any]) -> Any:
    """A position as it was encoded.

    Raises:
        msgspec.DecodeError: it is none of this shape, or has a number that no position has.
    """
    position = msgspec.json.decode(raw, type=shape)
    parts = position if isinstance(position, tuple) else (position,)
    if position is None or any(isinstance(part, int) and not 0 <= part <= _MAX_POSITION for part in parts):
        raise msgspec.DecodeError("no position")
    return position


def _others(name: str, given: Mapping[str, str]) -> str:
    return " and ".join(other for other in given if other != name)


def _is_digits(text: str) -> bool:
    return text.isascii() and text.isdecimal()


def encode_cursor(position: Any) -> str:
    """An opaque cursor from a position."""
    return base64.urlsafe_b64encode(msgspec.json.encode(position)).decode().rstrip("=")


def page_from(rows: Sequence[Any], limit: int, after: int) -> dict[str, Any]:
    """A page of a list that is there as a whole, from the place `after` on."""
    following = after + limit
    return page(list(rows[after:following]), limit, following if len(rows) > following else None)


def page(rows: list[Any], limit: int, position: Any | None) -> dict[str, Any]:
    """A page of a list; there is a next one as long as pages come full."""
    more = position is not None and len(rows) == limit
    return {"data": rows, "count": len(rows), "next_cursor": encode_cursor(position) if more else None}


def last_event_id(parameters: Parameters) -> int | None:
    """Where a stream of server-sent events is to go on: `Last-Event-ID`, or the parameter of that name."""
    given = parameters.text("last_event_id")
    last = request.headers.get("Last-Event-ID", given)
    if last is None:
        return None
    if not _is_digits(last) or len(last) > _MAX_DIGITS:
        raise bad_parameter("Last-Event-ID", "must be the id of an event of this stream")
    return int(last)


def event_stream(parts: AsyncIterator[bytes]) -> Response:
    """A reply of server-sent events, which does not end by itself."""
    response = Response(parts, content_type="text/event-stream")
    response.headers["X-Accel-Buffering"] = "no"
    response.timeout = None
    return response


BREACH_TYPES = ("availability", "latency", "error_rate", "burn_rate", "budget")
SEVERITIES = ("warning", "critical")

Usd = int | float | str
"""An amount of money in a body. Not `Decimal`, which would read `"1_000"` and digits of other scripts as numbers."""


# Amounts repeat, and exact arithmetic is slow. Texts have at most 1,100 characters: a megabyte of them. Longer ones are
# refused, which is not remembered.
_microusd = lru_cache(maxsize=1024, typed=True)(parse_usd)


def usd_field(amount: Usd, field: str, *, round_up: bool = False) -> int:
    """An amount of money in a body, in micro-USD; what is none is refused by the name of its field."""
    try:
        return _microusd(amount, round_up=round_up)
    except MoneyError as error:
        reason = str(error)
        raise RefusedError(Refusal("invalid", f"{field} {reason}", (FieldError(field, reason),))) from None


def decode_body(body: bytes, shape: type[S], either: Iterable[tuple[str, ...]] = ()) -> S:
    """A JSON object as a struct; each wrong field is named, the first in the detail as well.

    Of the names in each of `either` one is required: beside what is wrong that is said here, else the caller's to see.
    """
    if not body.strip():
        raise RefusedError(Refusal("malformed", "there is no body: send a JSON object"))
    try:
        try:
            return msgspec.json.decode(body, type=shape)
        except msgspec.ValidationError:
            msgspec.json.decode(body)  # what is no JSON further on is malformed before it is invalid
            raise
    except msgspec.ValidationError as error:
        wrong = field_error(error, shape)
        others = (bad for bad in field_errors(body, shape, either) if bad.field != wrong.field)
        errors = (wrong, *islice(others, MAX_ERRORS - 1))
        more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
        raise RefusedError(Refusal("invalid", f"{wrong.field} {wrong.reason}{more}", errors)) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RefusedError(Refusal("malformed", f"the body cannot be read: {why_unreadable(error, body)}")) from None
