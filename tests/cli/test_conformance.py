"""`asapctl conformance` against real agents: one that is right, and many that lie."""

from __future__ import annotations

import base64
import json
import logging
import socket
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
from asapd.wire.keys import public_base64
from asapd.wire.token import sign
from tests.cli.programs import Program

A = "urn:asap:agent:a"
KEY, OTHER = SigningKey(bytes([1]) * 32), SigningKey(bytes([2]) * 32)
HEALTH, MANIFEST = "/.well-known/asap/health", "/.well-known/asap/manifest.json"
CREDENTIALS = "Bearer secret"
Behave = Callable[["Request"], None]


class Request(BaseHTTPRequestHandler):
    """One request to an agent, and ways to answer it."""

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
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", seen
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


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
    }
    assert (shown.code, shown.out.splitlines()[-1]) == (0, "conforms")
    assert {method for method, _ in seen} == {"GET"}


def drip(request: Request) -> None:
    request.send_response(200)
    request.send_header("Content-Type", "application/json")
    request.end_headers()
    for _ in range(100):
        request.wfile.write(b" ")
        time.sleep(0.05)


def flood(request: Request) -> None:
    request.send_response(200)
    request.send_header("Content-Type", "application/json")
    request.end_headers()
    for _ in range(10_000):
        request.wfile.write(b" " * 65_536)


def two_faced() -> Behave:
    answers = iter([signed(KEY), signed(OTHER)])
    return lambda request: request.json(200, next(answers))


def open_delegations(request: Request) -> None:
    request.json(200, [])


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
    ({("GET", MANIFEST): two_faced()}, "manifest_unstable"),
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
    "url", ["agent", "ftp://x", "http://", "http://u:p@x", "http://x:0", "http://x?a=1", "http://[x"]
)
def test_what_is_no_address_of_an_agent_is_wrong_usage(ctl: Program, url: str) -> None:
    ran = ctl("conformance", url)
    assert (ran.code, "must be the base URL" in ran.err) == (2, True)


def test_a_key_that_is_none_is_wrong_usage(ctl: Program) -> None:
    assert ctl("conformance", "http://127.0.0.1:1", "--public-key", "AAAA").code == 2


# --- delegations, with credentials


class Issuer:
    """Delegations as the reference implementation serves them."""

    def __init__(self, *, keeps_revoked: bool = False, widens: bool = False) -> None:
        self.rows: dict[str, bool] = {}
        self.keeps_revoked = keeps_revoked
        self.widens = widens

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
        now_us = time.time_ns() // 1000
        scopes = ("*",) if self.widens else tuple(asked["scopes"])
        expires_us = now_us + asked["expires_in_seconds"] * SECOND_US
        claims = Claims("del_1", A, asked["delegate"], scopes, asked["max_tasks"], None, now_us, expires_us)
        self.rows["del_1"] = True
        request.json(201, {"token": sign(claims, KEY)})

    def show(self, request: Request) -> None:
        request.json(200, {"id": "del_1", "active": self.rows["del_1"]})

    def revoke(self, request: Request) -> None:
        self.rows["del_1"] = self.keeps_revoked
        request.json(204, None)


@pytest.mark.parametrize(
    ("issuer", "expected"),
    [
        (Issuer(), []),
        (Issuer(keeps_revoked=True), ["delegation_not_revoked"]),
        (Issuer(widens=True), ["delegation_token_differs"]),
    ],
)
def test_with_credentials_a_delegation_is_issued_and_revoked(ctl: Program, issuer: Issuer, expected: list[str]) -> None:
    with serving({**GOOD, **issuer.behave()}) as (url, seen):
        assert ctl("conformance", url, "--json").json["checks"]["delegation"] == "passed"
        assert issuer.rows == {}
        ran = ctl("conformance", url, "--bearer", "secret", "--json")
    assert [one["code"] for one in ran.json["findings"]] == expected
    assert ran.code == (1 if expected else 0)
    assert ("DELETE", "/asap/delegations/del_1") in seen


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
