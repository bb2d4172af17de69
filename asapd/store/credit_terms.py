"""Credit tiers as they were configured, from when on: append-only, by the watcher's word."""

from __future__ import annotations

import apsw
import msgspec

from asapd.store.rows import fetch_one
from asapd.store.tx import Tx
from asapd.store.units.promises import CreditTerms, RecordCredits
from asapd.store.units.unit import RowWritten

_COLUMNS = "since_us, tiers"


def record(tx: Tx, unit: RecordCredits) -> RowWritten:
    """Keep what is given back from now on; that nothing is from the start needs no entry."""
    is_first = tx.row("SELECT 1 FROM credit_terms") is None
    tiers = msgspec.json.encode(unit.terms.tiers).decode()
    tx.execute(f"INSERT INTO credit_terms ({_COLUMNS}) VALUES (?,?)", (unit.terms.since_us, tiers))
    seq = tx.connection.last_insert_rowid()
    if not is_first or unit.terms.tiers:
        listed = [{"below": below, "credit": share} for below, share in unit.terms.tiers]
        tx.audit("sla.credits", "asapd", "*", {"since_us": unit.terms.since_us, "tiers": listed}, unit.terms.since_us)
    return RowWritten(seq)


def newest(connection: apsw.Connection) -> CreditTerms | None:
    """What was said last."""
    return _terms(fetch_one(connection, f"SELECT {_COLUMNS} FROM credit_terms ORDER BY seq DESC LIMIT 1"))


def before(connection: apsw.Connection, end_us: int) -> CreditTerms | None:
    """What was in force when a period ended, else what was kept first.

    What was said later holds from its time on, also when the clock had gone back.
    """
    return _terms(
        fetch_one(
            connection,
            f"SELECT {_COLUMNS} FROM credit_terms ORDER BY since_us < ?1 DESC, iif(since_us < ?1, -seq, seq) LIMIT 1",
            (end_us,),
        )
    )


def _terms(row: tuple[int, str] | None) -> CreditTerms | None:
    return None if row is None else CreditTerms(row[0], msgspec.json.decode(row[1], type=list[tuple[str, str]]))
