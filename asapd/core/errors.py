"""Refusals: the outcomes a caller can meet that are not a bug, as values with a stable code.

`asapd.wire.problem` knows which HTTP status and title each code has.
"""

from __future__ import annotations

from typing import Any

import msgspec


class FieldError(msgspec.Struct, frozen=True, omit_defaults=True):
    """One bad field: its dotted path, why it is bad, and in a batch which event (from 0) holds it."""

    field: str
    reason: str
    index: int | None = None


class Refusal(msgspec.Struct, frozen=True, tag=True):
    """An expected no: `code` is stable, `detail` says what happened, why, and what to do.

    `extra` is merged into the problem document (JSON values only).
    """

    code: str
    detail: str
    errors: tuple[FieldError, ...] = ()
    extra: dict[str, Any] = {}
    retry_after_s: int | None = None
