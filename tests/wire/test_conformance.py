"""What conformance makes of answers: every finding can be met, and nothing an agent sends breaks it."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest
import rfc8785
from hypothesis import given
from hypothesis import strategies as st
from nacl.signing import SigningKey

from asapd.wire import conformance
from asapd.wire.conformance import FINDINGS, Answer, Finding
from asapd.wire.keys import public_jwk
from asapd.wire.manifest import Health, Manifest

A, B = "urn:asap:agent:a", "urn:asap:agent:b"
KEY, OTHER = SigningKey(bytes([1]) * 32), SigningKey(bytes([2]) * 32)
DOCUMENT: dict[str, Any] = {
    "id": A,
    "name": "a",
    "version": "1",
    "description": "d",
    "capabilities": {"skills": []},
    "endpoints": {"asap": "http://127.0.0.1:9000/asap", "events": "ws://127.0.0.1:9000/asap/ws"},
    "sla": {"availability": "99.5%"},
    "ttl_seconds": 300,
}


def raw(key: SigningKey) -> bytes:
    return bytes(key.verify_key)


def text(value: bytes) -> str:
    return base64.b64encode(value).decode()


def ok(value: Any, **more: Any) -> Answer:
    return Answer(200, "application/json", json.dumps(value).encode(), **more)


def envelope(document: dict[str, Any] | None = None, key: SigningKey = KEY, **seal: Any) -> dict[str, Any]:
    document = DOCUMENT if document is None else document
    signature = {"alg": "ed25519", "signature": text(key.sign(rfc8785.dumps(document)).signature)}
    return {"manifest": document, "signature": {**signature, **seal}, "public_key": text(raw(key))}


def codes(found: Any) -> list[str]:
    return [one.code for one in found]


def read(document: Any) -> Manifest:
    manifest, _ = conformance.judge_manifest(ok(document))
    assert manifest is not None
    return manifest


NO_ANSWER = Answer(0, trouble="no_answer", detail="silence")

HEALTH: list[tuple[Answer, list[str]]] = [
    (ok({"status": "healthy", "agent_id": A}), []),
    (NO_ANSWER, ["health_no_answer"]),
    (Answer(0, trouble="unreachable"), ["health_no_answer"]),
    (Answer(0, trouble="redirect"), ["health_redirect"]),
    (Answer(0, trouble="too_large"), ["health_too_large"]),
    (Answer(404, "application/json"), ["health_status"]),
    (Answer(200, "text/html", b'{"status":"healthy","agent_id":"a"}'), ["health_content_type"]),
    (Answer(200, "application/health+json", b'{"status":"healthy","agent_id":"a"}'), []),
    (Answer(200, "application/json", b"<html>"), ["health_malformed"]),
    (ok({"status": "fine"}), ["health_malformed"]),
    (ok({"status": "healthy"}), ["health_agent_id_missing"]),
    (ok({"status": "unhealthy", "agent_id": A}), ["health_unhealthy"]),
    (Answer(503, "application/json", b'{"status":"unhealthy","agent_id":"a"}'), ["health_unhealthy"]),
    (Answer(503, "application/json", b'{"status":"healthy","agent_id":"a"}'), ["health_status"]),
    (Answer(503, "text/html", b"busy"), ["health_content_type", "health_status"]),
]


@pytest.mark.parametrize(("answer", "expected"), HEALTH)
def test_a_health_document_is_judged(answer: Answer, expected: list[str]) -> None:
    _, found = conformance.judge_health(answer)
    assert codes(found) == expected


MANIFEST: list[tuple[Answer, list[str]]] = [
    (ok(DOCUMENT), []),
    (ok(envelope()), []),
    (NO_ANSWER, ["manifest_no_answer"]),
    (Answer(0, trouble="redirect"), ["manifest_redirect"]),
    (Answer(0, trouble="too_large"), ["manifest_too_large"]),
    (Answer(503, "application/json"), ["manifest_status"]),
    (Answer(200, "", json.dumps(DOCUMENT).encode()), ["manifest_content_type"]),
    (Answer(200, "application/json", b"[]"), ["manifest_malformed"]),
    (ok({**DOCUMENT, "id": "a"}), ["manifest_malformed"]),
    (ok({**DOCUMENT, "ttl_seconds": "5"}), ["manifest_malformed"]),
    (
        Answer(200, "application/json", json.dumps(DOCUMENT).replace('"name"', f'"id":"{B}","name"').encode()),
        ["manifest_duplicate_keys"],
    ),
    (ok({"id": A, "name": "a"}), ["manifest_fields_missing"]),
    (ok({**DOCUMENT, "endpoints": {"asap": "/asap"}}), ["endpoint_malformed"]),
    (ok({**DOCUMENT, "endpoints": {"asap": "ws://x"}}), ["endpoint_malformed"]),
    (ok({**DOCUMENT, "endpoints": {"asap": "http://[x", "events": 5, "more": None}}), ["endpoint_malformed"] * 2),
    (ok({**DOCUMENT, "endpoints": []}), []),
]


@pytest.mark.parametrize(("answer", "expected"), MANIFEST)
def test_a_manifest_is_judged(answer: Answer, expected: list[str]) -> None:
    _, found = conformance.judge_manifest(answer)
    assert codes(found) == expected


SIGNATURE: list[tuple[dict[str, Any], bytes | None, list[str]]] = [
    (envelope(), None, []),
    (envelope(), raw(KEY), []),
    (envelope(alg="EdDSA", trust_level="self-signed"), None, []),
    (DOCUMENT, None, ["signature_missing"]),
    (DOCUMENT, raw(KEY), ["signature_required"]),
    (envelope(alg="RS256"), None, ["signature_algorithm"]),
    ({**envelope(), "signature": "x"}, None, ["signature_algorithm"]),
    (envelope(signature="AAAA"), None, ["signature_malformed"]),
    ({**envelope(), "public_key": text(bytes(32))}, None, ["signature_key_unusable"]),
    ({**envelope(), "public_key": None}, None, ["signature_key_unusable"]),
    ({**envelope(), "manifest": {**DOCUMENT, "name": "b"}}, None, ["signature_bad"]),
    (envelope(key=OTHER), raw(KEY), ["signature_wrong_key"]),
    (envelope(trust_level="verified"), None, ["trust_level_unproven"]),
]


@pytest.mark.parametrize(("document", "expected_key", "expected"), SIGNATURE)
def test_a_signature_is_judged(document: dict[str, Any], expected_key: bytes | None, expected: list[str]) -> None:
    found = conformance.judge_signature(read(document), json.dumps(document).encode(), expected_key)
    assert codes(found) == expected


@pytest.mark.parametrize(
    ("sla", "expected"),
    [
        ({"availability": "99%"}, []),
        (None, ["sla_missing"]),
        ({"availability": "99.5.5%"}, ["sla_malformed"]),
        ({"support_hours": "24/7"}, ["sla_empty"]),
    ],
)
def test_an_sla_is_judged(sla: Any, expected: list[str]) -> None:
    assert codes(conformance.judge_sla(read({**DOCUMENT, "sla": sla}))) == expected


@pytest.mark.parametrize(
    ("ttl", "expected"), [(300, []), (None, ["ttl_missing"]), (0, ["ttl_extreme"]), (10**6, ["ttl_extreme"])]
)
def test_a_ttl_is_judged(ttl: int | None, expected: list[str]) -> None:
    assert codes(conformance.judge_ttl(read({**DOCUMENT, "ttl_seconds": ttl}))) == expected


def test_all_that_names_the_agent_has_to_name_the_same() -> None:
    manifest = read(DOCUMENT)
    same, other, silent = (Health("healthy", name) for name in (A, B, None))
    assert codes(conformance.judge_identity(manifest, same, A)) == []
    assert codes(conformance.judge_identity(manifest, silent, None)) == []
    assert codes(conformance.judge_identity(None, None, A)) == ["id_unproven"]
    assert codes(conformance.judge_identity(None, silent, A)) == ["id_unproven"]
    assert codes(conformance.judge_identity(manifest, None, A)) == []
    assert codes(conformance.judge_identity(None, same, A)) == []
    assert codes(conformance.judge_identity(None, None, None)) == []
    assert codes(conformance.judge_identity(manifest, other, None)) == ["id_mismatch"]
    assert codes(conformance.judge_identity(manifest, same, B)) == ["id_unexpected"] * 2
    assert codes(conformance.judge_identity(None, other, A)) == ["id_unexpected"]


@pytest.mark.parametrize(
    ("again", "expected"),
    [
        (ok(envelope()), ""),
        (ok(envelope(trust_level="self-signed")), ""),
        (ok(envelope({**DOCUMENT, "sla": {"availability": "1%"}})), "it said something else: sla"),
        (ok(envelope({**DOCUMENT, "version": "2", "more": 1})), "it said something else: more, version"),
        (ok(envelope(signature=text(b"\1" * 64))), "its signature was another, and only one of the two verifies"),
        (ok(envelope(key=OTHER)), "its signer was another"),
        (ok(DOCUMENT), "its signer was another"),
        (ok(envelope({**DOCUMENT, "id": B})), "its id was another"),
        (
            Answer(200, "application/json", json.dumps(envelope()).replace('"alg"', '"alg": "x", "alg"').encode()),
            "the key 'alg' stands twice",
        ),
        (ok([]), "there was no manifest: must be a JSON object"),
        (Answer(500), "there was no manifest: answered 500"),
        (NO_ANSWER, "there was no manifest: silence"),
    ],
)
def test_a_second_reading_has_to_show_the_same_manifest(again: Answer, expected: str) -> None:
    found = list(conformance.judge_stability(read(envelope()), [], again))
    assert [(one.code, one.detail) for one in found] == (
        [("manifest_unstable", f"read a second time, {expected}")] if expected else []
    )


def test_what_the_first_reading_showed_is_not_told_twice() -> None:
    answer = ok({**DOCUMENT, "endpoints": {"asap": "/asap"}})
    manifest, found = conformance.judge_manifest(answer)
    assert manifest is not None
    assert codes(found) == ["endpoint_malformed"]
    assert codes(conformance.judge_stability(manifest, found, answer)) == []
    assert codes(conformance.judge_stability(manifest, [], answer)) == ["manifest_unstable"]


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"keys": [public_jwk(raw(OTHER)), public_jwk(raw(KEY))]}, []),
        ({"keys": [public_jwk(raw(OTHER))]}, ["jwks_lacks_key"]),
        ({"keys": []}, ["jwks_lacks_key"]),
        ({"keys": [5]}, ["jwks_malformed"]),
        ({"keys": 5}, ["jwks_malformed"]),
        ({"keys": [{"kty": "OKP"}]}, ["jwks_lacks_key"]),
        ({"keys": [{**public_jwk(raw(KEY)), "d": "AAAA"}]}, ["jwks_private_key"]),
        ({"keys": [public_jwk(raw(KEY)), {"kty": "RSA", "p": "1", "q": "2"}]}, ["jwks_private_key"]),
        ({"keys": [public_jwk(raw(KEY)), {"kty": "oct", "k": "AAAA"}]}, ["jwks_private_key"]),
        ({"keys": [{**public_jwk(raw(KEY)), "d": None}]}, []),
        ({"keys": ["d"]}, ["jwks_malformed"]),
        ([], ["jwks_malformed"]),
    ],
)
def test_a_key_set_is_judged(body: Any, expected: list[str]) -> None:
    assert codes(conformance.judge_key_set(ok(body), read(envelope()))) == expected


def test_a_key_set_of_an_unsigned_agent_has_to_hold_nothing() -> None:
    assert codes(conformance.judge_key_set(ok({"keys": []}), read(DOCUMENT))) == []
    assert codes(conformance.judge_key_set(ok({"keys": []}), None)) == []


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (Answer(200, "text/plain", json.dumps({"keys": [public_jwk(raw(KEY))]}).encode()), ["jwks_content_type"]),
        (Answer(500), ["jwks_status"]),
        (Answer(401), ["jwks_status"]),
        (NO_ANSWER, ["jwks_no_answer"]),
        (Answer(0, trouble="redirect"), ["jwks_redirect"]),
        (Answer(0, trouble="too_large"), ["jwks_too_large"]),
    ],
)
def test_an_answer_without_a_key_set_is_trouble(answer: Answer, expected: list[str]) -> None:
    found = list(conformance.judge_key_set(answer, read(envelope())))
    assert codes(found) == expected
    assert {one.check for one in found} == {"keys"}


def test_every_finding_has_a_remedy_and_every_code_is_met_above() -> None:
    met = {code for _, found in [*HEALTH, *MANIFEST] for code in found}
    met |= {code for _, _, found in SIGNATURE for code in found}
    assert {code for code in FINDINGS if code.partition("_")[0] in {"health", "manifest", "signature"}} <= met | {
        "manifest_unstable"
    }
    assert all(remedy for _, remedy in FINDINGS.values())


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    "id",
                    "status",
                    "manifest",
                    "signature",
                    "public_key",
                    "sla",
                    "ttl_seconds",
                    "keys",
                    "kty",
                    "endpoints",
                ]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@given(st.binary(max_size=60) | _json.map(lambda value: json.dumps(value).encode()), st.sampled_from([200, 201, 503]))
def test_nothing_an_agent_sends_breaks_the_judge(body: bytes, status: int) -> None:
    answer = Answer(status, "application/json", body)
    health, found = conformance.judge_health(answer)
    manifest, more = conformance.judge_manifest(answer)
    found += [*more, *conformance.judge_identity(manifest, health, A), *conformance.judge_key_set(answer, manifest)]
    if manifest is not None:
        found += conformance.judge_signature(manifest, body, raw(KEY))
        found += [*conformance.judge_sla(manifest), *conformance.judge_ttl(manifest)]
        found += conformance.judge_stability(manifest, [], answer)
    assert all(isinstance(one, Finding) and one.code in FINDINGS for one in found)
