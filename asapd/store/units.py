"""Units of work: frozen values that say what to write, and the values that answer them.

One writer runs them, each in a savepoint of a shared transaction. A unit that is refused (by a
`Refusal`, `Denied` or `UsageConflict`) or fails is rolled back alone.
"""

from __future__ import annotations

from typing import Any, Generic, Literal, TypeVar

import msgspec

from asapd.core.budgets import Budget, Shortfall
from asapd.core.delegation import Claims, Denied
from asapd.core.errors import Refusal
from asapd.core.ledger import Estimate, Remaining
from asapd.core.repricing import Correction
from asapd.core.usage import Cost, UsageEvent
from asapd.store.visibility import EVERYTHING, Visibility

R_co = TypeVar("R_co", covariant=True)


class Unit(msgspec.Struct, Generic[R_co], frozen=True, tag=True):
    """Something to write; `R_co` is what its handler answers."""


# --- usage


class UsageConflict(msgspec.Struct, frozen=True, tag=True):
    """Events whose identity is already taken by other content: index in the request, and the stored row's number."""

    conflicts: list[tuple[int, int]]


class Attribution(msgspec.Struct, frozen=True):
    """What a report was made under: the delegation of a token that came with it, by its id where it is known here.

    `code` and `detail` say why the token allows nothing; `token_id` is what it calls itself, as far as it can be read.
    """

    delegation: str | None
    token_id: str | None
    code: str | None = None
    detail: str | None = None


class Recorded(msgspec.Struct, frozen=True, tag=True):
    """What became of a batch. `ids` is in the order of the request, duplicates included.

    `unauthorised` of the new ones were done without permission. `conflicts` are events, each by its index, with the row
    that has its identity. Where the unit had `places`, this has those of `ids`, and events are told by their places.
    """

    recorded: int
    duplicates: int
    unprotected: int
    ids: list[str]
    conflicts: list[tuple[int, int]] = []
    unauthorised: int = 0
    places: list[int] | None = None
    late: list[tuple[int, str]] = []


class RecordUsage(Unit[Recorded | UsageConflict], frozen=True):
    """Record events once each: rows, rollups, ledger and audit entries together.

    With `partial` the conflicting events are left out instead of refusing the whole. An `attribution` is no part of
    what the client says of an event, so a repeat under another token is still a repeat. `places` says where in the
    request each event stood, and `late` which others were left out for their time and why: both only come back, so that
    a repeat of the request is answered alike when other events are late. `contents` are the events' `content_digest`s,
    made by who has time for it: in the daemon, beside the writer. Without them the writer makes them. With `is_bound`
    events debit only delegations of which one side is of the tenant.
    """

    tenant: str
    actor: str
    now_us: int
    events: list[UsageEvent]
    costs: list[Cost]
    partial: bool = False
    attribution: Attribution | None = None
    places: list[int] | None = None
    late: list[tuple[int, str]] = []
    contents: list[bytes] = []
    is_bound: bool = False


class Recall(Unit[Any], frozen=True):
    """Refuse, unless the request's Idempotency-Key was answered before: then that answer comes first."""

    refusal: Refusal


class StreamValue(msgspec.Struct, frozen=True, array_like=True):
    """The last point of a cumulative stream: tokens and calls from `start_ns` to `time_ns`."""

    start_ns: int
    time_ns: int
    value: int
    calls: int


class StreamChanged(msgspec.Struct, frozen=True, array_like=True):
    """A cumulative stream went on from one value, None if it is new, to the next."""

    stream: bytes
    before: StreamValue | None
    after: StreamValue


class CollectionPart(msgspec.Struct, frozen=True, array_like=True):
    """What one point added to its collection."""

    bucket: str
    tokens: int
    calls: int


class CollectionChanged(msgspec.Struct, frozen=True, array_like=True):
    """A collection of points got parts, by their streams: `before` what it had, None if it is new.

    `event` is the place of its event in the unit's usage, which takes the place of the one before.
    """

    key: bytes
    resource: bytes
    rank: int
    time_us: int
    event: int
    before: dict[bytes, CollectionPart] | None
    after: dict[bytes, CollectionPart]


