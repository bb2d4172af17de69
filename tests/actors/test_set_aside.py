"""Spans of far fewer tokens than the metrics that they won over are found, and nothing is made of chance."""

from __future__ import annotations

from itertools import count

import pytest

from asapd.actors import set_aside
from asapd.actors.set_aside import SAY_EVERY_US, STRETCH_US, Gap, SetAside
from asapd.core.types import MINUTE_US, SECOND_US

R = b"resource"
A = "urn:asap:agent:a"
_numbers = count()


def told(compare: SetAside, at_us: int, *, spans: int = 0, metrics: int = 0, resource: bytes = R) -> list[Gap]:
    aside = [(resource, f"metric:{next(_numbers)}", metrics)] if metrics else []
    return compare.note(at_us, {resource: A}, spans={resource: spans} if spans else {}, metrics=aside)


def test_metrics_of_more_than_twice_the_tokens_of_spans_are_a_gap_after_ten_minutes() -> None:
    for metrics, is_gap in ((200, False), (201, True)):
        compare = SetAside()
        assert told(compare, 0, spans=100, metrics=metrics) == []
        assert told(compare, STRETCH_US - 1, spans=1, metrics=2) == []
        found = told(compare, STRETCH_US, spans=1)
        assert found == ([Gap(A, 101, 203)] if is_gap else [])
        assert compare.missing_tokens == (102 if is_gap else 0)


def test_a_gap_is_counted_each_time_and_said_once_an_hour() -> None:
    compare = SetAside()
    told(compare, 0, metrics=10)
    said = [at_us for at_us in range(STRETCH_US, 2 * SAY_EVERY_US, STRETCH_US) if told(compare, at_us, metrics=10)]
    assert said == [STRETCH_US, STRETCH_US + SAY_EVERY_US]
    assert compare.missing_tokens == 110


@pytest.mark.parametrize("ahead", ["spans", "metrics"])
def test_bursts_of_traces_that_are_whole_are_no_gap_wherever_a_stretch_ends(ahead: str) -> None:
    """Metrics come once a minute, of the calls of the minute before; each call has its span."""
    for offset_us in range(0, STRETCH_US, MINUTE_US):
        compare = SetAside()
        told(compare, 0, spans=1)
        for burst in range(10):
            at_us = offset_us + burst * STRETCH_US
            if ahead == "spans":
                told(compare, at_us - SECOND_US, spans=1_000)
                assert told(compare, at_us, metrics=1_000) == []
            else:
                assert told(compare, at_us, spans=500, metrics=1_000) == []
                assert told(compare, at_us + SECOND_US, spans=500) == []
        assert compare.missing_tokens == 0


def test_spans_that_no_metrics_tell_of_do_not_hide_a_gap_for_long() -> None:
    compare = SetAside()
    told(compare, 0, spans=1_000_000)
    for number in range(1, 5):
        told(compare, number * STRETCH_US, spans=1, metrics=100)
    assert compare.missing_tokens > 0


def test_of_too_many_resources_those_are_kept_that_spoke_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(set_aside, "MAX_RESOURCES", 2)
    compare = SetAside()
    for resource in (b"1", b"2", b"1", b"3"):
        told(compare, 0, metrics=10, resource=resource)
    found = [told(compare, STRETCH_US, spans=1, resource=resource) for resource in (b"1", b"3", b"2")]
    assert found == [[Gap(A, 0, 20)], [Gap(A, 0, 10)], []]


def test_metrics_set_aside_again_are_known_as_long_as_there_are_not_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(set_aside, "MAX_EVENTS", 2)
    compare = SetAside()
    for event in ("1", "1", "2", "3", "3", "1"):
        compare.note(0, {R: A}, spans={}, metrics=[(R, event, 10)])
    assert told(compare, STRETCH_US, spans=1) == [Gap(A, 0, 40)]
