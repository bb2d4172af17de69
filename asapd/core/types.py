"""Words every room shares: time, names, outcomes, roles."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from enum import IntEnum, StrEnum
from functools import lru_cache

SECOND_US = 1_000_000
MINUTE_US = 60 * SECOND_US
HOUR_US = 60 * MINUTE_US
DAY_US = 24 * HOUR_US
MAX_INT = 2**53 - 1
"""The largest integer that every JSON reader keeps exact."""

DEFAULT_TENANT = "default"
OWN_ID = "urn:asap:agent:asapd"
"""The daemon as an agent."""

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_NAIVE_EPOCH = EPOCH.replace(tzinfo=None)
AGENT_URN = re.compile(r"urn:asap:agent:[A-Za-z0-9][A-Za-z0-9._:-]{0,199}\Z")


class Outcome(IntEnum):
    """How a task ended."""

    COMPLETED = 1
    FAILED = 2


class Role(StrEnum):
    """What an API key may do."""

    INGEST = "ingest"
    READER = "reader"
    OPERATOR = "operator"
    ADMIN = "admin"


@lru_cache(maxsize=64)  # rows of one commit share their time; a miss costs a tenth more
def format_us(us: int) -> str:
    """Microseconds since the epoch as RFC 3339 UTC with six decimals: 2026-11-20T09:00:01.123456Z."""
    return (_NAIVE_EPOCH + timedelta(microseconds=us)).isoformat(timespec="microseconds") + "Z"


def datetime_us(moment: datetime) -> int:
    """A datetime as microseconds since the epoch; naive means UTC."""
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return (moment - EPOCH) // timedelta(microseconds=1)


_AGENTS = "urn:asap:agent:"


def may_match_an_agent(pattern: str) -> bool:
    """Whether there can be an agent that a pattern matches."""
    if not pattern.endswith("*"):
        return AGENT_URN.match(pattern) is not None
    stem = pattern[:-1]
    return _AGENTS.startswith(stem) or AGENT_URN.match(stem) is not None


def pattern_matches(pattern: str, name: str) -> bool:
    """Whether an agent pattern allows a name: exact, or a trailing `*` stands for any rest."""
    return name.startswith(pattern[:-1]) if pattern.endswith("*") else name == pattern
