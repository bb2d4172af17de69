"""The claims of a delegation, checked one by one: the same rules for both forms of a token."""

from __future__ import annotations

import re
from decimal import Decimal
from functools import lru_cache
from typing import Any

from msgspec import Struct

from asapd.core.delegation import MAX_SCOPES, Claims, is_scope
from asapd.core.money import MICRO, MoneyError, parse_usd
from asapd.core.types import AGENT_URN, MAX_INT, SECOND_US
from asapd.wire.strict_json import TokenMalformed, shown

MAX_NAME_CHARS = 256
# The year 10000: later times have no RFC 3339 form.
MAX_NUMERIC_DATE_S = 253_402_300_799
SIGNATURE_BYTES = 64

_DECIMAL_TEXT = re.compile(r"[0-9]{1,16}(?:\.[0-9]{1,6})?\Z")
_MAX_WHOLE_USD = MAX_INT // MICRO


class Level(Struct, frozen=True, gc=False):
    """One token of a chain as it was read, and where its parent is to be found.

    `signed` are the bytes that its signature may be over. Of the parent, `parent_text` is the whole token and
    `parent_id` the id of one that has to be known already; at most one of them is there.
    """

    claims: Claims
    text: str
    signature: bytes
    signed: tuple[bytes, ...]
    parent_text: str | None = None
    parent_id: str | None = None
    kid: str | None = None


# Amounts repeat, and exact arithmetic is slow; what comes here is short.
microusd = lru_cache(maxsize=1024, typed=True)(parse_usd)


def is_name(text: str) -> bool:
    """Whether the text is 1 to 256 characters of visible ASCII."""
    return text.isascii() and text.isprintable() and " " not in text and 0 < len(text) <= MAX_NAME_CHARS


def is_agent(text: str) -> bool:
    """Whether the text is the URN of an agent."""
    return len(text) <= MAX_NAME_CHARS and is_short_agent(text)


# Few agents are in use on a host; 4096 of 256 characters are a megabyte.
@lru_cache(maxsize=4096)
def is_short_agent(text: str) -> bool:
    """The same of a text of at most 256 characters, without the look at how many it has."""
    return AGENT_URN.match(text) is not None


# 256 of 64 scopes of 128 characters are two megabytes.
@lru_cache(maxsize=256)
def are_scopes(texts: tuple[str, ...]) -> bool:
    """Whether these, of 128 characters each at most, are 1 to 64 different scopes."""
    return 0 < len(texts) <= MAX_SCOPES and len(set(texts)) == len(texts) and all(map(is_scope, texts))


def read_name(values: dict[str, Any], key: str) -> str:
    """A member that is a string of visible ASCII."""
    value = values.get(key)
    if isinstance(value, str) and is_name(value):
        return value
    if key not in values:
        raise TokenMalformed(f"{key}: is missing")
    raise TokenMalformed(
        f"{key}: must be a string of 1 to {MAX_NAME_CHARS} visible ASCII characters, not {shown(value)}"
    )


def read_agent(values: dict[str, Any], key: str) -> str:
    """A member that names an agent."""
    name = read_name(values, key)
    if not is_agent(name):
        raise TokenMalformed(f"{key}: must be a URN of the form urn:asap:agent:<name>, not {shown(name)}")
    return name


def read_seconds_us(values: dict[str, Any], key: str) -> int:
    """A member that is whole seconds since 1970."""
    value = values.get(key)
    if type(value) is int and 0 < value <= MAX_NUMERIC_DATE_S:
        return value * SECOND_US
    if key not in values:
        raise TokenMalformed(f"{key}: is missing")
    raise TokenMalformed(f"{key}: must be whole seconds since 1970, from 1 to {MAX_NUMERIC_DATE_S}, not {shown(value)}")


def read_scopes(values: dict[str, Any], key: str) -> tuple[str, ...]:
    """A member that is a list of different scopes."""
    if key not in values:
        raise TokenMalformed(f"{key}: is missing")
    scopes = values[key]
    if not isinstance(scopes, list) or not 0 < len(scopes) <= MAX_SCOPES:
        raise TokenMalformed(f"{key}: must be a list of 1 to {MAX_SCOPES} scopes")
    for scope in scopes:
        if not isinstance(scope, str) or not is_scope(scope):
            raise TokenMalformed(f"{key}: {shown(scope)} is no scope; scopes look like a.b, a.* or *")
    if len(set(scopes)) != len(scopes):
        raise TokenMalformed(f"{key}: names a scope twice")
    return tuple(scopes)


def read_constraints(values: dict[str, Any], key: str, known: tuple[str, ...]) -> dict[str, Any]:
    """A member that is an object of constraints, all of which are enforced here; empty where there is none."""
    constraints = values.get(key, {})
    if not isinstance(constraints, dict):
        raise TokenMalformed(f"{key}: must be an object")
    for name in constraints:
        if name not in known:
            raise TokenMalformed(f"{key}: {shown(name)} is a constraint that is not enforced here")
    return constraints


def read_max_tasks(constraints: dict[str, Any]) -> int | None:
    """The limit of tasks; None is no limit."""
    if "max_tasks" not in constraints:
        return None
    value = constraints["max_tasks"]
    if type(value) is not int or not 0 <= value <= MAX_INT:
        raise TokenMalformed(f"max_tasks: must be an integer from 0 to {MAX_INT}, not {shown(value)}")
    return value


def read_max_cost(constraints: dict[str, Any]) -> int | None:
    """The limit of cost in micro-USD; None is no limit. Numbers and decimal text, read without binary rounding."""
    if "max_cost_usd" not in constraints:
        return None
    value = constraints["max_cost_usd"]
    if type(value) is int and 0 <= value <= _MAX_WHOLE_USD:
        return value * MICRO
    if not (type(value) in (int, float, Decimal) or (isinstance(value, str) and _DECIMAL_TEXT.match(value))):
        raise TokenMalformed(f"max_cost_usd: must be an amount of USD with up to six decimals, not {shown(value)}")
    try:
        return microusd(value)
    except MoneyError as error:
        raise TokenMalformed(f"max_cost_usd: {error}, not {shown(value)}") from None
