"""Secrets in text that people and agents write freely: what looks like one is masked before it is kept for good."""

from __future__ import annotations

import re
from typing import Any

MASK = "[masked]"

# Each begins with something that only such a secret has, so that no id, URN or digest is ever taken for one.
_SECRET = re.compile(
    r"asapd_[0-9a-f]{10}_[0-9a-f]{64}"  # our own API keys
    r"|-----BEGIN [A-Z ]{0,20}PRIVATE KEY-----(?:[^-]{0,8000}-----END [A-Z ]{0,20}PRIVATE KEY-----)?"
    r"|eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*"  # JWS, JWT
    r"|(?i:bearer)\s+[\w.~+/=-]{16,}"
    r"|(?:sk|pk|rk)[-_][\w-]{20,}"
    r"|gh[pousr]_\w{20,}|github_pat_\w{20,}|glpat-[\w-]{20,}|xox[abeprs]-[\w-]{10,}"
    r"|(?:AKIA|ASIA)[0-9A-Z]{16}"
    r"|AIza[\w-]{35}"
    r"|(?<=://)[^/\s:@]{1,64}:[^/\s@]{1,256}(?=@)"  # user and password of a URL
)


def masked(text: str) -> str:
    """A text with every secret in it replaced."""
    return _SECRET.sub(MASK, text)


def masked_details(details: dict[str, Any]) -> dict[str, Any]:
    """Details with the secrets in their texts replaced, however deep; keys are ours and stay."""
    return {key: _masked(value) for key, value in details.items()}


def _masked(value: Any) -> Any:
    if isinstance(value, str):
        return masked(value)
    if isinstance(value, dict):
        return masked_details(value)
    if isinstance(value, list | tuple):
        return [_masked(item) for item in value]
    return value
