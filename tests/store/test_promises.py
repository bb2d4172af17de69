"""What agents were held to is kept in order of time, each of the tenant that the agent had then."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import apsw
import pytest
from msgspec.structs import replace

from asapd.core.types import HOUR_US, MINUTE_US
from asapd.store import migrations, promises
from asapd.store.schema import MIGRATIONS, promise_record
from asapd.store.units.agents import AgentRecord, PutAgent, RecordManifest
from asapd.store.units.exchange import Envelope
from asapd.store.units.promises import PromiseRecord, RecordPromises
from asapd.store.writer import Writer, open_for_writing
from tests.store.older_file import indexes_of_now

A = "urn:asap:agent:a"
T0 = 1_800_000_000_000_000
FIRST = PromiseRecord(A, "default", T0, "manifest", {"availability": "99%"}, "d1")


def test_each_promise_holds_until_the_next_whatever_the_clock_did(tmp_path: Path) -> None:
    with closing(open_for_writing(tmp_path / "asapd.db")) as connection:
        writer = Writer(connection)
        writer.run([Envelope(1, PutAgent(AgentRecord(A, "http://127.0.0.1:1", "default"), "x", T0), False)])
        second, back, third = (
            replace(FIRST, since_us=T0 + hours * HOUR_US, source=source, sla=sla, error=error)
            for hours, source, sla, error in (
                (2, "tier", {"support_hours": "business"}, None),
                (1, "config", {"support_hours": "24/7"}, "no"),
                (3, None, None, None),
            )
        )
        foreign = replace(FIRST, tenant="other")
        writer.run([Envelope(2, RecordPromises([FIRST, second, back, foreign]), False)])
        assert promises.held(connection, A, "default") == [FIRST, back]
        assert promises.held(connection, A, "other") == [foreign]
        assert promises.newest(connection) == [back]
        assert promises.errors(connection) == [(A, "no")]
        writer.run([Envelope(3, RecordPromises([third]), False)])
        assert promises.errors(connection) == []
        hours = [(back.since_us, "24/7"), (third.since_us, None)]
        assert promises.support_hours(connection, third.since_us) == {A: hours}
        assert promises.support_hours(connection, third.since_us + 1) == {}
        told = connection.execute(
            "SELECT details FROM audit WHERE event_type = 'agent.promise' ORDER BY seq"
        ).fetchall()
        assert len(told) == 5
        with pytest.raises(apsw.ConstraintError, match="append-only"):
            connection.execute("DELETE FROM promise")


def test_a_manifest_that_is_read_at_once_is_the_promise_from_the_start(tmp_path: Path) -> None:
    with closing(open_for_writing(tmp_path / "asapd.db")) as connection:
        writer = Writer(connection)
        unknown = replace(FIRST, source=None, sla=None, manifest_digest=None)
        soon, late = (replace(FIRST, since_us=T0 + after_us) for after_us in (10 * MINUTE_US, 10 * MINUTE_US + 1))
        writer.run([Envelope(1, RecordPromises([unknown, soon]), False)])
        assert promises.held(connection, A, "default") == [FIRST]
        other = [replace(one, agent="urn:asap:agent:b") for one in (unknown, late)]
        writer.run([Envelope(2, RecordPromises(other), False)])
        assert promises.held(connection, "urn:asap:agent:b", "default") == other
        assert connection.execute("SELECT count(*) FROM audit WHERE event_type = 'agent.promise'").get == 2


def test_an_older_file_keeps_what_is_certain_of_its_past(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Versions of manifests count, but not of agents that may have had another promise, or another owner."""
    path = tmp_path / "asapd.db"
    agents = {
        "plain": ({}, [({"availability": "99%"}, None), (None, "bad"), ({"availability": 99.5}, None)]),
        "own": ({"sla": {"availability": "90%"}}, [({"availability": "99%"}, None)]),
        "without": ({}, [({"availability": "99%"}, None), (None, None)]),
    }
    with monkeypatch.context() as patched:
        patched.setattr(migrations, "MIGRATIONS", MIGRATIONS[: MIGRATIONS.index(promise_record.SCRIPT)])
        with closing(open_for_writing(path)) as connection, indexes_of_now(connection):
            writer, number = Writer(connection), 0
            for name, (fields, versions) in agents.items():
                agent = AgentRecord(f"urn:asap:agent:{name}", "http://127.0.0.1:1", "default", **fields)
                writer.run([Envelope(number := number + 1, PutAgent(agent, "x", T0), False)])
                for sla, error in versions:
                    number += 1
                    unit = RecordManifest(agent.id, T0 + number, f"d{number}", b"", "unsigned", sla, error, None, None)
                    writer.run([Envelope(number, unit, False)])
    with closing(open_for_writing(path)) as connection:
        found = promises.newest(connection)
        assert [(one.agent, one.since_us, one.manifest_digest) for one in found] == [
            ("urn:asap:agent:plain", T0 + 4, "d4")
        ]
        assert [one.sla for one in promises.held(connection, found[0].agent, "default")] == [
            {"availability": "99%"},
            {"availability": 99.5},
        ]