class SpanFact(msgspec.Struct, frozen=True, array_like=True):
    """Which span an event is of: trace id (16 bytes) and span id (8); with `is_work` of an agent's work."""

    span: bytes
    is_work: bool


class Evidence(msgspec.Struct, frozen=True, array_like=True):
    """A resource told of its usage at a time, by spans or metrics of a rank: near it those of a lower one are void."""

    resource: bytes
    rank: int
    time_us: int


class StreamsMoved(msgspec.Struct, frozen=True, tag=True):
    """Another export moved a stream or a collection in between: read it again and make the events anew."""


class RecordTelemetry(Unit[Recorded | UsageConflict | StreamsMoved], frozen=True):
    """Record usage that OpenTelemetry reported, together with what has to be remembered of the export.

    `spans` are of the events, one each, or none at all; `links` as in `wire.otlp_spans`. Evidence holds for
    `near_us` before and after its time. What was last heard of before `forget_before_us` is dropped. `by` is who
    reports: see `asapd.store.superseding`.
    """

    usage: RecordUsage
    forget_before_us: int
    near_us: int = 0
    streams: list[StreamChanged] = []
    collections: list[CollectionChanged] = []
    evidence: list[Evidence] = []
    spans: list[SpanFact] = []
    links: list[tuple[bytes, bytes]] = []
    by: Visibility = EVERYTHING

    @property
    def is_narrow(self) -> bool:
        """Whether who reports may not do so for every agent."""
        return "*" not in self.by.agents


class Voided(msgspec.Struct, frozen=True, tag=True):
    """A void: the id and row of the compensating event, and the id of the event that counts no longer."""

    id: str
    seq: int
    voids: str
    refunded_microusd: int


class VoidUsage(Unit[Voided | Refusal], frozen=True):
    """Take row `seq` out of all sums by a row with its negative, once; what it spent is given back.

    What delegations and hard-limited budgets counted is not `by` anybody's to give back: see `asapd.store.voids`.
    """

    seq: int
    reason: str
    actor: str
    now_us: int
    by: Visibility = EVERYTHING


class CostsCorrected(msgspec.Struct, frozen=True, tag=True):
    """How many costs were corrected, and the rows left alone because something had changed them since.

    Of `estimates_kept` the reservation was settled at an estimate of unknown size, which stays as it is.
    """

    corrected: int
    skipped: list[int]
    estimates_kept: int


class CorrectCosts(Unit[CostsCorrected], frozen=True):
    """Bring events to another cost by rows that hold the difference, where they still cost what each says."""

    corrections: list[Correction]
    price_version: str
    actor: str
    now_us: int


class UsageRetired(msgspec.Struct, frozen=True, tag=True):
    """Rows that a step of retention took, and whether there are more that are due."""

    rows: int
    more: bool


class RetireUsage(Unit[UsageRetired], frozen=True):
    """Drop at most `limit` of the oldest events from before `before_us`, their identities too; the rollups stay."""

    before_us: int
    actor: str
    now_us: int
    limit: int = 500


class DaysAddedUp(msgspec.Struct, frozen=True, tag=True):
    """Rows of hourly sums that were added to days, and whether there are more that are due."""

    rows: int
    more: bool


class AddUpDays(Unit[DaysAddedUp], frozen=True):
    """Add the next hourly sums, of days that ended before `before_us`, to the sums of days."""

    before_us: int


# --- delegations


class NewDelegation(msgspec.Struct, frozen=True):
    """A verified token on its way into the ledger."""

    claims: Claims
    token: str
    digest: bytes


class Registered(msgspec.Struct, frozen=True, tag=True):
    """The id under which the leaf of a chain is known from now on, and whether it is new."""

    id: str
    account: int
    created: bool


