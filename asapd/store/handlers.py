"""Which function runs which unit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from asapd.store import (
    agent_keys,
    agent_states,
    agents,
    audit,
    authorizing,
    breaches,
    budgets,
    corrections,
    delivery,
    erasure,
    horizon,
    keys,
    ledger,
    maintenance,
    manifests,
    reservations,
    retention,
    revocations,
    seals,
    silences,
    sweep,
    tasks,
    telemetry,
    units,
    usage,
    voids,
    watching,
    witnessing,
)
from asapd.store.tx import Tx

_HANDLERS: dict[type[Any], Callable[[Tx, Any], units.AnyResult]] = {
    units.RecordUsage: usage.record,
    units.Recall: usage.refuse,
    units.KeepHorizon: horizon.keep,
    units.RecordTelemetry: telemetry.record,
    units.VoidUsage: voids.void,
    units.CorrectCosts: corrections.correct,
    units.RetireUsage: retention.retire,
    units.RecordTask: tasks.record_task,
    units.RegisterDelegation: ledger.register,
    units.Reserve: authorizing.authorize,
    units.SettleReservation: reservations.settle,
    units.ReleaseReservation: reservations.release,
    units.ExtendReservation: reservations.extend,
    units.RefundReservation: reservations.refund,
    units.RecoverReservations: reservations.recover,
    units.Revoke: revocations.revoke,
    units.ImportRevocations: revocations.import_list,
    units.SyncBudgets: budgets.sync,
    units.PutAgent: agents.put,
    units.RemoveAgent: agents.remove,
    units.SyncAgents: agents.sync,
    units.ChangeAgentState: agent_states.change,
    units.ImportAgentKey: agent_keys.add,
    units.RetireAgentKey: agent_keys.retire,
    units.SyncKeys: agent_keys.sync,
    units.RecordProbe: agents.record_probe,
    units.RecordManifest: manifests.record,
    units.WriteBreach: breaches.write,
    units.MoveCursor: delivery.move_cursor,
    units.SyncTargets: delivery.sync_targets,
    units.MoveTarget: delivery.move_target,
    units.Redeliver: delivery.redeliver,
    units.EndRedelivery: delivery.end_redelivery,
    units.AckBreach: silences.acknowledge,
    units.AddSilence: silences.add,
    units.RemoveSilence: silences.remove,
    units.DeclareMaintenance: maintenance.declare,
    units.EndMaintenance: maintenance.end,
    units.KeepAlive: watching.keep_alive,
    units.RecordBlind: watching.record_blind,
    units.CreateKey: keys.create,
    units.RevokeKey: keys.revoke,
    units.Note: audit.note,
    units.Seal: seals.seal,
    units.EraseConsumer: erasure.erase,
    units.Witness: witnessing.witness,
    units.KeepCosignature: witnessing.keep,
    units.Sweep: sweep.sweep,
}


def handle(tx: Tx, unit: units.AnyUnit) -> units.AnyResult:
    """Run a unit against the open savepoint."""
    return _HANDLERS[type(unit)](tx, unit)
