"""`asapctl conformance` against real agents: one that is right, and many that lie."""

from __future__ import annotations

import base64
import json
import logging
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from random import Random
from typing import Any

import pytest
import rfc8785
import trio
from nacl.signing import SigningKey

from asapd.cli.conformance_visit import Expectations, visit
from asapd.cli.demo_agent import DemoAgent, Part
from asapd.core.delegation import Claims
from asapd.core.types import SECOND_US
from asapd.wire.keys import public_base64, public_jwk
from asapd.wire.token import sign, sign_document
from tests.cli.programs import Program

A = "urn:asap:agent:a"
KEY, OTHER = SigningKey(bytes([1]) * 32), SigningKey(bytes([2]) * 32)
HEALTH, MANIFEST = "/.well-known/asap/health", "/.well-known/asap/manifest.json"
CREDENTIALS = "Bearer secret"
Behave = Callable[["Request"], None]


class Server(ThreadingHTTPServer):
    """An agent whose end is the end of its threads: one that went on would complain in the midst of another test."""

    daemon_threads = False

    def __init__(self, handler: type[Request]) -> None:
        super().__init__(("127.0.0.1", 0), handler)
        self.is_over = threading.Event()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client may leave whenever it wants, which is no fault of the agent's."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


class Request(BaseHTTPRequestHandler):
    """One request to an agent, and ways to answer it."""

    server: Server
    timeout = 10
    behave: dict[tuple[str, str], Behave]
    seen: list[tuple[str, str]]

    def _serve(self) -> None:
        self.seen.append((self.command, self.path))
        base = "/asap/delegations/*" if self.path.startswith("/asap/delegations/") else self.path
        known = self.behave.get((self.command, base))
        if known is None:
            self.json(404, {"detail": "not found"})
        else:
            known(self)

    def do_GET(self) -> None:
        self._serve()

    def do_POST(self) -> None:
        self._serve()

    def do_DELETE(self) -> None:
        self._serve()

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def json(self, status: int, value: Any, **headers: str) -> None:
        sent = b"" if status == 204 else json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Type": "application/json", "Content-Length": str(len(sent)), **headers}.items():
            self.send_header(name, text)
        self.end_headers()
        self.wfile.write(sent)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 -- the base class's name
        pass


def document(**more: Any) -> dict[str, Any]:
    base = {"id": A, "name": "a", "version": "1", "description": "d", "capabilities": {}, "ttl_seconds": 300}
    return {**base, "endpoints": {"asap": "http://127.0.0.1:1/asap"}, "sla": {"availability": "99%"}, **more}


def signed(key: SigningKey = KEY, **more: Any) -> dict[str, Any]:
    manifest = document(**more)
    signature = base64.b64encode(key.sign(rfc8785.dumps(manifest)).signature).decode()
    return {
        "manifest": manifest,
        "signature": {"alg": "ed25519", "signature": signature, "trust_level": "self-signed"},
        "public_key": public_base64(bytes(key.verify_key)),
    }


def says(value: Any, status: int = 200, **headers: str) -> Behave:
    return lambda request: request.json(status, value, **headers)


GOOD: dict[tuple[str, str], Behave] = {
    ("GET", HEALTH): says({"status": "healthy", "agent_id": A}),
    ("GET", MANIFEST): says(signed()),
}


