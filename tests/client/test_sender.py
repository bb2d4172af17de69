"""Sending: in batches, in order, again until there is an answer; what is refused does not stand in the way."""

from __future__ import annotations

import errno
import json
import logging
import os
import threading
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from asapd.client import Meter, sender
from asapd.client import refused as refusing
from asapd.client.sender import Sender
from asapd.client.spool import Spool, is_left
from asapd.client.waiting import Kind, Memory
from tests.client.fake import Event, Fake, refused, taken, until

AGENT, CONSUMER = "urn:asap:agent:writer", "urn:asap:agent:desk"


def make(home: Path, **settings: Any) -> Meter:
    return Meter(home / "ingest.sock", **{"agent": AGENT, "consumer": CONSUMER, "spool": home / "spool", **settings})


def set_aside(home: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (home / "spool" / "refused.ndjson").read_text().splitlines()]


def fail_at(code: str, *bad: str, is_named: bool) -> Any:
    def handle(events: list[Event]) -> dict[str, Any]:
        places = [place for place, event in enumerate(events) if event["task_id"] in bad]
        if places:
            return refused(code, *places) if is_named else refused(code)
        return taken(events)

    return handle


def test_a_batch_leaves_when_it_is_full(home: Path, fake: Fake) -> None:
    with make(home, batch_events=3, batch_age_s=60) as meter:
        for number in range(5):  # of which the first round, that looks for what others left, may take some
            meter.record(task_id=f"t{number}")
        until(lambda: meter.stats().sent >= 3)
    assert [event["task_id"] for event in fake.events] == [f"t{number}" for number in range(5)]
    assert [event["seq"] for event in fake.events] == [1, 2, 3, 4, 5]


def test_a_batch_leaves_when_its_first_event_has_waited_long_enough(home: Path, fake: Fake) -> None:
    with make(home, batch_age_s=0.05) as meter:
        meter.record(task_id="alone")
        until(lambda: fake.events)
        until(lambda: meter.stats().pending == 0)
        meter.record(task_id="later")
        until(lambda: len(fake.events) == 2)


def test_flush_does_not_wait_for_company(home: Path, fake: Fake) -> None:
    with make(home, batch_age_s=60) as meter:
        meter.record(task_id="t")
        assert meter.flush()
        assert meter.flush(0.0)
        assert len(fake.events) == 1


def test_a_daemon_that_takes_nothing_is_not_asked_faster_because_a_flush_waits(
    home: Path, fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sender, "FIRST_PAUSE_S", 0.01)
    fake.handle = lambda events: refused("overloaded")
    with make(home) as meter:
        meter.record(task_id="t")
        assert meter.flush(0.3) is False
        # The pauses double, from 5 ms on at least: a thousand times the time has no room for more.
        assert len(fake.batches) < 20


@pytest.mark.parametrize("first_s", [0.01, 60.0])
def test_a_flush_ends_one_pause_but_none_before_the_shortest(
    home: Path, fake: Fake, monkeypatch: pytest.MonkeyPatch, first_s: float
) -> None:
    monkeypatch.setattr(sender, "FIRST_PAUSE_S", first_s)
    monkeypatch.setattr("asapd.client.sender.random.uniform", lambda *bounds: 6000.0)
    fake.handle = lambda events: refused("overloaded")
    with make(home, batch_age_s=0) as meter:
        meter.record(task_id="t")
        until(lambda: meter.stats().last_error)
        assert meter.flush(0.2) is False
        if first_s > 1:
            assert not meter.flush(0.0)
            assert len(fake.batches) == 1
        else:
            until(lambda: len(fake.batches) == 2)
            fake.handle = taken
            assert meter.flush()


