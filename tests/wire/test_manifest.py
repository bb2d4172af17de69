import base64
import json
import math
from decimal import Decimal
from typing import Any

import pytest
import rfc8785
from hypothesis import given
from hypothesis import strategies as st
from nacl.signing import SigningKey

from asapd.core.sla import Promise
from asapd.wire.manifest import (
    MAX_TTL_S,
    Health,
    Manifest,
    ManifestError,
    decode_health,
    decode_manifest,
    parse_sla,
    verify_manifest,
)

AGENT = "urn:asap:agent:peer-b"
REFERENCE_KEY = "s0l8kjq8smWf5OnQ+1iP4oBpUJ2EnYOSU0QKZIYbKUY="
KEY, OTHER = SigningKey(bytes(range(32))), SigningKey(bytes(range(1, 33)))

SKILLS = '[{"id":"echo","description":"%s","input_schema":null,"output_schema":null}]'
SLA_99_5 = '{"availability":"99.5%","max_latency_p95_ms":null,"max_error_rate":null,"support_hours":null}'
# Made by the reference implementation: which null fields are written differs from version to version.
BY_V2_5_4 = (
    '{"manifest":{"id":"urn:asap:agent:peer-b","name":"Peer B","version":"1.3.0","description":"asap-protocol peer '
    'under test","capabilities":{"asap_version":"0.1","skills":' + SKILLS % "Echo" + ',"state_persistence":false,'
    '"streaming":false,"mcp_tools":[],"hardware":null,"inference":null},"endpoints":{"asap":'
    '"http://127.0.0.1:18902/asap","events":"ws://127.0.0.1:18902/asap/ws"},"supported_versions":["2.2"],"auth":null,'
    '"signature":null,"sla":{"availability":"99.5%","max_latency_p95_ms":500,"max_error_rate":"1%","support_hours":'
    '"24/7"},"verification":null,"ttl_seconds":300},"signature":{"alg":"ed25519","signature":'
    '"6ikKfQGErY1kbI0qyEyhByrW0homItj6awij7+40iEgAqdRjxIToEDTj+i5MJmwA0dEnxUp5KY+melEAannUDg==",'
    '"trust_level":"self-signed"},"public_key":"' + REFERENCE_KEY + '"}'
)
BY_V2_5_4_NOT_ASCII = (
    '{"manifest":{"id":"urn:asap:agent:peer-b","name":"Peer \\u00e9","version":"1.3.0","description":"x",'
    '"capabilities":{"asap_version":"0.1","skills":' + SKILLS % "e" + ',"state_persistence":false,"streaming":false,'
    '"mcp_tools":[],"hardware":null,"inference":null},"endpoints":{"asap":"http://x/asap","events":null},'
    '"supported_versions":["2.2"],"auth":null,"signature":null,"sla":' + SLA_99_5 + ',"verification":null,'
    '"ttl_seconds":300},"signature":{"alg":"ed25519","signature":'
    '"zXudDpFjF2pKtlSwiiHfXEvNUmlaUltMTL+znyGuTrTvYKNzEb9vz5fYEbhxHfiMasntA0AQ+gec97nPlmmTAg==",'
    '"trust_level":"self-signed"},"public_key":"' + REFERENCE_KEY + '"}'
)
BY_V1_3_0 = (
    '{"manifest":{"id":"urn:asap:agent:peer-b","name":"Peer \\u00e9","version":"1.3.0","description":"x",'
    '"capabilities":{"asap_version":"0.1","skills":' + SKILLS % "e" + ',"state_persistence":false,"streaming":false,'
    '"mcp_tools":[]},"endpoints":{"asap":"http://x/asap","events":null},"auth":null,"signature":null,'
    '"sla":' + SLA_99_5 + ',"ttl_seconds":300},"signature":{"alg":"ed25519","signature":'
    '"98TAZnmhv8yW9ApaWekULbvDv3I94+EgfgtKjObbNoPRKRhqAolSrb8x/HAXisGRaakhYjodLP34i5ukiYPYAg==",'
    '"trust_level":"self-signed"},"public_key":"' + REFERENCE_KEY + '"}'
)
SAMPLES = [BY_V2_5_4, BY_V2_5_4_NOT_ASCII, BY_V1_3_0]


