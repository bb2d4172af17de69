"""The directory, and uptime as probes tell it: stored segments say what the timeline in memory says."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import apsw
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from asapd.core.errors import Refusal
from asapd.core.row_digest import row_digest
from asapd.core.uptime import Segment, UptimeTimeline
from asapd.store import agent_history, agents, audit
from asapd.store.sla_queries import segments_between
from asapd.store.units.agents import (
    AgentRecord,
    AgentsChanged,
    PutAgent,
    RecordManifest,
    RecordProbe,
    RemoveAgent,
    SyncAgents,
)
from asapd.store.units.exchange import AnyUnit, Envelope
from asapd.store.units.unit import RowWritten
from asapd.store.visibility import EVERYTHING, Visibility
from asapd.store.writer import Writer

NOW_US = 1_795_169_203_000_000
A, B, C = (f"urn:asap:agent:{name}" for name in "abc")
AGENT = AgentRecord(A, "http://127.0.0.1:9000", "default", tier="gold", sla={"availability": 99.5})
PROBE = RecordProbe(
    agent=A,
    ts_us=NOW_US,
    up=True,
    status="healthy",
    latency_us=1500,
    reason=None,
    detail=None,
    hold_us=100,
    state="healthy",
    since_us=NOW_US,
    ok_streak=1,
    fail_streak=0,
)

OpenStore = Callable[[], AbstractContextManager[apsw.Connection]]


@pytest.fixture
def submit(connection: apsw.Connection) -> Callable[[AnyUnit], Any]:
    writer = Writer(connection)
    return lambda unit: writer.run([Envelope(1, unit, False)])[0].result


def put(agent: AgentRecord) -> PutAgent:
    return PutAgent(agent, "key:x", NOW_US)


def sync(*records: AgentRecord) -> SyncAgents:
    return SyncAgents(list(records), "asapd", NOW_US)


def listed(connection: apsw.Connection, visible: Visibility = EVERYTHING) -> list[tuple[str, str, str]]:
    return [(agent.id, agent.url, agent.origin) for agent in agents.directory(connection, visible)]


# --- directory


def test_putting_adds_then_changes_then_does_nothing(
    connection: apsw.Connection, submit: Callable[[AnyUnit], Any]
) -> None:
    assert submit(put(AGENT)) == AgentsChanged(added=[A])
    assert submit(put(AGENT)) == AgentsChanged()
    assert submit(put(replace(AGENT, url="http://x"))) == AgentsChanged(changed=[A])
    assert listed(connection) == [(A, "http://x", "api")]
    entries = audit.list_entries(connection, audit.AuditFilter(), 10, 0, descending=False)
    assert [(entry["event_type"], entry["details"]["url"]) for entry in entries] == [
        ("agent.added", "http://127.0.0.1:9000"),
        ("agent.changed", "http://x"),
    ]


def test_syncing_makes_the_configured_part_equal_and_leaves_the_rest(
    connection: apsw.Connection, submit: Callable[[AnyUnit], Any]
) -> None:
    submit(put(replace(AGENT, id=C)))
    b = replace(AGENT, id=B)
    assert submit(sync(AGENT, b)) == AgentsChanged(added=[A, B])
    assert submit(sync(AGENT, b)) == AgentsChanged()
    assert submit(sync(replace(b, sla=None))) == AgentsChanged(changed=[B], removed=[A])
    assert listed(connection) == [(B, AGENT.url, "config"), (C, AGENT.url, "api")]
    assert submit(sync()) == AgentsChanged(removed=[B])


def test_a_configured_agent_takes_over_one_of_the_api_and_cannot_be_changed_by_it(
    connection: apsw.Connection, submit: Callable[[AnyUnit], Any]
) -> None:
    submit(put(AGENT))
    assert submit(sync(AGENT)) == AgentsChanged(changed=[A])
    for refusal in (submit(put(AGENT)), submit(RemoveAgent(A, "key:x", NOW_US))):
        assert isinstance(refusal, Refusal)
        assert refusal.code == "agent_configured"
    assert listed(connection) == [(A, AGENT.url, "config")]


def test_removing_takes_an_agent_out_and_keeps_its_history(
    connection: apsw.Connection, submit: Callable[[AnyUnit], Any]
) -> None:
    submit(put(AGENT))
    submit(PROBE)
    assert submit(RemoveAgent(A, "key:x", NOW_US)) == AgentsChanged(removed=[A])
    refusal = submit(RemoveAgent(A, "key:x", NOW_US))
    assert isinstance(refusal, Refusal)
    assert refusal.code == "agent_not_found"
    assert len(agents.probes(connection, A, None, None, 10, None)) == 1


def test_the_directory_shows_each_agent_with_its_newest_manifest_and_probe(
    connection: apsw.Connection, submit: Callable[[AnyUnit], Any]
) -> None:
    submit(put(AGENT))
    submit(put(AgentRecord(B, "http://b", "other")))
    manifest = RecordManifest(A, NOW_US, "d1", b"{}", "verified", {"availability": 99}, None, 60, "key")
    assert submit(manifest) == RowWritten(1)
    submit(replace(manifest, digest="d2", sla=None, sla_error="bad"))
    submit(PROBE)
    submit(replace(PROBE, ts_us=NOW_US + 1, up=False, reason="refused", state="unhealthy", fail_streak=1))
    first, second = agents.directory(connection, EVERYTHING)
    assert (first.sla, first.state, first.fail_streak) == ({"availability": 99.5}, "unhealthy", 1)
    assert first.manifest is not None
    assert (first.manifest.digest, first.manifest.sla, first.manifest.sla_error) == ("d2", None, "bad")
    assert first.last_probe is not None
    assert (first.last_probe.ts_us, first.last_probe.reason) == (NOW_US + 1, "refused")
    assert (second.id, second.manifest, second.last_probe, second.state) == (B, None, None, "unknown")
    assert agents.directory(connection, EVERYTHING, B) == [second]
    assert listed(connection, Visibility("other")) == [(B, "http://b", "api")]
    assert listed(connection, Visibility(None, (A,))) == [(A, AGENT.url, "api")]


# --- probes


def test_probes_are_listed_newest_first_in_pages(connection: apsw.Connection, submit: Callable[[AnyUnit], Any]) -> None:
    for offset in range(4):
        submit(replace(PROBE, ts_us=NOW_US + offset))

    def offsets(*arguments: Any) -> list[int]:
        return [probe.ts_us - NOW_US for _, probe in agents.probes(connection, A, *arguments)]

    assert offsets(None, None, 10, None) == [3, 2, 1, 0]
    assert offsets(NOW_US + 1, NOW_US + 3, 10, None) == [2, 1]
    assert offsets(None, None, 2, 4) == [2, 1]
    assert agents.probes(connection, B, None, None, 10, None) == []
    assert [fact.seq for fact in agents.probes_after(connection, 2, 10)] == [3, 4]


def test_a_change_of_state_is_kept_with_its_reason(
    connection: apsw.Connection, submit: Callable[[AnyUnit], Any]
) -> None:
    submit(put(AGENT))
    submit(replace(PROBE, transition_from="unknown"))
    submit(replace(PROBE, ts_us=NOW_US + 1, state="unhealthy", transition_from="healthy", reason="timeout"))
    assert agent_history.transitions(connection, EVERYTHING, A, 10) == [
        (NOW_US + 1, "healthy", "unhealthy", "timeout"),
        (NOW_US, "unknown", "healthy", None),
    ]
    (entry,) = audit.list_entries(connection, audit.AuditFilter(event_type="agent.state"), 1, 10, descending=True)
    (digest,) = entry["details"].pop("history")
    row = connection.execute(f"SELECT {agent_history.COLUMNS} FROM agent_event ORDER BY seq DESC").fetchone()
    assert row is not None
    assert digest == row_digest(row)
    assert entry["details"] == {"from": "healthy", "id": A, "reason": "timeout", "to": "unhealthy"}


def test_a_probe_number_is_never_given_twice_even_after_a_sweep(
    connection: apsw.Connection, submit: Callable[[AnyUnit], Any]
) -> None:
    submit(PROBE)
    connection.execute("DELETE FROM probe")
    assert submit(PROBE) == RowWritten(2)


@settings(max_examples=150, deadline=None)
@given(
    steps=st.lists(
        st.tuples(st.sampled_from((A, B)), st.integers(-3, 8), st.booleans(), st.integers(0, 6)), max_size=25
    )
)
def test_stored_segments_equal_what_each_microsecond_was(
    open_store: OpenStore, steps: list[tuple[str, int, bool, int]]
) -> None:
    truth: dict[str, dict[int, bool]] = {A: {}, B: {}}
    newest = dict.fromkeys((A, B), 0)
    timelines = {A: UptimeTimeline(), B: UptimeTimeline()}
    ts_us = NOW_US + 10
    with open_store() as connection:
        writer = Writer(connection)
        for agent, step, up, hold_us in steps:
            ts_us += step
            writer.run([Envelope(1, replace(PROBE, agent=agent, ts_us=ts_us, up=up, hold_us=hold_us), False)])
            timelines[agent].extend(ts_us, ts_us + hold_us, up)
            if ts_us >= newest[agent]:
                newest[agent] = ts_us
                kept = {moment: was for moment, was in truth[agent].items() if moment < ts_us}
                truth[agent] = kept | dict.fromkeys(range(ts_us, ts_us + hold_us), up)
        segments = {agent: segments_between(connection, agent, 0, 2**62) for agent in (A, B)}
        late = {agent: segments_between(connection, agent, NOW_US + 20, 2**62) for agent in (A, B)}
    for agent, own in segments.items():
        assert own == sorted(own, key=lambda one: one.start_us)
        told: dict[int, bool] = {}
        for segment in own:
            assert segment.start_us <= segment.end_us
            stretch = dict.fromkeys(range(segment.start_us, segment.end_us), segment.up)
            assert told.keys().isdisjoint(stretch)
            told |= stretch
        assert told == truth[agent]
        assert own == timelines[agent].segments(0, 2**62)
        assert late[agent] == [one for one in own if one.end_us > NOW_US + 20]
        refilled = UptimeTimeline()
        for segment in own:
            refilled.extend(segment.start_us, segment.end_us, segment.up)
        assert refilled.uptime(0, 2**62) == timelines[agent].uptime(0, 2**62)


def test_a_probe_cuts_the_one_before_it_short(connection: apsw.Connection, submit: Callable[[AnyUnit], Any]) -> None:
    submit(PROBE)
    submit(replace(PROBE, ts_us=NOW_US + 40, up=False))
    assert segments_between(connection, A, 0, 2**62) == [
        Segment(NOW_US, NOW_US + 40, True),
        Segment(NOW_US + 40, NOW_US + 140, False),
    ]