class RegisterDelegation(Unit[Registered | Denied | Refusal], frozen=True):
    """Register a verified chain, root first; those already known with the same bytes stay as they are.

    With `is_bound` one side of its last token has to be of the tenant.
    """

    chain: list[NewDelegation]
    actor: str
    tenant: str
    now_us: int
    is_bound: bool = False


class Reserved(msgspec.Struct, frozen=True, tag=True):
    """A reservation that now holds its estimate on every account of its path."""

    reservation: str
    delegation: str
    expires_at_us: int
    remaining: Remaining


class AuthorizationDenied(msgspec.Struct, frozen=True, tag=True):
    """The ledger's no, with what the path can still give; `shortfall` where a budget said it."""

    denied: Denied
    remaining: Remaining
    shortfall: Shortfall | None = None


class Reserve(Unit[Reserved | AuthorizationDenied | Denied | Refusal], frozen=True):
    """Hold an estimate on a delegation, all its ancestors and every matching budget, or on none.

    Either `chain` (registered if new) or `delegation` names the account. With `is_bound` one side of it has to be of
    the tenant; what nobody is bound by belongs to the tenant of the delegation.
    """

    task_id: str
    action: str
    estimate: Estimate
    ttl_us: int
    actor: str
    tenant: str
    now_us: int
    chain: list[NewDelegation] = []
    delegation: str = ""
    delegate: str | None = None
    consumer: str | None = None
    project: str | None = None
    is_bound: bool = False


class ReservationChanged(msgspec.Struct, frozen=True, tag=True):
    """A reservation after a verb was applied to it."""

    id: str
    state: str
    reason: str | None
    used_microusd: int
    held_microusd: int
    expires_at_us: int
    remaining: Remaining
    refunded_microusd: int = 0
    overrun_microusd: int | None = None
    refunded_to: list[str] | None = None
    """The delegations that a refund was given to; None of any other verb."""
    refunded_to_budgets: list[str] = []
    """The names of the budgets that it was given to."""


class SettleReservation(Unit[ReservationChanged | Refusal], frozen=True):
    """Close a reservation, adding `cost_microusd` and `tokens` to what usage already spent under it."""

    id: str
    cost_microusd: int | None
    actor: str
    now_us: int
    tokens: int | None = None


class ReleaseReservation(Unit[ReservationChanged | Refusal], frozen=True):
    """Give back what a reservation still holds; what was spent under it stays spent."""

    id: str
    actor: str
    now_us: int


class ExtendReservation(Unit[ReservationChanged | Refusal], frozen=True):
    """Move the expiry of an open reservation to `now_us + ttl_us`."""

    id: str
    ttl_us: int
    actor: str
    now_us: int


class RefundReservation(Unit[ReservationChanged | Refusal], frozen=True):
    """Give back an amount that was spent under a reservation, with a reason; what is still held stays held.

    It is given on the delegations that are `by` somebody's to fill again: see `asapd.store.reservations.refund`.
    """

    id: str
    cost_microusd: int
    reason: str
    actor: str
    now_us: int
    by: Visibility = EVERYTHING


class Recovered(msgspec.Struct, frozen=True, tag=True):
    """How many reservations a start found past their time, and whether there may be more."""

    reservations: int
    more: bool


class RecoverReservations(Unit[Recovered], frozen=True):
    """Close at most `limit` reservations whose time came while no daemon served, with the reason `recovered`."""

    now_us: int
    limit: int = 500


class Revoked(msgspec.Struct, frozen=True, tag=True):
    """Every delegation that is now revoked by this request or an earlier one: the root first.

    `hidden` counts those that whoever asked may not know of. `namesakes` are other delegations whose tokens have the
    id that was asked for, with their delegators; those stand. `open_reservations` are under what was revoked.
    """

    ids: list[str]
    newly: int
    hidden: int = 0
    namesakes: list[tuple[str, str]] = []
    open_reservations: list[str] = []


