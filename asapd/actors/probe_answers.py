"""What the prober makes of an answer: a verdict on an agent's health, or a manifest to keep. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from asapd.core.agent_keys import AgentKey, Signers, signers
from asapd.core.health import AgentStatus, ProbeResult
from asapd.runtime.fetch import Fetched, FetchFailed
from asapd.store.units.agents import RecordManifest
from asapd.wire.keys import KeyFormatError, load_public, public_base64
from asapd.wire.manifest import Manifest, ManifestError, Verification, decode_health, decode_manifest, verify_manifest

# What wall and monotonic time may differ by within one probe without saying that the host slept or its clock was set.
CLOCK_SLACK_S = 1.0
MAX_DETAIL = 300


def judge(answer: Fetched | FetchFailed, agent: str, ts_us: int, latency_ms: float) -> tuple[ProbeResult, int | None]:
    """What an answer says of the agent, and the ttl in it."""
    if isinstance(answer, FetchFailed):
        return ProbeResult(ts_us, False, reason=answer.reason, detail=answer.detail[:MAX_DETAIL]), None
    wrong_status = ProbeResult(
        ts_us, False, None, latency_ms, "http_status", f"answered with status {answer.status} instead of 200"
    )
    if answer.status not in (200, 503):
        return wrong_status, None
    try:
        health = decode_health(answer.body, agent)
    except ManifestError as problem:
        if answer.status != 200:
            return wrong_status, None
        return ProbeResult(ts_us, False, None, latency_ms, problem.reason, str(problem)[:MAX_DETAIL]), None
    if health.status == "unhealthy":
        result = reported_unhealthy(ts_us, latency_ms, health.agent_status)
    elif answer.status != 200:
        return wrong_status, None
    else:
        result = ProbeResult(ts_us, True, health.status, latency_ms, agent_status=health.agent_status)
    return result, health.ttl_seconds


def reported_unhealthy(ts_us: int, latency_ms: float | None, agent_status: AgentStatus | None) -> ProbeResult:
    """The result of an agent that says of itself that it is unhealthy."""
    detail = "the agent calls itself unhealthy"
    return ProbeResult(ts_us, False, "unhealthy", latency_ms, "reports_unhealthy", detail, agent_status)


def disturbed(elapsed_s: float, wall_s: float, timeout_s: float) -> bool:
    """Whether a failure may be asapd's own: it came back from its wait too late, or the host slept in between.

    A held-up loop reads what has arrived before it looks at deadlines, so only lateness beyond the deadline counts.
    """
    return elapsed_s > timeout_s + max(0.1, timeout_s / 10) or abs(wall_s - elapsed_s) > CLOCK_SLACK_S


def read_manifest(
    answer: Fetched | FetchFailed, agent: str, pinned: str | None, now_us: int, keys: Sequence[AgentKey] = ()
) -> RecordManifest | str:
    """What to store of an answer, or why nothing. `keys` are all that is known of the agent's."""
    if isinstance(answer, FetchFailed):
        return f"{answer.reason}: {answer.detail[:MAX_DETAIL]}"
    if answer.status != 200:
        return f"answered with status {answer.status} instead of 200"
    try:
        manifest = decode_manifest(answer.body)
    except ManifestError as problem:
        return str(problem)[:MAX_DETAIL]
    if manifest.id != agent:
        return f"it is the manifest of {manifest.id}"
    known = signers(keys, now_us)
    verification, key = _verified(manifest, pinned, known)
    pins = pinned is not None or bool(known.given)
    sla_error = disbelief(verification, pinned=pins, seen=bool(known.seen)) or manifest.sla_error
    return RecordManifest(
        agent=agent,
        fetched_us=now_us,
        digest=manifest.digest,
        body=answer.body,
        verification=verification,
        sla=manifest.raw["sla"] if manifest.sla is not None and sla_error is None else None,
        sla_error=sla_error,
        ttl_seconds=manifest.ttl_seconds,
        public_key=None if key is None else public_base64(key),
    )


def disbelief(verification: str, *, pinned: bool, seen: bool) -> str | None:
    """Why what a manifest promises must not be used; None when it may be.

    `pinned`: an operator gave a key of the agent; `seen`: its manifests were signed before.
    """
    match verification:
        case "bad_signature":
            return "the manifest's signature does not verify"
        case "wrong_key":
            return "the manifest is not signed with the public key that is set for this agent"
        case "key_changed":
            return "the manifest is signed with another key than before, which nobody confirmed"
        case "verified":
            return None
        case "self_signed" if not pinned:
            return None
        case _ if pinned or seen:
            return "the manifest is not signed, and a public key of this agent is known"
        case _:
            return None


def _verified(manifest: Manifest, pinned: str | None, known: Signers) -> tuple[Verification, bytes | None]:
    """Who signed a manifest, and the key that did; one that is only named in it did not."""
    given = set(known.given)
    try:
        if pinned is not None:
            given.add(load_public(pinned))
    except KeyFormatError:
        return ("wrong_key" if manifest.signed else "unsigned"), None
    for key in given:
        if verify_manifest(manifest, key) == "verified":
            return "verified", key
    verification = verify_manifest(manifest, None)
    if verification != "self_signed":
        return verification, None
    if given:
        return "wrong_key", manifest.public_key
    if known.takes(manifest.public_key) or manifest.public_key in known.seen:
        return "self_signed", manifest.public_key
    return "key_changed", manifest.public_key
