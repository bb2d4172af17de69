"""What passes between the daemon and its writer: envelopes of units and the answers to them."""

from __future__ import annotations

import msgspec

from asapd.core.delegation import Denied
from asapd.core.errors import Refusal
from asapd.store.units.agents import (
    AgentsChanged,
    ChangeAgentState,
    ImportAgentKey,
    PutAgent,
    RecordManifest,
    RecordProbe,
    RemoveAgent,
    RetireAgentKey,
    SyncAgents,
    SyncKeys,
)
from asapd.store.units.alerts import (
    AckBreach,
    AddSilence,
    AlertsRetired,
    AlertWritten,
    BreachAcked,
    CursorMoved,
    EndRedelivery,
    MoveCursor,
    MoveTarget,
    PassTarget,
    Redeliver,
    RemoveSilence,
    RetireAlerts,
    Silence,
    SyncTargets,
    WriteBreach,
)
from asapd.store.units.audit import (
    AuditRetired,
    EraseConsumer,
    Erased,
    KeepArchive,
    KeepCosignature,
    RetireAudit,
    Seal,
    Sealed,
    SealHours,
    Witness,
    Witnessed,
)
from asapd.store.units.delegations import (
    AuthorizationDenied,
    BudgetsSynced,
    ExtendReservation,
    ImportRevocations,
    Recovered,
    RecoverReservations,
    RefundReservation,
    RegisterDelegation,
    Registered,
    ReleaseReservation,
    ReservationChanged,
    Reserve,
    Reserved,
    RevocationsImported,
    Revoke,
    Revoked,
    SettleReservation,
    SyncBudgets,
)
from asapd.store.units.house import ApiKey, CreateKey, Note, RevokeKey, SetMasks, Sweep, Swept
from asapd.store.units.promises import (
    DeclareMaintenance,
    EndMaintenance,
    KeepAlive,
    KeepHolds,
    Maintenance,
    RecordBlind,
    RecordCredits,
    RecordPromises,
    UndoJump,
)
from asapd.store.units.unit import Failed, NotWritten, RowWritten
from asapd.store.units.usage import (
    AddUpDays,
    CorrectCosts,
    CostsCorrected,
    DaysAddedUp,
    KeepHorizon,
    Recall,
    Recorded,
    RecordTask,
    RecordTelemetry,
    RecordUsage,
    RetireUsage,
    StreamsMoved,
    UsageConflict,
    UsageRetired,
    UsageTooLate,
    Voided,
    VoidUsage,
)

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
    | RecordCredits
    | KeepHolds
    | UndoJump
    | CreateKey
    | SetMasks
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
    | UsageTooLate
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
    alerts: bool = False
    """Whether units up to this one in its commit wrote transitions of breaches, whatever their results say."""
