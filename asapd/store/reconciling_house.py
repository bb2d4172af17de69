"""Whether what the house decided is what the log says: keys, maintenance, silences, acknowledgements, blind time.

All of it, with the directory and what is revoked, is read from the log in one walk.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import apsw
import msgspec

from asapd.core.audit import read_details
from asapd.store.erasures import Erasures
from asapd.store.findings import Tally
from asapd.store.keys import list_keys, unsaid_digest
from asapd.store.numbered_rows import count_gone_of
from asapd.store.reconciling_directory import AgentEvents, AgentKeys, Agents, Manifests, Promises
from asapd.store.reconciling_retention import Retired
from asapd.store.reconciling_revocations import Revocations
from asapd.store.reconciling_witnessing import Cosignatures, WitnessedLogs
from asapd.store.rows import fetch
from asapd.store.standing import Entry, Standing, StandingRow

STEP = 5_000


class Part(Protocol):
    """One table: the kinds of entries that are about it, what they come to, and the rows held to that."""

    @property
    def kinds(self) -> tuple[str, ...]:
        """The types of these entries."""

    @property
    def log(self) -> Standing:
        """What they come to."""

    def do(self, entry: Entry) -> None:
        """Take in the next entry of one of the kinds."""

    def compare(self, connection: apsw.Connection) -> Tally:
        """Hold the rows to all that was taken in."""


def read_house(connection: apsw.Connection, erasures: Erasures) -> tuple[Part, ...]:
    """Take in what the log says of all these tables, to be compared with them at the same moment."""
    parts: tuple[Part, ...] = (
        _ApiKeys(),
        Agents(),
        AgentKeys(),
        AgentEvents(),
        Manifests(),
        Promises(),
        _Maintenance(),
        _Silences(),
        _Acknowledgements(),
        _Blind(),
        _Credits(),
        Retired(),
        Revocations(),
        Cosignatures(connection),
        WitnessedLogs(),
    )
    by_kind: dict[str, list[Part]] = {}
    for part in parts:
        for kind in part.kinds:
            by_kind.setdefault(kind, []).append(part)
    kinds = ", ".join(f"'{kind}'" for kind in by_kind)
    after = 0
    while found := fetch(
        connection,
        "SELECT seq, event_type, timestamp_us, actor, subject, details FROM audit "
        f"WHERE seq > ? AND event_type IN ({kinds}) ORDER BY seq LIMIT ?",
        (after, STEP),
    ):
        for seq, kind, at_us, actor, subject, details in found:
            for part in by_kind[kind]:
                if details is None:
                    part.log.lose(seq, at_us, is_retired=erasures.is_retired(seq))
                else:
                    _take_in(part, seq, kind, at_us, actor, subject, details)
        after = found[-1][0]
    return parts


def _take_in(part: Part, seq: int, kind: str, at_us: int, actor: str, subject: str, details: str) -> None:
    """Have a part take in an entry. One that says what no build ever said is a finding, and hides no other."""
    part.log.entries += 1
    try:
        part.do(Entry(seq, kind, at_us, actor, subject, read_details(details)))
    except (ValueError, ArithmeticError, LookupError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        part.log.findings.add(f"{part.log.table}: entry {seq} ({kind} {subject}) is none of asapd's, {reason}")


class _ApiKeys:
    kinds = ("key.created", "key.revoked")

    def __init__(self) -> None:
        self.log = Standing("api_key")

    def do(self, entry: Entry) -> None:
        if entry.kind == "key.created":
            self.log.say(entry.subject, entry.seq, **entry.details, created_us=entry.at_us, revoked_us=None)
        else:
            self.log.say(entry.subject, entry.seq, revoked_us=entry.at_us)

    def compare(self, connection: apsw.Connection) -> Tally:
        return self.log.compare(
            StandingRow(key.id, key.created_us, {**msgspec.to_builtins(key), "row_digest": unsaid_digest(key)})
            for key in list_keys(connection)
        )


class _Maintenance:
    kinds = ("maintenance.declared", "maintenance.ended")

    def __init__(self) -> None:
        self.log = Standing("maintenance")

    def do(self, entry: Entry) -> None:
        more: dict[str, Any] = {"ended_by": entry.actor}
        if entry.kind == "maintenance.declared":
            more = {"declared_us": entry.at_us, "declared_by": entry.actor, "ended_by": None}
        self.log.say(entry.details["id"], entry.seq, **entry.details, **more)

    def compare(self, connection: apsw.Connection) -> Tally:
        columns = "id, agent, start_us, end_us, reason, declared_us, declared_by, ended_us, ended_by"
        return self.log.compare(_rows(connection, f"SELECT {columns} FROM maintenance", columns, "declared_us"))


class _Silences:
    kinds = ("silence.added", "silence.removed")

    def __init__(self) -> None:
        self.log = Standing("silence")
        self._newest_us = 0

    def do(self, entry: Entry) -> None:
        if entry.kind == "silence.added":
            self._newest_us = max(self._newest_us, entry.at_us)
            self.log.say(entry.subject, entry.seq, **entry.details, created_us=entry.at_us)
        else:
            self.log.say(entry.subject, entry.seq, ends_us=entry.at_us)

    def compare(self, connection: apsw.Connection) -> Tally:
        columns = "id, agent, breach_type, severity, tenant, created_us, ends_us, author, comment"
        there = list(_rows(connection, f"SELECT {columns} FROM silence", columns, "created_us"))
        kept = {row.key for row in there}
        newest_us = max(self._newest_us, self.log.lost_us)
        for key in self.log.known():
            said = self.log.said(key)
            if key not in kept and said is not None and said["ends_us"] < newest_us:
                self.log.forget(key)  # one that was over is forgotten when another is added
        return self.log.compare(there)


class _Acknowledgements:
    kinds = ("breach.acknowledged",)

    def __init__(self) -> None:
        self.log = Standing("breach_ack")

    def do(self, entry: Entry) -> None:
        said = {"actor": entry.actor, "at_us": entry.at_us, "comment": entry.details["comment"]}
        self.log.say(entry.subject, entry.seq, **said)

    def compare(self, connection: apsw.Connection) -> Tally:
        columns = "breach, at_us, actor, comment"
        return self.log.compare(_rows(connection, f"SELECT {columns} FROM breach_ack", columns, "at_us"))


class _Credits:
    kinds = ("sla.credits",)

    def __init__(self) -> None:
        self.log = Standing("credit_terms")
        self._count: Counter[int] = Counter()

    def do(self, entry: Entry) -> None:
        told = entry.details
        self._count[told["since_us"]] += 1
        tiers = [[tier["below"], tier["credit"]] for tier in told["tiers"]]
        self.log.say((told["since_us"], self._count[told["since_us"]]), entry.seq, tiers=tiers)

    def compare(self, connection: apsw.Connection) -> Tally:
        count_gone_of(connection, "credit_terms", self.log.findings)
        return self.log.compare(self._rows(connection))

    def _rows(self, connection: apsw.Connection) -> Iterator[StandingRow]:
        count: Counter[int] = Counter()
        newest = 0
        for seq, since_us, text in fetch(connection, "SELECT seq, since_us, tiers FROM credit_terms ORDER BY seq"):
            tiers = msgspec.json.decode(text)
            if seq == 1 and not tiers:
                continue  # that nothing is given back from the start has no entry
            count[since_us] += 1
            newest = self.log.follow((since_us, count[since_us]), seq, newest)
            yield StandingRow((since_us, count[since_us]), since_us, {"tiers": tiers})


class _Blind:
    kinds = ("watch.interrupted", "watch.corrected")

    def __init__(self) -> None:
        self.log = Standing("blind")

    def do(self, entry: Entry) -> None:
        told = entry.details
        if entry.kind == "watch.interrupted":
            known = self.log.said(told["start_us"]) or told
            end_us = max(known["end_us"], told["end_us"])
            self.log.say(told["start_us"], entry.seq, cause=known["cause"], end_us=end_us)
            return
        for start_us in self.log.known():
            if isinstance(start_us, int) and start_us >= told["after_us"]:
                self.log.forget(start_us)
        if self.log.said(told["before_us"]) is not None:
            self.log.say(told["before_us"], entry.seq, end_us=entry.at_us)

    def compare(self, connection: apsw.Connection) -> Tally:
        columns = "start_us, end_us, cause"
        return self.log.compare(_rows(connection, f"SELECT {columns} FROM blind", columns, "end_us"))


def _rows(connection: apsw.Connection, sql: str, columns: str, made: str) -> Iterable[StandingRow]:
    """Rows by their first column."""
    names = columns.split(", ")
    for row in fetch(connection, sql):
        values = dict(zip(names, row, strict=True))
        yield StandingRow(row[0], values[made], values)
