"""Whether breaches and their alerts are what the log says of them."""

from __future__ import annotations

from typing import Any

import apsw
import msgspec

from asapd.core.row_digest import row_digest
from asapd.store.breaches import decode_alert, evidence_digest, public
from asapd.store.erasures import Erasures
from asapd.store.findings import Findings, Tally, takes
from asapd.store.rows import Row, fetch, fetch_one
from asapd.store.units.alerts import BreachRow

_SAID = ("agent", "breach_type", "budget", "window_us", "threshold", "actual", "samples", "severity")
_COLUMNS = (
    "id, agent_id, breach_type, window_us, threshold, threshold_value, actual, actual_value, severity, state, "
    "detected_at_us, samples, tenant, resolved_at_us, resolve_reason, budget, evidence, seq"
)


class _Entry(msgspec.Struct, frozen=True):
    seq: int
    timestamp_us: int
    says: dict[str, Any]


def reconcile_breaches(connection: apsw.Connection, erasures: Erasures) -> Tally:
    """Compare every alert with its entry, and every breach with its last alert and the entry of that."""
    findings = Findings()
    told: dict[int, _Entry] = {}
    gone = erasures.times("sla.breach")
    entries = erased = rows = 0
    for seq, at_us, details in fetch(
        connection, "SELECT seq, timestamp_us, details FROM audit WHERE event_type = 'sla.breach' ORDER BY seq"
    ):
        if details is None:
            erased += 1
            continue
        entries += 1
        said = msgspec.json.decode(details)
        told[said["seq"]] = _Entry(seq, at_us, said)
    # What the last entry of each breach says, and its alert; None where the entry was erased.
    last: dict[str, tuple[_Entry, Row] | None] = {
        entry.says["id"]: (entry, (number, "", "", 0, b"")) for number, entry in told.items()
    }
    for alert in connection.execute("SELECT seq, breach, event, ts_us, body FROM alert ORDER BY seq"):
        rows += 1
        number, breach, event, at_us, body = alert
        entry = told.pop(number, None)
        if entry is not None:
            last[breach] = entry, alert
            if (entry.says["id"], entry.says["event"], entry.timestamp_us) != (breach, event, at_us):
                findings.add(f"alert {number} is {event} {breach}, and entry {entry.seq} says otherwise")
            elif entry.says.get("alert_digest", digest := row_digest([body])) != digest:
                findings.add(f"alert {number} ({event} {breach}): its text is not the one that entry {entry.seq} knows")
        elif takes(gone, at_us):
            last[breach] = None
        else:
            findings.add(f"alert {number} ({event} {breach}) has no entry in the log")
    taken = _taken(connection)
    for number, entry in told.items():
        if number not in taken and fetch_one(connection, "SELECT 1 FROM alert WHERE seq = ?", (number,)) is None:
            findings.add(f"entry {entry.seq} (sla.breach {entry.says['id']}): alert {number} is not there")
    for *columns, budget, evidence, seq in fetch(connection, f"SELECT {_COLUMNS} FROM breach"):
        row = BreachRow(*[*columns, {}, budget])
        if row.id not in last:
            findings.add(f"breach {row.id} has no entry in the log")
        elif (known := last.pop(row.id)) is not None:
            _compare(row, evidence, seq, *known, findings)
    for breach in last:
        findings.add(f"breach {breach} is not there, and the log has entries of it")
    retired = sum(number in taken for number in told)
    return Tally("breach", rows, entries, retired, erased, findings.count, tuple(findings.named))


def _taken(connection: apsw.Connection) -> range:
    """The numbers of alerts that retention says it took: the oldest, without a hole."""
    through = 0
    for (details,) in fetch(
        connection, "SELECT details FROM audit WHERE event_type = 'retention.applied' AND subject = 'alert'"
    ):
        if details is not None:
            through = max(through, msgspec.json.decode(details)["last_row"])
    return range(1, through + 1)


def _compare(row: BreachRow, evidence: str, seq: int, entry: _Entry, alert: Row, findings: Findings) -> None:
    says, before = entry.says, findings.count
    if (says["event"] == "resolved") != (row.state == "resolved"):
        findings.add(f"breach {row.id} is {row.state}, and the log says {says['event']}")
    for name in _SAID:
        value = getattr(row, "agent_id" if name == "agent" else name)
        if says[name] != value:
            findings.add(f"breach {row.id}: {name} is {value!r}, and the log says {says[name]!r}")
    if "alert_digest" not in says or findings.count > before:
        return
    # The entry has the digest of the alert, and the alert tells all that a breach is but its evidence.
    if alert[4]:
        sent = decode_alert(alert[4])
        told = {**sent.params["breach"], "tenant": sent.tenant}
        for name, value in {**public(row), "seq": seq, "tenant": row.tenant}.items():
            if told.get(name, value) != value:
                findings.add(f"breach {row.id}: {name} is not what its last alert told")
    if says["evidence_digest"] != evidence_digest(evidence):
        findings.add(f"breach {row.id}: its evidence is not the one that entry {entry.seq} knows")
