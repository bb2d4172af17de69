"""What the offline check of a file comes to."""

from __future__ import annotations

from msgspec import Struct


class Verified(Struct, frozen=True):
    """`is_good` is the exit code's word; `verdict` goes to stdout, `remarks` (what was not checked) to stderr."""

    is_good: bool
    verdict: str
    remarks: tuple[str, ...] = ()


class CannotVerifyError(Exception):
    """The file is of a kind that needs more than was given, or of no known kind; the message says what to do."""