class Revoke(Unit[Revoked | Refusal], frozen=True):
    """Revoke a delegation and every descendant in one commit."""

    id: str
    actor: str
    reason: str
    now_us: int


class Revocation(msgspec.Struct, frozen=True, array_like=True):
    """A token that is revoked, by its own name; remembered until it has expired."""

    issuer: str
    jti: str
    revoked_us: int
    expires_us: int


class RevocationsImported(msgspec.Struct, frozen=True, tag=True):
    """How many entries were new, known and expired, and the delegations that they revoked, descendants too."""

    added: int
    known: int
    revoked: list[str]
    expired: int = 0


class ImportRevocations(Unit[RevocationsImported], frozen=True):
    """Merge a verified list of revocations, but for tokens that expired by `lapsed_us`; a registered one knows its end.

    `not_allowed` counts the entries it had besides.
    """

    entries: list[Revocation]
    signer: str
    key_id: str
    number: int
    digest: bytes
    not_allowed: int
    actor: str
    now_us: int
    lapsed_us: int = 0


class BudgetsSynced(msgspec.Struct, frozen=True, tag=True):
    """Which budgets a change of the configuration touched, by name."""

    added: list[str] = []
    changed: list[str] = []
    removed: list[str] = []


class SyncBudgets(Unit[BudgetsSynced], frozen=True):
    """Make the budgets equal to this list; what is counted stays as long as only limits differ."""

    budgets: list[Budget]
    actor: str
    now_us: int


# --- agents, probes, breaches


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


class RowWritten(msgspec.Struct, frozen=True, tag=True):
    """A row was written; its number in its table."""

    seq: int


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


class BreachRow(msgspec.Struct, frozen=True):
    """A breach as users see it; thresholds and values both as the reference's text and as numbers.

    It is of an agent, or of a budget.
    """

    id: str
    agent_id: str | None
    breach_type: str
    window_us: int
    threshold: str
    threshold_value: float
    actual: str | None
    actual_value: float | None
    severity: str
    state: str
    detected_at_us: int
    samples: int
    tenant: str
    resolved_at_us: int | None = None
    resolve_reason: str | None = None
    evidence: dict[str, Any] = {}
    budget: str | None = None


class AlertWritten(msgspec.Struct, frozen=True, tag=True):
    """The number of a breach transition on this host; None when an equal transition was already there."""

    seq: int | None


class WriteBreach(Unit[AlertWritten], frozen=True):
    """One transition of a breach (`opened`, `escalated`, `resolved`), its alert and its audit entry."""

    event: str
    breach: BreachRow
    now_us: int


# --- delivery of alerts


class CursorMoved(msgspec.Struct, frozen=True, tag=True):
    """Where a named cursor stands."""

    seq: int


class MoveCursor(Unit[CursorMoved | Refusal], frozen=True):
    """Acknowledge alerts up to `seq` under a name; with `is_open` only make the cursor, where there is none."""

    owner: str
    name: str
    seq: int
    is_open: bool
    now_us: int


class SyncTargets(Unit[RowWritten], frozen=True):
    """Keep a place for exactly these push targets."""

    names: list[str]


class MoveTarget(Unit[RowWritten], frozen=True):
    """A push target has come through `seq`; `error` is of the last attempt, `dead` are the numbers it gave up."""

    name: str
    seq: int
    now_us: int
    error: str | None = None
    dead: tuple[int, ...] = ()


class PassTarget(Unit[RowWritten], frozen=True):
    """A push target wants nothing up to `seq` that it has not taken."""

    name: str
    seq: int


class AlertsRetired(msgspec.Struct, frozen=True, tag=True):
    """Alerts that a step of retention took, and whether there may be more that are due."""

    rows: int
    more: bool


class RetireAlerts(Unit[AlertsRetired], frozen=True):
    """Drop at most `limit` of the oldest alerts from before `before_us` that every push target has come past."""

    before_us: int
    actor: str
    now_us: int
    limit: int = 500


