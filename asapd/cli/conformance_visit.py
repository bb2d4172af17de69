"""A visit to a live agent: the requests of `asapctl conformance`, each bounded, and what their answers show."""

from __future__ import annotations

import ssl
import time
from collections.abc import Iterable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote, urlsplit

import httpcore2
import trio

from asapd.wire import conformance as rules
from asapd.wire import conformance_delegations as delegations
from asapd.wire.conformance import Answer, Finding
from asapd.wire.conformance_delegations import FORGED, MADE_UP, Asked
from asapd.wire.manifest import Health, Manifest
from asapd.wire.token import SignedToken

HEALTH = "/.well-known/asap/health"
MANIFEST = "/.well-known/asap/manifest.json"
KEY_SET = "/.well-known/jwks.json"
DELEGATIONS = "/asap/delegations"
# What a prober takes of each.
_MAX_BYTES = {HEALTH: 64 << 10}
_MAX_BYTES_ELSE = 256 << 10
_ASKED = Asked("urn:asap:agent:asapd-conformance", ("task.execute",), 1, 60)


@dataclass(frozen=True)
class Expectations:
    """What is known of the agent beforehand. With `bearer`, a delegation is issued and revoked in that name.

    `delegator` is whom the bearer stands for, unless that is the agent itself, and `delegator_key` their key; keys have
    32 raw bytes.
    """

    agent: str | None = None
    public_key: bytes | None = None
    bearer: str | None = None
    delegator: str | None = None
    delegator_key: bytes | None = None


@dataclass
class Report:
    """What a visit found. `checks` says of each whether it passed, failed, or was skipped and why."""

    url: str
    agent: str | None = None
    reachable: bool = True
    checks: dict[str, str] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)

    @property
    def conforms(self) -> bool:
        """Whether nothing that was found is a failure."""
        return self.reachable and not any(one.severity == "failure" for one in self.findings)

    def add(self, check: str, found: Iterable[Finding]) -> None:
        """Enter the outcome of a check."""
        listed = list(found)
        failed = any(one.severity == "failure" for one in listed)
        if self.checks.get(check) != "failed":
            self.checks[check] = "failed" if failed else "warned" if listed else self.checks.get(check, "passed")
        self.findings += listed

    def skip(self, check: str, why: str) -> None:
        """Enter that a check was not made; what it found already stays."""
        self.checks.setdefault(check, f"skipped: {why}")


async def visit(url: str, expected: Expectations, *, timeout_s: float) -> Report:
    """Ask an agent all that can be asked without harm, each request within `timeout_s` seconds and bounded in size.

    Redirects are reported and not followed, and no proxy of the environment is used.
    """
    report = Report(url)
    # A server may close an idle connection in the moment it is used again, which would look like a fault of it.
    pool = httpcore2.AsyncConnectionPool(ssl_context=ssl.create_default_context(), max_keepalive_connections=0)
    async with pool:
        door = _Door(pool, url.rstrip("/"), timeout_s)
        first = await door.ask("GET", HEALTH)
        second = await door.ask("GET", MANIFEST)
        if first.trouble == second.trouble == "unreachable":
            report.reachable = False
            report.checks["reachable"] = first.detail
            return report
        health, found = rules.judge_health(first)
        report.add("health", found)
        manifest, found = rules.judge_manifest(second)
        report.add("manifest", found)
        report.agent = manifest.id if manifest is not None else None if health is None else health.agent_id
        _check_identity(report, manifest, health, expected.agent)
        if manifest is None:
            for check in ("signature", "sla", "ttl"):
                report.skip(check, "there is no manifest to judge")
        else:
            report.add("manifest", rules.judge_stability(manifest, found, await door.ask("GET", MANIFEST)))
            report.add("signature", rules.judge_signature(manifest, second.body, expected.public_key))
            report.add("sla", rules.judge_sla(manifest))
            report.add("ttl", rules.judge_ttl(manifest))
        await _check_key_set(door, report, manifest)
        await _check_guard(door, report)
        if expected.bearer is None:
            for check in ("issuing", "token", "revocation"):
                report.skip(check, "--bearer is not given")
        else:
            await _round_trip(door, report, manifest, expected, expected.bearer)
    return report


def _check_identity(report: Report, manifest: Manifest | None, health: Health | None, expected: str | None) -> None:
    found = list(rules.judge_identity(manifest, health, expected))
    if not found and expected is None and (manifest is None or health is None or health.agent_id is None):
        report.skip("identity", "there are no two that name the agent, and --agent is not given")
    else:
        report.add("identity", found)


async def _check_key_set(door: _Door, report: Report, manifest: Manifest | None) -> None:
    answer = await door.ask("GET", KEY_SET)
    if answer.status in (404, 405, 410, 501):
        report.skip("keys", "no key set is served")
        return
    found = list(rules.judge_key_set(answer, manifest))
    if found or (manifest is not None and manifest.public_key is not None):
        report.add("keys", found)
    else:
        report.skip("keys", "the manifest names no key to look for")


