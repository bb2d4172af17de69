"""A usage event as it is sent: identity, time, and values that the daemon can read."""

from __future__ import annotations

import json
import operator
import os
import re
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from decimal import MAX_EMAX, MIN_EMIN, ROUND_CEILING, Context, Decimal
from typing import Any, Literal, TypedDict

MAX_INT = 2**53 - 1
ERROR_CHARS = 2000

MAX_USD = MAX_INT // 1_000_000
"""The largest cost that the daemon takes: its integers are micro-dollars."""

# What Decimal reads and no sender means, which the daemon refuses: 1_000, spaces around, digits of other scripts.
_UNMEANT = re.compile(r"[^!-^`-~]")
_MICRO = Decimal("0.000001")
# 1,200 digits: every amount that is a double, whole, with its 1,074 decimals; what is longer is rounded up.
_EXACT = Context(prec=1_200, rounding=ROUND_CEILING, Emin=MIN_EMIN, Emax=MAX_EMAX)

Usd = Decimal | int | str | float
"""An amount of US dollars; text and Decimal are exact."""


class Details(TypedDict, total=False):
    """What an event may say besides who, for whom and how much; docs/http.md has the meanings.

    A `delegation_token` does not go into the event, but with it, as the header `X-ASAP-Delegation-Token`.
    """

    model: str | None
    provider: str | None
    project: str | None
    delegation: str | None
    delegation_token: str | None
    reservation: str | None
    action: str | None
    parent_task_id: str | None
    trace_id: str | None
    labels: Mapping[str, str] | None


class Metrics(TypedDict, total=False):
    """The counts of an event: integers from 0, below 2**53."""

    tokens_in: int
    tokens_out: int
    cached_tokens_in: int
    cache_write_tokens: int
    cache_write_1h_tokens: int
    reasoning_tokens: int
    duration_ms: int
    api_calls: int


# A duration of 0 is one that was measured: without it the event is no sample of latency. Tokens of 0 were counted: what
# an event costs that tells none is not known, where tokens have a price.
_SAID_BY_ZERO = frozenset(("duration_ms", "tokens_in", "tokens_out"))

TOKEN_FIELD = "delegation_token"  # noqa: S105 -- a name, not a token
# Longer ones would not pass as a header: the daemon refuses heads of over 32 KiB.
_TOKEN_CHARS = 24 * 1024

_ALPHABET = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"


def new_id(now_ns: int | None = None) -> str:
    """A ULID: 26 characters that sort by time, 80 bits of them chance."""
    now_ms = (time.time_ns() if now_ns is None else now_ns) // 1_000_000
    number = (now_ms << 80) | int.from_bytes(os.urandom(10))
    return "".join([_ALPHABET[(number >> shift) & 31] for shift in range(125, -5, -5)])


def timestamp(now_ns: int) -> str:
    """RFC 3339 in UTC with microseconds."""
    seconds, rest_ns = divmod(now_ns, 1_000_000_000)
    moment = datetime.fromtimestamp(seconds, UTC).replace(microsecond=rest_ns // 1000, tzinfo=None)
    return moment.isoformat(timespec="microseconds") + "Z"


def count(value: Any) -> int:
    """A count.

    Raises:
        TypeError: for what is no integer; a float is none, even a whole one.
        ValueError: outside 0 .. 2**53-1.
    """
    number = operator.index(value)
    if not 0 <= number <= MAX_INT:
        raise ValueError(f"a count is within 0 and 2**53-1, not {number}")
    return number


def dollars(value: Usd) -> Decimal:
    """An amount, with all its decimals.

    Raises:
        ValueError: for what is no finite amount from 0 to `MAX_USD`, and what Decimal reads but the daemon does not.
    """
    if isinstance(value, str) and _UNMEANT.search(value):
        raise ValueError(f'{value!r:.100} is no amount of US dollars such as "0.25"')
    try:
        amount = value if isinstance(value, Decimal) else Decimal(str(value))
    except ArithmeticError:
        raise ValueError(f"{value!r} is no amount of US dollars") from None
    if not amount.is_finite() or not 0 <= amount <= MAX_USD:
        raise ValueError(f"a cost is an amount from 0 to {MAX_USD} US dollars, not {value!r:.100}")
    return amount


def add_dollars(total: Decimal | None, more: Usd) -> Decimal:
    """The sum of amounts, with all its decimals: rounded one by one, many small ones would be too much.

    Raises:
        ValueError: as `dollars` does, and for a sum over `MAX_USD`.
    """
    return dollars(_EXACT.add(total or 0, dollars(more)))


def _as_cost(amount: Decimal) -> str:
    """A cost as it is sent: with at most six decimals, the rest rounded up, as the daemon does it."""
    return format(_EXACT.quantize(amount, _MICRO), "f").rstrip("0").rstrip(".")


def error_text(error: BaseException) -> str:
    """The kind and message of an exception, cut to what an event may hold."""
    try:
        message = str(error)
    except Exception:  # noqa: BLE001 -- the message belongs to the user's exception, which may be broken itself
        message = "(its message cannot be shown)"
    kind = type(error).__qualname__
    return clean(f"{kind}: {message}" if message else kind)[:ERROR_CHARS]


def token_text(text: str) -> str:
    """A token as one line of a header; what could be none is changed, so that the daemon says it is malformed."""
    line = text.strip()[:_TOKEN_CHARS]
    return "".join([char if " " <= char <= "~" else "?" for char in line]) or "?"


def clean(text: str) -> str:
    """The text without lone surrogates, which are not UTF-8."""
    return text.encode("utf-8", "replace").decode("utf-8")


def build(
    *,
    agent: str,
    consumer: str,
    task_id: str,
    now_ns: int,
    metrics: Metrics,
    outcome: Literal["completed", "failed"],
    error: str | None,
    cost: Decimal | None,
    details: Details,
) -> dict[str, Any]:
    """An event without `source` and `seq`, which the spool gives it. Its id is made here, once."""
    event: dict[str, Any] = {
        "id": new_id(now_ns),
        "task_id": task_id,
        "agent": agent,
        "consumer": consumer,
        "timestamp": timestamp(now_ns),
        "metrics": {name: value for name, value in metrics.items() if value or name in _SAID_BY_ZERO},
    }
    if outcome != "completed":
        event["outcome"] = outcome
    if error:
        event["error"] = clean(error)[:ERROR_CHARS]
    if cost is not None:
        event["cost_usd"] = _as_cost(cost)
    for name, value in details.items():
        if value is not None:
            event[name] = dict(value) if isinstance(value, Mapping) else value
    return event


_encoder = json.JSONEncoder(ensure_ascii=True, allow_nan=False, separators=(",", ":"))


def encode(value: Mapping[str, Any]) -> bytes:
    """Compact JSON in ASCII, on one line.

    Raises:
        TypeError, ValueError: for a value that JSON does not have.
    """
    return _encoder.encode(value).encode("ascii")