def plain(**fields: Any) -> bytes:
    return json.dumps({"id": AGENT, "name": "Peer", "version": "1", **fields}).encode()


def signed(key: SigningKey, *, shown: SigningKey | None = None, **seal: Any) -> bytes:
    manifest: dict[str, Any] = {"id": AGENT, "name": "Pé", "load": 1.50, "signature": None}
    payload = rfc8785.dumps({name: value for name, value in manifest.items() if name != "signature"})
    signature = base64.b64encode(key.sign(payload).signature).decode()
    return json.dumps(
        {
            "manifest": manifest,
            "signature": {"alg": "Ed25519", "signature": signature, "trust_level": "verified", **seal},
            "public_key": base64.b64encode(bytes((shown or key).verify_key)).decode(),
        }
    ).encode()


def pin(key: SigningKey) -> bytes:
    return bytes(key.verify_key)


@pytest.mark.parametrize("sample", SAMPLES)
def test_manifests_signed_by_the_reference_implementation_verify(sample: str) -> None:
    manifest = decode_manifest(sample.encode())
    assert manifest.public_key == base64.b64decode(REFERENCE_KEY)
    assert (manifest.id, manifest.signed, manifest.ttl_seconds) == (AGENT, True, 300)
    assert manifest.sla is not None
    assert manifest.sla.availability_percent == Decimal("99.5")
    assert verify_manifest(manifest, None) == "self_signed"
    assert verify_manifest(manifest, base64.b64decode(REFERENCE_KEY)) == "verified"
    assert verify_manifest(manifest, pin(KEY)) == "wrong_key"


@pytest.mark.parametrize("sample", SAMPLES)
def test_a_changed_manifest_does_not_verify(sample: str) -> None:
    manifest = decode_manifest(sample.replace("99.5%", "10%").encode())
    assert verify_manifest(manifest, None) == "bad_signature"
    assert verify_manifest(manifest, base64.b64decode(REFERENCE_KEY)) == "bad_signature"


def test_trust_level_is_outside_the_signature_and_not_believed() -> None:
    assert (
        verify_manifest(decode_manifest(BY_V2_5_4.replace("self-signed", "verified").encode()), None) == "self_signed"
    )


def test_the_pinned_key_decides_whatever_key_the_manifest_names() -> None:
    assert verify_manifest(decode_manifest(signed(KEY, shown=OTHER)), pin(KEY)) == "verified"
    assert verify_manifest(decode_manifest(signed(KEY, shown=OTHER)), None) == "bad_signature"
    assert verify_manifest(decode_manifest(signed(KEY, shown=OTHER)), pin(OTHER)) == "bad_signature"
    assert verify_manifest(decode_manifest(signed(OTHER)), pin(KEY)) == "wrong_key"


@pytest.mark.parametrize(
    "seal",
    [
        {"alg": "none"},
        {"alg": None},
        {"signature": None},
        {"signature": "not base64!"},
        {"signature": "é"},
        {"signature": base64.b64encode(bytes(63)).decode()},
        {"signature": base64.b64encode(bytes(64)).decode()},
    ],
)
def test_a_malformed_signature_does_not_sink_the_manifest_but_never_verifies(seal: dict[str, Any]) -> None:
    manifest = decode_manifest(signed(KEY, **seal))
    assert manifest.signed
    assert verify_manifest(manifest, None) == "bad_signature"
    assert verify_manifest(manifest, pin(KEY)) == "bad_signature"