class Redeliver(Unit[RowWritten | Refusal], frozen=True):
    """Have a dead letter delivered again."""

    id: int
    actor: str
    now_us: int


class EndRedelivery(Unit[RowWritten], frozen=True):
    """A dead letter was delivered, or met another error."""

    id: int
    error: str | None


class BreachAcked(msgspec.Struct, frozen=True, tag=True):
    """Who acknowledged a breach, as users see it; `created` is whether nobody had before."""

    acknowledged: dict[str, Any]
    created: bool


class AckBreach(Unit[BreachAcked | Refusal], frozen=True):
    """Acknowledge an open breach."""

    breach: str
    comment: str
    actor: str
    now_us: int


class Silence(msgspec.Struct, frozen=True, tag=True):
    """What is not pushed until `ends_us`; None in `agent`, `breach_type`, `severity` or `tenant` fits any."""

    id: str
    agent: str | None
    breach_type: str | None
    severity: str | None
    tenant: str | None
    created_us: int
    ends_us: int
    author: str
    comment: str


class AddSilence(Unit[Silence | Refusal], frozen=True):
    """Put a silence in force; its id and time of creation are given by the store."""

    silence: Silence
    actor: str
    now_us: int
    forget_before_us: int


class RemoveSilence(Unit[Silence | Refusal], frozen=True):
    """End a silence."""

    id: str
    actor: str
    now_us: int


# --- time that does not count


class Maintenance(msgspec.Struct, frozen=True, tag=True):
    """Time that does not count, of an agent or with None of all; `ended_us` when it was ended before `end_us`."""

    id: str
    agent: str | None
    start_us: int
    end_us: int
    reason: str
    declared_us: int
    declared_by: str
    ended_us: int | None = None
    ended_by: str | None = None


class DeclareMaintenance(Unit[Maintenance | Refusal], frozen=True):
    """Take a stretch of time out of an agent's figures, or with None of everybody's."""

    agent: str | None
    start_us: int
    end_us: int
    reason: str
    actor: str
    now_us: int


class EndMaintenance(Unit[Maintenance | Refusal], frozen=True):
    """End a maintenance window now, or call it off."""

    id: str
    actor: str
    now_us: int


class KeepAlive(Unit[RowWritten], frozen=True):
    """A sign that the daemon was running."""

    now_us: int


class RecordBlind(Unit[RowWritten], frozen=True):
    """The daemon did not look in a stretch of time; `cause` is `stopped`, `held_up` or `clock_set`."""

    start_us: int
    end_us: int
    cause: str


class UndoJump(Unit[RowWritten], frozen=True):
    """The clock was put from `before_us` forward to `after_us` by mistake, and is back since.

    What was written of uptime at times from `after_us` on goes, and from `before_us` to `now_us` nobody looked.
    """

    before_us: int
    after_us: int
    now_us: int


class BreachHold(msgspec.Struct, frozen=True):
    """Since when a term is `pending` or `resolving`; with `phase` None it is neither any more."""

    agent: str
    breach_type: str
    phase: str | None
    since_us: int = 0
    threshold: str | None = None


class KeepHolds(Unit[RowWritten], frozen=True):
    """Remember the holds that began, and forget those that ended."""

    holds: list[BreachHold]


class PromiseRecord(msgspec.Struct, frozen=True):
    """What an agent is held to from a time on, in the form of a manifest's SLA block; `source` None is nothing."""

    agent: str
    tenant: str
    since_us: int
    source: str | None
    sla: dict[str, Any] | None
    manifest_digest: str | None = None
    error: str | None = None


class RecordPromises(Unit[RowWritten], frozen=True):
    """Remember what agents are held to from now on."""

    promises: list[PromiseRecord]


# --- keys, tasks, the daemon's own affairs


class ApiKey(msgspec.Struct, frozen=True, tag=True):
    """An API key without its secret: `digest` is the SHA-256 of the secret part."""

    id: str
    name: str
    role: str
    agents: list[str]
    tenant: str | None
    may_sign: bool
    digest: bytes
    created_us: int
    revoked_us: int | None = None


