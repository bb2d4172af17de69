"""Whether what is revoked is what the log says: each revoked token has its row, and each row somebody who said so."""

from __future__ import annotations

from datetime import datetime

import apsw
import msgspec

from asapd.core.types import datetime_us
from asapd.store.findings import Tally
from asapd.store.rows import fetch
from asapd.store.standing import Entry, Standing

# Rows of tokens that have expired are forgotten. By the latest time that was ever written down, none of these is.
_MISSING = """
SELECT id FROM delegation d WHERE revoked_us IS NOT NULL AND expires_us > ?
AND NOT EXISTS (SELECT 1 FROM revocation r WHERE r.issuer = d.delegator AND r.jti = d.jti)
"""
_ROWS = """
SELECT issuer, r.jti, r.revoked_us, r.expires_us, recorded_us, d.revoked_us, d.expires_us
FROM revocation r LEFT JOIN delegation d ON d.delegator = issuer AND d.jti = r.jti AND d.revoked_us IS NOT NULL
"""


class Revocations:
    """Delegations are held to their own entries elsewhere; a list that was imported may say earlier and later times."""

    kinds = ("delegation.revoked", "revocations.imported", "revocation.changed")

    def __init__(self) -> None:
        self.log = Standing("revocation")
        self._lists = 0
        self._unseen: dict[tuple[str, str], _Said] = {}
        self._changed: dict[tuple[str, str], _Said] = {}

    def do(self, entry: Entry) -> None:
        """Remember which tokens were revoked before anybody showed them, and what lists said of others."""
        told = entry.details
        if entry.kind == "revocations.imported":
            self._lists += "changed" not in told  # an earlier one, which did not say what it changed
        elif entry.kind == "revocation.changed":
            said = _Said(entry.seq, entry.at_us, told["expires_us"], told["revoked_us"])
            self._changed[told["issuer"], told["jti"]] = said
        elif told["id"] is None:
            expires_us = datetime_us(datetime.fromisoformat(told["expires_at"]))
            said = _Said(entry.seq, entry.at_us, expires_us, told.get("revoked_us"))
            self._unseen.setdefault((told["issuer"], told["jti"]), said)

    def compare(self, connection: apsw.Connection) -> Tally:
        """Hold the rows to revoked delegations, and to what lists said of tokens that nobody has shown."""
        log, count = self.log, 0
        newest_us = fetch(connection, "SELECT max(timestamp_us) FROM audit")[0][0] or 0
        is_exact = not self._lists and not log.erased
        for issuer, jti, revoked_us, expires_us, recorded_us, known_us, end_us in fetch(connection, _ROWS):
            count += 1
            where = f"revocation of {jti} by {issuer}"
            unseen = self._unseen.pop((issuer, jti), None)
            said = self._changed.pop((issuer, jti), unseen)
            if said is not None:
                if not said.is_so(revoked_us, expires_us, recorded_us, is_exact=is_exact):
                    log.findings.add(f"{where}: its times are not what entry {said.seq} says")
            elif known_us is not None:
                is_so = (revoked_us, expires_us, recorded_us) == (known_us, end_us, known_us)
                if not is_so and (is_exact or expires_us < end_us):
                    log.findings.add(f"{where}: its times are not those of the delegation that was revoked")
            elif log.was_lost(recorded_us):
                log.retired += 1
            else:
                log.findings.add(f"{where}: nothing in the log says so")
        for (name,) in fetch(connection, _MISSING, (newest_us,)):
            log.findings.add(f"revocation of delegation {name} is not there, and the log says that it was revoked")
        for (issuer, jti), said in (self._unseen | self._changed).items():
            if said.expires_us > newest_us:
                log.findings.add(f"revocation of {jti} by {issuer} is not there, and entry {said.seq} says so")
        return log.tally(count)


class _Said(msgspec.Struct, frozen=True):
    """What an entry says of a revocation; `revoked_us` is None in those of earlier builds."""

    seq: int
    at_us: int
    expires_us: int
    revoked_us: int | None

    def is_so(self, revoked_us: int, expires_us: int, recorded_us: int, *, is_exact: bool) -> bool:
        """Whether a row is as said, or, unless `is_exact`, what later lists may have made of that."""
        if is_exact and self.revoked_us is not None:
            return (revoked_us, expires_us, recorded_us) == (self.revoked_us, self.expires_us, self.at_us)
        is_later = recorded_us >= self.at_us and expires_us >= self.expires_us
        return is_later and (self.revoked_us is None or revoked_us <= self.revoked_us)