@pytest.mark.parametrize("key", [None, 5, "", "AAAA", base64.b64encode(bytes(32)).decode()])
def test_a_malformed_public_key_does_not_verify_but_a_pinned_one_does(key: object) -> None:
    document = json.loads(signed(KEY))
    document["public_key"] = key
    manifest = decode_manifest(json.dumps(document).encode())
    assert manifest.public_key is None
    assert verify_manifest(manifest, None) == "bad_signature"
    assert verify_manifest(manifest, pin(KEY)) == "verified"


def test_a_pinned_key_of_the_wrong_length_verifies_nothing() -> None:
    assert verify_manifest(decode_manifest(signed(KEY)), b"short") == "wrong_key"


def test_a_seal_that_is_no_object_is_a_bad_signature_and_null_is_none() -> None:
    document = json.loads(signed(KEY))
    document["signature"] = "text"
    assert verify_manifest(decode_manifest(json.dumps(document).encode()), None) == "bad_signature"
    document["signature"] = None
    assert verify_manifest(decode_manifest(json.dumps(document).encode()), pin(KEY)) == "unsigned"


def test_a_plain_manifest_is_unsigned() -> None:
    manifest = decode_manifest(plain(signature=None, sla={"availability": 99.5}, ttl_seconds=60, extra=[1]))
    assert (manifest.id, manifest.name, manifest.version) == (AGENT, "Peer", "1")
    assert (manifest.signed, manifest.public_key, manifest.ttl_seconds) == (False, None, 60)
    assert manifest.sla == Promise(Decimal("99.5"))
    assert manifest.sla_error is None
    assert manifest.raw["extra"] == [1]
    assert verify_manifest(manifest, None) == verify_manifest(manifest, pin(KEY)) == "unsigned"


def test_the_digest_is_of_the_canonical_form_without_the_signature() -> None:
    one, other = (
        plain(a=1, b=[1.0]),
        json.dumps(
            {"b": [1], "a": 1, "signature": "x", "version": "1", "id": AGENT, "name": "Peer"}, indent=2
        ).encode(),
    )
    assert decode_manifest(one).digest == decode_manifest(other).digest
    assert decode_manifest(one).digest != decode_manifest(plain(a=2, b=[1.0])).digest


def test_a_manifest_needs_no_more_than_an_id() -> None:
    manifest = decode_manifest(json.dumps({"id": AGENT, "name": None}).encode())
    assert (manifest.name, manifest.version, manifest.sla, manifest.ttl_seconds) == ("", "", None, None)


def test_a_bad_sla_block_is_carried_as_an_error() -> None:
    manifest = decode_manifest(plain(sla={"availability": "99.5.5%"}))
    assert manifest.sla is None
    assert manifest.sla_error is not None
    assert "availability" in manifest.sla_error
    assert "99.5.5%" in manifest.sla_error


@pytest.mark.parametrize(("ttl", "expected"), [(0, None), (1, 1), (2**53, None), (10**9, MAX_TTL_S)])
def test_a_ttl_is_capped_and_nought_is_none(ttl: int, expected: int | None) -> None:
    if ttl == 2**53:
        with pytest.raises(ManifestError, match="canonical"):
            decode_manifest(plain(ttl_seconds=ttl))
    else:
        assert decode_manifest(plain(ttl_seconds=ttl)).ttl_seconds == expected


