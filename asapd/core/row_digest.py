"""A digest of what a record holds and its entry does not say field by field."""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import sha256
from typing import Any

import msgspec

_encode = msgspec.msgpack.encode


def row_digest(values: Iterable[Any]) -> str:
    """SHA-256, in hex, of the values of a record's columns in their order, as a msgpack array.

    No two values of SQLite look alike in it, as infinity and NULL, or bytes and a text, do in JSON.
    """
    return sha256(_encode(list(values))).hexdigest()


def consumer_digest(salt: bytes, consumer: str) -> str:
    """SHA-256, in hex, of 16 random bytes and a name, which nobody can guess any more once the bytes are gone."""
    return sha256(salt + consumer.encode()).hexdigest()