class CreateKey(Unit[ApiKey | Refusal], frozen=True):
    """Store a new API key."""

    key: ApiKey
    actor: str
    now_us: int


class RevokeKey(Unit[ApiKey | Refusal], frozen=True):
    """Refuse a key from the next request on."""

    id: str
    actor: str
    now_us: int


class TaskEvent(msgspec.Struct, frozen=True):
    """One step in the life of a task: state is `started`, `completed` or `failed`."""

    task_id: str
    agent: str
    consumer: str
    state: str
    timestamp_us: int
    error: str | None = None
    parent_task_id: str | None = None


class RecordTask(Unit[RowWritten | Refusal], frozen=True):
    """A task began or ended. A task ends once: the same end again changes nothing, another is refused."""

    task: TaskEvent
    actor: str
    tenant: str
    now_us: int


class Note(Unit[RowWritten], frozen=True):
    """An audit entry about the daemon itself: started, configuration reloaded, ..."""

    event_type: str
    actor: str
    subject: str
    details: dict[str, Any]
    now_us: int


class Swept(msgspec.Struct, frozen=True, tag=True):
    """What a sweep did, and whether there is more of it to do."""

    reservations_expired: int
    rows_deleted: int
    more: bool
    tasks_abandoned: int = 0


class Sweep(Unit[Swept], frozen=True):
    """Expire lapsed reservations and drop what nothing needs any more, in a small bounded step.

    No usage from before `usage_before_us` can come any more. A task that began before `tasks_before_us` is overdue.
    Tokens that expired before `revocations_before_us` are refused for that alone. Uptime from before `uptime_before_us`
    is old.
    """

    now_us: int
    probes_before_us: int
    idempotency_before_us: int
    limit: int = 500
    usage_before_us: int = 0
    tasks_before_us: int = 0
    revocations_before_us: int = 0
    uptime_before_us: int = 0


class Failed(msgspec.Struct, frozen=True, tag=True):
    """The handler of this unit had a bug; nothing of the unit was written."""

    error: str


class NotWritten(msgspec.Struct, frozen=True, tag=True):
    """The whole commit failed for a reason of the disk; nothing of it was written."""

    error: str
    full: bool


class Sealed(msgspec.Struct, frozen=True, tag=True):
    """Nodes of the log's tree are kept, up to this size."""

    size: int


class Seal(Unit[Sealed], frozen=True):
    """Keep nodes of the tree over the audit log (level, index, hash), and a checkpoint of it unless `note` is None."""

    size: int
    root: bytes
    nodes: list[tuple[int, int, bytes]]
    note: str | None
    now_us: int


class Witnessed(msgspec.Struct, frozen=True, tag=True):
    """The size of a log that was seen last, and whether it is the one that was just shown."""

    size: int
    is_taken: bool


class Witness(Unit[Witnessed | Refusal], frozen=True):
    """Take a checkpoint of another log for its newest, if the proof leads there from the size that was seen last."""

    origin: str
    old_size: int
    size: int
    root: bytes
    proof: list[bytes]


class KeepCosignature(Unit[RowWritten], frozen=True):
    """Keep what a witness signed of a checkpoint."""

    size: int
    witness: str
    line: str


class Erased(msgspec.Struct, frozen=True, tag=True):
    """So many entries have no payload any more. `is_whole`: nothing of the consumer is left under its name."""

    entries: int
    is_whole: bool = True


class EraseConsumer(Unit[Erased | Refusal], frozen=True):
    """Erase the payloads of these entries; with `after` those behind it as well, and give the consumer its pseudonym.

    `after` is an entry up to which `seqs` are the last that name the consumer; None while there are more. `news` are
    news of delegations that name it, and up to `news_after` the last of them.
    """

    consumer: str
    pseudonym: str
    seqs: list[int]
    reason: str
    actor: str
    now_us: int
    after: int | None = 0
    news: list[int] = []
    news_after: int = 0


