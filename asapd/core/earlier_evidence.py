"""Evidence from before time could be excluded or blind: what it would have said, and what was otherwise then."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from asapd.core.types import DAY_US, MINUTE_US

# All time counted then, so this is what was so.
_NOTHING: Mapping[str, Any] = {"excluded_us": 0, "blind_us": 0, "excluded": [], "blind": []}

_STEPPED_OTHERWISE = frozenset((5 * MINUTE_US, 30 * MINUTE_US, 3 * DAY_US))


def is_earlier(evidence: Mapping[str, Any]) -> bool:
    """Whether it is from then: it lacks all that it would say of such time, for nobody may leave out just some."""
    return "form" not in evidence and not evidence.keys() & _NOTHING.keys()


def filled(evidence: Mapping[str, Any]) -> Mapping[str, Any]:
    """The same with what it would have said, if it is from then."""
    return {**_NOTHING, **evidence} if is_earlier(evidence) else evidence


def explained(breach: Mapping[str, Any], evidence: Mapping[str, Any], severity: str, found: list[str]) -> list[str]:
    """What differs, where that which was otherwise then is said to be so: it is not proven, and no forgery either.

    `severity` is what the evidence makes.
    """
    if not is_earlier(evidence):
        return found
    told: list[str] = []
    for may_be, names, what in (
        (
            evidence["window_us"] in _STEPPED_OTHERWISE,
            "period: is",
            "period: is as an earlier asapd made it, in which windows of this length had other steps",
        ),
        (
            (breach["severity"], severity) == ("critical", "warning"),
            ("breach.severity:", "breach.actual", "breach.samples:"),
            "breach.severity: an earlier asapd made this, which kept nothing of what a breach escalated to",
        ),
    ):
        left = [one for one in found if not one.startswith(names)]
        if may_be and len(left) < len(found):
            told.append(f"{what}: this one cannot compute it, which says nothing against it")
            found = left
    return told + found
