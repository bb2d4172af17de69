"""Whether the directory is what the log says: agents, their keys, their history, their manifests and promises."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import apsw
import msgspec

from asapd.core.agent_keys import AgentKey
from asapd.core.masking import is_masked_form
from asapd.core.row_digest import row_digest
from asapd.store import agent_history
from asapd.store.agent_keys import keys_of, read_key
from asapd.store.findings import Tally
from asapd.store.numbered_rows import count_gone_of, rows_of
from asapd.store.rows import Row, fetch
from asapd.store.standing import Entry, Standing, StandingRow
from asapd.store.visibility import Visibility
from asapd.wire.keys import public_base64

STEP = 2_000


class Agents:
    """The directory itself, but for the state of health, which probes make."""

    kinds = ("agent.added", "agent.changed", "agent.removed", "agent.key_retired")

    def __init__(self) -> None:
        self.log = Standing("agent")

    def do(self, entry: Entry) -> None:
        """Take in what an agent is from now on."""
        told = entry.details
        match entry.kind:
            case "agent.removed":
                self.log.end(entry.subject, entry.seq)
            case "agent.key_retired":
                self._retire_key(entry)
            case _:
                made = {"added_us": entry.at_us} if entry.kind == "agent.added" else {}
                said = {name: value for name, value in told.items() if name != "history"}
                self.log.say(entry.subject, entry.seq, **said, **made)

    def _retire_key(self, entry: Entry) -> None:
        """A key that was posted with its agent and is retired by itself leaves the agent's row as well."""
        known = self.log.said(entry.subject)
        if known is None or entry.details["source"] != "api" or known["origin"] != "api":
            return
        if read_key(known["public_key"]) == read_key(entry.details["public_key"]):
            self.log.say(entry.subject, entry.seq, public_key=None)

    def compare(self, connection: apsw.Connection) -> Tally:
        """Hold the rows to it."""
        names = ("id", "url", "tenant", "origin", "public_key", "tier", "sla", "health", "added_us")
        rows = fetch(connection, f"SELECT {', '.join(names)} FROM agent")
        for agent, tenant, held_since_us in fetch(connection, "SELECT id, tenant, held_since_us FROM agent"):
            # By their history, which is held to the log itself: what was before is another tenant's.
            if not agent_history.may_be_held_since(connection, tenant, agent, held_since_us):
                known_us = agent_history.held_since_us(connection, Visibility(tenant=tenant), agent)
                told = f"held_since_us is {held_since_us}, and its history comes to {known_us}"
                self.log.findings.add(f"agent {agent}: {told}")
        return self.log.compare(StandingRow(row[0], row[-1], dict(zip(names, row, strict=True))) for row in rows)


class AgentKeys:
    """What verifies the tokens and manifests of agents. Of each key and source, the last that was said.

    Some changes have no entry of their own: a manifest shows a key that another source has, and an agent that leaves
    takes keys along that verified nothing any more, as does one whose manifest claims a retired key again.
    """

    kinds = (
        "agent.key_added",
        "agent.key_claimed",
        "agent.key_withdrawn",
        "agent.key_retired",
        "agent.removed",
        "agent.added",
        "agent.changed",
    )

    def __init__(self) -> None:
        self.log = Standing("agent_key")
        self._added: set[tuple[str, str]] = set()
        self._told: set[tuple[str, str]] = set()
        self._left: set[str] = set()
        self._claims: dict[str, set[tuple[str, str, str]]] = {}
        self._tenants: dict[str, str | None] = {}

    def do(self, entry: Entry) -> None:
        """Take in what became of a key."""
        told, agent = entry.details, entry.subject
        if entry.kind == "agent.removed":
            self._leave(agent)
            return
        if entry.kind in ("agent.added", "agent.changed"):
            # Given to another tenant it leaves its keys behind as well; what it had may have been erased. Entries of
            # older builds do not say whose it is.
            tenant = told.get("tenant")
            if entry.kind == "agent.changed" and (tenant is None or self._tenants.get(agent) != tenant):
                self._leave(agent)
            self._tenants[agent] = tenant
            return
        key = (agent, told["public_key"], told["source"])
        self._told.add(key[:2])
        retired = {name: told[name] for name in ("retired_us",) if name in told}  # earlier ones do not say
        match entry.kind:
            case "agent.key_added":
                self._added.add(key[:2])
                self.log.say(key, entry.seq, state="active", since_us=entry.at_us, until_us=None, **retired)
            case "agent.key_claimed":
                self._claims.setdefault(agent, set()).add(key)
                self.log.say(key, entry.seq, state="claimed", since_us=entry.at_us, until_us=None, **retired)
            case "agent.key_withdrawn":
                self.log.say(key, entry.seq, state="retired", until_us=entry.at_us, **retired)
            case _:
                if (self.log.said(key) or {}).get("state") == "claimed":
                    self.log.forget(key)  # somebody may have confirmed it since, of which no entry says when
                self.log.say(key, entry.seq, state="retired", until_us=told["until_us"], **retired)

    def _leave(self, agent: str) -> None:
        self._left.add(agent)
        for key in self._claims.pop(agent, ()):
            if (self.log.said(key) or {}).get("state") == "claimed":
                self.log.forget(key)

    def compare(self, connection: apsw.Connection) -> Tally:
        """Hold the rows to it."""
        keys = keys_of(connection)
        there = {(key.agent, public_base64(key.public_key)) for key in keys if key.source == "former"}
        rows = list(self._judged(keys))
        found = {row.key for row in rows}
        for key in self.log.known():
            said = self.log.said(key)
            if key in found or said is None or not isinstance(key, tuple) or said["state"] == "active":
                continue
            if said["state"] != "claimed" and (key[:2] in there or key[0] in self._left):
                self.log.forget(key)
        return self.log.compare(rows)

    def _judged(self, keys: list[AgentKey]) -> Iterator[StandingRow]:
        elsewhere = {(key.agent, key.public_key) for key in keys if key.source != "manifest"}
        for key in keys:
            name = (key.agent, public_base64(key.public_key), key.source)
            was_added = name[:2] in self._added
            is_known = was_added or (self.log.erased > 0 and (key.agent, key.public_key) in elsewhere)
            is_told = (self.log.said(name) or {}).get("state") == "active"
            is_shown = key.source == "manifest" and key.state == "active" and is_known and not is_told
            if is_shown or (key.source == "former" and key.state == "retired" and name[:2] in self._told):
                self.log.forget(name)  # no entry says so, and the key is one that the log knows
                continue
            yield StandingRow(name, key.since_us, msgspec.to_builtins(key))