async def _check_guard(door: _Door, report: Report) -> None:
    """Ask for what nobody may have without credentials, the last three times for what the agent would issue."""
    found: list[Finding] = []
    offered = False
    refused, closed = delegations.judge_refusal, delegations.judge_closed
    for method, bearer, body, judge, what, accepted in (
        ("GET", None, None, refused, "GET without credentials", "delegation_open"),
        ("GET", FORGED, None, refused, "GET with a token of alg none", "delegation_forged_accepted"),
        ("GET", MADE_UP, None, refused, "GET with a made-up bearer", "delegation_any_bearer"),
        ("POST", None, b'{"delegate": ', refused, "POST of broken JSON without credentials", "delegation_open"),
        ("POST", None, _ASKED.body(), closed, "POST without credentials", "delegation_open"),
        ("POST", FORGED, _ASKED.body(), closed, "POST with a token of alg none", "delegation_forged_accepted"),
        ("POST", MADE_UP, _ASKED.body(), closed, "POST with a made-up bearer", "delegation_any_bearer"),
    ):
        answer = await door.ask(method, DELEGATIONS, bearer=bearer, body=body)
        offered = offered or delegations.is_offered(answer)
        found += judge(answer, what, accepted)
    if offered:
        report.add("delegation", found)
    else:
        report.skip("delegation", f"{DELEGATIONS} is not offered")


async def _round_trip(
    door: _Door, report: Report, manifest: Manifest | None, expected: Expectations, bearer: str
) -> None:
    """Issue, look up, revoke, the latter two as a stranger first."""
    made = await door.ask("POST", DELEGATIONS, bearer=bearer, body=_ASKED.body())
    token, found = delegations.judge_issued(made, _ASKED, time.time_ns() // 1000)
    report.add("issuing", found)
    if token is None:
        report.skip("token", "none was issued")
        report.skip("revocation", "there is nothing to revoke")
        return
    _check_token(report, token, manifest, expected)
    issued = token.claims.id
    if not delegations.is_plain_id(issued):
        # What an agent calls a token must not lead the operator's credentials to another of its addresses.
        report.skip("revocation", "its id is none to put into a path")
        return
    where = f"{DELEGATIONS}/{quote(issued, safe='')}"
    report.add("issuing", delegations.judge_listed(await door.ask("GET", DELEGATIONS, bearer=bearer), issued))
    for method in ("GET", "DELETE"):
        stranger, what = await door.ask(method, where), f"{method} of {issued} without credentials"
        report.add("delegation", delegations.judge_refusal(stranger, what, "delegation_open"))
    unseen = list(delegations.judge_shown(await door.ask("GET", where, bearer=bearer), issued))
    report.add("issuing", unseen)
    revoked = await door.ask("DELETE", where, bearer=bearer)
    found = list(delegations.judge_revoked(revoked, await door.ask("GET", where, bearer=bearer), issued))
    if unseen and not found:
        report.skip("revocation", "it was not shown as active before, so that it is not now shows nothing")
    else:
        report.add("revocation", found)


def _check_token(report: Report, token: SignedToken, manifest: Manifest | None, expected: Expectations) -> None:
    agent = expected.agent if manifest is None else manifest.id
    delegator = expected.delegator or agent
    key = expected.delegator_key
    if key is None and delegator == agent:
        key = expected.public_key if manifest is None else manifest.public_key
    if delegator is None:
        report.skip("token", "nothing says whom it should be from; give --delegator")
        return
    found = list(delegations.judge_signer(token, delegator, key))
    if key is None and not found:
        report.skip("token", f"no key of {delegator} is known, so its signature is not checked; give --delegator-key")
    else:
        report.add("token", found)


class _Door:
    """One agent, asked within bounds."""

    def __init__(self, pool: httpcore2.AsyncConnectionPool, base: str, timeout_s: float) -> None:
        self._pool = pool
        self._base = base
        self._timeout_s = timeout_s

    async def ask(self, method: str, path: str, *, bearer: str | None = None, body: bytes | None = None) -> Answer:
        headers: dict[bytes | str, bytes | str] = {
            "Host": urlsplit(self._base).netloc,
            "User-Agent": "asapctl",
            "Accept": "application/json",
            # Without it a few compressed bytes could stand for gigabytes.
            "Accept-Encoding": "identity",
        }
        if bearer is not None:
            headers["Authorization"] = f"Bearer {bearer}"
        if body is not None:
            headers |= {"Content-Type": "application/json", "Content-Length": str(len(body))}
        connected = False

        async def trace(event: str, info: dict[str, Any]) -> None:  # noqa: ARG001 -- the library's signature
            nonlocal connected
            connected = connected or event.startswith("http11.")

        most = _MAX_BYTES.get(path, _MAX_BYTES_ELSE)
        detail = f"no whole answer within {self._timeout_s:g} s"
        with trio.move_on_after(self._timeout_s):
            try:
                async with self._pool.stream(
                    method, self._base + path, headers=headers, content=body, extensions={"trace": trace}
                ) as answer:
                    return await _read(answer, most)
            except (httpcore2.NetworkError, httpcore2.ProtocolError, httpcore2.TimeoutException) as error:
                detail = str(error) or type(error).__name__
        return Answer(0, trouble="no_answer" if connected else "unreachable", detail=f"{method} {path}: {detail}")


async def _read(answer: httpcore2.Response, most: int) -> Answer:
    headers = {name.lower(): value.decode("latin-1") for name, value in answer.headers}
    if 300 <= answer.status < 400:
        target = ascii(headers.get(b"location", ""))[:120]
        return Answer(0, trouble="redirect", detail=f"answered {answer.status} to {target}")
    body = b""
    async with aclosing(answer.aiter_stream()) as parts:
        async for part in parts:
            body += part
            if len(body) > most:
                return Answer(0, trouble="too_large", detail=f"the body has more than {most} bytes")
    return Answer(answer.status, headers.get(b"content-type", ""), body)