@contextmanager
def serving(behave: dict[tuple[str, str], Behave]) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    seen: list[tuple[str, str]] = []
    handler = type("Agent", (Request,), {"behave": behave, "seen": seen})
    server = Server(handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", seen
    finally:
        server.is_over.set()
        server.shutdown()
        thread.join()
        server.server_close()  # waits for the threads of the requests


def test_an_agent_that_is_right_conforms_and_nothing_is_changed_there(ctl: Program, tmp_path: Path) -> None:
    (tmp_path / "key").write_text(public_base64(bytes(KEY.verify_key)))
    with serving(GOOD) as (url, seen):
        ran = ctl("conformance", f"{url}/", "--agent", A, "--public-key", f"@{tmp_path / 'key'}", "--json")
        shown = ctl("conformance", url)
    assert ran.code == 0, ran
    assert ran.json["conforms"] is True
    assert ran.json["agent"] == A
    assert ran.json["findings"] == []
    assert ran.json["checks"] == {
        **dict.fromkeys(("health", "manifest", "identity", "signature", "sla", "ttl"), "passed"),
        "keys": "skipped: no key set is served",
        "delegation": "skipped: /asap/delegations is not offered",
        **dict.fromkeys(("issuing", "token", "revocation"), "skipped: --bearer is not given"),
    }
    assert (shown.code, shown.out.splitlines()[-1]) == (0, "conforms")
    assert {path for method, path in seen if method != "GET"} == {"/asap/delegations"}


def drip(request: Request) -> None:
    request.send_response(200)
    request.send_header("Content-Type", "application/json")
    request.end_headers()
    for _ in range(100):
        request.wfile.write(b" ")
        if request.server.is_over.wait(0.05):
            return


def flood(request: Request) -> None:
    request.send_response(200)
    request.send_header("Content-Type", "application/json")
    request.end_headers()
    for _ in range(10_000):
        request.wfile.write(b" " * 65_536)


def in_turn(*values: Any) -> Behave:
    answers = iter(values)
    return lambda request: request.json(200, next(answers))


def badly_signed() -> dict[str, Any]:
    return {**signed(), "signature": {"alg": "ed25519", "signature": base64.b64encode(bytes([1]) * 64).decode()}}


def hang(request: Request) -> None:
    request.server.is_over.wait(2)
    request.close_connection = True


def reset(request: Request) -> None:
    request.connection.shutdown(socket.SHUT_RDWR)


def open_delegations(request: Request) -> None:
    request.json(200, [])


def issues_to_anybody(request: Request) -> None:
    try:
        json.loads(request.body())
    except ValueError:
        request.json(422, {"detail": "no JSON"})
    else:
        request.json(201, {"token": "for anybody"})


def takes_any_token(request: Request) -> None:
    request.json(201 if request.headers.get("Authorization") and request.body() else 401, {"token": "for any token"})


def takes_any_bearer_but_forged(status: int) -> Behave:
    def answer(request: Request) -> None:
        request.body()
        bearer = request.headers.get("Authorization", "").removeprefix("Bearer ")
        request.json(status if bearer and bearer.count(".") != 2 else 401, {"token": "x"} if status == 201 else [])

    return answer


def answers_valid_ones(status: int) -> Behave:
    return lambda request: request.json(status if b"}" in request.body() else 422, {})


LISTED, KEYS = ("GET", "/asap/delegations"), ("GET", "/.well-known/jwks.json")
ISSUED = ("POST", "/asap/delegations")


LIARS: list[tuple[dict[tuple[str, str], Behave], str]] = [
    ({("GET", HEALTH): says({"status": "healthy", "agent_id": "urn:asap:agent:b"})}, "id_mismatch"),
    ({("GET", HEALTH): says({}, 302, Location="http://127.0.0.1:1/")}, "health_redirect"),
    ({("GET", HEALTH): flood}, "health_too_large"),
    ({("GET", HEALTH): drip}, "health_no_answer"),
    ({("GET", HEALTH): lambda request: request.connection.shutdown(socket.SHUT_RDWR)}, "health_no_answer"),
    ({("GET", HEALTH): says({"status": "great"})}, "health_malformed"),
    ({("GET", HEALTH): says("x", 500)}, "health_status"),
    ({("GET", MANIFEST): says({}, 307, Location=MANIFEST)}, "manifest_redirect"),
    ({("GET", MANIFEST): flood}, "manifest_too_large"),
    ({("GET", MANIFEST): drip}, "manifest_no_answer"),
    ({("GET", MANIFEST): says(["no"])}, "manifest_malformed"),
    ({("GET", MANIFEST): in_turn(signed(KEY), signed(OTHER))}, "manifest_unstable"),
    ({("GET", MANIFEST): in_turn(signed(), signed(sla={"availability": "1%"}))}, "manifest_unstable"),
    ({("GET", MANIFEST): in_turn(signed(), badly_signed())}, "manifest_unstable"),
    ({KEYS: says({}, 500)}, "jwks_status"),
    ({KEYS: hang}, "jwks_no_answer"),
    ({KEYS: reset}, "jwks_no_answer"),
    ({KEYS: says({"keys": [{**public_jwk(bytes(KEY.verify_key)), "d": "AAAA"}]})}, "jwks_private_key"),
    ({LISTED: says({}, 401), ISSUED: issues_to_anybody}, "delegation_open"),
    ({LISTED: says({}, 401), ISSUED: takes_any_token}, "delegation_forged_accepted"),
    ({LISTED: takes_any_bearer_but_forged(200), ISSUED: says({}, 401)}, "delegation_any_bearer"),
    ({LISTED: says({}, 401), ISSUED: takes_any_bearer_but_forged(201)}, "delegation_any_bearer"),
    ({ISSUED: says({"token": "for anybody"}, 201)}, "delegation_open"),
    ({LISTED: says({}, 401), ISSUED: answers_valid_ones(422)}, "delegation_refusal_unclear"),
    ({LISTED: says({}, 401), ISSUED: answers_valid_ones(500)}, "delegation_error"),
    ({LISTED: says({}, 401), ISSUED: hang}, "delegation_no_answer"),
    ({LISTED: reset}, "delegation_no_answer"),
    ({("GET", MANIFEST): says({**signed(), "manifest": document(name="b")})}, "signature_bad"),
    ({("GET", MANIFEST): says({**signed(), "public_key": public_base64(bytes(32))})}, "signature_key_unusable"),
    ({("GET", MANIFEST): says(signed(sla={"availability": "99.5.5%"}))}, "sla_malformed"),
    ({("GET", "/asap/delegations"): open_delegations}, "delegation_open"),
    (
        {
            ("GET", "/asap/delegations"): lambda request: request.json(
                200 if request.headers.get("Authorization") else 401, []
            ),
            ("POST", "/asap/delegations"): says({}, 401),
        },
        "delegation_forged_accepted",
    ),
    ({("GET", "/asap/delegations"): says({}, 401), ("POST", "/asap/delegations"): says({}, 500)}, "delegation_error"),
]


@pytest.mark.parametrize("behave", [drip, flood, hang, reset])
def test_an_agent_of_these_tests_ends_with_its_test(behave: Behave, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever its client does, so that no thread of it is left to break the test after."""
    before = set(threading.enumerate())
    came = threading.Event()

    def noticed(request: Request) -> None:
        came.set()
        behave(request)

    with (
        serving({("GET", "/"): noticed}) as (url, _),
        socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as client,
    ):
        client.sendall(b"GET / HTTP/1.0\r\n\r\n")
        assert came.wait(30)
    assert set(threading.enumerate()) <= before
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("behave", "code"), LIARS, ids=[code for _, code in LIARS])
def test_an_agent_that_is_wrong_is_told_so_within_bounds(
    ctl: Program, behave: dict[tuple[str, str], Behave], code: str
) -> None:
    with serving({**GOOD, **behave}) as (url, _):
        started_s = time.monotonic()
        ran = ctl("conformance", url, "--timeout", "0.5", "--json")
        assert time.monotonic() - started_s < 8
    assert ran.code == 1
    assert ran.json["conforms"] is False
    found = {one["code"]: one for one in ran.json["findings"]}
    assert found[code]["severity"] == "failure"
    assert found[code]["remedy"]
    assert ran.json["checks"][found[code]["check"]] == "failed"


def test_findings_are_printed_with_their_remedy_and_without_what_a_terminal_would_obey(ctl: Program) -> None:
    with serving({**GOOD, ("GET", MANIFEST): says({**document(), "id": "urn:\x1b[2J"})}) as (url, _):
        ran = ctl("conformance", url, "--agent", A)
    assert ran.code == 1
    assert "failure manifest_malformed: " in ran.out
    assert "\n  send a manifest, plain or as" in ran.out
    assert "\x1b" not in ran.out
    assert ran.out.endswith("does not conform\n")


def test_warnings_alone_are_no_failure(ctl: Program) -> None:
    with serving({**GOOD, ("GET", MANIFEST): says(document(sla=None, ttl_seconds=None))}) as (url, _):
        ran = ctl("conformance", url, "--json")
        pinned = ctl("conformance", url, "--public-key", public_base64(bytes(KEY.verify_key)), "--json")
    assert ran.code == 0
    assert [one["code"] for one in ran.json["findings"]] == ["signature_missing", "sla_missing", "ttl_missing"]
    assert ran.json["checks"]["sla"] == "warned"
    assert pinned.code == 1


def test_where_nobody_answers_the_code_is_3(ctl: Program) -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{held.getsockname()[1]}"
        ran = ctl("conformance", url, "--json")
    assert ran.code == 3
    assert (ran.json["reachable"], ran.json["conforms"]) == (False, False)
    assert f"{url} cannot be reached" in ran.err
    assert ctl("conformance", "http://agent.invalid").code == 3
    with serving(GOOD) as (url, _):
        assert ctl("conformance", url.replace("http:", "https:")).code == 3  # it speaks no TLS


@pytest.mark.parametrize(
    ("url", "said"),
    [
        *(
            (url, "must be the base URL")
            for url in ("agent", "ftp://x", "http://", "http://u:p@x", "http://x:0", "http://x?a=1", "http://[x")
        ),
        ("http://x:99999", "must be the base URL"),
        ("http://a..b/", "a name of labels"),
        ("http://../", "a name of labels"),
        (f"http://{'a' * 70}/", "1 to 63 letters"),
        (f"http://{'a.' * 130}b/", "a name of labels"),
        ("http://a!b/", "a name of labels"),
        ("http://[::x]/", "must be"),
        ("http://[v1.a:b]/", "must be an IP address"),
        ("http://b\xfccher.example/", "xn--"),
        ("http://127.0.0.1:1/\xfc", "holds a character that no URL has"),
        ("http://127.0.0.1:1/\n", "holds a character that no URL has"),
        ("http://127.0.0.1:1/a b", "holds a character that no URL has"),
        ("http://127.0.0.1:1/a\\b", "holds a character that no URL has"),
    ],
)
def test_what_is_no_address_of_an_agent_is_wrong_usage(ctl: Program, url: str, said: str) -> None:
    ran = ctl("conformance", url)
    assert (ran.code, said in ran.err) == (2, True), ran


@pytest.mark.parametrize(
    "url", ["http://[::1]:1", "http://localhost.:1", "http://127.0.0.1:1/a%20b", "http://a_b.invalid"]
)
def test_an_unusual_address_is_one_as_well(ctl: Program, url: str) -> None:
    assert ctl("conformance", url).code == 3


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--bearer", "secr\xe9t"], "--bearer: holds a character"),
        (["--bearer", "secret\nsecret"], "--bearer: holds a character"),
        (["--bearer", "two words"], "--bearer: holds a character"),
        (["--bearer", ""], "--bearer: is empty"),
        (["--bearer", "\n"], "--bearer: is empty"),
        (["--agent", "writer"], "--agent: 'writer': must be an agent's name"),
        (["--bearer", "x", "--delegator", "\udcff"], "--delegator: '\\udcff': must be an agent's name"),
        (["--bearer", "x", "--delegator-key", "AAAA"], "--delegator-key: must be 32 bytes"),
        (["--delegator", A], "of the token that --bearer asks for"),
        (["--delegator-key", public_base64(bytes(KEY.verify_key))], "of the token that --bearer asks for"),
        (["--public-key", "AAAA"], "--public-key: must be 32 bytes"),
    ],
)
def test_options_that_cannot_be_used_are_wrong_usage(ctl: Program, options: list[str], said: str) -> None:
    ran = ctl("conformance", "http://127.0.0.1:1", *options)
    assert (ran.code, said in ran.err) == (2, True), ran
    assert "secr" not in ran.err


def test_an_agent_that_names_nobody_is_nobody_in_particular(ctl: Program) -> None:
    nobody = {("GET", HEALTH): says({"status": "healthy"}), ("GET", MANIFEST): says({"name": "a"})}
    with serving(nobody) as (url, _):
        ran = ctl("conformance", url, "--agent", A, "--json")
        unasked = ctl("conformance", url, "--json")
    assert ran.json["checks"]["identity"] == "failed"
    assert "id_unproven" in [one["code"] for one in ran.json["findings"]]
    assert unasked.json["checks"]["identity"].startswith("skipped: there are no two that name the agent")


def test_what_cannot_be_compared_is_skipped(ctl: Program) -> None:
    unsigned = {("GET", MANIFEST): says(document()), ("GET", HEALTH): says({"status": "healthy"})}
    with serving({**unsigned, KEYS: says({"keys": []})}) as (url, _):
        ran = ctl("conformance", url, "--json")
        named = ctl("conformance", url, "--agent", A, "--json")
    assert ran.code == 0
    assert ran.json["checks"]["keys"] == "skipped: the manifest names no key to look for"
    assert ran.json["checks"]["identity"].startswith("skipped: ")
    assert named.json["checks"]["identity"] == "passed"


# --- delegations, with credentials


class Issuer:
    """Delegations as the reference implementation serves them, by default without a fault."""

    def __init__(
        self,
        *,
        id_: str = "del_1",
        delegator: str = A,
        key: SigningKey = KEY,
        scopes: tuple[str, ...] = ("task.execute",),
        age_s: int = 0,
        write: Callable[[Claims, SigningKey], str] = sign,
        shows: Behave | None = None,
        shows_revoked: Behave | None = None,
        keeps_revoked: bool = False,
    ) -> None:
        self.rows: dict[str, bool] = {}
        self.id = id_
        self.delegator = delegator
        self.key = key
        self.scopes = scopes
        self.age_s = age_s
        self.write = write
        self.shows = shows
        self.shows_revoked = shows_revoked
        self.keeps_revoked = keeps_revoked

    def behave(self) -> dict[tuple[str, str], Behave]:
        return {
            ("GET", "/asap/delegations"): self.guarded(self.list),
            ("POST", "/asap/delegations"): self.guarded(self.issue),
            ("GET", "/asap/delegations/*"): self.guarded(self.show),
            ("DELETE", "/asap/delegations/*"): self.guarded(self.revoke),
        }

    def guarded(self, inner: Behave) -> Behave:
        def behave(request: Request) -> None:
            if request.headers.get("Authorization") == CREDENTIALS:
                inner(request)
            else:
                request.json(401, {"detail": "who are you"})

        return behave

    def list(self, request: Request) -> None:
        request.json(200, [{"id": one, "active": active} for one, active in self.rows.items()])

    def issue(self, request: Request) -> None:
        asked = json.loads(request.body())
        now_us = time.time_ns() // 1000 - self.age_s * SECOND_US
        expires_us = now_us + asked["expires_in_seconds"] * SECOND_US
        claims = Claims(
            self.id, self.delegator, asked["delegate"], self.scopes, asked["max_tasks"], None, now_us, expires_us
        )
        self.rows[self.id] = True
        request.json(201, {"token": self.write(claims, self.key)})

    def show(self, request: Request) -> None:
        special = self.shows if self.rows[self.id] else self.shows_revoked
        if special is None:
            request.json(200, {"id": self.id, "active": self.rows[self.id]})
        else:
            special(request)

    def revoke(self, request: Request) -> None:
        self.rows[self.id] = self.keeps_revoked
        request.json(204, None)


WHOLE = {"delegation": "passed", "issuing": "passed", "token": "passed", "revocation": "passed"}


@pytest.mark.parametrize(
    ("issuer", "expected", "checks"),
    [
        (Issuer(), [], {}),
        (Issuer(id_="urn:asap:1"), [], {}),
        (Issuer(shows_revoked=says({}, 404)), [], {}),
        (Issuer(keeps_revoked=True), ["delegation_not_revoked"], {"revocation": "failed"}),
        (Issuer(shows_revoked=says({}, 500)), ["delegation_not_revoked"], {"revocation": "failed"}),
        (Issuer(shows_revoked=hang), ["delegation_not_revoked"], {"revocation": "failed"}),
        (Issuer(shows_revoked=reset), ["delegation_not_revoked"], {"revocation": "failed"}),
        (
            Issuer(shows=says({}, 404), shows_revoked=says({}, 404)),
            ["delegation_not_shown"],
            {
                "issuing": "failed",
                "revocation": "skipped: it was not shown as active before, so that it is not now shows nothing",
            },
        ),
        (Issuer(scopes=("*",)), ["delegation_token_differs"], {"issuing": "failed"}),
        (Issuer(age_s=120), ["delegation_token_expired"], {"issuing": "failed"}),
        (Issuer(write=sign_document), ["delegation_token_form"], {"issuing": "failed"}),
        (Issuer(key=OTHER), ["delegation_token_signature"], {"token": "failed"}),
        (
            Issuer(key=OTHER, write=sign_document),
            ["delegation_token_form", "delegation_token_signature"],
            {"issuing": "failed", "token": "failed"},
        ),
        (
            Issuer(delegator="urn:asap:agent:b", key=OTHER),
            ["delegation_token_foreign", "delegation_token_signature"],
            {"token": "failed"},
        ),
    ],
)
def test_with_credentials_a_delegation_is_issued_and_revoked(
    ctl: Program, issuer: Issuer, expected: list[str], checks: dict[str, str]
) -> None:
    with serving({**GOOD, **issuer.behave()}) as (url, seen):
        assert ctl("conformance", url, "--json").json["checks"]["delegation"] == "passed"
        assert issuer.rows == {}
        ran = ctl("conformance", url, "--bearer", "secret", "--timeout", "1", "--json")
    assert [one["code"] for one in ran.json["findings"]] == expected
    assert {name: ran.json["checks"][name] for name in WHOLE} == {**WHOLE, **checks}
    assert ran.code == (1 if expected else 0)
    assert [method for method, path in seen if path.startswith("/asap/delegations/")] == [
        *("GET", "DELETE"),
        *("GET", "DELETE", "GET"),
    ]


@pytest.mark.parametrize(("method", "codes"), [("GET", []), ("DELETE", ["delegation_not_shown"])])
def test_what_strangers_may_see_or_revoke_is_not_guarded(ctl: Program, method: str, codes: list[str]) -> None:
    issuer = Issuer()
    open_ = {(method, "/asap/delegations/*"): issuer.show if method == "GET" else issuer.revoke}
    with serving({**GOOD, **issuer.behave(), **open_}) as (url, _):
        ran = ctl("conformance", url, "--bearer", "secret", "--json")
    assert [one["code"] for one in ran.json["findings"]] == ["delegation_open", *codes]
    assert f"{method} of del_1 without credentials" in ran.json["findings"][0]["detail"]
    assert ran.json["checks"]["delegation"] == "failed"


@pytest.mark.parametrize("id_", ["../../admin/erase?all=1", "#x", "%2e%2e", "/", ".."])
def test_an_id_does_not_lead_the_bearer_elsewhere(ctl: Program, id_: str) -> None:
    with serving({**GOOD, **Issuer(id_=id_).behave()}) as (url, seen):
        ran = ctl("conformance", url, "--bearer", "secret", "--json")
    assert ran.code == 1
    assert [one["code"] for one in ran.json["findings"]] == ["delegation_id_unsafe"]
    assert ran.json["checks"]["revocation"] == "skipped: its id is none to put into a path"
    assert {path for _, path in seen} == {HEALTH, MANIFEST, KEYS[1], "/asap/delegations"}
    assert "DELETE" not in {method for method, _ in seen}


def test_a_token_of_whom_the_bearer_stands_for_is_checked_with_their_key(ctl: Program) -> None:
    other, key = "urn:asap:agent:b", public_base64(bytes(OTHER.verify_key))
    with serving({**GOOD, **Issuer(delegator=other, key=OTHER).behave()}) as (url, _):
        base = ("conformance", url, "--bearer", "secret", "--json", "--delegator", other)
        checked = ctl(*base, "--delegator-key", key)
        unchecked = ctl(*base)
        wrong = ctl(*base, "--delegator-key", public_base64(bytes(KEY.verify_key)))
    assert (checked.code, checked.json["checks"]["token"]) == (0, "passed")
    assert (unchecked.code, unchecked.json["checks"]["token"].partition(":")[0]) == (0, "skipped")
    assert "no key of urn:asap:agent:b is known" in unchecked.json["checks"]["token"]
    assert (wrong.code, [one["code"] for one in wrong.json["findings"]]) == (1, ["delegation_token_signature"])


def test_without_a_manifest_nothing_says_whose_token_it_should_be(ctl: Program) -> None:
    with serving({**GOOD, **Issuer().behave(), ("GET", MANIFEST): says({}, 404)}) as (url, _):
        ran = ctl("conformance", url, "--bearer", "secret", "--json")
        named = ctl("conformance", url, "--bearer", "secret", "--agent", A, "--json")
        keyed = ctl(
            *("conformance", url, "--bearer", "secret", "--agent", A, "--json"),
            *("--public-key", public_base64(bytes(KEY.verify_key))),
        )
    assert ran.json["checks"]["token"] == "skipped: nothing says whom it should be from; give --delegator"
    assert named.json["checks"]["token"].startswith("skipped: no key of urn:asap:agent:a is known")
    assert keyed.json["checks"]["token"] == "passed"


def test_credentials_where_nothing_is_issued_are_told(ctl: Program) -> None:
    with serving(GOOD) as (url, _):
        ran = ctl("conformance", url, "--bearer", "secret", "--json")
    assert ran.code == 1
    assert [one["code"] for one in ran.json["findings"]] == ["delegation_not_issued"]
    assert ran.json["checks"]["delegation"] == "skipped: /asap/delegations is not offered"
    assert ran.json["checks"]["revocation"] == "skipped: there is nothing to revoke"


def test_credentials_that_are_not_taken_are_told(ctl: Program) -> None:
    with serving({**GOOD, **Issuer().behave()}) as (url, _):
        ran = ctl("conformance", url, "--bearer", "wrong", "--json")
    assert [one["code"] for one in ran.json["findings"]] == ["delegation_not_issued"]


async def test_the_agents_of_the_demo_conform() -> None:
    part = Part("writer", "m", 10, (1, 2), {"availability": "99%"}, 1)
    agent = DemoAgent(part, Random(1), logging.getLogger("test.conformance"))
    await agent.listen()
    async with trio.open_nursery() as nursery:
        await nursery.start(agent.serve)
        expected = Expectations(part.urn, bytes(agent.key.verify_key))
        report = await visit(agent.url, expected, timeout_s=5)
        nursery.cancel_scope.cancel()
    assert report.conforms
    assert [one.code for one in report.findings] == ["manifest_fields_missing"]