class Manifests:
    """Every version of a manifest, by its agent and time; of two of one moment in their order."""

    kinds: tuple[str, ...] = ("agent.manifest",)

    def __init__(self) -> None:
        self.log = Standing("manifest")
        self._count: Counter[tuple[str, int]] = Counter()

    def do(self, entry: Entry) -> None:
        """Take in one version."""
        at = (entry.subject, entry.at_us)
        self._count[at] += 1
        said = {name: value for name, value in entry.details.items() if name not in {"history", "id"}}
        self.log.say((*at, self._count[at]), entry.seq, **said)

    def compare(self, connection: apsw.Connection) -> Tally:
        """Hold the rows to it."""
        count_gone_of(connection, "manifest", self.log.findings)
        return self.log.compare(self._rows(connection))

    def _rows(self, connection: apsw.Connection) -> Iterator[StandingRow]:
        columns = "seq, agent, fetched_us, digest, verification, sla_error, body, sla, ttl_seconds, public_key"
        count: Counter[tuple[str, int]] = Counter()
        newest = 0
        for seq, agent, at_us, digest, verification, error, *unsaid in rows_of(
            connection, "manifest", columns, *_bounds(connection, "manifest")
        ):
            count[agent, at_us] += 1
            values = {"digest": digest, "verification": verification, "sla_error": error}
            values["row_digest"] = row_digest(unsaid)
            newest = self.log.follow((agent, at_us, count[agent, at_us]), seq, newest)
            yield StandingRow((agent, at_us, count[agent, at_us]), at_us, values)


class Promises:
    """What agents were held to, by agent and time; of two of one moment in their order.

    That one promises nothing from the start has no entry. What an upgrade took from manifests has theirs.
    """

    kinds = ("agent.promise", "agent.manifest")

    def __init__(self) -> None:
        self.log = Standing("promise")
        self._count: Counter[tuple[str, int]] = Counter()
        self._manifests: set[tuple[str, int, str]] = set()

    def do(self, entry: Entry) -> None:
        """Take in what an agent is held to from now on."""
        told = entry.details
        if entry.kind == "agent.manifest":
            self._manifests.add((entry.subject, entry.at_us, told["digest"]))
            return
        at = (entry.subject, told["since_us"])
        self._count[at] += 1
        self.log.say((*at, self._count[at]), entry.seq, **{name: value for name, value in told.items() if name != "id"})

    def compare(self, connection: apsw.Connection) -> Tally:
        """Hold the rows to it."""
        count_gone_of(connection, "promise", self.log.findings)
        return self.log.compare(self._rows(connection))

    def _rows(self, connection: apsw.Connection) -> Iterator[StandingRow]:
        names = ("seq", "agent", "tenant", "since_us", "source", "sla", "manifest_digest", "error")
        count: Counter[tuple[str, int]] = Counter()
        seen: set[tuple[str, str]] = set()
        newest = 0
        for row in rows_of(connection, "promise", ", ".join(names), *_bounds(connection, "promise")):
            values: dict[str, Any] = dict(zip(names, row, strict=True))
            values["sla"] = None if values["sla"] is None else msgspec.json.decode(values["sla"])
            agent, since_us = values["agent"], values["since_us"]
            is_first = (agent, values["tenant"]) not in seen
            seen.add((agent, values["tenant"]))
            key = (agent, since_us, count[agent, since_us] + 1)
            if is_first and values["source"] is None and values["error"] is None:
                continue
            is_taken_over = (agent, since_us, values["manifest_digest"]) in self._manifests
            if self.log.said(key) is None and is_taken_over and values["source"] == "manifest":
                continue
            count[agent, since_us] += 1
            newest = self.log.follow(key, values["seq"], newest)
            yield StandingRow(key, since_us, values)


