"""Evidence of a breach as a statement: its `signature` is Ed25519 over the RFC 8785 form of all the rest."""

from __future__ import annotations

import base64
import binascii
from datetime import datetime
from decimal import Decimal
from typing import Any, Final

import msgspec
from nacl.bindings import crypto_sign_open
from nacl.exceptions import BadSignatureError
from nacl.signing import SigningKey

from asapd.core.canonical import LARGEST_WRITTEN, CanonicalError, canonical, exact
from asapd.core.evidence import EvidenceError, arithmetic
from asapd.core.types import format_us
from asapd.wire.keys import KeyFormatError, key_id, load_public, public_base64
from asapd.wire.strict_json import TokenMalformed, parse_strict_json

KIND: Final = "asapd.breach-evidence"
VERSION: Final = 1
_MEMBERS = frozenset(
    ("arithmetic", "breach", "evidence", "issued_at", "issuer", "key_id", "public_key", "statement", "version")
)


class StatementMalformed(ValueError):  # noqa: N818 -- says what the text is
    """The text is not a statement of evidence; whoever made it has to correct what the message names."""


class Statement(msgspec.Struct, frozen=True):
    """A statement as it was received. Decoding says nothing about its signature, only `signed_by` does."""

    issuer: str
    key_id: str
    public_key: bytes
    arithmetic: Any
    breach: dict[str, Any]
    evidence: dict[str, Any]
    signed: bytes
    signature: bytes

    def signed_by(self, public_key: bytes) -> bool:
        """Whether a key (32 raw bytes) signed it."""
        try:
            crypto_sign_open(self.signature + self.signed, public_key)
        except BadSignatureError:
            return False
        return True


def sign_evidence(breach: dict[str, Any], evidence: dict[str, Any], key: SigningKey, now_us: int) -> bytes:
    """A breach with its evidence as a signed statement, in its canonical form."""
    public_key = bytes(key.verify_key)
    try:
        worked_out = arithmetic(evidence) if breach.get("agent_id") is not None else {}
    except EvidenceError:
        worked_out = {}  # evidence of before this form is signed as it was kept
    document = {
        "statement": KIND,
        "version": VERSION,
        "issuer": f"asapd/{key_id(public_key)}",
        "key_id": key_id(public_key),
        "public_key": public_base64(public_key),
        "issued_at": format_us(now_us),
        "breach": breach,
        "evidence": exact(evidence),
        "arithmetic": worked_out,
    }
    signature = key.sign(canonical(document)).signature
    return canonical({**document, "signature": base64.b64encode(signature).decode("ascii")})


def is_statement(document: object) -> bool:
    """Whether a JSON value says that it is a statement of evidence."""
    return isinstance(document, dict) and document.get("statement") == KIND


def decode_statement(raw: bytes) -> Statement:
    """The statement in a JSON text, read strictly.

    Raises:
        StatementMalformed: anything else, and nothing else is raised.
    """
    try:
        document = floats(parse_strict_json(raw))
    except TokenMalformed as error:
        raise StatementMalformed(f"the statement {error.reason}") from None
    if not is_statement(document) or document.get("version") != VERSION or document["version"] is True:
        raise StatementMalformed(f"it is not a statement of kind {KIND}, version {VERSION}")
    signature = _signature(document.pop("signature", None))
    if strange := sorted(document.keys() - _MEMBERS):
        raise StatementMalformed(f"it has {', '.join(strange)}, which no statement has")
    try:
        datetime.fromisoformat(document.get("issued_at"))
    except (TypeError, ValueError):
        raise StatementMalformed("issued_at: must be a time") from None
    try:
        # A float from 2**53 on, such as what was measured, is read as the integer that it looks like.
        signed = canonical(document, largest=LARGEST_WRITTEN)
        public_key = load_public(str(document.get("public_key")))
    except CanonicalError as error:
        raise StatementMalformed(f"the statement has no canonical form: {error}") from None
    except KeyFormatError as error:
        raise StatementMalformed(f"public_key: {error}") from None
    breach, evidence = document.get("breach"), document.get("evidence")
    if not isinstance(breach, dict) or not isinstance(evidence, dict):
        raise StatementMalformed("breach and evidence: must be objects")
    issuer, named, worked_out = (document.get(name) for name in ("issuer", "key_id", "arithmetic"))
    return Statement(str(issuer), str(named), public_key, worked_out, breach, evidence, signed, signature)


def floats(value: Any) -> Any:
    """JSON that was read strictly, with its fractions as floats, so that it has a canonical form again."""
    if isinstance(value, Decimal):
        return float(value)
    if isinstance(value, dict):
        return {name: floats(member) for name, member in value.items()}
    return [floats(item) for item in value] if isinstance(value, list) else value


def _signature(value: Any) -> bytes:
    if isinstance(value, str):
        try:
            raw = base64.b64decode(value, validate=True)
        except (binascii.Error, ValueError):
            raw = b""
        if len(raw) == 64 and base64.b64encode(raw).decode("ascii") == value:
            return raw
    raise StatementMalformed("signature: must be the 64 bytes of an Ed25519 signature in base64")
