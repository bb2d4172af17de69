"""Delegation tokens: what honest programs write is read exactly, and nothing is read in two ways."""

import base64
import json
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nacl.signing import SigningKey

from asapd.core.delegation import MAX_SCOPES
from asapd.core.types import AGENT_URN
from asapd.wire.token import (
    MAX_NUMERIC_DATE_S,
    MAX_TOKEN_BYTES,
    Claims,
    SignedToken,
    TokenMalformed,
    decode,
    lineage,
    parse_strict_json,
    sign,
    verify,
)

# Made by the reference implementation, v2.5.4 and v1.3.0.
REFERENCE_KEY = base64.b64decode("s0l8kjq8smWf5OnQ+1iP4oBpUJ2EnYOSU0QKZIYbKUY=")
REFERENCE_V254 = (
    "eyJ0eXAiOiJKV1QiLCJhbGciOiJFZDI1NTE5In0.eyJpc3MiOiJ1cm46YXNhcDphZ2VudDpwZWVyLWEiLCJhdWQiOiJ1cm46YXNhcDphZ2VudDpwZW"
    "VyLWIiLCJqdGkiOiJkZWxfMDFNN1c2UkRSNzkyMjAzN0FEU0RLM1IzQkMiLCJpYXQiOjE3OTUxNjkyMDMsImV4cCI6MTc5NTE3MjgwMywic2NwIjpb"
    "InRhc2suZXhlY3V0ZSIsImRhdGEucmVhZCJdLCJ4LWFzYXAtY29uc3RyYWludHMiOnsibWF4X3Rhc2tzIjo1fX0.CuM7cUPAIH98twI0a2g1uErEAE"
    "hJLfz-pwSnqMpq9xEWEXmaghAQ2xJdlajlDDFRSa85Wy29CwvlpZHNJpiFAg"
)
REFERENCE_V130 = (
    "eyJ0eXAiOiJKV1QiLCJhbGciOiJFZERTQSJ9.eyJpc3MiOiJ1cm46YXNhcDphZ2VudDpwZWVyLWEiLCJhdWQiOiJ1cm46YXNhcDphZ2VudDpwZWVyL"
    "WIiLCJqdGkiOiJkZWxfMDFNN1c0WTJQNDNLMVJYMzg3RFIxNTVZR0MiLCJpYXQiOjE3OTUxNjcyOTIsImV4cCI6MTc5NTE3MDg5Miwic2NwIjpbInR"
    "hc2suZXhlY3V0ZSIsImRhdGEucmVhZCJdLCJ4LWFzYXAtY29uc3RyYWludHMiOnsibWF4X3Rhc2tzIjo1fX0.WxcClIixbVG1I4LkufgqgQLenNQ0h"
    "dt-2MbYyBichorbcbYQpsmF3JljsKmZdbUE3AX6ZiQPXnSObZgUPQyJCg"
)
REFERENCE_WITH_COST = (
    "eyJ0eXAiOiJKV1QiLCJhbGciOiJFZDI1NTE5In0.eyJpc3MiOiJ1cm46YXNhcDphZ2VudDpwZWVyLWEiLCJhdWQiOiJ1cm46YXNhcDphZ2VudDpwZW"
    "VyLWIiLCJqdGkiOiJkZWxfMDFNN1c0WDhCVFI5TjdSOENKMVcxTlI1M0giLCJpYXQiOjE3OTUxNjcyNjUsImV4cCI6MTc5NTE3MDg2NSwic2NwIjpb"
    "InRhc2suZXhlY3V0ZSJdLCJ4LWFzYXAtY29uc3RyYWludHMiOnsibWF4X3Rhc2tzIjo1LCJtYXhfY29zdF91c2QiOjEuNX19.ITTFLZlwWv0pcF-v6"
    "vXN-BerhdOiqBiNhoDHjPmyA86w7cIE3uWkGVOnKbsC5WPJR8lz3bTt7HQDRy2flJp7DQ"
)
REFERENCE_WITH_COST_V130 = (
    "eyJ0eXAiOiJKV1QiLCJhbGciOiJFZERTQSJ9.eyJpc3MiOiJ1cm46YXNhcDphZ2VudDpwZWVyLWEiLCJhdWQiOiJ1cm46YXNhcDphZ2VudDpwZWVyL"
    "WIiLCJqdGkiOiJkZWxfMDFNN1c0WDhTMkpRS1RHWllNMkZaQk1GN1kiLCJpYXQiOjE3OTUxNjcyNjUsImV4cCI6MTc5NTE3MDg2NSwic2NwIjpbInR"
    "hc2suZXhlY3V0ZSJdLCJ4LWFzYXAtY29uc3RyYWludHMiOnsibWF4X3Rhc2tzIjo1LCJtYXhfY29zdF91c2QiOjEuNX19.RwqNTuhtYCZH5-"
    "OwR1tlu8f4nj6v5QWjSCQwEjnul-BGPkw9H1O8UWm7fi0Bei2VvG7eREpld0REeXtwbF71AA"
)