@pytest.mark.parametrize(
    ("body", "reason", "words"),
    [
        (b"", "bad_json", "JSON"),
        (b"\xff", "bad_json", "JSON"),
        (b'{"id":"\xff"}', "bad_json", "JSON"),
        (b"{} x", "bad_json", "JSON"),
        (b"[]", "bad_json", "object"),
        (b"1e999", "bad_json", "JSON"),
        (b'{"id":NaN}', "bad_json", "JSON"),
        (b'{"a":' * 100_000, "bad_json", "deep"),
        (b"{}", "protocol", "id"),
        (b'{"manifest":[]}', "protocol", "manifest"),
        (b'{"manifest":{}}', "protocol", "id"),
        (plain(id="peer"), "protocol", "id"),
        (plain(id=5), "protocol", "id"),
        (plain(name=5), "protocol", "name"),
        (plain(version=[]), "protocol", "version"),
        (plain(ttl_seconds=-1), "protocol", "ttl_seconds"),
        (plain(ttl_seconds=True), "protocol", "ttl_seconds"),
        (plain(ttl_seconds=1.5), "protocol", "ttl_seconds"),
        (plain(big=2**53), "protocol", "canonical"),
        (plain(deep=json.loads("[" * 200 + "]" * 200)), "protocol", "canonical"),
    ],
)
def test_what_is_no_manifest_is_refused_with_a_reason(body: bytes, reason: str, words: str) -> None:
    with pytest.raises(ManifestError, match=words) as caught:
        decode_manifest(body)
    assert caught.value.reason == reason


def test_an_sla_block_says_what_is_promised() -> None:
    block = {"availability": "99.5%", "max_latency_p95_ms": 500, "max_error_rate": "1%", "support_hours": "24/7"}
    assert parse_sla(block) == Promise(Decimal("99.5"), 500, Decimal(1), "24/7")
    assert parse_sla(dict.fromkeys(block)) == parse_sla({}) == Promise()


@pytest.mark.parametrize(
    ("value", "expected"),
    [("99.5%", "99.5"), (99.5, "99.5"), (1, "1"), ("100%", "100"), (0, "0"), (-0.0, "0"), (1e-06, "0.000001")],
)
def test_a_percentage_is_text_with_a_sign_or_a_number(value: object, expected: str) -> None:
    promise = parse_sla({"availability": value, "max_error_rate": value})
    assert promise.availability_percent == promise.max_error_rate_percent == Decimal(expected)


@pytest.mark.parametrize("field", ["availability", "max_error_rate"])
@pytest.mark.parametrize(
    "value",
    [
        "99.5.5%", "-5%", "1000%", "100.1%", "99.5", "", "%", " 99%", "99 %", "99%\n", "٩٩%", "1e1%", "99.1234567%",
        ".5%", -5, 100.1, 1000, True, False, math.nan, math.inf, 1e-7, 10**400, [], {},
    ],
)  # fmt: skip
def test_what_is_no_percentage_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(ManifestError, match=rf"sla\.{field}"):
        parse_sla({field: value})


@pytest.mark.parametrize("value", [0, -1, 2**53, 500.0, "500", True, []])
def test_a_latency_is_a_positive_exact_integer(value: object) -> None:
    assert parse_sla({"max_latency_p95_ms": 2**53 - 1}).max_latency_p95_ms == 2**53 - 1
    with pytest.raises(ManifestError, match=r"sla\.max_latency_p95_ms"):
        parse_sla({"max_latency_p95_ms": value})


@pytest.mark.parametrize("value", [24, [], "x" * 201])
def test_support_hours_are_short_text(value: object) -> None:
    with pytest.raises(ManifestError, match=r"sla\.support_hours"):
        parse_sla({"support_hours": value})


def test_an_unknown_term_is_refused_by_name() -> None:
    with pytest.raises(ManifestError, match="'avaliability'"):
        parse_sla({"avaliability": "99%"})
    with pytest.raises(ManifestError, match=r"'x{50,60}\.\.\."):
        parse_sla({"x" * 10_000: 1})


@pytest.mark.parametrize("block", [None, [], "99%", 5])
def test_an_sla_block_is_an_object(block: object) -> None:
    with pytest.raises(ManifestError, match="object"):
        parse_sla(block)


def test_the_references_health_document_is_understood() -> None:
    body = (
        b'{"status":"healthy","agent_id":"urn:asap:agent:peer-b","version":"1.3.0","asap_version":"0.1",'
        b'"uptime_seconds":0.49,"load":null}'
    )
    expected = Health("healthy", AGENT, "1.3.0", 0.49)
    assert decode_health(body, AGENT) == decode_health(body, None) == expected


