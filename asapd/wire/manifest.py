"""An agent's manifest, plain or signed, and its health document, as the agent serves them."""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from decimal import Decimal
from typing import Any, Literal, get_args

import msgspec
from msgspec import Struct
from nacl.exceptions import BadSignatureError
from nacl.signing import VerifyKey

from asapd.core.canonical import CanonicalError, canonical
from asapd.core.health import AgentStatus, FailReason, Status
from asapd.core.sla import Promise
from asapd.core.types import AGENT_URN, MAX_INT
from asapd.wire.keys import KeyFormatError, load_public

Verification = Literal["verified", "self_signed", "bad_signature", "wrong_key", "key_changed", "unsigned"]

MAX_TTL_S = 366 * 86_400
"""A greater ttl is taken as this: far beyond any probing interval, and microseconds of it still fit 64 bits."""

_PERCENT = re.compile(r"[0-9]{1,3}(\.[0-9]{1,6})?%\Z")
_SLA_FIELDS = ("availability", "max_latency_p95_ms", "max_error_rate", "support_hours")
_AGENT_STATUSES: tuple[AgentStatus, ...] = get_args(AgentStatus)
_MAX_TEXT = 200


class ManifestError(ValueError):
    """What the agent served is not what the protocol says; the agent's fault. `reason` is a probe's stable word."""

    def __init__(self, detail: str, reason: FailReason = "protocol") -> None:
        super().__init__(detail)
        self.reason: FailReason = reason


class Manifest(Struct, frozen=True):
    """A manifest that could be read; whether to believe it is what `verify_manifest` says.

    `raw` is the manifest object as received, without the envelope of the signed form. `signed_bytes` is its canonical
    form (RFC 8785) without the top-level `signature`, and `digest` the hex SHA-256 of that. `signature` (64 bytes) and
    `public_key` (32) are None where the signed form has none that is usable.
    """

    id: str
    name: str
    version: str
    sla: Promise | None
    sla_error: str | None
    ttl_seconds: int | None
    public_key: bytes | None
    signed: bool
    signature: bytes | None
    digest: str
    signed_bytes: bytes
    raw: dict[str, Any]


class Health(Struct, frozen=True):
    """What an agent says of itself. Only `status` is required; what is not of its usual type is None."""

    status: Status
    agent_id: str | None = None
    version: str | None = None
    uptime_seconds: float | None = None
    ttl_seconds: int | None = None
    load: Any = None
    agent_status: AgentStatus | None = None


def parse_sla(block: object) -> Promise:
    """An SLA block as a promise.

    Percentages are numbers or text with a sign: 99.5, "99.5%". Missing and null terms are not promised.

    Raises:
        ManifestError: a value that is not what its field takes, or an unknown field; the message names it.
    """
    if not isinstance(block, dict):
        raise ManifestError("sla: must be an object")
    for key in block:
        if key not in _SLA_FIELDS:
            raise ManifestError(f"sla: unknown field {_shown(key)}; known are {', '.join(_SLA_FIELDS)}")
    latency = block.get("max_latency_p95_ms")
    if latency is not None and (type(latency) is not int or not 0 < latency <= MAX_INT):
        raise ManifestError(f"sla.max_latency_p95_ms: must be a positive integer up to 2^53-1, not {_shown(latency)}")
    support = block.get("support_hours")
    if support is not None and (not isinstance(support, str) or len(support) > _MAX_TEXT):
        raise ManifestError(f"sla.support_hours: must be text of at most {_MAX_TEXT} characters")
    return Promise(
        _percent("availability", block.get("availability")),
        latency,
        _percent("max_error_rate", block.get("max_error_rate")),
        support,
    )


def decode_manifest(body: bytes) -> Manifest:
    """A plain manifest, or the signed form `{manifest, signature{alg, signature, trust_level}, public_key}`.

    A bad SLA block does not sink the manifest, it is carried in `sla_error`. A bad signature or key does not
    either: it will not verify. `trust_level` is outside the signature, so it is not read at all. A `ttl_seconds` of 0
    counts as none given, or an agent could make all its downtime unknown.

    Raises:
        ManifestError: not JSON, not a manifest, or without a canonical form.
    """
    document = _decode_object(body)
    enveloped = "id" not in document and "manifest" in document
    raw = document["manifest"] if enveloped else document
    if not isinstance(raw, dict):
        raise ManifestError("manifest: must be an object")
    agent_id = raw.get("id")
    if not isinstance(agent_id, str) or AGENT_URN.match(agent_id) is None:
        raise ManifestError(f"id: must be an agent's name, urn:asap:agent:<name>, not {_shown(agent_id)}")
    try:
        signed_bytes = canonical({key: value for key, value in raw.items() if key != "signature"})
    except CanonicalError as problem:
        raise ManifestError(f"manifest: has no canonical form: {problem}") from None
    sla, sla_error = None, None
    if raw.get("sla") is not None:
        try:
            sla = parse_sla(raw["sla"])
        except ManifestError as problem:
            sla_error = str(problem)
    seal = document.get("signature") if enveloped else None
    return Manifest(
        id=agent_id,
        name=_text(raw, "name"),
        version=_text(raw, "version"),
        sla=sla,
        sla_error=sla_error,
        ttl_seconds=_ttl(raw.get("ttl_seconds")),
        public_key=_public_key(document.get("public_key")) if enveloped else None,
        signed=seal is not None,
        signature=_signature(seal),
        digest=hashlib.sha256(signed_bytes).hexdigest(),
        signed_bytes=signed_bytes,
        raw=raw,
    )


