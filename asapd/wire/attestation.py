"""What excuses that records are gone: details of an entry, signed by the daemon's key for the entry's place in the log.

Who can write the database can chain entries too, and could explain away what was taken; this signature takes the key.
"""

from __future__ import annotations

from typing import Any, Final

from nacl.signing import SigningKey

from asapd.core.audit import as_they_are, canonical_details
from asapd.core.types import format_us
from asapd.wire.receipt import signature_of, verifies

KIND: Final = "asapd.attestation"
MEMBER: Final = "attestation"


def attested(
    event_type: str, actor: str, subject: str, details: dict[str, Any], previous_hash: bytes, key: SigningKey
) -> dict[str, Any]:
    """Details with `attestation`: Ed25519 over the canonical form of what the entry says and of what it follows."""
    said = _said(event_type, actor, subject, details, previous_hash)
    return {**details, MEMBER: signature_of(said, key)}


def is_attested(
    event_type: str, actor: str, subject: str, details: dict[str, Any], previous_hash: bytes, public_key: bytes
) -> bool:
    """Whether a key (32 raw bytes) signed the details of an entry, for the place where it stands."""
    said = {name: value for name, value in details.items() if name != MEMBER}
    return verifies(details.get(MEMBER), _said(event_type, actor, subject, said, previous_hash), public_key)


def _said(event_type: str, actor: str, subject: str, details: dict[str, Any], previous_hash: bytes) -> bytes:
    return as_they_are(
        {
            "statement": KIND,
            "event_type": event_type,
            "actor": actor,
            "subject": subject,
            "details": details,
            "previous_hash": previous_hash.hex(),
        }
    )


def sealing(size: int, root: bytes, sealed_us: int) -> bytes:
    """What is signed of when a checkpoint of a size and a root was: a checkpoint itself has no time in it."""
    return canonical_details(
        {"statement": "asapd.sealing", "root": root.hex(), "sealed_at": format_us(sealed_us), "size": size}
    )
