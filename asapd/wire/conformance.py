"""What the answers of a live agent show of how it keeps to the protocol; pure, from bytes to findings."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any, Literal
from urllib.parse import urlsplit

import msgspec
from msgspec import Struct

from asapd.wire.keys import jwk_thumbprint, public_jwk
from asapd.wire.manifest import Health, Manifest, ManifestError, decode_health, decode_manifest, verify_manifest

Severity = Literal["failure", "warning"]

# Fields that the protocol's own implementation writes into every manifest.
_FIELDS = ("name", "version", "description", "capabilities", "endpoints")
# RFC 7518 section 6 and RFC 8037 section 2: what only the owner of a key may have.
_PRIVATE_MEMBERS = ("d", "p", "q", "dp", "dq", "qi", "oth", "k")
_TTL_LEAST_S, _TTL_MOST_S = 10, 86_400

FINDINGS: dict[str, tuple[Severity, str]] = {
    "health_no_answer": ("failure", "answer GET /.well-known/asap/health in whole and in time"),
    "health_redirect": ("failure", "answer there itself: a prober follows no redirect"),
    "health_too_large": ("failure", "keep the health document below 64 KiB"),
    "health_status": ("failure", "answer 200, or 503 with an unhealthy document"),
    "health_content_type": ("warning", "send Content-Type: application/json"),
    "health_malformed": ("failure", 'send a JSON object with "status": "healthy", "degraded" or "unhealthy"'),
    "health_agent_id_missing": ("warning", "name the agent in agent_id, so that a mix-up of addresses is seen"),
    "health_unhealthy": ("warning", "the agent itself says so: see what ails it"),
    "manifest_no_answer": ("failure", "answer GET /.well-known/asap/manifest.json in whole and in time"),
    "manifest_redirect": ("failure", "answer there itself: a redirected manifest is not taken"),
    "manifest_too_large": ("failure", "keep the manifest below 256 KiB"),
    "manifest_status": ("failure", "answer 200"),
    "manifest_content_type": ("warning", "send Content-Type: application/json"),
    "manifest_malformed": ("failure", "send a manifest, plain or as {manifest, signature, public_key}"),
    "manifest_duplicate_keys": ("failure", "write each key once: readers differ in which of two they take"),
    "manifest_fields_missing": ("warning", f"add them; usual are {', '.join(_FIELDS)}"),
    "manifest_unstable": ("failure", "serve one manifest, signed by one key, from every instance behind this address"),
    "endpoint_malformed": ("failure", "endpoints are absolute URLs: http or https, for events also ws or wss"),
    "id_mismatch": ("failure", "name the same agent in the health document and in the manifest"),
    "id_unexpected": ("failure", "this address is another agent's: correct the address or the name"),
    "id_unproven": ("failure", "serve a manifest with an id, or a health document with an agent_id"),
    "signature_missing": ("warning", "sign the manifest: without it nobody can tell a forged one"),
    "signature_required": ("failure", "sign the manifest with the agent's key"),
    "signature_algorithm": ("failure", 'sign with Ed25519, and say "alg": "ed25519"'),
    "signature_malformed": ("failure", "send the 64 bytes of the signature in base64 as signature.signature"),
    "signature_key_unusable": ("failure", "send the 32 bytes of an Ed25519 key, not of small order, as public_key"),
    "signature_bad": (
        "failure",
        "sign the RFC 8785 form of the manifest as it is sent, without its own signature field",
    ),
    "signature_wrong_key": ("failure", "sign with the key that was announced, or announce the new one beforehand"),
    "trust_level_unproven": ("warning", "the signature does not cover trust_level: prove it elsewhere"),
    "sla_missing": ("warning", "add an sla block, or agree on a tier with whoever judges this agent"),
    "sla_malformed": ("failure", 'percentages are "99.5%" or 99.5, max_latency_p95_ms is a positive integer'),
    "sla_empty": ("warning", "promise at least one of availability, max_latency_p95_ms and max_error_rate"),
    "ttl_missing": ("warning", "add ttl_seconds, so that readers know when to ask again"),
    "ttl_extreme": ("warning", f"keep ttl_seconds between {_TTL_LEAST_S} and {_TTL_MOST_S}"),
    "jwks_no_answer": ("failure", "answer GET /.well-known/jwks.json in whole and in time"),
    "jwks_redirect": ("failure", "answer there itself: a redirected key set is not taken"),
    "jwks_too_large": ("failure", "keep the key set below 256 KiB"),
    "jwks_status": ("failure", "answer 200, or 404 where there is no key set"),
    "jwks_content_type": ("warning", "send Content-Type: application/jwk-set+json"),
    "jwks_private_key": ("failure", "take the private members out now and replace the key: everybody can sign with it"),
    "jwks_malformed": ("warning", "serve a JSON Web Key Set (RFC 7517), or nothing, at /.well-known/jwks.json"),
    "jwks_lacks_key": ("warning", "list the key that signs the manifest in the key set"),
    "delegation_no_answer": ("failure", "answer requests for /asap/delegations in whole and in time"),
    "delegation_error": ("failure", "answer what is wrong with a 4xx status: a 5xx is a bug that anybody can call up"),
    "delegation_open": ("failure", "ask for credentials before showing, issuing or revoking delegations"),
    "delegation_forged_accepted": ("failure", "check the signature: this token says alg none and bears none"),
    "delegation_any_bearer": ("failure", "take no credentials but those that were given to somebody"),
    "delegation_refusal_unclear": (
        "failure",
        "answer 401 or 403 to whoever has no credentials, before anything else is looked at",
    ),
    "delegation_not_issued": ("failure", "issue to the bearer, with 201 and the token"),
    "delegation_token_malformed": ("failure", "issue a JWS with alg EdDSA and iss, aud, jti, iat, exp and scp"),
    "delegation_token_form": ("failure", "issue a JWS here: clients of /asap/delegations read no document"),
    "delegation_token_differs": ("failure", "issue what was asked for and no more"),
    "delegation_token_expired": (
        "failure",
        "issue tokens that are valid from now on, and set the clocks of both hosts",
    ),
    "delegation_token_foreign": (
        "failure",
        "issue in the agent's own name; where the bearer stands for another agent, name it: --delegator",
    ),
    "delegation_token_signature": ("failure", "sign tokens with the key of the agent that they are from"),
    "delegation_id_unsafe": (
        "failure",
        "give tokens a jti of letters, digits and . _ ~ : -, which stands in a path as it is",
    ),
    "delegation_not_listed": ("failure", "list an issued delegation to its delegator until it expires"),
    "delegation_not_shown": ("failure", "answer GET of an issued delegation with its id and whether it is active"),
    "delegation_not_revoked": ("failure", "answer DELETE with 204, and show the delegation as not active from then on"),
}
"""Every code a finding can have, with how bad it is and what would mend it."""


class Answer(Struct, frozen=True):
    """An agent's answer to one request. `trouble` is why there is none in whole: then `status` is 0 and no body."""

    status: int
    content_type: str = ""
    body: bytes = b""
    trouble: Literal["unreachable", "no_answer", "redirect", "too_large"] | None = None
    detail: str = ""


