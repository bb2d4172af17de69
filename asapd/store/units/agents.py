"""Units of agents, their keys, probes and manifests."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from asapd.core.errors import Refusal
from asapd.store.units.unit import RowWritten, Unit


class AgentRecord(msgspec.Struct, frozen=True):
    """An agent of the directory. `sla` is the operator's own block, which goes before the manifest's.

    `health` is how its health is learned: `probe`, or `heartbeat` for one that reports by itself, whose `url` may be
    empty.
    """

    id: str
    url: str
    tenant: str
    public_key: str | None = None
    tier: str | None = None
    sla: dict[str, Any] | None = None
    health: str = "probe"


class AgentsChanged(msgspec.Struct, frozen=True, tag=True):
    """Which agents a change of the directory touched."""

    added: list[str] = []
    changed: list[str] = []
    removed: list[str] = []


class PutAgent(Unit[AgentsChanged | Refusal], frozen=True):
    """Add an agent through the API, or change one that was added so; a key that it replaces keeps its overlap.

    With `is_bound` the agent's tenant asks for it, and must not take what the host or another tenant has.
    """

    agent: AgentRecord
    actor: str
    now_us: int
    key_overlap_us: int = 0
    is_bound: bool = False


class RemoveAgent(Unit[AgentsChanged | Refusal], frozen=True):
    """Remove an agent that was added through the API; its history stays."""

    id: str
    actor: str
    now_us: int


class SyncAgents(Unit[AgentsChanged], frozen=True):
    """Make the configured part of the directory equal to this list; keys that are replaced keep their overlap."""

    agents: list[AgentRecord]
    actor: str
    now_us: int
    key_overlap_us: int = 0


class ChangeAgentState(Unit[AgentsChanged | Refusal], frozen=True):
    """Pause an agent, resume it, or note that it fell silent; `reason` is the operator's, where one gave it."""

    agent: str
    verb: Literal["pause", "resume", "silence"]
    actor: str
    now_us: int
    reason: str | None = None


class ImportAgentKey(Unit[AgentsChanged | Refusal], frozen=True):
    """Take a public key (32 raw bytes) of an agent from an operator; what manifests gave ends after the overlap.

    With `is_bound` it is the tenant's of the agent: it begins no chain, and goes when the agent leaves the directory.
    """

    agent: str
    public_key: bytes
    actor: str
    now_us: int
    overlap_us: int
    is_bound: bool = False


class RetireAgentKey(Unit[AgentsChanged | Refusal], frozen=True):
    """Retire a key by its thumbprint (RFC 7638): it verifies what was issued before, until the overlap is over."""

    agent: str
    kid: str
    actor: str
    now_us: int
    overlap_us: int


class SyncKeys(Unit[AgentsChanged], frozen=True):
    """Make the public halves of the keys that the daemon holds be these, by agent, and of its own identity."""

    held: list[tuple[str, bytes]]
    identity: tuple[str, bytes] | None
    actor: str
    now_us: int
    overlap_us: int


class RecordProbe(Unit[RowWritten], frozen=True):
    """A probe's result, what it makes of the agent's state, and the uptime it adds.

    The probe's word holds for `hold_us` unless a newer one replaces it. `pushed`: the agent reported it by itself.
    `reason` is why it is not up, `transition_reason` why the state changed. `changed`, `verdict` and
    `flapping_since_us` are what `asapd.core.flapping` remembers, and `flap` is whether that just began or ended.
    """

    agent: str
    ts_us: int
    up: bool
    status: str | None
    latency_us: int | None
    reason: str | None
    detail: str | None
    hold_us: int
    state: str
    since_us: int
    ok_streak: int
    fail_streak: int
    transition_from: str | None = None
    transition_reason: str | None = None
    pushed: bool = False
    agent_status: str | None = None
    changed: int = 0
    verdict: str | None = None
    flapping_since_us: int | None = None
    flap: Literal["flapping", "settled"] | None = None


class RecordManifest(Unit[RowWritten], frozen=True):
    """A manifest that differs from the last one stored for its agent."""

    agent: str
    fetched_us: int
    digest: str
    body: bytes
    verification: str
    sla: dict[str, Any] | None
    sla_error: str | None
    ttl_seconds: int | None
    public_key: str | None
