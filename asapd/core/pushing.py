"""Pushing alerts to a target: which it wants, when a failed attempt is repeated, and when it is given up."""

from __future__ import annotations

from collections.abc import Collection

from msgspec import Struct

LONGEST_WAIT_S = 60.0
LONGEST_ASKED_S = 3600.0
"""A receiver may ask for more patience than the backoff has, but not for ever."""

REFUSED_TRIES = 5
"""Attempts at what a receiver says it will never take: some half a minute, in case it was a bad deployment."""

# What a receiver says of the message itself; all else (a key, an address, an overload) may be mended on its side.
_OF_THE_MESSAGE = frozenset({400, 405, 406, 410, 411, 413, 414, 415, 422, 501})


class Failed(Struct, frozen=True):
    """An attempt that failed. `is_final`: the receiver refuses this message, now and later."""

    error: str
    is_final: bool = False
    retry_after_s: float | None = None


def wants(events: Collection[str], min_severity: str, *, event: str, severity: str, held: str | None) -> bool:
    """Whether a target with these filters is pushed a transition; what is held back is pushed to none.

    `severity` is the breach's highest so far.
    """
    return held is None and event in events and (min_severity != "critical" or severity == "critical")


def judge(status: int, retry_after: str | None = None) -> Failed | None:
    """What an HTTP status says of an attempt; None is delivered.

    `retry_after` counts in seconds (RFC 9110, section 10.2.3); a date is not read.
    """
    if 200 <= status < 300:
        return None
    asked = (
        float(retry_after) if retry_after is not None and retry_after.isascii() and retry_after.isdecimal() else None
    )
    return Failed(
        f"answered with status {status}",
        status in _OF_THE_MESSAGE,
        None if asked is None else min(asked, LONGEST_ASKED_S),
    )


def wait_s(failures: int, retry_after_s: float | None, chance: float) -> float:
    """How long to wait after so many failures in a row: doubling from a second, the half of it by chance (0 to 1)."""
    backoff_s = min(LONGEST_WAIT_S, 2.0 ** min(failures - 1, 30))
    return max(backoff_s * (0.5 + chance / 2), retry_after_s or 0.0)


def gives_up(failed: Failed, failures: int, *, age_us: int, retry_for_us: int) -> bool:
    """Whether an alert of this age becomes a dead letter, so that those behind it have their turn."""
    return age_us >= retry_for_us or (failed.is_final and failures >= REFUSED_TRIES)