KEY = SigningKey(bytes(range(32)))
PUBLIC = bytes(KEY.verify_key)
OTHER_KEY = SigningKey(bytes(32))
GROUP_ORDER = 2**252 + 27742317777372353535851937790883648493

HEADER: dict[str, Any] = {"alg": "EdDSA", "typ": "JWT"}
PAYLOAD: dict[str, Any] = {
    "iss": "urn:asap:agent:a",
    "aud": "urn:asap:agent:b",
    "jti": "del_1",
    "iat": 1_795_169_203,
    "exp": 1_795_172_803,
    "scp": ["task.execute", "data.*"],
    "x-asap-constraints": {"max_tasks": 5, "max_cost_usd": 1.5},
}
CLAIMS = Claims(
    id="del_1",
    delegator="urn:asap:agent:a",
    delegate="urn:asap:agent:b",
    scopes=("task.execute", "data.*"),
    max_tasks=5,
    max_cost_microusd=1_500_000,
    issued_at_us=1_795_169_203_000_000,
    expires_at_us=1_795_172_803_000_000,
)


def b64(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def forge(payload: bytes, header: bytes = b'{"alg":"EdDSA"}', key: SigningKey = KEY) -> str:
    """A token with a right signature over whatever bytes are given."""
    signed = f"{b64(header)}.{b64(payload)}"
    return f"{signed}.{b64(key.sign(signed.encode()).signature)}"


def with_payload(**changes: Any) -> str:
    payload = {key: value for key, value in (PAYLOAD | changes).items() if value is not ...}
    return forge(json.dumps(payload).encode())


def with_header(**changes: Any) -> str:
    header = {key: value for key, value in (HEADER | changes).items() if value is not ...}
    return forge(json.dumps(PAYLOAD).encode(), json.dumps(header).encode())


def with_text(old: str, new: str) -> str:
    """The honest payload with one piece of its JSON text replaced."""
    text = json.dumps(PAYLOAD)
    assert old in text
    return forge(text.replace(old, new, 1).encode())


def with_constraints(**constraints: Any) -> str:
    return with_payload(**{"x-asap-constraints": constraints})


HONEST = forge(json.dumps(PAYLOAD).encode(), json.dumps(HEADER).encode())


def parts(text: str = HONEST) -> list[str]:
    return text.split(".")


def with_part(index: int, change: Callable[[str], str]) -> str:
    pieces = parts()
    pieces[index] = change(pieces[index])
    return ".".join(pieces)


def with_signature(change: Callable[[bytes], bytes]) -> str:
    return with_part(2, lambda text: b64(change(base64.urlsafe_b64decode(text + "=="))))


def add_group_order(signature: bytes) -> bytes:
    scalar = int.from_bytes(signature[32:], "little") + GROUP_ORDER
    return signature[:32] + scalar.to_bytes(32, "little")


def read(text: str | bytes) -> SignedToken | str:
    """The token, or the reason why it is none; whatever else is raised fails the test."""
    try:
        return decode(text)
    except TokenMalformed as error:
        return error.reason


def chain_text(depth: int) -> str:
    text = sign(CLAIMS, KEY)
    for _ in range(depth - 1):
        text = sign(CLAIMS, KEY, parent=text)
    return text


@pytest.mark.parametrize(
    ("text", "token_id", "scopes", "cost_microusd", "issued_at_s"),
    [
        (REFERENCE_V254, "del_01M7W6RDR7922037ADSDK3R3BC", ("task.execute", "data.read"), None, 1_795_169_203),
        (REFERENCE_V130, "del_01M7W4Y2P43K1RX387DR155YGC", ("task.execute", "data.read"), None, 1_795_167_292),
        (REFERENCE_WITH_COST, "del_01M7W4X8BTR9N7R8CJ1W1NR53H", ("task.execute",), 1_500_000, 1_795_167_265),
        (REFERENCE_WITH_COST_V130, "del_01M7W4X8S2JQKTGZYM2FZBMF7Y", ("task.execute",), 1_500_000, 1_795_167_265),
    ],
)
def test_tokens_of_the_reference_implementation_decode_and_verify(
    text: str, token_id: str, scopes: tuple[str, ...], cost_microusd: int | None, issued_at_s: int
) -> None:
    token = decode(text)
    assert token.claims == Claims(
        id=token_id,
        delegator="urn:asap:agent:peer-a",
        delegate="urn:asap:agent:peer-b",
        scopes=scopes,
        max_tasks=5,
        max_cost_microusd=cost_microusd,
        issued_at_us=issued_at_s * 1_000_000,
        expires_at_us=(issued_at_s + 3600) * 1_000_000,
    )
    assert token.text == text
    assert verify(token, REFERENCE_KEY)
    assert not verify(token, PUBLIC)


def test_bytes_and_text_decode_alike() -> None:
    assert decode(HONEST.encode()) == decode(HONEST)
    assert decode(HONEST).claims == CLAIMS


def test_digest_is_the_sha256_of_the_text() -> None:
    assert len(decode(HONEST).digest) == 32
    assert decode(HONEST).digest != decode(sign(CLAIMS, KEY)).digest


def test_a_written_token_is_eddsa_with_exact_cost() -> None:
    text = sign(msgspec.structs.replace(CLAIMS, max_cost_microusd=100_001), KEY, kid="k1")
    header, payload, _ = (base64.urlsafe_b64decode(part + "==") for part in text.split("."))
    assert json.loads(header) == {"alg": "EdDSA", "typ": "JWT", "kid": "k1"}
    assert b'"max_cost_usd":0.100001' in payload
    assert decode(text).kid == "k1"


def test_a_written_token_without_limits_has_no_constraints() -> None:
    text = sign(msgspec.structs.replace(CLAIMS, max_tasks=None, max_cost_microusd=None), KEY)
    assert b"constraints" not in base64.urlsafe_b64decode(parts(text)[1] + "==")
    assert decode(text).claims.max_tasks is None
    assert decode(text).claims.max_cost_microusd is None


def test_fractions_of_a_second_never_lengthen_a_written_token() -> None:
    claims = msgspec.structs.replace(CLAIMS, expires_at_us=2_999_999, not_before_us=1_000_001, issued_at_us=1_999_999)
    written = decode(sign(claims, KEY)).claims
    assert (written.expires_at_us, written.not_before_us, written.issued_at_us) == (2_000_000, 2_000_000, 1_000_000)


@pytest.mark.parametrize(
    "changes",
    [
        {"id": ""},
        {"id": "\ud800"},
        {"delegator": "a b"},
        {"delegate": "x" * 257},
        {"scopes": ()},
        {"scopes": ("a", "a")},
        {"max_tasks": -1},
        {"max_tasks": 2**70},
        {"max_cost_microusd": -1},
        {"max_cost_microusd": 2**60},
        {"expires_at_us": 0},
        {"issued_at_us": -1},
        {"not_before_us": 10**18},
    ],
)
def test_claims_that_would_not_decode_are_not_signed(changes: dict[str, Any]) -> None:
    with pytest.raises(TokenMalformed):
        sign(msgspec.structs.replace(CLAIMS, **changes), KEY)


def test_a_parent_that_is_no_token_is_not_signed_over() -> None:
    with pytest.raises(TokenMalformed):
        sign(CLAIMS, KEY, parent="x.y.z")


def test_parents_come_with_the_token_root_first() -> None:
    root = sign(CLAIMS, OTHER_KEY)
    leaf = decode(sign(msgspec.structs.replace(CLAIMS, id="del_2"), KEY, parent=root))
    assert [token.claims.id for token in lineage(leaf)] == ["del_1", "del_2"]
    assert leaf.parent == decode(root)
    assert leaf.parent is not None
    assert verify(leaf.parent, bytes(OTHER_KEY.verify_key))
    assert verify(leaf, PUBLIC)
    assert not verify(leaf.parent, PUBLIC)


def test_a_chain_deeper_than_allowed_is_told_from_other_faults() -> None:
    text = chain_text(5)
    assert len(lineage(decode(text, max_depth=5))) == 5
    with pytest.raises(TokenMalformed) as caught:
        decode(text, max_depth=4)
    assert caught.value.too_deep
    with pytest.raises(TokenMalformed) as caught:
        decode("x", max_depth=4)
    assert not caught.value.too_deep


def test_the_bound_of_size_is_on_the_whole_text() -> None:
    assert decode(HONEST, max_bytes=len(HONEST)).text == HONEST
    with pytest.raises(TokenMalformed, match="longer"):
        decode(HONEST, max_bytes=len(HONEST) - 1)


@pytest.mark.parametrize(
    "text",
    [
        with_payload(nbf=1),
        with_payload(sub="x", nested={"a": [{"b": 1.5e3, "c": None}], "d": '\\"[{'}),
        with_payload(scp=["*"]),
        with_payload(scp=[f"a.s{index}" for index in range(MAX_SCOPES)]),
        with_payload(**{"x-asap-constraints": ...}),
        with_constraints(),
        with_constraints(max_tasks=0, max_cost_usd=0),
        with_constraints(max_tasks=2**53 - 1),
        with_constraints(max_cost_usd="0.000001"),
        with_payload(exp=MAX_NUMERIC_DATE_S),
        with_payload(iss="urn:asap:agent:" + "x" * 200),
        with_header(alg="Ed25519"),
        with_header(typ=...),
        with_header(typ="anything at all"),
        with_header(kid="key-1", jku="https://example.com", b64=True),
        forge(b" \n" + json.dumps(PAYLOAD).encode() + b" "),
    ],
)
def test_unusual_but_honest_tokens_pass(text: str) -> None:
    assert verify(decode(text), PUBLIC)


@pytest.mark.parametrize(
    ("written", "microusd"),
    [("0.1", 100_000), ("1e3", 1_000_000_000), ("1.50000000", 1_500_000), ('"2.5"', 2_500_000), ("-0.0", 0)],
)
def test_cost_is_read_without_binary_rounding(written: str, microusd: int) -> None:
    assert decode(with_text("1.5", written)).claims.max_cost_microusd == microusd


NOT_TASKS: list[Any] = [-1, 2**53, 2**64, True, None, 1.0, 1.5, "5", [5], {}]
NOT_MONEY: list[Any] = [-1, -0.5, True, None, 1e-7, 0.1234567, 1e10, 1e300, 2**53, [1], {}]
NOT_MONEY += ["", " 1", "1 ", "1\n", "+1", "-1", "1e3", "0x1", "NaN", "Infinity", "1_000", "1.", ".5", "1,5", "\u0661"]
NOT_MONEY += ["1.1234567", "9" * 17, "9999999999"]

MALFORMED: dict[str, str | bytes] = {
    # shape
    "empty": "",
    "one part": "x",
    "two parts": ".".join(parts()[:2]),
    "four parts": HONEST + ".x",
    "JSON serialisation": json.dumps({"payload": parts()[1], "protected": parts()[0], "signature": parts()[2]}),
    "only dots": "..",
    "many dots": "." * 10_000,
    "leading space": " " + HONEST,
    "final newline": HONEST + "\n",
    "newline inside": with_part(1, lambda text: text[:10] + "\n" + text[10:]),
    "null byte": HONEST + "\0",
    "non-ASCII text": HONEST + "é",
    "full-width letter": with_part(1, lambda text: "\uff45" + text[1:]),
    "lone surrogate": "\ud800" + HONEST,
    "non-ASCII bytes": HONEST.encode() + b"\xff",
    "too long": forge(json.dumps(PAYLOAD | {"x": "y" * MAX_TOKEN_BYTES}).encode()),
    # base64url
    "padded payload": with_part(1, lambda text: text + "=" * (-len(text) % 4 or 4)),
    "padded signature": HONEST + "==",
    "standard alphabet": with_part(2, lambda text: "+/" + text[2:]),
    "rubbish skipped by lax decoders": with_part(1, lambda text: text[:4] + "!!!!" + text[4:]),
    "trailing bits in signature": with_part(2, lambda text: text[:-1] + chr(ord(text[-1]) + 1)),
    "impossible length": with_part(1, lambda text: text + "A" * ((1 - len(text)) % 4)),
    "empty header": with_part(0, lambda _: ""),
    "empty payload": with_part(1, lambda _: ""),
    # header
    "alg none": forge(json.dumps(PAYLOAD).encode(), b'{"alg":"none"}'),
    "alg none, unsigned": ".".join([b64(b'{"alg":"none"}'), parts()[1], ""]),
    "alg None": with_header(alg="None"),
    "alg HS256": with_header(alg="HS256"),
    "alg RS256": with_header(alg="RS256"),
    "alg ES256K": with_header(alg="ES256K"),
    "alg eddsa": with_header(alg="eddsa"),
    "alg EDDSA": with_header(alg="EDDSA"),
    "alg ed25519": with_header(alg="ed25519"),
    "alg Ed448": with_header(alg="Ed448"),
    "alg with space": with_header(alg="EdDSA "),
    "alg with null": with_header(alg="EdDSA\0"),
    "alg homoglyph": with_header(alg="Ed\u0044SA\u200b"),
    "alg list": with_header(alg=["EdDSA"]),
    "alg object": with_header(alg={"EdDSA": 1}),
    "alg null": with_header(alg=None),
    "alg missing": with_header(alg=...),
    "alg twice": forge(json.dumps(PAYLOAD).encode(), b'{"alg":"none","alg":"EdDSA"}'),
    "alg twice by escape": forge(json.dumps(PAYLOAD).encode(), b'{"alg":"none","\\u0061lg":"EdDSA"}'),
    "crit": with_header(crit=["exp"]),
    "crit empty": with_header(crit=[]),
    "unencoded payload": with_header(b64=False, crit=["b64"]),
    "typ number": with_header(typ=1),
    "kid number": with_header(kid=1),
    "kid with newline": with_header(kid="a\nb"),
    "kid empty": with_header(kid=""),
    "header list": forge(json.dumps(PAYLOAD).encode(), b'["EdDSA"]'),
    "header not UTF-8": forge(json.dumps(PAYLOAD).encode(), b'{"alg":"EdDSA","x":"\xff"}'),
    "header with nested twin keys": forge(json.dumps(PAYLOAD).encode(), b'{"alg":"EdDSA","jwk":{"a":1,"a":2}}'),
    # payload as JSON
    "payload list": forge(b"[]"),
    "payload string": forge(b'"x"'),
    "payload null": forge(b"null"),
    "payload empty object": forge(b"{}"),
    "payload not JSON": forge(b"{iss:1}"),
    "payload cut": forge(json.dumps(PAYLOAD).encode()[:-1]),
    "payload followed by rubbish": forge(json.dumps(PAYLOAD).encode() + b"x"),
    "payload twice": forge(json.dumps(PAYLOAD).encode() * 2),
    "payload with byte order mark": forge(b"\xef\xbb\xbf" + json.dumps(PAYLOAD).encode()),
    "payload UTF-16": forge(json.dumps(PAYLOAD).encode("utf-16")),
    "payload overlong UTF-8": forge(json.dumps(PAYLOAD).encode().replace(b"del_1", b"del_\xc0\xb1")),
    "raw newline in string": with_text("del_1", "del\n1"),
    "NaN": with_payload(x=float("nan")),
    "Infinity": with_payload(exp=float("inf")),
    "digits without end": with_text('"jti"', f'"x": {"9" * 5000}, "jti"'),
    "exponent without end": with_text('"jti"', '"x": 1e999999999, "jti"'),
    "exponent beyond Decimal": with_text('"jti"', '"x": 1e99999999999999999999, "jti"'),
    "fraction without end": with_text('"jti"', f'"x": 1.{"1" * 5000}, "jti"'),
    "deep lists": with_text('"jti"', f'"x": {"[" * 10_000}{"]" * 10_000}, "jti"'),
    "deep objects": with_text('"jti"', '"x": ' + '{"a":' * 5000 + "1" + "}" * 5000 + ', "jti"'),
    "open lists": forge(b"[" * 40_000),
    "open string": forge(b'{"' + b'\\"' * 20_000),
    # duplicates
    "iss twice": with_text('"jti"', '"iss": "urn:asap:agent:root", "jti"'),
    "exp twice": with_text('"jti"', '"exp": 9999999999, "jti"'),
    "scp twice": with_text('"jti"', '"scp": ["*"], "jti"'),
    "iss twice by escape": with_text('"jti"', '"\\u0069ss": "urn:asap:agent:root", "jti"'),
    "constraints twice": with_text('"jti"', '"x-asap-constraints": {}, "jti"'),
    "max_tasks twice": with_text('"max_tasks": 5', '"max_tasks": 5, "max_tasks": 500'),
    "twins in an unknown claim": with_text('"jti"', '"x": [{"y": {"z": 1, "z": 1}}], "jti"'),
    # names
    **{f"{name} missing": with_payload(**{name: ...}) for name in ("iss", "aud", "jti", "iat", "exp", "scp")},
    **{f"{name} null": with_payload(**{name: None}) for name in ("iss", "aud", "jti", "iat", "exp", "scp", "nbf")},
    **{f"{name} empty": with_payload(**{name: ""}) for name in ("iss", "aud", "jti")},
    **{f"{name} a number": with_payload(**{name: 7}) for name in ("iss", "aud", "jti")},
    **{f"{name} a list": with_payload(**{name: ["urn:asap:agent:b"]}) for name in ("iss", "aud", "jti")},
    **{f"{name} too long": with_payload(**{name: "x" * 257}) for name in ("iss", "aud", "jti")},
    **{f"{name} no agent": with_payload(**{name: "urn:asap:agent:%61"}) for name in ("iss", "aud")},
    "iss with newline": with_payload(iss="urn:asap:agent:a\n"),
    "iss with carriage return": with_payload(iss="urn:asap:agent:a\rb"),
    "iss with null": with_payload(iss="urn:asap:agent:a\0"),
    "iss with space": with_payload(iss="urn:asap:agent:a b"),
    "iss with escape sequence": with_payload(iss="urn:asap:agent:\x1b[31m"),
    "iss with cyrillic a": with_payload(iss="urn:asap:agent:\u0430"),
    "aud with right-to-left override": with_payload(aud="urn:asap:agent:\u202eb"),
    "aud with line separator": with_payload(aud="urn:asap:agent:b\u2028"),
    "aud with zero-width space": with_payload(aud="urn:asap:agent:b\u200b"),
    "jti with lone surrogate": with_text("del_1", "\\ud800"),
    "jti with emoji": with_payload(jti="del_\U0001f4b8"),
    "jti with delete": with_payload(jti="del_\x7f"),
    # times
    **{f"{name} zero": with_payload(**{name: 0}) for name in ("iat", "exp", "nbf")},
    **{f"{name} negative": with_payload(**{name: -1}) for name in ("iat", "exp", "nbf")},
    **{f"{name} true": with_payload(**{name: True}) for name in ("iat", "exp", "nbf")},
    **{f"{name} text": with_payload(**{name: "1795172803"}) for name in ("iat", "exp", "nbf")},
    **{f"{name} fraction": with_payload(**{name: 1795172803.5}) for name in ("iat", "exp", "nbf")},
    "exp whole but written as fraction": with_payload(exp=1795172803.0),
    "exp by exponent": with_text("1795172803", "1e10"),
    "exp after the year 9999": with_payload(exp=MAX_NUMERIC_DATE_S + 1),
    "exp 2**63": with_payload(exp=2**63),
    "exp in milliseconds": with_payload(exp=1_795_172_803_000),
    "exp list": with_payload(exp=[1795172803]),
    # scopes
    "scp text": with_payload(scp="task.execute"),
    "scp empty": with_payload(scp=[]),
    "scp object": with_payload(scp={"task.execute": True}),
    "scp too many": with_payload(scp=[f"a.s{index}" for index in range(MAX_SCOPES + 1)]),
    "scp repeats": with_payload(scp=["a", "b", "a"]),
    "scope number": with_payload(scp=["a", 1]),
    "scope nested": with_payload(scp=["a", ["b"]]),
    "scope null": with_payload(scp=[None]),
    "scope empty": with_payload(scp=[""]),
    "scope with space": with_payload(scp=["task execute"]),
    "scope with newline": with_payload(scp=["task.execute\n"]),
    "scope only dot and star": with_payload(scp=[".*"]),
    "scope star first": with_payload(scp=["*.read"]),
    "scope star amid": with_payload(scp=["a.*.b"]),
    "scope star glued": with_payload(scp=["task*"]),
    "scope two stars": with_payload(scp=["**"]),
    "scope final dot": with_payload(scp=["task."]),
    "scope empty segment": with_payload(scp=["a..b"]),
    "scope too long": with_payload(scp=["a" * 129]),
    "scope unicode": with_payload(scp=["t\u0430sk.execute"]),
    # constraints
    "constraints null": with_payload(**{"x-asap-constraints": None}),
    "constraints list": with_payload(**{"x-asap-constraints": []}),
    "constraints text": with_payload(**{"x-asap-constraints": "{}"}),
    "constraint unknown": with_constraints(max_tasks=5, max_tokens=10),
    "constraint misspelt": with_constraints(max_cost=1),
    "constraint in capitals": with_constraints(MAX_TASKS=1),
    **{f"max_tasks {value!r}": with_constraints(max_tasks=value) for value in NOT_TASKS},
    **{f"max_cost_usd {value!r}": with_constraints(max_cost_usd=value) for value in NOT_MONEY},
    "cost too small to see": with_text("1.5", "1e-999999"),
    "cost zero with a monstrous exponent": with_text("1.5", "0e999999"),
    "cost hidden behind digits": with_text("1.5", "1.0000000000000000000000000000000001"),
    # parents
    "prf null": with_payload(prf=None),
    "prf empty": with_payload(prf=""),
    "prf number": with_payload(prf=1),
    "prf list": with_payload(prf=[HONEST]),
    "prf object": with_payload(prf=PAYLOAD),
    "prf no token": with_payload(prf="del_1"),
    "prf unicode": with_payload(prf=HONEST + "é"),
    "prf with newline": with_payload(prf=HONEST + "\n"),
    "prf malformed two levels down": with_payload(prf=with_payload(prf=with_payload(exp=None))),
    "prf alg none": with_payload(prf=forge(json.dumps(PAYLOAD).encode(), b'{"alg":"none"}')),
    # signatures
    "no signature": ".".join(parts()[:2]) + ".",
    "signature cut": with_signature(lambda signature: signature[:63]),
    "signature longer": with_signature(lambda signature: signature + b"\0"),
    "signature twice": with_signature(lambda signature: signature * 2),
    "header and payload swapped": ".".join([parts()[1], parts()[0], parts()[2]]),
}

UNVERIFIED: dict[str, str] = {
    "signature zero": with_signature(lambda _: bytes(64)),
    "signature with one bit flipped": with_signature(lambda signature: bytes([signature[0] ^ 1]) + signature[1:]),
    "signature with halves swapped": with_signature(lambda signature: signature[32:] + signature[:32]),
    "signature not canonical": with_signature(add_group_order),
    "signature of another key": forge(json.dumps(PAYLOAD).encode(), key=OTHER_KEY),
    "signature of another token": ".".join([*parts()[:2], parts(with_payload(jti="del_2"))[2]]),
    "signature over the payload alone": with_signature(lambda _: KEY.sign(parts()[1].encode()).signature),
    "signature over the decoded payload": with_signature(lambda _: KEY.sign(json.dumps(PAYLOAD).encode()).signature),
    "payload re-encoded": with_part(1, lambda _: b64(json.dumps(PAYLOAD, separators=(",", ":")).encode())),
    "payload with keys reordered": with_part(1, lambda _: b64(json.dumps(PAYLOAD, sort_keys=True).encode())),
    "payload widened": with_part(1, lambda _: b64(json.dumps(PAYLOAD | {"scp": ["*"]}).encode())),
    "payload of a third party's token": with_part(1, lambda _: parts(REFERENCE_V254)[1]),
    "header exchanged": with_part(0, lambda _: b64(b'{"alg":"Ed25519"}')),
}


def test_the_tables_of_hostile_tokens_start_from_an_honest_one() -> None:
    assert verify(decode(HONEST), PUBLIC)


@pytest.mark.parametrize("text", MALFORMED.values(), ids=MALFORMED.keys())
def test_ambiguous_or_unenforceable_tokens_are_malformed(text: str | bytes) -> None:
    reason = read(text)
    assert isinstance(reason, str)
    assert reason.isascii()
    assert reason.isprintable()
    assert 0 < len(reason) < 250


@pytest.mark.parametrize("text", UNVERIFIED.values(), ids=UNVERIFIED.keys())
def test_tokens_with_a_foreign_signature_do_not_verify(text: str) -> None:
    assert not verify(decode(text), PUBLIC)


def test_a_fault_in_a_parent_says_which_parent() -> None:
    assert read(MALFORMED["prf malformed two levels down"]) == (
        f"parent 2: exp: must be whole seconds since 1970, from 1 to {MAX_NUMERIC_DATE_S}, not null"
    )


def test_a_token_that_embeds_itself_ends_at_the_bound_of_size() -> None:
    """A true cycle cannot be made, because a token contains its parent; a tower can, and is bounded."""
    text = HONEST
    while len(text) <= MAX_TOKEN_BYTES:
        text = with_payload(prf=text)
    assert read(text) == f"is longer than {MAX_TOKEN_BYTES} bytes"


SMALL_ORDER = [
    bytes(32),
    b"\x01" + bytes(31),
    bytes.fromhex("26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05"),
    bytes.fromhex("c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a"),
    b"\xec" + b"\xff" * 30 + b"\x7f",
    b"\xed" + b"\xff" * 30 + b"\x7f",
    b"\xee" + b"\xff" * 30 + b"\x7f",
    b"\xee" + b"\xff" * 31,
]


@pytest.mark.parametrize("public_key", SMALL_ORDER)
@pytest.mark.parametrize("point", SMALL_ORDER)
def test_no_signature_fits_a_key_of_small_order(public_key: bytes, point: bytes) -> None:
    """With such a key a lax verifier takes (point, 0) for a signature over anything."""
    token = decode(with_signature(lambda _: point + bytes(32)))
    assert not verify(token, public_key)


@pytest.mark.parametrize("public_key", [b"", PUBLIC[:31], PUBLIC + b"\0"])
def test_a_key_of_the_wrong_length_verifies_nothing(public_key: bytes) -> None:
    assert not verify(decode(HONEST), public_key)


def test_a_signature_of_the_wrong_length_verifies_nothing() -> None:
    token = decode(HONEST)
    (signed,) = token.signed
    joined = msgspec.structs.replace(token, signed=(signed[1:],), signature=token.signature + signed[:1])
    assert not verify(joined, PUBLIC)


agents = st.from_regex(AGENT_URN, fullmatch=True)
names = st.text(alphabet=[chr(code) for code in range(0x21, 0x7F)], min_size=1, max_size=40)
scopes = st.from_regex(r"\A(\*|[a-z_]{1,6}(\.[a-z0-9]{1,6}){0,3}(\.\*)?)\Z")
seconds = st.integers(1, MAX_NUMERIC_DATE_S).map(lambda value: value * 1_000_000)
claims_values = st.builds(
    Claims,
    id=names,
    delegator=agents,
    delegate=agents,
    scopes=st.lists(scopes, min_size=1, max_size=4, unique=True).map(tuple),
    max_tasks=st.none() | st.integers(0, 2**53 - 1),
    max_cost_microusd=st.none() | st.integers(0, 9_007_199_254_000_000),
    issued_at_us=seconds,
    expires_at_us=seconds,
    not_before_us=st.none() | seconds,
)


@given(claims_values, st.none() | names)
def test_whatever_is_signed_reads_back_exactly(claims: Claims, kid: str | None) -> None:
    root = sign(claims, KEY, kid=kid)
    token = decode(sign(claims, OTHER_KEY, parent=root))
    assert token.claims == claims
    assert token.parent == decode(root)
    assert token.parent is not None
    assert token.parent.kid == kid
    assert verify(token, bytes(OTHER_KEY.verify_key))


@given(st.binary() | st.text())
def test_arbitrary_input_is_malformed(text: str | bytes) -> None:
    assert isinstance(read(text), str)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
claim_names = st.sampled_from(["iss", "aud", "jti", "iat", "exp", "nbf", "scp", "x-asap-constraints", "prf", "x"])
constraint_names = st.sampled_from(["max_tasks", "max_cost_usd", "x"])


@settings(max_examples=200, deadline=None)
@given(
    st.dictionaries(claim_names, json_values, max_size=3), st.dictionaries(constraint_names, json_values, max_size=2)
)
def test_any_json_in_any_claim_is_read_or_malformed(changes: dict[str, Any], constraints: dict[str, Any]) -> None:
    payload = PAYLOAD | {"x-asap-constraints": constraints} | changes
    token = read(forge(json.dumps(payload).encode()))
    assert isinstance(token, str) or verify(token, PUBLIC)


CHAIN = chain_text(3)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_mutated_token_is_malformed_or_does_not_verify(data: st.DataObject) -> None:
    """No change of the bytes leaves the outermost signature good, wherever in the chain it lands."""
    raw = bytearray(CHAIN.encode())
    start = data.draw(st.integers(0, len(raw) - 1))
    width = data.draw(st.integers(0, 4))
    raw[start : start + width] = data.draw(st.binary(max_size=4))
    token = read(bytes(raw))
    assert isinstance(token, str) or bytes(raw) == CHAIN.encode() or not verify(token, PUBLIC)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_mutated_payload_under_a_good_signature_is_read_or_malformed(data: st.DataObject) -> None:
    raw = bytearray(json.dumps(PAYLOAD | {"prf": HONEST}).encode())
    start = data.draw(st.integers(0, len(raw) - 1))
    raw[start : start + data.draw(st.integers(0, 4))] = data.draw(
        st.binary(max_size=4) | st.sampled_from([b'"', b"\\", b"{", b"[[", b"1e9", b"\\ud800", b"\xed\xa0\x80"])
    )
    token = read(forge(bytes(raw)))
    assert isinstance(token, str) or verify(token, PUBLIC)


@given(st.text(alphabet='"\\[]{}:,a1 \n', max_size=60))
def test_strict_json_agrees_with_the_parser_on_what_is_json(text: str) -> None:
    try:
        value = parse_strict_json(text.encode())
    except TokenMalformed:
        try:
            json.loads(text, object_pairs_hook=refuse_twins)
        except ValueError:
            return
        raise
    assert value == json.loads(text)


def refuse_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({key for key, _ in pairs}) != len(pairs):
        raise ValueError
    return dict(pairs)


def test_strict_json_keeps_decimals_exact() -> None:
    assert str(parse_strict_json(b"[0.1]")[0]) == "0.1"


@pytest.mark.parametrize("raw", [b'"\\', b'{"a":1,"b":2,"a":3}', b"\xff", b"-Infinity", b"[" * 33 + b"]" * 33])
def test_strict_json_refuses(raw: bytes) -> None:
    with pytest.raises(TokenMalformed):
        parse_strict_json(raw)


def test_strict_json_nests_as_deep_as_said() -> None:
    assert parse_strict_json(b"[" * 32 + b"]" * 32)