def test_a_status_alone_is_a_health_document() -> None:
    assert decode_health(b'{"status":"degraded"}', AGENT) == Health("degraded")
    assert decode_health(b'{"status":"unhealthy","ttl_seconds":60,"load":{"cpu":1}}', None) == Health(
        "unhealthy", ttl_seconds=60, load={"cpu": 1}
    )


def test_side_notes_of_another_type_are_left_out() -> None:
    body = b'{"status":"healthy","version":5,"uptime_seconds":%s,"ttl_seconds":%s}'
    for uptime in (b"true", b'"5"', b"-1", b"1" + b"0" * 400):
        for ttl in (b"true", b"0", b"-5", b"1.5", b'"5"'):
            assert decode_health(body % (uptime, ttl), None) == Health("healthy")
    assert decode_health(body % (b"5", b"1" + b"0" * 400), None).ttl_seconds == MAX_TTL_S


@pytest.mark.parametrize(
    ("body", "reason", "words"),
    [
        (b"ok", "bad_json", "JSON"),
        (b'"healthy"', "bad_json", "object"),
        (b"[" * 100_000, "bad_json", "deep"),
        (b"{}", "protocol", "status"),
        (b'{"status":"ok"}', "protocol", "status"),
        (b'{"status":["healthy"]}', "protocol", "status"),
        (b'{"status":"healthy","agent_id":5}', "protocol", "agent_id"),
        (b'{"status":"healthy","agent_id":"urn:asap:agent:other"}', "wrong_agent", "urn:asap:agent:other"),
        (b'{"status":"ok","agent_id":"urn:asap:agent:other"}', "wrong_agent", "urn:asap:agent:other"),
    ],
)
def test_what_is_no_health_document_is_refused_with_a_reason(body: bytes, reason: str, words: str) -> None:
    with pytest.raises(ManifestError, match=words) as caught:
        decode_health(body, AGENT)
    assert caught.value.reason == reason


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just(AGENT)
anything = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3), max_leaves=6
)
keys = st.sampled_from(
    ["id", "manifest", "signature", "public_key", "sla", "ttl_seconds", "availability", "alg", "status", "agent_id"]
)
objects = st.dictionaries(keys, st.dictionaries(keys, anything, max_size=4) | anything, max_size=6)


@given(st.binary(max_size=60) | objects.map(lambda value: json.dumps(value).encode()))
def test_decoders_raise_nothing_but_their_own_error(body: bytes) -> None:
    for decode in (decode_manifest, lambda given: decode_health(given, AGENT)):
        try:
            document = decode(body)
        except ManifestError as problem:
            shown = str(problem)
        else:
            shown = ""
            if isinstance(document, Manifest):
                assert verify_manifest(document, pin(KEY)) in {"unsigned", "bad_signature"}
        assert shown.isprintable()


@given(objects | anything)
def test_an_sla_block_of_anything_is_a_promise_or_an_error(block: object) -> None:
    try:
        found: Promise | str = parse_sla(block)
    except ManifestError as problem:
        found = str(problem)
    assert isinstance(found, Promise) or found.startswith("sla")


@pytest.mark.parametrize(
    ("said", "known"),
    [
        ("READY", "READY"),
        ("draining", "DRAINING"),
        ("Busy", "BUSY"),
        ("PAUSE", "PAUSE"),
        ("ASLEEP", None),
        (1, None),
        (None, None),
        (["READY"], None),
    ],
)
def test_whether_an_agent_takes_work_is_its_own_word_and_never_its_health(said: Any, known: str | None) -> None:
    health = decode_health(json.dumps({"status": "healthy", "agent_status": said}).encode(), None)
    assert (health.status, health.agent_status) == ("healthy", known)
