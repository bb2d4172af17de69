"""Whether what is revoked is what the log says: each revoked token has its row, and each row somebody who said so."""

from __future__ import annotations

from datetime import datetime

import apsw

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

    kinds = ("delegation.revoked", "revocations.imported")

    def __init__(self) -> None:
        self.log = Standing("revocation")
        self._lists = 0
        self._unseen: dict[tuple[str, str], tuple[int, int, int, int | None]] = {}
        """By issuer and jti the newest entry of a token, its time, and the expiry and the revocation that it says."""

    def do(self, entry: Entry) -> None:
        """Remember which tokens were revoked before anybody showed them."""
        if entry.kind == "revocations.imported":
            self._lists += 1
        elif entry.details["id"] is None:
            told = entry.details
            expires_us = datetime_us(datetime.fromisoformat(told["expires_at"]))
            said = (entry.seq, entry.at_us, expires_us, told.get("revoked_us"))
            self._unseen[told["issuer"], told["jti"]] = said

    def compare(self, connection: apsw.Connection) -> Tally:
        """Hold the rows to revoked delegations, and to what lists said of tokens that nobody has shown."""
        log, count = self.log, 0
        newest_us = fetch(connection, "SELECT max(timestamp_us) FROM audit")[0][0] or 0
        is_exact = not self._lists and not log.erased
        for issuer, jti, revoked_us, expires_us, recorded_us, known_us, end_us in fetch(connection, _ROWS):
            count += 1
            where = f"revocation of {jti} by {issuer}"
            told = self._unseen.pop((issuer, jti), None)
            if told is not None:
                seq, at_us, least_us, most_us = told
                if recorded_us < at_us or expires_us < least_us or (most_us is not None and revoked_us > most_us):
                    log.findings.add(f"{where}: its times are not what entry {seq} says")
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
        for (issuer, jti), (seq, _, expires_us, _) in self._unseen.items():
            if expires_us > newest_us:
                log.findings.add(f"revocation of {jti} by {issuer} is not there, and entry {seq} says so")
        return log.tally(count)
