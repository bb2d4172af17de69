"""What can be asked of the actors. Every message that expects an answer carries its reply slot."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec

from asapd import config
from asapd.actors.revocations import Imported
from asapd.core.access import Caller
from asapd.core.burnrate import BudgetForecast, Burning
from asapd.core.delegation import Claims, Denied
from asapd.core.errors import Refusal
from asapd.core.health import AgentStatus, Status
from asapd.core.ledger import Estimate, Remaining
from asapd.core.pricing import PriceTable
from asapd.core.reputation import Reputation
from asapd.core.sla import Metrics, Promise, TermVerdict
from asapd.core.usage import UsageEvent
from asapd.runtime.ask import Reply
from asapd.store.units.agents import (
    AgentRecord as AgentRecord,  # noqa: PLC0414 -- handed on to the doors, which do not know the store
)
from asapd.store.units.agents import AgentsChanged
from asapd.store.units.delegations import (
    AuthorizationDenied as AuthorizationDenied,  # noqa: PLC0414 -- handed on to the doors, which do not know the store
)
from asapd.store.units.delegations import (
    ReservationChanged,
    Revoked,
)
from asapd.store.units.delegations import (
    Reserved as Reserved,  # noqa: PLC0414 -- handed on to the doors, which do not know the store
)
from asapd.store.units.exchange import (
    Idempotency as Idempotency,  # noqa: PLC0414 -- handed on to the doors, which do not know the store
)
from asapd.store.units.house import ApiKey
from asapd.store.units.promises import Maintenance
from asapd.store.units.unit import RowWritten
from asapd.store.units.usage import (
    Attribution as Attribution,  # noqa: PLC0414 -- handed on to the doors, which do not know the store
)
from asapd.store.units.usage import (
    Recorded as Recorded,  # noqa: PLC0414 -- handed on to the doors, which do not know the store
)
from asapd.store.units.usage import (
    TaskEvent as TaskEvent,  # noqa: PLC0414 -- handed on to the doors, which do not know the store
)
from asapd.store.units.usage import Voided
from asapd.wire.otlp_points import MetricPoint
from asapd.wire.otlp_spans import SpanUsage

# --- meter


class Report(msgspec.Struct, frozen=True):  # made for each single event, in a fifth of a dataclass's time
    """Record these events once each. With `partial` the conflicting ones are left out.

    `places` says where in the request each event stood; None for a request that is one event, unless `partial`.
    """

    caller: Caller
    events: list[UsageEvent]
    places: list[int] | None
    partial: bool
    idempotency: Idempotency | None
    reply: Reply[Recorded | Refusal]
    attribution: Attribution | None = None


@dataclass(frozen=True, slots=True)
class TelemetryRecorded:
    """What became of an export: events, and for each span or point that was left out the reason.

    `notes` say what else the sender should know, of what was taken and does not count.
    """

    recorded: int
    duplicates: int
    rejected: list[str]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ReportSpans:
    """Record what the spans of one export used; `links` say which is below which, see `OtlpOutcome`."""

    caller: Caller
    spans: list[SpanUsage]
    links: list[tuple[bytes, bytes]]
    reply: Reply[TelemetryRecorded | Refusal]


@dataclass(frozen=True, slots=True)
class ReportMetrics:
    """Record what the points of one export add to those before them."""

    caller: Caller
    points: list[MetricPoint]
    reply: Reply[TelemetryRecorded | Refusal]


@dataclass(frozen=True, slots=True)
class VoidRequest:
    """Take a stored event out of all sums, by its row number."""

    caller: Caller
    seq: int
    reason: str
    idempotency: Idempotency | None
    reply: Reply[Voided | Refusal]


@dataclass(frozen=True, slots=True)
class ReportTask:
    """Record one step in the life of a task."""

    caller: Caller
    task: TaskEvent
    idempotency: Idempotency | None
    reply: Reply[RowWritten | Refusal]


@dataclass(frozen=True, slots=True)
class ReconfigureMeter:
    """Use other limits of lateness and another price table from the next message on."""

    metering: config.Metering
    prices: PriceTable
    reply: Reply[None]


MeterMessage = Report | ReportSpans | ReportMetrics | ReportTask | VoidRequest | ReconfigureMeter

# --- registry


@dataclass(frozen=True, slots=True)
class Issue:
    """Sign a token with a key that the daemon holds for the delegator, and register it."""

    caller: Caller
    delegator: str
    delegate: str
    scopes: tuple[str, ...]
    max_cost_microusd: int | None
    max_tasks: int | None
    expires_at_us: int
    parent: str | None
    idempotency: Idempotency | None
    reply: Reply[Issued | Denied | Refusal]


@dataclass(frozen=True, slots=True)
class Issued:
    """A registered delegation and its token."""

    id: str
    token: str
    created: bool


@dataclass(frozen=True, slots=True)
class Register:
    """Register a token that was signed elsewhere."""

    caller: Caller
    token: str
    idempotency: Idempotency | None
    reply: Reply[Issued | Denied | Refusal]


@dataclass(frozen=True, slots=True)
class Validate:
    """Judge a token without touching the ledger. `action` and `delegate` None are not judged."""

    caller: Caller
    token: str
    action: str | None
    delegate: str | None
    reply: Reply[Validity | Refusal]


@dataclass(frozen=True, slots=True)
class Validity:
    """A verdict on a token: `denied` None means valid. `chain` is root first, as far as it could be read."""

    denied: Denied | None
    chain: tuple[Claims, ...]
    remaining: Remaining | None


@dataclass(frozen=True, slots=True)
class Authorize:
    """Reserve an estimate under a token or a registered delegation."""

    caller: Caller
    token: str | None
    delegation: str | None
    action: str
    task_id: str
    delegate: str | None
    consumer: str | None
    project: str | None
    estimate: Estimate
    ttl_us: int | None
    idempotency: Idempotency | None
    reply: Reply[Reserved | AuthorizationDenied | Denied | Refusal]


@dataclass(frozen=True, slots=True)
class ChangeReservation:
    """Settle, release, extend or refund a reservation."""

    caller: Caller
    verb: Literal["settle", "release", "extend", "refund"]
    reservation: str
    cost_microusd: int | None
    ttl_us: int | None
    reason: str
    idempotency: Idempotency | None
    reply: Reply[ReservationChanged | Refusal]
    tokens: int | None = None


@dataclass(frozen=True, slots=True)
class RevokeDelegation:
    """Revoke a delegation and everything under it."""

    caller: Caller
    delegation: str
    reason: str
    reply: Reply[Revoked | Refusal]


@dataclass(frozen=True, slots=True)
class ImportRevocationList:
    """Merge a signed list of revocations, as it came."""

    caller: Caller
    body: bytes
    idempotency: Idempotency | None
    reply: Reply[Imported | Refusal]


@dataclass(frozen=True, slots=True)
class Attribute:
    """Say under which delegation a report is that came with this token, registering it if it is valid."""

    caller: Caller
    token: str
    reply: Reply[Attribution | Refusal]


@dataclass(frozen=True, slots=True)
class ReconfigureRegistry:
    """Use other roots, keys, limits and budgets from the next message on.

    `pinned` maps agents to raw public keys. The answer has the agents whose key the daemon holds now and did not, or
    held and does not.
    """

    delegation: config.Delegation
    pinned: dict[str, bytes]
    reply: Reply[Refusal | tuple[str, ...]]
    budgets: tuple[config.Budget, ...] = ()
    actor: str = "asapd"


RegistryMessage = (
    Issue
    | Register
    | Validate
    | Authorize
    | ChangeReservation
    | RevokeDelegation
    | ImportRevocationList
    | Attribute
    | ReconfigureRegistry
)

# --- prober, which owns the directory


@dataclass(frozen=True, slots=True)
class PutAgentRequest:
    """Add an agent through the API, or change one; with `is_bound` for its tenant, which has to be the first to."""

    agent: AgentRecord
    actor: str
    idempotency: Idempotency | None
    reply: Reply[AgentsChanged | Refusal]
    is_bound: bool = False


@dataclass(frozen=True, slots=True)
class RemoveAgentRequest:
    """Take an agent out of the directory."""

    id: str
    actor: str
    reply: Reply[AgentsChanged | Refusal]


@dataclass(frozen=True, slots=True)
class ImportKeyRequest:
    """Believe a public key (32 raw bytes) of an agent from now on; with `is_bound` on the word of its tenant."""

    agent: str
    public_key: bytes
    actor: str
    idempotency: Idempotency | None
    reply: Reply[AgentsChanged | Refusal]
    is_bound: bool = False


@dataclass(frozen=True, slots=True)
class RetireKeyRequest:
    """Retire an agent's key by its thumbprint, or dismiss one that a manifest claimed.

    `overlap_us` None is as configured.
    """

    agent: str
    kid: str
    overlap_us: int | None
    actor: str
    reply: Reply[AgentsChanged | Refusal]


@dataclass(frozen=True, slots=True)
class ReconfigureProber:
    """Probe by other settings, and make the configured part of the directory equal to `agents`.

    `key_overlap_us` None leaves the overlap of keys as it is.
    """

    settings: config.Prober
    agents: list[AgentRecord]
    actor: str
    reply: Reply[AgentsChanged | Refusal]
    key_overlap_us: int | None = None


@dataclass(frozen=True, slots=True)
class SetPausedRequest:
    """Pause an agent, which is then neither asked nor judged, or resume it."""

    agent: str
    paused: bool
    reason: str | None
    actor: str
    reply: Reply[AgentsChanged | Refusal]


@dataclass(frozen=True, slots=True)
class HeartbeatRequest:
    """What an agent that is not probed says of itself, and for how long that holds."""

    agent: str
    status: Status
    agent_status: AgentStatus | None
    ttl_s: int | None
    reply: Reply[Heard | Refusal]


@dataclass(frozen=True, slots=True)
class Heard:
    """Where an agent stands after its heartbeat; the next one is due at `holds_until_us`, None while it is paused."""

    state: str
    holds_until_us: int | None


ProberMessage = (
    PutAgentRequest
    | RemoveAgentRequest
    | ImportKeyRequest
    | RetireKeyRequest
    | SetPausedRequest
    | HeartbeatRequest
    | ReconfigureProber
)

# --- watcher


@dataclass(frozen=True, slots=True)
class FiguresRequest:
    """The figures of one agent, of some, or of all in the directory, in one of the configured windows.

    `in_full` asks for burn rates, forecast and reputation as well, which look at every window.
    """

    agent: str | None
    window_us: int
    reply: Reply[list[Figures] | Refusal]
    some: frozenset[str] | None = None
    in_full: bool = False


@dataclass(frozen=True, slots=True)
class Figures:
    """What an agent promised in a window and what it kept. `promise_source` is as in `HeldTo`."""

    metrics: Metrics
    promise: Promise
    promise_source: str | None
    sla_error: str | None
    verdicts: list[TermVerdict]
    compliance_percent: float | None
    sla_score: float | None
    error_budget_left_percent: float | None
    burn_rates: dict[str, float | None]
    burning: list[Burning] = field(default_factory=list)
    """The burn-rate rules held to each promised budget."""
    forecasts: list[BudgetForecast] = field(default_factory=list)
    """The budgets of the longest window at the pace of the last hour."""
    budget_window_us: int = 0
    reputation: Reputation | None = None


@dataclass(frozen=True, slots=True)
class ReconfigureWatcher:
    """Judge by other windows, thresholds and tiers from now on."""

    sla: config.Sla
    reply: Reply[None]


@dataclass(frozen=True, slots=True)
class MaintenanceRequest:
    """Take a stretch of time out of an agent's figures, or with None of everybody's."""

    caller: Caller
    agent: str | None
    start_us: int
    end_us: int
    reason: str
    idempotency: Idempotency | None
    reply: Reply[Maintenance | Refusal]


@dataclass(frozen=True, slots=True)
class EndMaintenanceRequest:
    """End a maintenance window now, or call it off."""

    caller: Caller
    id: str
    reply: Reply[Maintenance | Refusal]


WatcherMessage = FiguresRequest | ReconfigureWatcher | MaintenanceRequest | EndMaintenanceRequest

# --- gatekeeper, which owns the API keys


@dataclass(frozen=True, slots=True)
class CreateKeyRequest:
    """Make an API key."""

    caller: Caller
    name: str
    role: str
    agents: tuple[str, ...]
    tenant: str | None
    may_sign: bool
    reply: Reply[NewKey | Refusal]
    idempotency: Idempotency | None = None


@dataclass(frozen=True, slots=True)
class NewKey:
    """A key just made, with the secret that is shown this once."""

    key: ApiKey
    secret: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class RevokeKeyRequest:
    """Refuse a key from the next request on."""

    caller: Caller
    id: str
    reply: Reply[ApiKey | Refusal]


GatekeeperMessage = CreateKeyRequest | RevokeKeyRequest

# --- auditor


@dataclass(frozen=True, slots=True)
class Remark:
    """Write an audit entry about the daemon itself."""

    event_type: str
    actor: str
    subject: str
    details: dict[str, Any]
    reply: Reply[RowWritten | Refusal]


AuditorMessage = Remark