def test_flush_is_about_the_meter_and_not_about_what_others_left(home: Path, fake: Fake) -> None:
    """However much of a former process is sent, the own event, which cannot be read, waits."""
    left = Memory(10**6, None)
    more = iter("bcd")

    def handle(events: list[Event]) -> dict[str, Any]:
        for name in next(more, ""):
            left.append(Kind.USAGE, {"id": name})
        return taken(events)

    def broken(*args: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    fake.handle = handle
    with make(home, batch_age_s=60) as meter:
        meter._spool.read = broken  # type: ignore[union-attr,method-assign,assignment] -- as a disk does it
        meter.record(task_id="cannot be read")
        left.append(Kind.USAGE, {"id": "a"})
        meter._sender._work.queues.append(left)  # type: ignore[union-attr] -- as if it had been adopted
        assert meter.flush(0.3) is False
        until(lambda: left.count == 0)
    assert [event["id"] for event in fake.events] == ["a", "b", "c", "d"]


def test_events_of_an_outage_come_in_order_with_the_ids_they_were_given(home: Path) -> None:
    with make(home) as meter:
        ids = [meter.record(task_id=str(number)) for number in range(50)]
        assert meter.flush(0.2) is False
        assert meter.stats().pending == 50
        assert "FileNotFoundError" in str(meter.stats().last_error)
        with Fake(home / "ingest.sock") as fake:
            assert meter.flush()
            assert [event["id"] for event in fake.events] == ids
        assert meter.stats().last_error is None


def test_what_one_process_left_the_next_one_sends_with_the_same_ids(home: Path) -> None:
    meter = make(home)
    ids = [meter.record(task_id=str(number)) for number in range(5)]
    meter.close()
    with Fake(home / "ingest.sock") as fake, make(home) as meter:
        ids.append(meter.record(task_id="more"))
        assert meter.flush()
        assert [event["id"] for event in fake.events] == ids
        assert [event["seq"] for event in fake.events] == [1, 2, 3, 4, 5, 6]
        assert len({event["source"] for event in fake.events}) == 1


def test_what_a_process_that_is_gone_left_a_running_one_adopts(home: Path, fake: Fake) -> None:
    left = Spool(home / "spool" / "7", 10**6, None)
    left.append(Kind.USAGE, {"id": "left"})
    running = Spool(home / "spool" / "6", 10**6, None)
    running.append(Kind.USAGE, {"id": "kept"})
    own = Spool(home / "spool" / "1", 10**6, None)
    own.append(Kind.USAGE, {"id": "own"})
    own.close()
    left.close()
    with make(home) as meter:
        until(lambda: {event["id"] for event in fake.events} == {"left", "own"})
        until(lambda: meter.stats().pending == 0)
    running.close()


def test_however_many_are_gone_only_a_few_of_what_they_left_are_open_at_once(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sender, "MOST_ADOPTED", 2)
    names = [str(number) for number in range(2, 9)]
    for name in names:
        left = Spool(home / "spool" / name, 10**6, None)
        left.append(Kind.USAGE, {"id": name})
        left.close()
    held: list[int] = []
    send_one = Sender._send_one

    def count(self: Sender, queue: Any) -> Any:
        held.append(len(self._work.queues) - self._work.own)
        return send_one(self, queue)

    monkeypatch.setattr(Sender, "_send_one", count)
    with make(home) as meter:
        until(lambda: held)
        with Fake(home / "ingest.sock") as fake:
            until(lambda: len(fake.events) == len(names))
        until(lambda: meter.stats().pending == 0)
    assert sorted(event["id"] for event in fake.events) == names
    assert max(held) == 2


def test_a_lost_answer_makes_it_send_the_same_events_again(home: Path, fake: Fake) -> None:
    answers = iter([None, None])
    fake.handle = lambda events: next(answers, taken(events))
    with make(home) as meter:
        event_id = meter.record(task_id="t")
        assert meter.flush()
    assert len(fake.events) == 3
    assert {event["id"] for event in fake.events} == {event_id}


def test_events_that_the_daemon_knows_are_counted_as_duplicates(home: Path, fake: Fake) -> None:
    fake.handle = lambda events: {"ok": True, "recorded": 0, "duplicates": len(events)}
    with make(home) as meter:
        meter.record(task_id="t")
        assert meter.flush()
        assert (meter.stats().sent, meter.stats().duplicates) == (1, 1)


@pytest.mark.parametrize("code", ["invalid", "usage_conflict", "forbidden"])
def test_events_that_are_refused_by_name_are_set_aside_and_the_others_get_through(
    home: Path, fake: Fake, code: str
) -> None:
    fake.handle = fail_at(code, "t3", "t7", is_named=True)
    with make(home, batch_age_s=0.1) as meter:
        for number in range(10):
            meter.record(task_id=f"t{number}")
        assert meter.flush()
        assert (meter.stats().sent, meter.stats().refused, meter.stats().pending) == (8, 2, 0)
    lines = set_aside(home)
    assert [line["event"]["task_id"] for line in lines] == ["t3", "t7"]
    assert lines[0]["code"] == code
    assert lines[0]["reason"] == "agent is bad"
    assert lines[0]["refused_at"].endswith("Z")


@pytest.mark.parametrize("code", ["malformed", "too_large"])
def test_an_event_that_is_refused_without_a_name_is_found(home: Path, fake: Fake, code: str) -> None:
    fake.handle = fail_at(code, "t3", "t4", is_named=False)
    with make(home, batch_age_s=0.1) as meter:
        for number in range(10):
            meter.record(task_id=f"t{number}")
        assert meter.flush()
        assert (meter.stats().sent, meter.stats().refused) == (8, 2)
    assert [line["event"]["task_id"] for line in set_aside(home)] == ["t3", "t4"]


def test_an_event_at_which_the_daemon_fails_is_set_aside_when_others_work(home: Path, fake: Fake) -> None:
    fake.handle = fail_at("internal", "t1", is_named=False)
    with make(home, batch_age_s=0.01) as meter:
        meter.record(task_id="t1")
        until(lambda: len(fake.batches) > sender.BUG_TRIES)
        assert meter.stats().refused == 0
        meter.record(task_id="t2")
        assert meter.flush()
        assert (meter.stats().sent, meter.stats().refused) == (1, 1)
    assert set_aside(home)[0]["code"] == "internal"


def test_a_daemon_that_fails_at_everything_makes_nothing_be_set_aside(
    home: Path, fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sender, "LONGEST_PAUSE_S", 0.02)
    fake.handle = lambda events: refused("internal")
    with make(home, batch_age_s=0.01) as meter:
        for number in range(3):
            meter.record(task_id=f"t{number}")
        until(lambda: len(fake.batches) > 3 * sender.BUG_TRIES)
        assert meter.stats().pending == 3
        fake.handle = taken
        assert meter.flush()
        assert (meter.stats().sent, meter.stats().refused) == (3, 0)


@pytest.mark.parametrize("batch_events", [1, 500])
def test_several_events_at_which_the_daemon_fails_do_not_stop_those_behind_them(
    home: Path, fake: Fake, monkeypatch: pytest.MonkeyPatch, batch_events: int
) -> None:
    monkeypatch.setattr(sender, "LONGEST_PAUSE_S", 0.02)
    fake.handle = fail_at("internal", "bad1", "bad2", is_named=False)
    with make(home, batch_age_s=0.05, batch_events=batch_events) as meter:
        meter.record(task_id="bad1")
        meter.record(task_id="bad2")
        until(lambda: len(fake.batches) > 3 * sender.BUG_TRIES)
        assert meter.stats().refused == 0
        meter.record(task_id="good")
        assert meter.flush()
        assert (meter.stats().sent, meter.stats().refused) == (1, 2)
    assert [line["event"]["task_id"] for line in set_aside(home)] == ["bad1", "bad2"]


def test_an_event_under_a_token_at_which_the_daemon_fails_does_not_stop_those_behind_it(
    home: Path, fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sender, "LONGEST_PAUSE_S", 0.02)
    fake.http = lambda path, headers, body: (500, {"code": "internal"})
    with make(home, batch_age_s=60) as meter:
        meter.record(task_id="bad", delegation_token="a.b.c")
        for number in range(3):
            meter.record(task_id=f"t{number}")
        assert meter.flush()
        assert (meter.stats().sent, meter.stats().refused) == (3, 1)
    assert [event["task_id"] for event in fake.events] == ["t0", "t1", "t2"]


@pytest.mark.parametrize("status", [400, 403, 500])
def test_an_event_that_a_proxy_refuses_does_not_stop_those_behind_it(
    home: Path, fake: Fake, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    """Such as one under a token that is longer than the proxy takes as a header."""
    monkeypatch.setattr(sender, "LONGEST_PAUSE_S", 0.02)
    fake.http = lambda path, headers, body: (status, {})
    with make(home, batch_age_s=60) as meter:
        meter.record(task_id="bad", delegation_token="x" * 9000)
        for number in range(3):
            meter.record(task_id=f"t{number}")
        assert meter.flush()
        assert (meter.stats().sent, meter.stats().refused) == (3, 1)
    assert str(status) in set_aside(home)[0]["reason"]


def test_at_an_address_where_there_is_no_daemon_nothing_is_set_aside(
    home: Path, fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sender, "LONGEST_PAUSE_S", 0.02)
    fake.http = lambda path, headers, body: (404, {})
    with make(home, batch_age_s=0.05) as meter:
        for number in range(5):
            meter.record(task_id=f"t{number}", delegation_token="a.b.c")
        meter.settle("res_1")
        until(lambda: len(fake.requests) > 10 * sender.BUG_TRIES)
        assert (meter.stats().pending, meter.stats().refused, meter.stats().lost) == (6, 0, 0)
        fake.http = lambda path, headers, body: (200, {"status": "recorded", "recorded": len(body or [])})
        assert meter.flush()
        assert (meter.stats().sent, meter.stats().refused) == (5, 0)


@pytest.mark.parametrize("first", ["a.b.c", None])
def test_no_event_goes_out_under_the_token_of_another(
    home: Path, fake: Fake, monkeypatch: pytest.MonkeyPatch, first: str | None
) -> None:
    """Also when the daemon goes away while those are looked for at which it fails."""
    monkeypatch.setattr(sender, "LONGEST_PAUSE_S", 0.02)
    sent: list[tuple[str, str | None]] = []
    away = iter([None])

    def judge(events: list[Event], token: str | None) -> int:
        sent.extend((event["task_id"], token) for event in events)
        if any(event["task_id"] == "bad" for event in events):
            return 500
        return 200 if len(fake.log) <= sender.BUG_TRIES else next(away, 200) or 503

    def frame(events: list[Event]) -> dict[str, Any]:
        return {200: taken(events), 500: refused("internal"), 503: refused("overloaded")}[judge(events, None)]

    def http(path: str, headers: dict[str, str], body: list[Event]) -> tuple[int, dict[str, Any]]:
        status = judge(body, headers["x-asap-delegation-token"])
        code = {500: "internal", 503: "overloaded"}.get(status)
        return status, {"status": "recorded", "recorded": len(body), "duplicates": 0} if code is None else {
            "code": code
        }

    fake.handle, fake.http = frame, http
    with make(home, batch_age_s=60) as meter:
        meter.record(task_id="bad", delegation_token=first)
        meter.record(task_id="a", delegation_token="d.e.f")
        meter.record(task_id="b")
        assert meter.flush()
        assert (meter.stats().sent, meter.stats().refused) == (2, 1)
    assert set(sent) == {("bad", first), ("a", "d.e.f"), ("b", None)}
    assert next(away, "used") == "used"


def test_what_is_taken_of_another_queue_shows_too_that_it_is_not_the_daemon(
    home: Path, fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One queue after the other: what fails in one does not make the others wait, either."""
    monkeypatch.setattr(sender, "ADOPT_EVERY_S", 0.02)
    monkeypatch.setattr(sender, "LONGEST_PAUSE_S", 60.0)
    fake.handle = fail_at("internal", "bad", is_named=False)
    with make(home, batch_age_s=0, batch_events=1) as meter:
        assert meter.flush()
        left = Spool(home / "spool" / "2", 10**6, None)
        left.append(Kind.USAGE, {"id": "bad", "task_id": "bad"})
        left.close()
        until(lambda: meter.stats().pending)
        for number in range(20):
            meter.record(task_id=f"t{number}")
        assert meter.flush(20)
        until(lambda: meter.stats().pending == 0)
        assert (meter.stats().sent, meter.stats().refused) == (20, 1)
    assert [(line["code"], line["event"]["id"]) for line in set_aside(home)] == [("internal", "bad")]


@pytest.mark.parametrize("bad", ["an event", "a settlement"])
def test_refused_events_between_do_not_hide_what_the_daemon_takes(
    home: Path, fake: Fake, monkeypatch: pytest.MonkeyPatch, bad: str
) -> None:
    monkeypatch.setattr(sender, "LONGEST_PAUSE_S", 0.02)
    monkeypatch.setattr(sender, "BATCH_BYTES", 1000)
    names = [f"late{number}" for number in range(20)]

    def handle(events: list[Event]) -> dict[str, Any]:
        if any(event["task_id"] == "bad" for event in events):
            return refused("internal")
        answer: dict[str, Any] = fail_at("invalid", *names, is_named=True)(events)
        return answer

    fake.handle = handle
    fake.http = lambda path, headers, body: (500, {"code": "internal"})
    with make(home, batch_age_s=60) as meter:
        if bad == "an event":
            meter.record(task_id="bad")
        else:
            meter.settle("bad")
        for name in names:
            meter.record(task_id=name)
        meter.record(task_id="good")
        assert meter.flush()
        assert (meter.stats().sent, meter.stats().refused) == (1, 21)


def test_a_daemon_that_only_refuses_things_is_not_one_that_works(
    home: Path, fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says that an event is invalid before it comes to its disk, at which it may fail with every other."""
    monkeypatch.setattr(sender, "LONGEST_PAUSE_S", 0.02)
    fake.handle = lambda events: refused("invalid" if events[0]["task_id"] == "odd" else "internal")
    with make(home, batch_age_s=0.05, batch_events=1) as meter:
        for name in ("good", "odd", "good too"):
            meter.record(task_id=name)
        until(lambda: len(fake.batches) > 4 * sender.BUG_TRIES)
        assert (meter.stats().pending, meter.stats().refused) == (3, 1)
        fake.handle = taken
        assert meter.flush()
        assert (meter.stats().sent, meter.stats().refused) == (2, 1)


@pytest.mark.parametrize("known", ["usage", "settlement"])
def test_a_daemon_that_only_knows_things_is_not_one_that_works(
    home: Path, fake: Fake, monkeypatch: pytest.MonkeyPatch, known: str
) -> None:
    """What was recorded or closed before it answers without its disk, at which it may fail with every other."""
    monkeypatch.setattr(sender, "LONGEST_PAUSE_S", 0.02)

    def handle(events: list[Event]) -> dict[str, Any]:
        if {event["task_id"] for event in events} == {"known"}:
            return {"ok": True, "recorded": 0, "duplicates": len(events)}
        return refused("internal")

    fake.handle = handle
    fake.http = lambda path, headers, body: (409, {"code": "reservation_closed", "detail": "no"})
    with make(home, batch_age_s=0.01, batch_events=1) as meter:
        for number in range(3):
            meter.record(task_id=f"good{number}")
        until(lambda: len(fake.batches) > 4 * sender.BUG_TRIES)
        if known == "settlement":
            meter._memory.append(Kind.SETTLE, {"reservation": "res_1"})
            until(lambda: fake.requests)
        else:
            meter.record(task_id="known")
            until(lambda: meter.stats().sent)
        asked = len(fake.batches)
        until(lambda: len(fake.batches) > asked + 8 * sender.BUG_TRIES)
        assert meter.stats().refused == 0
        fake.handle = taken
        assert meter.flush()
        assert meter.stats().refused == 0


def test_a_daemon_that_recovers_while_events_are_tried_one_by_one_gets_them_all(
    home: Path, fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sender, "LONGEST_PAUSE_S", 0.02)
    fake.handle = lambda events: taken(events) if len(fake.batches) > sender.BUG_TRIES + 2 else refused("internal")
    with make(home, batch_age_s=60) as meter:
        for number in range(5):  # two of them fail by themselves, and then it takes the others
            meter.record(task_id=f"t{number}")
        assert meter.flush()
        assert (meter.stats().sent, meter.stats().refused) == (5, 0)


def test_a_daemon_that_fails_at_everything_is_not_asked_about_each_event_without_a_pause(
    home: Path, fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is everything that waits read into memory."""
    monkeypatch.setattr(sender, "LONGEST_PAUSE_S", 0.001)
    monkeypatch.setattr(sender, "FAILURES_AT_A_STRETCH", 3)
    monkeypatch.setattr(sender, "FAILING_BYTES", 1)
    asked: list[int] = []
    pause = Sender._pause

    def count(self: Sender, pause_s: float) -> None:
        asked.append(len(fake.batches))
        pause(self, pause_s)

    monkeypatch.setattr(Sender, "_pause", count)
    fake.handle = lambda events: refused("internal")
    with make(home, batch_age_s=60, batch_events=10) as meter:
        for number in range(25):
            meter.record(task_id=f"t{number}")
        until(lambda: len(asked) > 30)
        assert max(after - before for before, after in pairwise(asked)) == 3
        assert {event["task_id"] for event in fake.events} < {f"t{number}" for number in range(20)}
        fake.handle = taken
        assert meter.flush()
        assert (meter.stats().sent, meter.stats().refused) == (25, 0)


def test_a_daemon_that_takes_one_thing_and_fails_again_does_not_have_everything_set_aside(
    home: Path, fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sender, "LONGEST_PAUSE_S", 0.02)
    monkeypatch.setattr(sender, "FAILURES_AT_A_STRETCH", 3)
    fake.handle = lambda events: taken(events) if events[0]["task_id"] == "one" else refused("internal")
    with make(home, batch_age_s=0.01) as meter:
        for number in range(10):
            meter.record(task_id=f"t{number}")
        until(lambda: len(fake.batches) > 4 * sender.BUG_TRIES)
        meter.record(task_id="one")
        until(lambda: meter.stats().refused)
        asked = len(fake.batches)
        until(lambda: len(fake.batches) > asked + 4 * sender.BUG_TRIES)
        assert (meter.stats().sent, meter.stats().refused <= 3) == (1, True)
        fake.handle = taken
        assert meter.flush()
        assert meter.stats().sent == 11 - meter.stats().refused


@pytest.mark.parametrize("code", ["unauthorized", "forbidden", "storage_full", "outcome_unknown", "overloaded"])
def test_what_is_not_about_the_events_makes_them_wait(home: Path, fake: Fake, code: str) -> None:
    fake.handle = lambda events: refused(code)
    with make(home) as meter:
        meter.record(task_id="t")
        until(lambda: len(fake.batches) > 1)
        assert code in str(meter.stats().last_error)
        fake.handle = taken
        assert meter.flush()
        assert (meter.stats().sent, meter.stats().refused) == (1, 0)


def test_what_answers_nonsense_is_not_believed(home: Path, fake: Fake) -> None:
    fake.handle = lambda events: []  # type: ignore[assignment,return-value] -- what no daemon says
    with make(home) as meter:
        meter.record(task_id="t")
        until(lambda: len(fake.batches) > 1)
        assert "not asapd" in str(meter.stats().last_error)
        fake.handle = taken
        assert meter.flush()


def test_a_damaged_line_is_set_aside(home: Path) -> None:
    meter = make(home)
    meter.record(task_id="broken")
    meter.record(task_id="whole")
    meter.close()
    (segment,) = (home / "spool" / "1").glob("*.segment")
    segment.write_bytes(segment.read_bytes().replace(b"broken", b"br\xffken"))
    with Fake(home / "ingest.sock") as fake, make(home) as meter:
        assert meter.flush()
        assert [event["task_id"] for event in fake.events] == ["whole"]
    assert set_aside(home)[0]["code"] == "damaged"
    assert "br" in set_aside(home)[0]["event"]


def test_what_cannot_be_read_behind_does_not_have_what_was_refused_counted_again(
    home: Path, fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sender, "LONGEST_PAUSE_S", 0.02)
    read = Spool.read
    refused_reads: list[int] = []

    def read_first_only(self: Spool, most: int, max_bytes: int, after: Any = None) -> Any:
        if after is not None:
            refused_reads.append(1)
            raise OSError(errno.EIO, "Input/output error")
        return read(self, most, max_bytes, after)

    def handle(events: list[Event]) -> dict[str, Any]:
        answer: dict[str, Any] = fail_at("invalid", "odd", is_named=True)(events)
        return refused("internal") if answer["ok"] else answer

    fake.handle = handle
    left = Spool(home / "spool" / "1", 10**6, None)
    for name in ("odd", "bad", "behind"):
        left.append(Kind.USAGE, {"task_id": name})
    left.close()
    with monkeypatch.context() as patch:
        patch.setattr(Spool, "read", read_first_only)
        with make(home, batch_age_s=0.01, batch_events=2) as meter:
            until(lambda: len(refused_reads) > 5)
            assert (meter.stats().refused, meter.stats().pending) == (1, 3)
            assert "internal" in str(meter.stats().last_error)
            patch.setattr(Spool, "read", read)
            fake.handle = taken
            assert meter.flush()
            assert (meter.stats().sent, meter.stats().refused) == (2, 1)
    assert [line["event"]["task_id"] for line in set_aside(home)] == ["odd"]


def test_reservations_are_settled_after_the_usage_before_them_even_across_an_outage(home: Path) -> None:
    meter = make(home)
    meter.record(task_id="a", reservation="res_1")
    meter.settle("res_1")
    meter.record(task_id="b", reservation="res_2")
    meter.settle("res_2")
    meter._append(Kind.SETTLE, {"reservation": "../keys"}, [])  # a build before this one took it
    answers = {"/reservations/res_1/settle": (200, {"state": "settled"})}
    closed = (409, {"code": "reservation_closed"})
    with Fake(home / "ingest.sock", http=lambda path, headers, body: answers.get(path, closed)) as fake:
        assert meter.flush()
        assert fake.log == ["usage", "/reservations/res_1/settle", "/reservations/res_2/settle"]
        assert fake.requests[0][1]["idempotency-key"] == "settle-res_1"
    assert meter.stats().refused == 1
    meter.close()


@pytest.mark.parametrize("is_late", [True, False], ids=["a spool that is made late", "a disk that refuses for a while"])
def test_a_reservation_is_settled_after_its_usage_though_that_waits_in_memory(
    home: Path, monkeypatch: pytest.MonkeyPatch, is_late: bool
) -> None:
    def refuse(*args: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    if is_late:
        monkeypatch.setattr(sender, "ADOPT_EVERY_S", 0.02)
        (home / "spool").write_text("a file")
    with make(home) as meter:
        with monkeypatch.context() as patch:
            patch.setattr("asapd.client.spool.os.write", refuse)
            meter.record(task_id="a", reservation="res_1")
        if is_late:
            (home / "spool").unlink()
            until(lambda: meter._spool is not None)
        meter.settle("res_1")
        with Fake(home / "ingest.sock", http=lambda path, headers, body: (200, {"state": "settled"})) as fake:
            assert meter.flush()
            assert fake.log == ["usage", "/reservations/res_1/settle"]


def test_a_settlement_waits_while_the_daemon_cannot_take_it_and_is_set_aside_when_refused(
    home: Path, fake: Fake
) -> None:
    answers = iter([None, (503, {"code": "overloaded"}), (422, {"code": "invalid", "detail": "no"})])
    fake.http = lambda path, headers, body: next(answers)
    with make(home) as meter:
        meter.settle("res_1")
        assert meter.flush()
        assert meter.stats().refused == 1
    assert set_aside(home)[0]["event"] == {"reservation": "res_1"}


@pytest.mark.parametrize(("status", "code"), [(403, "forbidden"), (403, "host_not_allowed"), (404, "not_found")])
@pytest.mark.parametrize("is_key", [True, False], ids=["the key", "this reservation"])
def test_a_settlement_waits_while_it_may_be_the_key_that_is_wrong(
    home: Path, fake: Fake, monkeypatch: pytest.MonkeyPatch, status: int, code: str, is_key: bool
) -> None:
    """Where the key may do other things it is not the key."""
    monkeypatch.setattr(sender, "LONGEST_PAUSE_S", 0.02)
    fake.http = lambda path, headers, body: (status, {"code": code, "detail": "no"})
    with make(home, batch_age_s=0.01) as meter:
        meter.settle("res_1")
        until(lambda: len(fake.requests) > 4 * sender.BUG_TRIES)
        assert code in str(meter.stats().last_error)
        assert (meter.stats().pending, meter.stats().refused) == (1, 0)
        if is_key:
            fake.http = lambda path, headers, body: (200, {"state": "settled"})
        else:
            meter.record(task_id="t")
        assert meter.flush()
        assert (meter.stats().pending, meter.stats().refused) == (0, not is_key)


@pytest.mark.parametrize("behind", ["usage", "a settlement", "usage in memory"])
def test_a_settlement_at_which_the_daemon_fails_is_set_aside_when_it_takes_other_things(
    home: Path, fake: Fake, monkeypatch: pytest.MonkeyPatch, behind: str
) -> None:
    def settle(path: str, headers: dict[str, str], body: Any) -> tuple[int, dict[str, Any]]:
        return (500, {"code": "internal"}) if "bad" in path else (200, {"state": "settled"})

    monkeypatch.setattr(sender, "LONGEST_PAUSE_S", 0.02)
    fake.http = settle
    with make(home, batch_age_s=0.01) as meter:
        meter.settle("bad")
        until(lambda: len(fake.requests) > sender.BUG_TRIES)
        assert "internal" in str(meter.stats().last_error)
        assert meter.stats().refused == 0
        if behind == "usage in memory":
            meter._memory.append(Kind.USAGE, {"id": "a"})
        elif behind == "usage":
            meter.record(task_id="t")
        else:
            meter.settle("good")
        assert meter.flush()
        assert (meter.stats().sent, meter.stats().refused) == (behind != "a settlement", 1)
        until(lambda: meter.stats().last_error is None)
    assert [(line["code"], line["event"]["reservation"]) for line in set_aside(home)] == [("internal", "bad")]


def test_a_settlement_that_was_passed_over_waits_on_when_the_daemon_goes_away(
    home: Path, fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sender, "LONGEST_PAUSE_S", 0.02)
    answers = {"b": iter([None, (200, {"state": "settled"})])}
    failure = (500, {"code": "internal"})
    fake.http = lambda path, headers, body: next(answers.get(path.split("/")[2], iter([])), failure)
    with make(home, batch_age_s=0.05) as meter:
        meter.settle("a")
        meter.settle("b")
        assert meter.flush()
        assert meter.stats().refused == 1
    assert [line["event"]["reservation"] for line in set_aside(home)] == ["a"]


def test_closing_does_not_wait_for_a_daemon_that_does_not_answer(home: Path, fake: Fake) -> None:
    hold = threading.Event()
    fake.handle = lambda events: taken(events) if hold.wait(20) else None
    meter = make(home)
    meter.record(task_id="t")
    until(lambda: fake.batches)
    began_s = time.monotonic()
    meter.close(0.1)
    hold.set()
    assert time.monotonic() - began_s < 5
    until(lambda: is_left(home / "spool"))
    left = Spool(home / "spool" / "1", 10**6, None)
    assert left.count == 1
    left.close()


@pytest.mark.parametrize("is_before", [True, False], ids=["just before the memory", "just after the spool"])
def test_what_comes_while_the_queues_are_closed_is_counted_as_lost(
    home: Path, monkeypatch: pytest.MonkeyPatch, is_before: bool
) -> None:
    """From a thread that saw the meter open a moment ago."""
    queue: type[Memory | Spool] = Memory if is_before else Spool
    close = queue.close

    def closing(self: Any) -> int:
        if is_before:
            meter._memory.append(Kind.USAGE, {"id": "late"})
            return close(self)
        lost = close(self)
        assert meter._keep(Kind.USAGE, {"id": "late"}), "there is the memory"
        return lost

    meter = make(home)
    meter.record(task_id="kept")
    with monkeypatch.context() as patch:
        patch.setattr(queue, "close", closing)
        meter.close(0)
        until(lambda: not meter._sender.is_alive)  # type: ignore[union-attr] -- it has one
    assert meter.stats().lost == 1


def test_an_outage_is_logged_once_and_so_is_its_end(home: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "asapd.client"), make(home) as meter:
        meter.record(task_id="t")
        meter.flush(0.3)
        with Fake(home / "ingest.sock"):
            assert meter.flush()
            until(lambda: len(caplog.records) == 2)
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]


def test_during_an_outage_the_spool_is_synced(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = threading.Event()
    sync = Spool.sync
    monkeypatch.setattr(Spool, "sync", lambda self: (sync(self), synced.set()))
    with make(home) as meter:
        meter.record(task_id="t")
        assert synced.wait(10)


def test_a_spool_that_cannot_be_read_does_not_stop_the_others(home: Path, fake: Fake) -> None:
    for number, name in ((1, "own"), (7, "left")):
        left = Spool(home / "spool" / str(number), 10**6, None)
        left.append(Kind.USAGE, {"id": name})
        left.close()
    with make(home, batch_age_s=60) as meter:
        # The first round, which is due at once, is past the own spool then: what comes now waits for a minute.
        until(lambda: meter.stats().sent == 2)
        meter.record(task_id="t")
        (segment,) = (home / "spool" / "1").glob("*.segment")
        segment.write_bytes(b"")
        other = Spool(home / "spool" / "2", 10**6, None)
        other.append(Kind.USAGE, {"id": "other"})
        other.close()
        work = meter._sender._work  # type: ignore[union-attr] -- adopting is due in half a minute only
        work.queues.extend(work.adopt())
        assert meter.flush(0.5) is False
        until(lambda: "spool cannot be used" in str(meter.stats().last_error))
        assert [event["id"] for event in fake.events] == ["own", "left", "other"]


def test_what_comes_between_while_a_bad_event_is_looked_for_is_no_trouble(home: Path, fake: Fake) -> None:
    """One event is refused, one fails, and once the daemon goes away, while events are tried one by one."""
    away = iter([None])

    def handle(events: list[Event]) -> dict[str, Any] | None:
        names = {event["task_id"] for event in events}
        if len(events) > 1 or "fails" in names:
            return refused("internal")
        if "refused" in names:
            return refused("invalid")
        if "later" in names:
            return next(away, taken(events))
        return taken(events)

    fake.handle = handle
    with make(home, batch_age_s=0.1) as meter:
        for name in ("good", "refused", "fails", "later", "last"):
            meter.record(task_id=name)
        assert meter.flush()
        assert (meter.stats().sent, meter.stats().refused) == (3, 2)
    assert {line["event"]["task_id"]: line["code"] for line in set_aside(home)} == {
        "refused": "invalid",
        "fails": "internal",
    }


def test_what_is_refused_and_cannot_be_kept_is_lost_and_at_least_logged(
    home: Path, fake: Fake, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.handle = lambda events: refused("invalid")
    with make(home, spool=False) as meter:
        meter.record(task_id="here it is")
        assert meter.flush()
        assert (meter.stats().refused, meter.stats().lost) == (1, 1)
    assert "here it is" in caplog.text
    monkeypatch.setattr("asapd.client.refused.MAX_BYTES", 0)
    with make(home) as meter:
        meter.record(task_id="and here")
        assert meter.flush()
        assert (meter.stats().refused, meter.stats().lost) == (1, 1)
    assert "and here" in caplog.text
    assert "refused.ndjson is full" in caplog.text


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.EMFILE, errno.ENFILE, errno.EINTR])
@pytest.mark.parametrize("kind", ["invalid", "damaged"])
def test_what_cannot_be_set_aside_at_present_waits_and_nothing_else_does(
    home: Path, fake: Fake, monkeypatch: pytest.MonkeyPatch, number: int, kind: str
) -> None:
    """Such as while a process that is stopped has the file; it is waited for once."""
    waits: list[float] = []
    lock = refusing._lock

    def fail(fd: int, patience_s: float) -> None:
        waits.append(patience_s)
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(refusing, "_lock", fail)
    monkeypatch.setattr(sender, "LONGEST_PAUSE_S", 0.02)
    fake.handle = fail_at("invalid", "bad1", "bad2", "bad3", is_named=True)
    left = Spool(home / "spool" / "1", 10**6, None)
    for name in ("bad1", "bad2", "good"):
        left.append(Kind.USAGE, {"task_id": name})
    left.close()
    if kind == "damaged":
        (segment,) = (home / "spool" / "1").glob("*.segment")
        segment.write_bytes(segment.read_bytes().replace(b'"bad', b'"bax'))
    with make(home, batch_age_s=0.01) as meter:
        until(lambda: meter.stats().sent == 1)
        meter.record(task_id="bad3")
        meter.record(task_id="good too")
        until(lambda: meter.stats().sent == 2)
        until(lambda: len(waits) > 5)
        assert [wait_s > 0 for wait_s in waits[:6]] == [True] + [False] * 5
        assert "refused.ndjson" in str(meter.stats().last_error)
        assert (meter.stats().refused, meter.stats().lost) == (0, 0)
        assert meter.stats().pending == 5
        monkeypatch.setattr(refusing, "_lock", lock)
        assert meter.flush()
        assert (meter.stats().sent, meter.stats().refused, meter.stats().lost) == (2, 3, 0)
        assert meter.stats().pending == 0
    assert len(set_aside(home)) == 3


@pytest.mark.parametrize("now_ns", [-5 * 10**18, 0, 4 * 10**20, 10**22])
def test_a_clock_that_is_wrong_by_ages_breaks_nothing(
    home: Path, fake: Fake, monkeypatch: pytest.MonkeyPatch, now_ns: int
) -> None:
    is_wrong = threading.Event()
    fail = fail_at("invalid", "before", is_named=True)
    fake.handle = lambda events: fail(events) if is_wrong.wait(10) else None
    is_year = now_ns < 10**20
    with make(home) as meter:
        meter.record(task_id="before")
        with monkeypatch.context() as patch:
            patch.setattr(time, "time_ns", lambda: now_ns)
            is_wrong.set()
            assert (meter.record(task_id="t") is not None) == is_year
            assert meter.flush()
        stats = meter.stats()
        assert (stats.recorded, stats.misused, stats.refused) == ((2, 0, 1) if is_year else (1, 1, 1))
    assert [line["refused_at"] is not None for line in set_aside(home)] == [is_year]


def test_the_number_of_the_refused_that_are_lost_is_said_though_each_is_not(
    home: Path, fake: Fake, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def said() -> list[str]:
        return [record.getMessage().partition(";")[0] for record in caplog.records]

    fake.handle = lambda events: refused("invalid", *range(len(events)))
    meter = make(home, spool=False)
    for number in range(3):
        meter.record(task_id=str(number))
    assert meter.flush()
    assert said() == ["usage events lost: 1"]
    with monkeypatch.context() as patch:
        patch.setattr("asapd.client.stats.QUIET_S", 0.0)
        meter.record(task_id="a minute later")
        assert meter.flush()
    for number in range(2):
        meter.record(task_id=str(number))
    meter.close()
    assert said() == [f"usage events lost: {number}" for number in (1, 3, 2)]
    assert meter.stats().lost == 6


@pytest.mark.parametrize("broken", ["write", "fsync"])
def test_of_a_refused_event_all_is_kept_or_nothing(
    home: Path, fake: Fake, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    """On a disk that fills up a write is short first, and fails then."""
    write = os.write
    room = iter([10, 10])

    def short(fd: int, data: bytes) -> int:
        if "refused" not in Path(f"/proc/self/fd/{fd}").readlink().name:
            return write(fd, data)
        size_bytes = next(room, 0)
        if not size_bytes:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(fd, data[:size_bytes])

    def fail(fd: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    fake.handle = lambda events: refused("invalid", *range(len(events)))
    with make(home) as meter:
        meter.record(task_id="kept")
        assert meter.flush()
        with monkeypatch.context() as patch:
            patch.setattr(f"asapd.client.refused.os.{broken}", {"write": short, "fsync": fail}[broken])
            meter.record(task_id="nowhere")
            assert meter.flush()
        meter.record(task_id="kept too")
        assert meter.flush()
        assert (meter.stats().refused, meter.stats().lost) == (3, 1)
    assert [line["event"]["task_id"] for line in set_aside(home)] == ["kept", "kept too"]
    assert "nowhere" in caplog.text


def test_a_bug_in_the_thread_does_not_end_it(home: Path, fake: Fake) -> None:
    with make(home) as meter:
        assert meter.flush()
        link = meter._link
        report, link.report = link.report, None  # type: ignore[method-assign,assignment] -- as wrong as can be
        meter.record(task_id="t")
        until(lambda: meter.stats().last_error is not None)
        link.report = report  # type: ignore[method-assign] -- mended
        assert meter.flush()
    assert len(fake.events) == 1