class Finding(Struct, frozen=True):
    """One thing that is not as it should be: a code of `FINDINGS`, and what was seen."""

    check: str
    code: str
    severity: Severity
    detail: str
    remedy: str


def finding(check: str, code: str, detail: str) -> Finding:
    """A finding with the severity and remedy of its code."""
    severity, remedy = FINDINGS[code]
    return Finding(check, code, severity, detail, remedy)


def judge_health(answer: Answer) -> tuple[Health | None, list[Finding]]:
    """What a health document shows, and the document if it can be read."""
    found = list(_transport("health", answer, (200, 503)))
    if any(one.severity == "failure" for one in found):
        return None, found
    try:
        health = decode_health(answer.body, None)
    except ManifestError as problem:
        # A 503 of a proxy in front has no health document.
        code = "health_malformed" if answer.status == 200 else "health_status"
        return None, [*found, finding("health", code, f"status {answer.status}: {problem}")]
    if health.agent_id is None:
        found.append(finding("health", "health_agent_id_missing", "there is no agent_id"))
    if health.status == "unhealthy":
        found.append(finding("health", "health_unhealthy", "the agent calls itself unhealthy"))
    elif answer.status == 503:
        found.append(finding("health", "health_status", f"status 503, and the document says {health.status}"))
    return health, found