class AgentEvents:
    """What happened to agents: each event was written with an entry, of the same time, by the same actor."""

    kinds: tuple[str, ...] = ()

    def __init__(self) -> None:
        self.log = Standing("agent_event")
        self._newest = 0

    def do(self, entry: Entry) -> None:
        """Nothing: entries of events may be very many, and are looked up by their times."""

    def compare(self, connection: apsw.Connection) -> Tally:
        """Hold every event to the entry of its moment, and see that none is missing between them."""
        after, last = _bounds(connection, "agent_event")
        columns = f"seq, {agent_history.COLUMNS}"
        count, step = 0, []
        for row in rows_of(connection, "agent_event", columns, after, last):
            count += 1
            step.append(row)
            if len(step) == STEP:
                self._step(connection, step)
                step = []
        self._step(connection, step)
        # Events and their entries are in one order: behind the last event there is no entry of another.
        for seq, kind in fetch(connection, _OF_NO_EVENT, (self._newest,)):
            self.log.findings.add(f"entry {seq} ({kind}): there is no such row in agent_event")
        count_gone_of(connection, "agent_event", self.log.findings)
        return self.log.tally(count)

    def _step(self, connection: apsw.Connection, events: list[Row]) -> None:
        times = msgspec.json.encode(sorted({row[3] for row in events})).decode()
        said: dict[tuple[str | None, int], list[tuple[int, str, str, dict[str, Any]]]] = {}
        lost: set[tuple[str, int]] = set()
        for entry, kind, at_us, actor, subject, details in fetch(
            connection,
            "SELECT seq, event_type, timestamp_us, actor, subject, details FROM audit "
            "WHERE timestamp_us IN (SELECT value FROM json_each(?)) AND event_type GLOB 'agent.*'",
            (times,),
        ):
            if details is None:
                lost.add((kind, at_us))
            else:
                said.setdefault((subject, at_us), []).append((entry, kind, actor, msgspec.json.decode(details)))
        taken: set[tuple[int, str]] = set()
        for seq, *values in events:
            agent, _, at_us, event, actor, old, new, reason, _ = values
            kinds = _TOLD_AS.get(event, (f"agent.{event}",))
            states = {"from": old, "to": new}
            for entry, kind, by, told in said.get((agent, at_us), ()):
                if "history" in told:
                    is_same = row_digest(values) in told["history"]
                else:  # earlier ones say less
                    is_same = "from" not in told or (
                        {name: told[name] for name in states} == states and is_masked_form(told["reason"], reason)
                    )
                if kind in kinds and actor == by and is_same and (entry, event) not in taken:
                    taken.add((entry, event))
                    self.log.entries += 1
                    if entry < self._newest:
                        self.log.findings.add(f"agent_event row {seq} was not written where entry {entry} was")
                    self._newest = max(self._newest, entry)
                    break
            else:
                if any((kind, at_us) in lost for kind in kinds):
                    self.log.retired += 1
                else:
                    where = f"agent_event row {seq} ({event} of {agent})"
                    self.log.findings.add(f"{where} has no entry in the log that says the same")


_OF_NO_EVENT = (
    "SELECT seq, event_type FROM audit WHERE seq > ? AND event_type GLOB 'agent.*' "
    "AND json_valid(details) AND details ->> 'history' IS NOT NULL ORDER BY seq"
)
_TOLD_AS = {
    "added": ("agent.added", "agent.changed"),
    "removed": ("agent.removed", "agent.changed"),
    "sla_rejected": ("agent.manifest",),
}
"""An agent that another tenant gets is removed from the one and added to the other, and the log has one change."""


def _bounds(connection: apsw.Connection, table: str) -> tuple[int, int]:
    """Behind which number, and up to which, all rows of a table are, forged ones before the first too."""
    first, last = fetch(connection, f"SELECT min(seq), max(seq) FROM {table}")[0]
    return min(first or 0, 1) - 1, last or 0
