"""A visit to a live agent: the requests of `asapctl conformance`, each bounded, and what their answers show."""

from __future__ import annotations

import ssl
import time
from collections.abc import Iterable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import httpcore2
import trio

from asapd.wire import conformance as rules
from asapd.wire.conformance import FORGED, Answer, Asked, Finding
from asapd.wire.manifest import Manifest

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
    """What is known of the agent beforehand. With `bearer`, a delegation is issued and revoked in that name."""

    agent: str | None = None
    public_key: bytes | None = None
    bearer: str | None = None


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
        report.add("identity", rules.judge_identity(manifest, health, expected.agent))
        if manifest is None:
            for check in ("signature", "sla", "ttl"):
                report.checks[check] = "skipped: there is no manifest to judge"
        else:
            report.add("manifest", rules.judge_stability(manifest, await door.ask("GET", MANIFEST)))
            report.add("signature", rules.judge_signature(manifest, second.body, expected.public_key))
            report.add("sla", rules.judge_sla(manifest))
            report.add("ttl", rules.judge_ttl(manifest))
        await _check_key_set(door, report, manifest)
        await _check_delegation(door, report, manifest, expected.bearer)
    return report


async def _check_key_set(door: _Door, report: Report, manifest: Manifest | None) -> None:
    answer = await door.ask("GET", KEY_SET)
    if answer.status == 200:
        report.add("keys", rules.judge_key_set(answer, manifest))
    else:
        report.checks["keys"] = "skipped: no key set is served"


async def _check_delegation(door: _Door, report: Report, manifest: Manifest | None, bearer: str | None) -> None:
    listing = await door.ask("GET", DELEGATIONS)
    if listing.status in (404, 405, 501):
        report.checks["delegation"] = f"skipped: {DELEGATIONS} is not offered"
        return
    found = list(rules.judge_refusal(listing, "GET without credentials", "delegation_open"))
    forged = await door.ask("GET", DELEGATIONS, bearer=FORGED)
    found += rules.judge_refusal(forged, "GET with a token of alg none", "delegation_forged_accepted")
    broken = await door.ask("POST", DELEGATIONS, body=b'{"delegate": ')
    found += rules.judge_refusal(broken, "POST of broken JSON without credentials", "delegation_open")
    if bearer is not None:
        found += await _round_trip(door, manifest, bearer)
    report.add("delegation", found)


async def _round_trip(door: _Door, manifest: Manifest | None, bearer: str) -> list[Finding]:
    """Issue, list, revoke."""
    made = await door.ask("POST", DELEGATIONS, bearer=bearer, body=_ASKED.body())
    issued, found = rules.judge_issued(made, _ASKED, manifest, time.time_ns() // 1000)
    if issued is None:
        return found
    where = f"{DELEGATIONS}/{issued}"
    found += rules.judge_listed(await door.ask("GET", DELEGATIONS, bearer=bearer), issued)
    revoked = await door.ask("DELETE", where, bearer=bearer)
    found += rules.judge_revoked(revoked, await door.ask("GET", where, bearer=bearer))
    return found


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