def judge_manifest(answer: Answer) -> tuple[Manifest | None, list[Finding]]:
    """What a manifest shows of its form, and the manifest if it can be read."""
    found = list(_transport("manifest", answer, (200,)))
    if any(one.severity == "failure" for one in found):
        return None, found
    twice = _duplicate_key(answer.body)
    if twice is not None:
        found.append(finding("manifest", "manifest_duplicate_keys", f"the key {ascii(twice)[:80]} stands twice"))
    try:
        manifest = decode_manifest(answer.body)
    except ManifestError as problem:
        return None, [*found, finding("manifest", "manifest_malformed", str(problem))]
    missing = [name for name in _FIELDS if manifest.raw.get(name) is None]
    if missing:
        found.append(finding("manifest", "manifest_fields_missing", f"not there: {', '.join(missing)}"))
    found += _endpoints(manifest.raw.get("endpoints"))
    return manifest, found


def judge_stability(first: Manifest, seen: Iterable[Finding], again: Answer) -> Iterator[Finding]:
    """Whether a second reading gives the same manifest by the same key, as soundly signed as the first.

    `seen` is what the first reading showed, which is not told twice.
    """
    second, found = judge_manifest(again)
    known = {one.code for one in seen}
    fresh = [one.detail for one in found if one.severity == "failure" and one.code not in known]
    if second is None:
        what = f"there was no manifest: {', '.join(fresh)}"
    elif first.id != second.id:
        what = "its id was another"
    elif (first.signed, first.public_key) != (second.signed, second.public_key):
        what = "its signer was another"
    elif first.digest != second.digest:
        names = sorted(name for name in {*first.raw, *second.raw} if first.raw.get(name) != second.raw.get(name))
        what = f"it said something else: {ascii(', '.join(names))[1:-1][:120]}"
    elif verify_manifest(first, None) != verify_manifest(second, None):
        what = "its signature was another, and only one of the two verifies"
    elif fresh:
        what = fresh[0]
    else:
        return
    yield finding("manifest", "manifest_unstable", f"read a second time, {what}")


def judge_identity(manifest: Manifest | None, health: Health | None, expected: str | None) -> Iterator[Finding]:
    """Whether all that names the agent names the same one, and with `expected`, whether anything names it."""
    named = None if health is None else health.agent_id
    if manifest is not None and named is not None and manifest.id != named:
        yield finding("identity", "id_mismatch", f"the manifest is of {manifest.id}, the health document of {named}")
    for where, name in (("manifest", None if manifest is None else manifest.id), ("health document", named)):
        if expected is not None and name not in (None, expected):
            yield finding("identity", "id_unexpected", f"the {where} is of {name}, not of {expected}")
    if expected is not None and manifest is None and named is None:
        yield finding(
            "identity", "id_unproven", f"nothing that is served here names an agent, so nothing shows {expected}"
        )


def judge_signature(manifest: Manifest, body: bytes, expected_key: bytes | None) -> Iterator[Finding]:
    """Whether the manifest is signed, by whom, and soundly. `expected_key` has 32 raw bytes."""
    if not manifest.signed:
        code = "signature_missing" if expected_key is None else "signature_required"
        yield finding("signature", code, "the manifest is not signed")
        return
    envelope = msgspec.json.decode(body)
    seal = envelope["signature"]
    alg = seal.get("alg") if isinstance(seal, dict) else None
    level = seal.get("trust_level") if isinstance(seal, dict) else None
    if level not in (None, "self-signed"):
        yield finding("signature", "trust_level_unproven", f"trust_level is {ascii(level)[:60]}")
    if manifest.signature is None:
        if not isinstance(alg, str) or alg.lower() not in ("ed25519", "eddsa"):
            yield finding("signature", "signature_algorithm", f"alg is {ascii(alg)[:60]}")
        else:
            yield finding("signature", "signature_malformed", "signature.signature is not the base64 of 64 bytes")
        return
    if manifest.public_key is None:
        yield finding("signature", "signature_key_unusable", "public_key is missing or no safe Ed25519 key")
        return
    match verify_manifest(manifest, expected_key):
        case "bad_signature":
            yield finding("signature", "signature_bad", "the signature does not verify with the key beside it")
        case "wrong_key":
            kid = jwk_thumbprint(manifest.public_key)
            yield finding("signature", "signature_wrong_key", f"the manifest is signed by the key {kid}")
        case _:
            pass


