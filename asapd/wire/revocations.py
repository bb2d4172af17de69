"""A signed list of revocations: an object whose `signature` is Ed25519 over the RFC 8785 form of all the rest of it."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable, Sequence
from typing import Any, Final

import msgspec
from nacl.bindings import crypto_sign_open
from nacl.exceptions import BadSignatureError
from nacl.signing import SigningKey

from asapd.core.canonical import CanonicalError, canonical
from asapd.core.types import MAX_INT, SECOND_US, format_us
from asapd.wire.keys import key_id
from asapd.wire.token import MAX_NAME_CHARS, MAX_NUMERIC_DATE_S, TokenMalformed, parse_strict_json
from asapd.wire.usage import parse_timestamp

VERSION: Final = 1
DAEMON_PREFIX: Final = "asapd/"
MAX_ENTRIES: Final = 50_000
"""Of one list: what fits into the default `http.max_body`, and about a second of the writer's work."""

# Names, times and numbers only: for those, sorted compact JSON is RFC 8785.
_encoder = msgspec.json.Encoder(order="sorted")


class ListMalformed(ValueError):  # noqa: N818 -- says what the text is
    """The text is not a list of revocations; whoever made it has to correct what the message names."""


class Entry(msgspec.Struct, frozen=True):
    """One revoked token: its issuer and its id (`jti`); times in microseconds since the epoch."""

    issuer: str
    id: str
    revoked_us: int
    expires_us: int


class RevocationList(msgspec.Struct, frozen=True):
    """A list as it was received. Decoding says nothing about its signature, only `verify` does."""

    issuer: str
    key_id: str
    number: int
    entries: list[Entry]
    signed: bytes
    signature: bytes


def daemon_name(public_key: bytes) -> str:
    """What a daemon calls itself as the issuer of lists: `asapd/<key id>`."""
    return f"{DAEMON_PREFIX}{key_id(public_key)}"


def sign_list(entries: Iterable[Entry], key: SigningKey, *, issuer: str, number: int, updated_us: int | None) -> bytes:
    """A list as JSON text. `number` never falls, `updated_us` is when the newest entry came."""
    document: dict[str, Any] = {
        "entries": [
            {
                "expires_at": format_us(entry.expires_us),
                "id": entry.id,
                "issuer": entry.issuer,
                "revoked_at": format_us(entry.revoked_us),
            }
            for entry in entries
        ],
        "issuer": issuer,
        "key_id": key_id(bytes(key.verify_key)),
        "number": number,
        "updated_at": None if updated_us is None else format_us(updated_us),
        "version": VERSION,
    }
    document["signature"] = base64.b64encode(key.sign(_encoder.encode(document)).signature).decode("ascii")
    return _encoder.encode(document)


def decode_list(raw: bytes) -> RevocationList:
    """The list in a JSON text, read strictly.

    An entry without an `issuer` is of the list's own. Members that are not known are covered by the signature, and
    otherwise ignored.

    Raises:
        ListMalformed: anything else, and nothing else is raised.
    """
    try:
        document = parse_strict_json(raw)
    except TokenMalformed as error:
        raise ListMalformed(f"the list {error.reason}") from None
    if not isinstance(document, dict):
        raise ListMalformed("the list must be a JSON object")
    if document.get("version") != VERSION or isinstance(document["version"], bool):
        raise ListMalformed(f"version: must be {VERSION}")
    issuer = _name(document, "issuer", "")
    number = document.get("number")
    if type(number) is not int or not 0 <= number <= MAX_INT:
        raise ListMalformed(f"number: must be an integer from 0 to {MAX_INT}")
    entries = document.get("entries")
    if not isinstance(entries, list) or len(entries) > MAX_ENTRIES:
        raise ListMalformed(f"entries: must be an array of at most {MAX_ENTRIES} objects")
    signature = _signature(document.pop("signature", None))
    try:
        signed = canonical(document)
    except CanonicalError as error:
        raise ListMalformed(f"the list has no canonical form: {error}") from None
    found = [_entry(entry, f"entries[{index}]", issuer) for index, entry in enumerate(entries)]
    return RevocationList(issuer, _name(document, "key_id", ""), number, found, signed, signature)


def verify_list(found: RevocationList, public_keys: Sequence[bytes]) -> bytes | None:
    """Which of the keys (32 raw bytes) signed the list; None when none did."""
    for key in public_keys:
        try:
            crypto_sign_open(found.signature + found.signed, key)
        except BadSignatureError:
            continue
        return key
    return None


def _entry(raw: Any, place: str, issuer: str) -> Entry:
    if not isinstance(raw, dict):
        raise ListMalformed(f"{place}: must be an object")
    prefix = f"{place}."
    named = _name(raw, "issuer", prefix) if "issuer" in raw else issuer
    return Entry(named, _name(raw, "id", prefix), _time(raw, "revoked_at", prefix), _time(raw, "expires_at", prefix))


def _name(raw: dict[str, Any], field: str, prefix: str) -> str:
    value = raw.get(field)
    # As in a token: what could be no claim of one names none.
    if (
        not isinstance(value, str)
        or not 0 < len(value) <= MAX_NAME_CHARS
        or not all("!" <= char <= "~" for char in value)
    ):
        raise ListMalformed(f"{prefix}{field}: must have 1 to {MAX_NAME_CHARS} visible ASCII characters")
    return value


def _time(raw: dict[str, Any], field: str, prefix: str) -> int:
    value = raw.get(field)
    if not isinstance(value, str):
        raise ListMalformed(f"{prefix}{field}: must be a time, such as 2026-11-20T09:00:00Z")
    try:
        found_us = parse_timestamp(value)
    except ValueError as error:
        raise ListMalformed(f"{prefix}{field}: {error}") from None
    if not 0 <= found_us <= MAX_NUMERIC_DATE_S * SECOND_US:
        # An offset can carry a time out of the years that can be written.
        raise ListMalformed(f"{prefix}{field}: must be between 1970 and 9999")
    return found_us


def _signature(value: Any) -> bytes:
    if isinstance(value, str):
        try:
            raw = base64.b64decode(value, validate=True)
        except (binascii.Error, ValueError):
            raw = b""
        if len(raw) == 64 and base64.b64encode(raw).decode("ascii") == value:
            return raw
    raise ListMalformed("signature: must be the 64 bytes of an Ed25519 signature in base64")
