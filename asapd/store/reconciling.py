"""Whether everything that was recorded has its entry in the log, says the same as it, and the reverse.

Rows that retention took are told from others by its own entries. So are entries whose content was erased: one that an
erasure names answers for one row of its kind, and any other is a finding.
"""

from __future__ import annotations

from collections.abc import Callable

import apsw
import msgspec

from asapd.store import budgets_held, ledger_held, usage_days, usage_hours
from asapd.store.damaged import unreadable
from asapd.store.erasures import Erasures
from asapd.store.excuses import unattested
from asapd.store.findings import NAMED, Findings, Tally
from asapd.store.reconciling_breaches import reconcile_breaches
from asapd.store.reconciling_delegations import reconcile_delegations
from asapd.store.reconciling_house import read_house
from asapd.store.reconciling_identity import reconcile_identities
from asapd.store.reconciling_outcomes import reconcile_outcomes
from asapd.store.reconciling_tasks import reconcile_tasks
from asapd.store.reconciling_usage import reconcile_usage
from asapd.store.reconciling_usage_behind import reconcile_usage_parties, reconcile_usage_tasks
from asapd.store.rows import one_moment


def reconcile(connection: apsw.Connection, keys: tuple[bytes, ...] = ()) -> tuple[Tally, ...]:
    """Compare usage, tasks, delegations and breaches with the log, and what was erased with what erasures say.

    What explains why something is gone has to be signed by one of the daemon's keys, if any are given.
    """
    # What mostly grows is read step by step, up to where it ends now; what changes has to be seen at one moment.
    usage = _compared(connection, "usage", reconcile_usage)
    identities = _compared(connection, "usage_identity", reconcile_identities)
    by_task = _compared(connection, "usage_task", reconcile_usage_tasks)
    by_party = _compared(connection, "usage_party", reconcile_usage_parties)
    hours, ledger = _compared(connection, "usage_hour", _hours), _compared(connection, "ledger", _ledger)
    budgets = _compared(connection, "budget_period", _budgets)
    with one_moment(connection):
        tasks = _compared(connection, "task", reconcile_tasks)
    with one_moment(connection):
        erasures = Erasures(connection)
        return (
            usage,
            tasks,
            identities,
            by_task,
            by_party,
            hours,
            _compared(connection, "delegation", lambda connection: reconcile_delegations(connection, erasures)),
            ledger,
            budgets,
            _compared(connection, "breach", lambda connection: reconcile_breaches(connection, erasures)),
            _days(connection),
            _compared(connection, "task_outcome", reconcile_outcomes),
            *(_compared(connection, part.log.table, part.compare) for part in read_house(connection, erasures)),
            _explained(_erased(erasures), connection, keys),
        )


def _compared(connection: apsw.Connection, table: str, compare: Callable[[apsw.Connection], Tally]) -> Tally:
    """A comparison, or in its place which rows cannot be read, so that one changed byte hides behind no crash."""
    try:
        return compare(connection)
    except (ValueError, ArithmeticError, LookupError, TypeError, AttributeError) as error:
        findings = Findings()
        for finding in unreadable(connection, table):
            findings.add(finding)
        if not findings.count:
            findings.add(f"{table}: the rows cannot be compared with the log, {type(error).__name__}: {error}")
        return Tally(table, 0, 0, findings=findings.count, named=tuple(findings.named))


# --- sums by hour


def _hours(connection: apsw.Connection) -> Tally:
    findings = Findings()
    rows, sealed, waiting = usage_hours.compare(connection, findings.add)
    return Tally("usage_hour", rows, sealed, waiting, 0, findings.count, tuple(findings.named))


# --- the ledger


def _ledger(connection: apsw.Connection) -> Tally:
    findings = Findings()
    found = ledger_held.compare(connection, findings.add)
    return Tally("ledger", found.rows, found.entries, found.retired, 0, findings.count, tuple(findings.named))


# --- what budgets counted


def _budgets(connection: apsw.Connection) -> Tally:
    findings = Findings()
    found = budgets_held.compare(connection, findings.add)
    named = tuple(findings.named)
    return Tally("budget_period", found.rows, found.entries, found.trusted, 0, findings.count, named)


# --- sums of days


def _days(connection: apsw.Connection) -> Tally:
    findings = Findings()
    rows = usage_days.compare(connection, findings.add)
    return Tally("usage_day", rows, 0, findings=findings.count, named=tuple(findings.named))


# --- erased entries


def _explained(erased: Tally, connection: apsw.Connection, keys: tuple[bytes, ...]) -> Tally:
    """A tally of what is gone, with what was explained by somebody else than the daemon."""
    false = _unattested(connection, keys)
    named = (*false, *erased.named)[:NAMED]
    return msgspec.structs.replace(erased, findings=erased.findings + len(false), named=named)


def _unattested(connection: apsw.Connection, keys: tuple[bytes, ...]) -> list[str]:
    found: list[str] = []
    try:
        found += unattested(connection, keys)
    except (ValueError, ArithmeticError, LookupError, TypeError, AttributeError) as error:
        found.append(f"what explains gaps cannot be read, {type(error).__name__}: {error}")
    return found


def _erased(erasures: Erasures) -> Tally:
    findings, rows, retired = Findings(), 0, 0
    for said in erasures.odd:
        findings.add(said)
    for seq, kind in erasures.without_content():
        rows += 1
        retired += erasures.is_retired(seq)
        if not erasures.is_explained(seq):
            findings.add(f"entry {seq} ({kind}) has lost its content, and no erasure says so")
    return Tally("erasure", rows, erasures.count, retired, rows - retired, findings.count, tuple(findings.named))
