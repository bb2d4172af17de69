"""Tokens that somebody would like to be believed, each with the code it is to be refused with.

They are written by hand: what honest code cannot write is the point.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from typing import Any

import rfc8785
from msgspec import Struct
from nacl.signing import SigningKey

NOW_S = 1_800_000_000
NOW_US = NOW_S * 1_000_000
A, B, C, D, STRANGER = (f"urn:asap:agent:{name}" for name in ("a", "b", "c", "d", "stranger"))
KEYS = {agent: SigningKey(agent[-1].encode() * 32) for agent in (A, B, C, D, STRANGER)}
ROOT = A
LEARNED = (B, C)
"""Whose keys are known, besides that of the root; D and the stranger are nobody here."""

HEADER = {"alg": "EdDSA", "typ": "JWT"}
GROUP_ORDER = 2**252 + 27742317777372353535851937790883648493


class Case(Struct, frozen=True):
    """A token, what is asked of it, and the code; `position` counts from the token presented, None is not looked at."""

    name: str
    token: str
    code: str | None
    action: str | None = "task.execute"
    delegate: str | None = None
    position: int | None = None


def b64(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def forge(payload: bytes | str, key: SigningKey = KEYS[A], header: bytes | str = '{"alg":"EdDSA","typ":"JWT"}') -> str:
    """A JWS with a right signature over whatever bytes are given."""
    raw = [part.encode() if isinstance(part, str) else part for part in (header, payload)]
    signed = ".".join(b64(part) for part in raw)
    return f"{signed}.{b64(key.sign(signed.encode()).signature)}"


def payload(issuer: str = A, delegate: str = B, **changes: Any) -> dict[str, Any]:
    """Honest claims with changes; `...` leaves one out."""
    claims: dict[str, Any] = {
        "iss": issuer,
        "aud": delegate,
        "jti": f"{issuer[-1]}-{delegate[-1]}",
        "iat": NOW_S - 60,
        "exp": NOW_S + 3600,
        "scp": ["task.*", "data.read"],
        "x-asap-constraints": {"max_tasks": 5, "max_cost_usd": 1.5},
        **changes,
    }
    return {name: value for name, value in claims.items() if value is not ...}


def jws(issuer: str = A, delegate: str = B, *, key: SigningKey | None = None, **changes: Any) -> str:
    """A JWS of such claims, signed by its issuer."""
    text = json.dumps(payload(issuer, delegate, **changes), separators=(",", ":"))
    return forge(text, key or KEYS[issuer])


def headed(**changes: Any) -> str:
    header = {name: value for name, value in (HEADER | changes).items() if value is not ...}
    return forge(json.dumps(payload()), header=json.dumps(header))


def respelt(old: str, new: str) -> str:
    """The honest payload with one piece of its text replaced, and signed like that."""
    text = json.dumps(payload())
    assert old in text, old
    return forge(text.replace(old, new, 1))


def spliced(index: int, change: Callable[[str], str], text: str | None = None) -> str:
    """An honest token with one of its three parts changed after signing."""
    parts = (jws() if text is None else text).split(".")
    parts[index] = change(parts[index])
    return ".".join(parts)


def resigned(change: Callable[[bytes], bytes]) -> str:
    return spliced(2, lambda text: b64(change(base64.urlsafe_b64decode(text + "=="))))


def document(
    issuer: str = A, to: str = B, *, key: SigningKey | None = None, whole: bool = False, **changes: Any
) -> dict[str, Any]:
    """A signed document; `whole` signs it with its outer member, `...` leaves a member out."""
    inner: dict[str, Any] = {
        "id": f"doc-{issuer[-1]}-{to[-1]}",
        "delegator": issuer,
        "delegate": to,
        "scopes": ["task.*", "data.read"],
        "constraints": {"max_cost_usd": 1.5, "max_tasks": 5, "expires_at": "2027-01-15T09:00:00Z"},
        **changes,
    }
    inner = {name: value for name, value in inner.items() if value is not ...}
    try:
        signed = rfc8785.dumps({"delegation": inner} if whole else inner)
    except rfc8785.CanonicalizationError:
        signed = b"has no canonical form"
    signature = (key or KEYS[issuer]).sign(signed).signature
    inner.setdefault("signature", base64.b64encode(signature).decode())
    return {"delegation": inner}


def doc(**changes: Any) -> str:
    return json.dumps(document(**changes))


def limited(**constraints: Any) -> str:
    """A document with these constraints and an expiry."""
    said = {"expires_at": "2027-01-15T09:00:00Z", **constraints}
    return doc(constraints={name: value for name, value in said.items() if value is not ...})


def doc_text(old: str, new: str, **changes: Any) -> str:
    """A document with its text changed after signing."""
    text = doc(**changes)
    assert old in text, old
    return text.replace(old, new, 1)


def tower(depth: int) -> str:
    """A chain from A on of as many tokens, each agent new."""
    text, names = None, [A, B, C, *(f"urn:asap:agent:n{number}" for number in range(depth))]
    for number in range(depth):
        key = KEYS.get(names[number], KEYS[D])
        more = {} if text is None else {"prf": text}
        text = jws(names[number], names[number + 1], key=key, jti=f"tower-{number}", **more)
    assert text is not None
    return text


def doc_tower(depth: int) -> str:
    made: dict[str, Any] | None = None
    for number in range(depth):
        more = {} if made is None else {"parent": made}
        made = document(id=f"tower-{number}", **more)
    return json.dumps(made)


PARENT = jws()
CHILD = jws(B, C, prf=PARENT)
GRANDCHILD = jws(C, D, prf=CHILD)
PARENT_DOC = document()
CHILD_DOC = document(B, C, parent=PARENT_DOC)

HONEST = [
    Case("a root", PARENT, None),
    Case("a chain", CHILD, None, delegate=C),
    Case("a chain of three", GRANDCHILD, None),
    Case("a chain to the last allowed depth of agents that are known", jws(C, D, prf=jws(B, C, prf=jws())), None),
    Case("alg Ed25519", headed(alg="Ed25519"), None),
    Case("expires in a second", jws(exp=NOW_S + 1), None),
    Case("valid from this second on", jws(nbf=NOW_S), None),
    Case("issued by a clock that is ahead", jws(iat=NOW_S + 240), None),
    Case("given to oneself, narrower", jws(B, B, prf=PARENT, scp=["task.execute"]), None),
    Case("given back to an agent on the way, narrower", jws(C, B, jti="back", prf=CHILD), None),
    Case("given by the root to itself, and on from there", jws(A, B, prf=jws(A, A)), None),
    Case("a document", doc(), None),
    Case("a document signed with its outer member", doc(whole=True), None),
    Case("a document under a document", json.dumps(CHILD_DOC), None),
    Case("a document under a JWS", doc(issuer=B, to=C, parent=PARENT), None),
    Case("a JWS under a document", jws(B, C, prf=json.dumps(PARENT_DOC)), None),
    Case("a document in another order and spelling", json.dumps(PARENT_DOC, indent=2, sort_keys=True), None),
    Case("a document with a whole number as a fraction", doc_text("1.5", "1.50"), None),
    Case("a document with an amount as text", limited(max_cost_usd="0.000001"), None),
    Case("a document that ends at a number of seconds", limited(expires_at=NOW_S + 1), None),
    Case("a document that ends in another zone", limited(expires_at="2027-01-15T10:00:00+01:00"), None),
]


def _malformed() -> dict[str, str]:
    cases: dict[str, str] = {}
    for claim in ("iss", "aud", "jti", "iat", "exp", "scp"):
        cases[f"{claim} missing"] = jws(**{claim: ...})
    for claim in ("iss", "aud", "jti", "iat", "exp", "nbf", "scp", "prf", "x-asap-constraints"):
        for what, value in (("null", None), ("true", True), ("a list", [[]]), ("a number", 1.5)):
            cases[f"{claim} is {what}"] = jws(**{claim: value})
    for claim in ("iss", "aud", "jti"):
        for what, value in (
            ("empty", ""),
            ("of 257 characters", "x" * 257),
            ("with a newline", "urn:asap:agent:a\n"),
            ("with a space", "urn:asap:agent:a b"),
            ("with a null", "urn:asap:agent:a\0"),
            ("with an escape sequence", "urn:asap:agent:\x1b[2J"),
            ("with a cyrillic letter", "urn:asap:agent:\u0430"),
            ("with a right-to-left override", "urn:asap:agent:\u202ea"),
            ("with a zero-width joiner", "urn:asap:agent:a\u200d"),
            ("with half a surrogate pair", "urn:asap:agent:\ud800"),
        ):
            cases[f"{claim} {what}"] = forge(json.dumps(payload(**{claim: value})))
    for claim in ("iat", "exp", "nbf"):
        for what, value in (
            ("zero", 0),
            ("negative", -1),
            ("text", str(NOW_S + 3600)),
            ("a fraction", NOW_S + 0.5),
            ("a whole number as a fraction", float(NOW_S)),
            ("in milliseconds", NOW_US // 1000),
            ("beyond 2**64", 2**70),
        ):
            cases[f"{claim} {what}"] = jws(**{claim: value})
    for what, value in (
        ("text", "task.*"),
        ("empty", []),
        ("of 65 scopes", [f"a.s{number}" for number in range(65)]),
        ("twice the same", ["a", "a"]),
        ("with a number", [1]),
        ("with a star inside", ["a.*.b"]),
        ("with a star glued on", ["task*"]),
        ("with a newline", ["task.execute\n"]),
        ("with a cyrillic letter", ["t\u0430sk.execute"]),
        ("of 129 characters", ["a" * 129]),
    ):
        cases[f"scopes {what}"] = jws(scp=value)
    for what, limits in (
        ("unknown", {"max_tokens": 1}),
        ("in capitals", {"MAX_TASKS": 1}),
        ("tasks negative", {"max_tasks": -1}),
        ("tasks a fraction", {"max_tasks": 1.5}),
        ("tasks a whole number as a fraction", {"max_tasks": 1.0}),
        ("tasks true", {"max_tasks": True}),
        ("tasks null", {"max_tasks": None}),
        ("tasks beyond exact numbers", {"max_tasks": 2**53}),
        ("tasks text", {"max_tasks": "5"}),
        ("cost negative", {"max_cost_usd": -0.01}),
        ("cost null", {"max_cost_usd": None}),
        ("cost true", {"max_cost_usd": True}),
        ("cost with seven decimals", {"max_cost_usd": 0.1234567}),
        ("cost too small to see", {"max_cost_usd": 1e-7}),
        ("cost beyond all money", {"max_cost_usd": 1e300}),
        ("cost NaN", {"max_cost_usd": float("nan")}),
        ("cost infinite", {"max_cost_usd": float("inf")}),
        ("cost as text in exponents", {"max_cost_usd": "1e3"}),
        ("cost a list", {"max_cost_usd": [1]}),
    ):
        cases[f"constraint {what}"] = jws(**{"x-asap-constraints": limits})
    for what, algorithm in (
        ("none", "none"),
        ("None", "None"),
        ("HS256", "HS256"),
        ("RS256", "RS256"),
        ("ES256", "ES256"),
        ("eddsa", "eddsa"),
        ("EDDSA", "EDDSA"),
        ("ed25519", "ed25519"),
        ("ED25519", "ED25519"),
        ("with a space", "EdDSA "),
        ("with a null", "EdDSA\0"),
        ("with a homoglyph", "\u0415dDSA"),
        ("a list", ["EdDSA"]),
        ("null", None),
        ("missing", ...),
    ):
        cases[f"alg {what}"] = headed(alg=algorithm)
    cases |= {
        "alg none without a signature": ".".join((b64(b'{"alg":"none"}'), PARENT.split(".")[1], "")),
        "alg none in the parent": jws(B, C, prf=forge(json.dumps(payload()), header='{"alg":"none"}')),
        "alg HS256 keyed with the public key": headed(alg="HS256", jwk={"k": b64(bytes(KEYS[A].verify_key))}),
        "alg twice": forge(json.dumps(payload()), header='{"alg":"none","alg":"EdDSA"}'),
        "alg twice by an escape": forge(json.dumps(payload()), header='{"alg":"EdDSA","\\u0061lg":"none"}'),
        "alg none of a stranger": forge(json.dumps(payload(STRANGER)), KEYS[STRANGER], '{"alg":"none"}'),
        "crit": headed(crit=["exp"]),
        "b64 false": headed(b64=False, crit=["b64"]),
        "kid with a newline": headed(kid="a\nb"),
        "header a list": forge(json.dumps(payload()), header='["EdDSA"]'),
        "iss twice": respelt('"jti"', f'"iss": "{STRANGER}", "jti"'),
        "exp twice": respelt('"jti"', '"exp": 9999999999, "jti"'),
        "scp twice": respelt('"jti"', '"scp": ["*"], "jti"'),
        "jti twice by an escape": respelt('"iat"', '"\\u006ati": "x", "iat"'),
        "max_tasks twice": respelt('"max_tasks": 5', '"max_tasks": 5, "max_tasks": 500'),
        "constraints twice": respelt('"iat"', '"x-asap-constraints": {}, "iat"'),
        "prf twice": forge(json.dumps(payload(prf=PARENT)).replace('"iat"', f'"prf": "{PARENT}", "iat"')),
        "twins in a claim nobody reads": respelt('"iat"', '"x": {"y": 1, "y": 2}, "iat"'),
        "exp by an exponent": respelt(str(NOW_S + 3600), "1e10"),
        "payload a list": forge("[]"),
        "payload null": forge("null"),
        "payload empty": forge("{}"),
        "payload cut": forge(json.dumps(payload())[:-1]),
        "payload and more": forge(json.dumps(payload()) + "{}"),
        "payload with a byte order mark": forge("\ufeff" + json.dumps(payload())),
        "payload in UTF-16": forge(json.dumps(payload()).encode("utf-16")),
        "payload with overlong UTF-8": forge(json.dumps(payload()).encode().replace(b"a-b", b"\xc0\xaf")),
        "payload of open brackets": forge("[" * 40_000),
        "payload of deep objects": forge('{"a":' * 5_000 + "1" + "}" * 5_000),
        "payload of a number without end": respelt('"iat"', f'"x": {"9" * 9_000}, "iat"'),
        "payload with an exponent without end": respelt('"iat"', '"x": 1e999999999, "iat"'),
        "padded": spliced(1, lambda part: part + "=" * (-len(part) % 4 or 4)),
        "in the standard alphabet": spliced(2, lambda part: "+/" + part[2:]),
        "with rubbish that lax decoders skip": spliced(1, lambda part: part[:4] + "!!!!" + part[4:]),
        "with bits behind the last byte": spliced(2, lambda part: part[:-1] + chr(ord(part[-1]) + 1)),
        "with a newline inside": spliced(1, lambda part: part[:8] + "\n" + part[8:]),
        "with a newline at the end": PARENT + "\n",
        "with a character outside ASCII": PARENT + "\u00e9",
        "empty": "",
        "two parts": PARENT.rpartition(".")[0],
        "four parts": PARENT + ".x",
        "a JSON serialisation": json.dumps({"payload": PARENT.split(".")[1], "signature": PARENT.split(".")[2]}),
        "an id": "a-b",
        "longer than any": forge(json.dumps(payload(x="y" * 300_000))),
        "signature missing": spliced(2, lambda _: ""),
        "signature cut": resigned(lambda signature: signature[:63]),
        "signature with more": resigned(lambda signature: signature + b"\0"),
        "parent an id": jws(B, C, prf="a-b"),
        "parent with a newline": jws(B, C, prf=PARENT + "\n"),
        "parent malformed two levels up": jws(C, D, prf=jws(B, C, prf=jws(exp=None))),
    }
    return cases


def _malformed_documents() -> dict[str, str]:
    cases = {f"document without {member}": doc(**{member: ...}) for member in ("id", "delegator", "delegate", "scopes")}
    for member in ("id", "delegator", "delegate", "scopes", "constraints", "parent", "signature", "issued_at"):
        for what, value in (("null", None), ("true", True), ("a number", 7.5), ("a list", [[]])):
            cases[f"document {member} is {what}"] = doc(**{member: value})
    for what, name in (("a newline", "a\n"), ("a space", "a b"), ("a cyrillic letter", "\u0430"), ("nothing", "")):
        cases[f"document id with {what}"] = doc(id=name)
        cases[f"document delegate with {what}"] = doc(delegate=name)
    for what, value in (
        ("missing", ...),
        ("null", None),
        ("zero", 0),
        ("negative", -5),
        ("a fraction", NOW_S + 0.5),
        ("a word", "never"),
        ("a day", "2027-01-15"),
        ("a week date", "2027-W02-5T09:00:00"),
        ("the 30th of February", "2027-02-30T09:00:00Z"),
        ("with a newline", "2027-01-15T09:00:00Z\n"),
        ("in foreign digits", "\u0662027-01-15T09:00:00Z"),
        ("with nanoseconds", "2027-01-15T09:00:00.000000001Z"),
        ("before time", "0001-01-01T00:00:00+23:59"),
    ):
        cases[f"document expiry {what}"] = limited(expires_at=value)
    for what, limits in (
        ("unknown", {"max_tokens": 1}),
        ("tasks a whole number as a fraction", {"max_tasks": 1.0}),
        ("tasks true", {"max_tasks": True}),
        ("tasks negative", {"max_tasks": -1}),
        ("cost negative", {"max_cost_usd": -1}),
        ("cost with seven decimals", {"max_cost_usd": 0.1234567}),
        ("cost null", {"max_cost_usd": None}),
        ("cost beyond exact numbers", {"max_cost_usd": 2**53 - 1}),
        ("start null", {"not_before": None}),
    ):
        cases[f"document constraint {what}"] = limited(**limits)
    return cases | {
        "document with an unknown member": doc(nbf=NOW_S),
        "document with a limit in the wrong place": doc(max_tasks=1),
        "document beside another member": json.dumps({**PARENT_DOC, "x": 1}),
        "document a list": json.dumps({"delegation": [PARENT_DOC]}),
        "document without its outer member": json.dumps(PARENT_DOC["delegation"]),
        "document with id twice": doc_text('"id": ', '"id": "x", "id": '),
        "document with max_tasks twice": doc_text('"max_tasks": 5', '"max_tasks": 500, "max_tasks": 5'),
        "document with delegation twice": doc()[:-1] + ', "delegation": {}}',
        "document with id twice by an escape": doc_text('"id": ', '"\\u0069d": "x", "id": '),
        "document with tasks spelt as a fraction": doc_text('"max_tasks": 5', '"max_tasks": 5.0'),
        "document with NaN": doc_text("1.5", "NaN"),
        "document cut": doc()[:-1],
        "document and more": doc() + "x",
        "document with signature in base64url": doc(signature="-_" * 43),
        "document with signature unpadded": doc(signature=PARENT_DOC["delegation"]["signature"].rstrip("=")),
        "document with signature and rubbish": doc(signature="!" + PARENT_DOC["delegation"]["signature"]),
        "document with a short signature": doc(signature=base64.b64encode(bytes(63)).decode()),
        "document whose parent is no document": doc(parent={"id": "x"}),
        "document whose parent has a member twice": doc_text(
            '"parent": {"delegation": {', '"parent": {"delegation": {"id": "x", ', issuer=B, to=C, parent=PARENT_DOC
        ),
        "document whose parent escapes what is not ASCII": doc(parent={"delegation": {"\u0080": None}}),
        "document whose parent has half a surrogate pair": doc(parent={"delegation": {"x": "\ud800"}}),
        "document whose parent has a number beyond exact ones": doc(parent={"delegation": {"x": 2**60}}),
        "document that nests without end": '{"delegation":' * 4_000 + "1" + "}" * 4_000,
    }


def _unverified() -> dict[str, tuple[str, int]]:
    """Each with the position of the token that is not what its issuer signed."""
    other = jws(jti="other")
    return {
        "signature zero": (resigned(lambda _: bytes(64)), 0),
        "signature with a bit flipped": (resigned(lambda raw: bytes([raw[0] ^ 1]) + raw[1:]), 0),
        "signature with its halves swapped": (resigned(lambda raw: raw[32:] + raw[:32]), 0),
        "signature not canonical": (
            resigned(lambda raw: raw[:32] + (int.from_bytes(raw[32:], "little") + GROUP_ORDER).to_bytes(32, "little")),
            0,
        ),
        "signature of another token": (spliced(2, lambda _: other.split(".")[2]), 0),
        "signature of another agent": (jws(key=KEYS[B]), 0),
        "signature of a stranger": (jws(key=KEYS[STRANGER]), 0),
        "signature over the payload alone": (
            resigned(lambda _: KEYS[A].sign(PARENT.split(".")[1].encode()).signature),
            0,
        ),
        "signatures of parent and child swapped": (
            spliced(2, lambda _: PARENT.split(".")[2], jws(B, C, prf=spliced(2, lambda _: CHILD.split(".")[2]))),
            1,
        ),
        "payload re-encoded": (spliced(1, lambda _: b64(json.dumps(payload(), indent=1).encode())), 0),
        "payload with keys in another order": (
            spliced(1, lambda _: b64(json.dumps(payload(), sort_keys=True).encode())),
            0,
        ),
        "payload widened": (spliced(1, lambda _: b64(json.dumps(payload(scp=["*"])).encode())), 0),
        "payload prolonged": (spliced(1, lambda _: b64(json.dumps(payload(exp=NOW_S + 10**6)).encode())), 0),
        "header exchanged": (spliced(0, lambda _: b64(b'{"alg":"Ed25519"}')), 0),
        "parent exchanged after signing": (
            spliced(1, lambda _: b64(json.dumps(payload(B, C, prf=other)).encode()), CHILD),
            0,
        ),
        "parent forged": (jws(B, C, prf=jws(key=KEYS[B], scp=["*"])), 1),
        "grandparent forged": (jws(C, D, prf=jws(B, C, prf=jws(key=KEYS[C]))), 2),
        "document re-signed by another": (doc(key=KEYS[B]), 0),
        "document with its scope changed": (doc_text("data.read", "data.*"), 0),
        "document with its cost raised": (doc_text("1.5", "1500000"), 0),
        "document with its parent taken out": (
            json.dumps({"delegation": {k: v for k, v in CHILD_DOC["delegation"].items() if k != "parent"}}),
            0,
        ),
        "document with a changed parent": (json.dumps(CHILD_DOC).replace('"doc-a-b"', '"doc-a-x"'), 1),
        "document signed as a JWS payload is": (
            doc(signature=base64.b64encode(KEYS[A].sign(b"x").signature).decode()),
            0,
        ),
        "document with its signature over its text": (
            doc(signature=base64.b64encode(KEYS[A].sign(json.dumps(PARENT_DOC).encode()).signature).decode()),
            0,
        ),
    }


def _refused() -> list[Case]:
    narrow = jws(scp=["task.execute"], **{"x-asap-constraints": {}}, nbf=NOW_S - 60)
    deep = {"x-asap-constraints": ...}
    return [
        Case("key of nobody", jws(D), "unknown_key", position=0),
        Case("key of nobody in the parent", jws(B, C, prf=jws(STRANGER, B)), "unknown_key", position=1),
        Case("issuer in capitals", jws("urn:asap:agent:A", key=KEYS[A]), "unknown_key", position=0),
        Case("issuer with a trailing dot", jws(A + ".", key=KEYS[A]), "unknown_key", position=0),
        Case("issuer percent-encoded", jws("urn:asap:agent:%61", key=KEYS[A]), "malformed"),
        Case("a root that is none", jws(B, C), "untrusted_root", position=0),
        Case("a chain from a root that is none", jws(C, D, prf=jws(B, C)), "untrusted_root", position=1),
        Case("a document of a root that is none", doc(issuer=B, to=C), "untrusted_root", position=0),
        Case("expired this second", jws(exp=NOW_S), "expired", position=0),
        Case("expired in 1970", jws(exp=1), "expired", position=0),
        Case("a parent that expired", jws(B, C, prf=jws(exp=NOW_S), exp=NOW_S), "expired", position=1),
        Case("a document that expired this second", limited(expires_at=NOW_S), "expired", position=0),
        Case("issued in an hour", jws(iat=NOW_S + 3600), "not_yet_valid", position=0),
        Case("issued after its end", jws(iat=NOW_S + 30, exp=NOW_S + 20), "not_yet_valid", position=0),
        Case("a parent that is issued in an hour", jws(B, C, prf=jws(iat=NOW_S + 3600)), "not_yet_valid", position=1),
        Case("valid in a second", jws(nbf=NOW_S + 1), "not_yet_valid", position=0),
        Case("valid in 9999", jws(nbf=253_402_300_799, exp=253_402_300_799), "not_yet_valid", position=0),
        Case("a parent that is valid in a second", jws(B, C, prf=jws(nbf=NOW_S + 1)), "not_yet_valid", position=1),
        Case("a document valid in a second", limited(not_before="2027-01-15T08:00:01Z"), "not_yet_valid", position=0),
        Case("presented by another", PARENT, "wrong_delegate", delegate=C, position=0),
        Case("presented by its issuer", PARENT, "wrong_delegate", delegate=A, position=0),
        Case("presented by a URN in capitals", PARENT, "wrong_delegate", delegate=B.upper(), position=0),
        Case("an action beside its scopes", PARENT, "action_not_allowed", action="money.spend", position=0),
        Case("an action above its scopes", PARENT, "action_not_allowed", action="task", position=0),
        Case("an action that is a scope", PARENT, "action_not_allowed", action="task.*", position=0),
        Case("an action that is a star", jws(scp=["*"]), "action_not_allowed", action="*", position=0),
        Case("an action with a newline", PARENT, "action_not_allowed", action="task.execute\n", position=0),
        Case("an action in capitals", PARENT, "action_not_allowed", action="TASK.EXECUTE", position=0),
        Case("an action that is empty", PARENT, "action_not_allowed", action="", position=0),
        Case("a child with every right", jws(B, C, prf=PARENT, scp=["*"]), "scope_exceeded", position=0),
        Case("a child with a wider scope", jws(B, C, prf=PARENT, scp=["data.*"]), "scope_exceeded", position=0),
        Case("a child with a longer word", jws(B, C, prf=PARENT, scp=["taskx"]), "scope_exceeded", position=0),
        Case(
            "a wider child under a narrow one",
            jws(C, D, prf=jws(B, C, prf=narrow, scp=["task.execute"], nbf=NOW_S - 60)),
            "scope_exceeded",
            position=0,
        ),
        Case("a middle that widens", jws(C, D, prf=jws(B, C, prf=PARENT, scp=["*"])), "scope_exceeded", position=1),
        Case("a document that widens", doc(issuer=B, to=C, parent=PARENT, scopes=["*"]), "scope_exceeded", position=0),
        Case(
            "a child with more tasks",
            jws(B, C, prf=PARENT, **{"x-asap-constraints": {"max_tasks": 6}}),
            "constraint_exceeded",
            position=0,
        ),
        Case(
            "a child with a micro-dollar more",
            jws(B, C, prf=PARENT, **{"x-asap-constraints": {"max_cost_usd": 1.500001}}),
            "constraint_exceeded",
            position=0,
        ),
        Case(
            "a child that lives a second longer",
            jws(B, C, prf=PARENT, exp=NOW_S + 3601),
            "constraint_exceeded",
            position=0,
        ),
        Case(
            "a child that begins earlier",
            jws(B, C, prf=narrow, scp=["task.execute"], nbf=NOW_S - 61),
            "constraint_exceeded",
            position=0,
        ),
        Case(
            "more tasks past a link that says nothing",
            jws(C, D, prf=jws(B, C, prf=PARENT, **deep), **{"x-asap-constraints": {"max_tasks": 6}}),
            "constraint_exceeded",
            position=0,
        ),
        Case("a child of somebody else's token", jws(C, D, prf=PARENT), "chain_broken", position=0),
        Case("a child whose issuer differs in case", jws(B, C, prf=jws(A, B.upper())), "malformed"),
        Case("a child of its parent's issuer", jws(A, C, prf=PARENT), "chain_broken", position=0),
        Case(
            "a document under an id nobody registered",
            doc(issuer=B, to=C, parent="nothing"),
            "chain_broken",
            position=0,
        ),
        Case("a document that is its own parent", doc(issuer=B, to=C, id="me", parent="me"), "cycle", position=0),
        Case("a token under itself", jws(prf=jws()), "cycle", position=0),
        Case("a token twice in a chain", jws(A, B, prf=jws(B, A, prf=PARENT)), "cycle", position=0),
        Case("given back to the root", jws(B, A, prf=PARENT), "cycle", position=0),
        Case("given back to the root by way of others", jws(C, A, prf=CHILD), "cycle", position=0),
        Case("given round under new ids", jws(A, B, jti="x", prf=jws(B, A, prf=PARENT)), "cycle", position=1),
        Case("nine deep", tower(9), "chain_too_deep", position=0),
        Case("fourteen deep", tower(14), "chain_too_deep", position=0),
        Case("documents nine deep", doc_tower(9), "chain_too_deep", position=0),
        Case("documents forty deep", doc_tower(40), "chain_too_deep", position=0),
    ]


CASES = [
    *(Case(name, token, "malformed") for name, token in {**_malformed(), **_malformed_documents()}.items()),
    *(Case(name, token, "bad_signature", position=place) for name, (token, place) in _unverified().items()),
    *_refused(),
]


def with_signature_of(text: str, other: str) -> str:
    """A token with the signature of another one of the same form."""
    if text.startswith("{"):
        taken = json.loads(other)["delegation"]["signature"]
        made = json.loads(text)
        made["delegation"]["signature"] = taken
        return json.dumps(made)
    return ".".join([*text.split(".")[:2], other.split(".")[2]])