def judge_sla(manifest: Manifest) -> Iterator[Finding]:
    """Whether the agent promises anything that can be judged."""
    if manifest.sla_error is not None:
        yield finding("sla", "sla_malformed", manifest.sla_error)
    elif manifest.sla is None:
        yield finding("sla", "sla_missing", "there is no sla block")
    elif (
        manifest.sla.availability_percent is None
        and manifest.sla.max_latency_p95_ms is None
        and manifest.sla.max_error_rate_percent is None
    ):
        yield finding("sla", "sla_empty", "the sla block promises nothing that can be measured")


def judge_ttl(manifest: Manifest) -> Iterator[Finding]:
    """Whether readers learn how long the manifest holds."""
    ttl = manifest.raw.get("ttl_seconds")
    if ttl is None:
        yield finding("ttl", "ttl_missing", "there is no ttl_seconds")
    elif not _TTL_LEAST_S <= ttl <= _TTL_MOST_S:
        yield finding("ttl", "ttl_extreme", f"ttl_seconds is {ttl}")


def judge_key_set(answer: Answer, manifest: Manifest | None) -> Iterator[Finding]:
    """Whether a key set, where one is served, has the key of the manifest and no private one."""
    found = list(_transport("keys", answer, (200,), "jwks"))
    yield from found
    if any(one.severity == "failure" for one in found):
        return
    try:
        keys = msgspec.json.decode(answer.body)["keys"]
        private = sorted({name for key in keys for name in _PRIVATE_MEMBERS if key.get(name) is not None})
    except (msgspec.DecodeError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        yield finding("keys", "jwks_malformed", "what is served there is not a key set")
        return
    if private:
        yield finding("keys", "jwks_private_key", f"it publishes private members of keys: {', '.join(private)}")
    named = [key.get("x") for key in keys if key.get("kty") == "OKP"]
    signer = None if manifest is None else manifest.public_key
    if signer is not None and public_jwk(signer)["x"] not in named:
        yield finding("keys", "jwks_lacks_key", f"the key {jwk_thumbprint(signer)} signs the manifest and is not in it")


def _transport(check: str, answer: Answer, statuses: tuple[int, ...], codes: str | None = None) -> Iterator[Finding]:
    codes = check if codes is None else codes
    match answer.trouble:
        case "unreachable" | "no_answer":
            yield finding(check, f"{codes}_no_answer", answer.detail)
        case "redirect" | "too_large":
            yield finding(check, f"{codes}_{answer.trouble}", answer.detail)
        case None:
            if answer.status not in statuses:
                yield finding(check, f"{codes}_status", f"answered {answer.status}")
            elif not _is_json(answer.content_type):
                shown = ascii(answer.content_type)[:80]
                yield finding(check, f"{codes}_content_type", f"Content-Type is {shown}")


def _is_json(content_type: str) -> bool:
    kind = content_type.partition(";")[0].strip().lower()
    return kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json"))


def _endpoints(endpoints: object) -> Iterator[Finding]:
    if not isinstance(endpoints, dict):
        return
    for name, value in endpoints.items():
        if value is None:
            continue
        schemes = ("ws", "wss", "http", "https") if name == "events" else ("http", "https")
        try:
            parts = urlsplit(value) if isinstance(value, str) else None
            usable = parts is not None and parts.scheme in schemes and bool(parts.hostname) and parts.port != 0
        except ValueError:
            usable = False
        if not usable:
            yield finding(
                "manifest", "endpoint_malformed", f"endpoints.{ascii(name)[1:-1][:40]} is {ascii(value)[:80]}"
            )


def _duplicate_key(body: bytes) -> str | None:
    """The first key that stands twice in an object; None without one, and for what cannot be read at all."""
    twice: list[str] = []

    def collect(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        seen: dict[str, Any] = {}
        for key, value in pairs:
            if key in seen:
                twice.append(key)
            seen[key] = value
        return seen

    try:
        json.loads(body, object_pairs_hook=collect)
    except (ValueError, RecursionError):
        return None
    return twice[0] if twice else None
