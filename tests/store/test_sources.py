"""What a source delivered is what a recount of its numbers says, however they came."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from itertools import pairwise

import apsw
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asapd.core.usage import UNKNOWN_COST, UsageEvent
from asapd.store import sources
from asapd.store.sources import SourceFilter, list_sources, runs_of
from asapd.store.units.exchange import Envelope
from asapd.store.units.usage import RecordUsage
from asapd.store.visibility import EVERYTHING, Visibility
from asapd.store.writer import Writer

NOW_US = 1_795_169_203_000_000
A = "urn:asap:agent:a"

OpenStore = Callable[[], AbstractContextManager[apsw.Connection]]


def event(number: int, seq: int | None, agent: str = A, source: str = "s") -> UsageEvent:
    return UsageEvent("t", agent, "c", NOW_US, id=f"e{number}", source=source, source_seq=seq)


def record(writer: Writer, events: list[UsageEvent]) -> None:
    writer.run([Envelope(1, RecordUsage("default", "key:x", NOW_US, events, [UNKNOWN_COST] * len(events)), False)])


@settings(max_examples=150, deadline=None)
@given(batches=st.lists(st.lists(st.integers(0, 30), max_size=8), min_size=1, max_size=6), data=st.data())
def test_gaps_and_repeats_are_those_of_a_recount(
    open_store: OpenStore, batches: list[list[int]], data: st.DataObject
) -> None:
    numbers = [seq for batch in batches for seq in batch]
    resent = data.draw(st.integers(0, len(batches[-1])))
    with open_store() as connection:
        writer = Writer(connection)
        number = 0
        for batch in batches:
            events = [event(number + index, seq) for index, seq in enumerate(batch)]
            number += len(batch)
            record(writer, events)
        record(writer, events[:resent])
        found = [row for _, row in list_sources(connection, SourceFilter(EVERYTHING), 10, None)]
        if not numbers:
            assert found == []
            return
        (row,) = found
        distinct = sorted(set(numbers))
        assert (row["events"], row["resent"]) == (len(numbers), resent)
        seq = row["seq"]
        assert (seq["first"], seq["last"], seq["seen"]) == (distinct[0], distinct[-1], len(distinct))
        assert seq["repeated"] == len(numbers) - len(distinct)
        assert seq["missing"] == distinct[-1] - distinct[0] + 1 - len(distinct)
        gaps = [{"first": low + 1, "last": high - 1} for low, high in pairwise(distinct) if high > low + 1]
        assert seq["gaps"] == gaps[::-1]
        assert row["drift_percent"] == 100 * (seq["missing"] + seq["repeated"]) / seq["expected"]


def test_a_source_without_numbers_has_no_drift(connection: apsw.Connection) -> None:
    record(Writer(connection), [event(1, None), event(2, None, source="")])
    rows = [row for _, row in list_sources(connection, SourceFilter(EVERYTHING), 10, None)]
    assert [(row["source"], row["seq"], row["drift_percent"]) for row in rows] == [
        (None, None, None),
        ("s", None, None),
    ]


def test_a_source_that_numbers_at_random_is_folded_and_still_counted(
    connection: apsw.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "MAX_RANGES", 4)
    writer = Writer(connection)
    record(writer, [event(seq, seq) for seq in range(0, 20, 2)])
    record(writer, [event(100, 3)])
    ((_, row),) = list_sources(connection, SourceFilter(EVERYTHING), 10, None)
    assert connection.execute("SELECT count(*) FROM usage_source_range").get == 4
    assert (row["seq"]["missing"], row["seq"]["untracked"], row["seq"]["expected"]) == (9, 1, 19)


def test_sources_are_filtered_and_paged(connection: apsw.Connection) -> None:
    record(Writer(connection), [event(1, 1), event(2, 1, "urn:asap:agent:b"), event(3, 1, source="z")])
    everything = list_sources(connection, SourceFilter(EVERYTHING), 10, None)
    assert len(everything) == 3
    assert list_sources(connection, SourceFilter(EVERYTHING), 10, everything[0][0]) == everything[1:]
    assert len(list_sources(connection, SourceFilter(EVERYTHING, agent=A), 10, None)) == 2
    assert len(list_sources(connection, SourceFilter(EVERYTHING, source="z"), 10, None)) == 1
    assert len(list_sources(connection, SourceFilter(Visibility(None, ("*:b",))), 10, None)) == 0
    assert len(list_sources(connection, SourceFilter(Visibility(None, ("urn:asap:agent:b",))), 10, None)) == 1


def test_runs_have_no_gap_and_lose_nothing() -> None:
    assert runs_of([5, 1, 2, 2, 9, 8]) == [(1, 2), (5, 5), (8, 9)]
    assert runs_of([]) == []