class SealHours(Unit[RowWritten | Refusal], frozen=True):
    """Enter what the sums of hours are whose events are all gone: each hour with its rows and their digest."""

    hours: list[tuple[int, int, str]]
    actor: str
    now_us: int


class KeepArchive(Unit[RowWritten | Refusal], frozen=True):
    """Record that entries were written into a file that verifies; the next of them may be retired from now on."""

    first_seq: int
    last_seq: int
    last_hash: bytes
    before_us: int
    file: str
    sha256: str
    actor: str
    now_us: int


class AuditRetired(msgspec.Struct, frozen=True, tag=True):
    """How many entries a step took the content of, and whether the archive holds more that is not retired."""

    entries: int
    more: bool


class RetireAudit(Unit[AuditRetired], frozen=True):
    """Erase the content of the next `limit` entries of the archive at hand; their hashes stay."""

    actor: str
    now_us: int
    limit: int = 500


class KeepHorizon(Unit[RowWritten], frozen=True):
    """Take no events from before `edge_us` any more, nor from longer than `late_max_us` before the newest commit."""

    edge_us: int
    late_max_us: int


AnyUnit = (
    RecordUsage
    | Recall
    | KeepHorizon
    | VoidUsage
    | CorrectCosts
    | RetireUsage
    | SealHours
    | AddUpDays
    | RecordTelemetry
    | RegisterDelegation
    | Reserve
    | SettleReservation
    | ReleaseReservation
    | ExtendReservation
    | RefundReservation
    | RecoverReservations
    | Revoke
    | ImportRevocations
    | SyncBudgets
    | PutAgent
    | RemoveAgent
    | SyncAgents
    | ChangeAgentState
    | ImportAgentKey
    | RetireAgentKey
    | SyncKeys
    | RecordProbe
    | RecordManifest
    | WriteBreach
    | MoveCursor
    | SyncTargets
    | MoveTarget
    | PassTarget
    | RetireAlerts
    | Redeliver
    | EndRedelivery
    | AckBreach
    | AddSilence
    | RemoveSilence
    | DeclareMaintenance
    | EndMaintenance
    | KeepAlive
    | RecordBlind
    | RecordPromises
    | KeepHolds
    | UndoJump
    | CreateKey
    | RevokeKey
    | RecordTask
    | Note
    | Seal
    | EraseConsumer
    | KeepArchive
    | RetireAudit
    | Witness
    | KeepCosignature
    | Sweep
)
AnyResult = (
    Recorded
    | Voided
    | CostsCorrected
    | UsageRetired
    | AlertsRetired
    | DaysAddedUp
    | UsageConflict
    | StreamsMoved
    | Registered
    | Reserved
    | AuthorizationDenied
    | Denied
    | Refusal
    | ReservationChanged
    | Recovered
    | Revoked
    | RevocationsImported
    | BudgetsSynced
    | AgentsChanged
    | RowWritten
    | AlertWritten
    | CursorMoved
    | BreachAcked
    | Silence
    | Maintenance
    | ApiKey
    | Sealed
    | Erased
    | AuditRetired
    | Witnessed
    | Swept
    | Failed
    | NotWritten
)


class Idempotency(msgspec.Struct, frozen=True, array_like=True):
    """An Idempotency-Key: 16-byte digests of (caller, route, key) and of the request it came with."""

    key: bytes
    request: bytes
    now_us: int


class Envelope(msgspec.Struct, frozen=True, array_like=True):
    """A unit on its way to the writer. Decisions (`urgent`) go ahead of bulk ingest."""

    number: int
    unit: AnyUnit
    urgent: bool
    idempotency: Idempotency | None = None


class Answer(msgspec.Struct, frozen=True, array_like=True):
    """The outcome of one envelope, sent after its commit."""

    number: int
    result: AnyResult
    replayed: bool = False
