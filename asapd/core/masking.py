"""Secrets in text that people and agents write freely: what looks like one is masked before it is kept for good."""

from __future__ import annotations

import re
from collections.abc import Iterable
from math import prod
from typing import Any

MASK = "[masked]"

# Each begins with something that only such a secret has, and begins a word: `task-550e...` is no `sk-`.
_SECRET = re.compile(
    r"(?<![A-Za-z0-9_-])(?:asapd_[0-9a-f]{10}_[0-9a-f]{64}"  # our own API keys
    r"|eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*"  # JWS, JWT
    r"|(?i:bearer)\s+[\w.~+/=-]{16,}"
    r"|(?:sk|pk|rk)[-_][\w-]{20,}"
    r"|gh[pousr]_\w{20,}|github_pat_\w{20,}|glpat-[\w-]{20,}|xox[abeprs]-[\w-]{10,}"
    r"|(?:AKIA|ASIA)[0-9A-Z]{16}"
    r"|AIza[\w-]{35})"
    r"|-----BEGIN [A-Z ]{0,20}PRIVATE KEY-----(?:[^-]{0,8000}-----END [A-Z ]{0,20}PRIVATE KEY-----)?"
    r"|(?<=://)[^/\s:@]{1,64}:[^/\s@]{1,256}(?=@)"  # user and password of a URL
)


MOST_STEPS = 4_096
"""Ways to match a pattern at one place of a text. In a text of 2000 characters, the longest, some 15 ms."""

FREE_TEXT = frozenset(
    {"comment", "description", "detail", "error", "message", "note", "reason", "text", "title", "url"}
)
"""The details that people and agents word as they like: nothing that asapd finds records by, or compares."""

_QUANTIFIER = re.compile(r"[*+?]|\{(\d*)(,?)(\d*)\}")
_VERBOSE = re.compile(r"\(\?[A-Za-z]*x")
_CLASS = re.compile(r"\[\^?\]?(?:\\.|[^\]\\])*\]", re.DOTALL)


def why_not(pattern: str) -> str | None:
    """Why a pattern is none that texts may be searched for, in words that follow its name; None when it is one.

    Python's search tries every way to match. That is bounded here: only single characters and classes are repeated, no
    more often than said, and the ways that repeats and alternatives offer are few when multiplied.
    """
    try:
        if re.compile(pattern).search("") is not None:
            return "matches where there is nothing"
    except (re.error, OverflowError, RecursionError) as error:
        return f"is no regular expression: {error}"
    ways: list[int] = []
    at, after_group = 0, False
    while at < len(pattern):
        found = _QUANTIFIER.match(pattern, at)
        if pattern[at] == "\\":
            at, after_group = at + 2, False
        elif pattern[at] == "[" and (chars := _CLASS.match(pattern, at)) is not None:
            at, after_group = chars.end(), False
        elif _VERBOSE.match(pattern, at) is not None:
            return "is of the verbose form: write it without"
        elif pattern.startswith("(?", at):
            at, after_group = at + 2, False
        elif found is not None:
            if after_group:
                return "repeats a group: repeat single characters and classes only"
            least, comma, most = found.group(1) or "0", found.group(2), found.group(3)
            if found.group() in ("*", "+") or (comma and not most):
                return "repeats without an end: write how often at most, such as {0,64}"
            ways.append(2 if found.group() == "?" else int(most or least) + 1)
            at = found.end()
        else:
            after_group = pattern[at] == ")"
            if pattern[at] == "|":
                ways.append(2)
            at += 1
    if prod(ways) > MOST_STEPS:
        return f"has more than {MOST_STEPS} ways to match (of its repeats and alternatives, multiplied): shorten it"
    return None


def compiled(patterns: Iterable[str]) -> tuple[re.Pattern[str], ...]:
    """Patterns as they are looked for."""
    return tuple(re.compile(pattern) for pattern in patterns)


def masked(text: str) -> str:
    """A text with every secret in it replaced."""
    return _SECRET.sub(MASK, text)


def is_masked_form(said: str | None, text: str | None) -> bool:
    """Whether a text could be read as `said` once secrets in it were replaced, whatever the patterns were then."""
    if said is None or text is None:
        return said is text
    first, *parts = said.split(MASK)
    if not parts:
        return said == text
    *middle, last = parts
    if not text.startswith(first) or not text.endswith(last):
        return False
    at, end = len(first), len(text) - len(last)
    for part in middle:
        found = text.find(part, at, end)
        if found < 0:
            return False
        at = found + len(part)
    return at <= end


def masked_details(details: dict[str, Any], patterns: tuple[re.Pattern[str], ...] = ()) -> dict[str, Any]:
    """Details with secrets, and what matches a pattern, replaced in their free texts, however deep.

    Keys stay, and so does what names or counts something.
    """
    return {
        # Most details are numbers and names: a call for each of them was a tenth of what a decision costs the writer.
        key: value if type(value) in _PLAIN and key not in FREE_TEXT else _masked(value, patterns, key in FREE_TEXT)
        for key, value in details.items()
    }


_PLAIN = frozenset({str, int, bool, type(None)})


def _masked(value: Any, patterns: tuple[re.Pattern[str], ...], is_free: bool) -> Any:
    if isinstance(value, str) and is_free:
        text = masked(value)
        for pattern in patterns:
            # Not in what was masked before: one that finds a word of the mask would mask it again.
            text = MASK.join(pattern.sub(MASK, part) for part in text.split(MASK))
        return text
    if isinstance(value, dict):
        return {key: _masked(item, patterns, is_free or key in FREE_TEXT) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_masked(item, patterns, is_free) for item in value]
    return value