def verify_manifest(manifest: Manifest, pinned_key: bytes | None) -> Verification:
    """Who signed a manifest: the pinned key (32 raw bytes), or without one whoever names a key of their own in it.

    `wrong_key`: a sound signature, but by the key the manifest names and not by the pinned one.
    """
    if not manifest.signed:
        return "unsigned"
    if pinned_key is not None and _verifies(manifest, pinned_key):
        return "verified"
    if not _verifies(manifest, manifest.public_key):
        return "bad_signature"
    return "self_signed" if pinned_key is None else "wrong_key"


def decode_health(body: bytes, expected_id: str | None) -> Health:
    """A health document; one that names no agent is taken for the expected one's.

    Raises:
        ManifestError: `bad_json`; `protocol` without a known `status`; `wrong_agent` when it names another agent.
    """
    document = _decode_object(body)
    agent_id = document.get("agent_id")
    if agent_id is not None and not isinstance(agent_id, str):
        raise ManifestError("agent_id: must be text")
    if expected_id is not None and agent_id not in (None, expected_id):
        raise ManifestError(f"agent_id: {_shown(agent_id)} answers, not {expected_id}", "wrong_agent")
    try:
        status = msgspec.convert(document.get("status"), Status)
    except msgspec.ValidationError:
        raise ManifestError(
            f"status: must be healthy, degraded or unhealthy, not {_shown(document.get('status'))}"
        ) from None
    version, uptime, ttl = document.get("version"), document.get("uptime_seconds"), document.get("ttl_seconds")
    return Health(
        status=status,
        agent_id=agent_id,
        version=version if isinstance(version, str) else None,
        uptime_seconds=_seconds(uptime),
        ttl_seconds=min(ttl, MAX_TTL_S) if type(ttl) is int and ttl > 0 else None,
        load=document.get("load"),
        agent_status=_agent_status(document.get("agent_status")),
    )


def _decode_object(body: bytes) -> dict[str, Any]:
    try:
        document = msgspec.json.decode(body)
    # UnicodeDecodeError is a ValueError: msgspec lets it through for text that is not UTF-8.
    except (msgspec.DecodeError, ValueError) as problem:
        raise ManifestError(f"is not JSON: {problem}", "bad_json") from None
    except RecursionError:
        raise ManifestError("is nested too deep", "bad_json") from None
    if not isinstance(document, dict):
        raise ManifestError("must be a JSON object", "bad_json")
    return document


def _percent(field: str, value: object) -> Decimal | None:
    if value is None:
        return None
    if isinstance(value, str):
        percent = Decimal(value[:-1]) if _PERCENT.match(value) else None
    elif isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 100:
        percent = None
    else:
        # A float is read through its shortest repr; adding 0 makes -0.0 a plain zero.
        percent = Decimal(repr(value)) + 0
    exponent = percent.as_tuple().exponent if percent is not None else None
    if percent is None or percent > 100 or not isinstance(exponent, int) or exponent < -6:
        raise ManifestError(
            f'sla.{field}: must be a percentage from 0 to 100 with at most six decimals, such as "99.5%" or 99.5, '
            f"not {_shown(value)}"
        )
    return percent


def _agent_status(value: object) -> AgentStatus | None:
    known = value.upper() if isinstance(value, str) else None
    return next((status for status in _AGENT_STATUSES if status == known), None)


def _seconds(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= MAX_INT:
        return None
    return float(value)


def _text(raw: dict[str, Any], key: str) -> str:
    value = raw.get(key)
    if value is not None and not isinstance(value, str):
        raise ManifestError(f"{key}: must be text")
    return value or ""


def _ttl(value: object) -> int | None:
    if value is None:
        return None
    if type(value) is not int or value < 0:
        raise ManifestError(f"ttl_seconds: must be a whole number of seconds, not {_shown(value)}")
    return min(value, MAX_TTL_S) or None


def _public_key(value: object) -> bytes | None:
    try:
        return load_public(value) if isinstance(value, str) else None
    except KeyFormatError:
        return None


def _signature(seal: object) -> bytes | None:
    if not isinstance(seal, dict):
        return None
    alg, text = seal.get("alg"), seal.get("signature")
    if not isinstance(alg, str) or alg.lower() not in ("ed25519", "eddsa") or not isinstance(text, str):
        return None
    try:
        raw = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return None
    return raw if len(raw) == 64 else None


def _verifies(manifest: Manifest, key: bytes | None) -> bool:
    if key is None or manifest.signature is None:
        return False
    try:
        VerifyKey(key).verify(manifest.signed_bytes, manifest.signature)
    except (BadSignatureError, ValueError):
        return False
    return True


def _shown(value: object) -> str:
    """A value as the agent's owner would recognise it, in printable ASCII and cut to a readable length."""
    text = ascii(value) if isinstance(value, str | int | float | bool) or value is None else f"a {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:56]}..."
