"""The meter: settings, what it does when it cannot do its work, forks and exits."""

from __future__ import annotations

import contextlib
import errno
import json
import operator
import os
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asapd.client import Allowed, Denied, Meter, Unavailable
from asapd.client import meter as meters
from asapd.client import sender as senders
from asapd.client.event import dollars
from asapd.client.spool import Spool
from asapd.client.waiting import Kind
from asapd.core.money import MoneyError, parse_usd
from asapd.wire.usage import Events, decode_events
from tests.client.fake import PATIENCE_S, Fake, refused, taken, until
from tests.client.interrupts import everywhere

SMALL, SMALLEST = 0.0001, 5e-324
"""Doubles: as decimals one has 66 of them, and the other 1,074, which is the most."""
AGENT, CONSUMER = "urn:asap:agent:writer", "urn:asap:agent:desk"


def make(home: Path, **settings: Any) -> Meter:
    return Meter(home / "ingest.sock", **{"agent": AGENT, "consumer": CONSUMER, "spool": home / "spool", **settings})


def test_a_recorded_event_has_what_was_said_and_its_id_is_given(home: Path, fake: Fake) -> None:
    with make(home, source="billing") as meter:
        given = meter.record(
            task_id="t",
            tokens_in=5,
            tokens_out=2,
            cached_tokens_in=1,
            duration_ms=30,
            outcome="failed",
            error="no",
            cost_usd="0.000001",
            model="m",
            labels={"a": "b"},
        )
        meter.record(agent="urn:asap:agent:other", consumer="urn:asap:agent:else")
        assert meter.flush()
    event, other = fake.events
    assert event.pop("timestamp")
    assert event.pop("source").startswith("billing-")
    assert event == {
        "id": given,
        "seq": 1,
        "task_id": "t",
        "agent": AGENT,
        "consumer": CONSUMER,
        "metrics": {"tokens_in": 5, "tokens_out": 2, "cached_tokens_in": 1, "duration_ms": 30},
        "outcome": "failed",
        "error": "no",
        "cost_usd": "0.000001",
        "model": "m",
        "labels": {"a": "b"},
    }
    assert (other["agent"], other["consumer"]) == ("urn:asap:agent:other", "urn:asap:agent:else")
    assert len(other["task_id"]) == 26
    assert other["metrics"] == {}, "nobody said how long it took"


def test_no_tokens_are_told_where_they_were_counted(home: Path, fake: Fake) -> None:
    with make(home) as meter:
        meter.record(tokens_in=0)
        meter.record(tokens_out=0, cached_tokens_in=0)
        with meter.task() as task:
            task.tokens(0, 0, reasoning=0)
        assert meter.flush()
    told = [{name: n for name, n in event["metrics"].items() if name != "duration_ms"} for event in fake.events]
    assert told == [{"tokens_in": 0}, {"tokens_out": 0}, {"tokens_in": 0, "tokens_out": 0}]


def test_a_call_that_makes_no_sense_is_counted_as_misused_and_raises_nothing(home: Path, fake: Fake) -> None:
    with make(home) as meter:
        assert meter.record(tokens_in=-1) is None
        assert meter.record(cost_usd="much") is None
        assert meter.record(cost_usd="1_000") is None
        assert meter.record(tokenz=1) is None  # type: ignore[call-arg] -- wrong on purpose
        stats = meter.stats()
    assert (stats.lost, stats.misused, stats.recorded) == (0, 4, 0)


def test_a_name_that_breaks_is_left_out(home: Path, fake: Fake) -> None:
    class Strange:
        def __bool__(self) -> bool:
            raise RuntimeError("no")

    with make(home) as meter:
        with meter.task(agent=Strange(), consumer=Strange(), recorder=1):  # type: ignore[arg-type] -- wrong on purpose
            pass
        assert meter.flush()
        assert meter.stats().misused == 3
    assert [(event["agent"], event["consumer"]) for event in fake.events] == [(AGENT, CONSUMER)]


@pytest.mark.parametrize(
    ("cost", "sent"),
    [
        (Decimal(SMALL), "0.000101"),
        (Decimal(SMALLEST), "0.000001"),
        (1e-7, "0.000001"),
        ("0.25" + "0" * 2000, "0.25"),
        (Decimal("0e-1000000000"), "0"),
        (Decimal("1e-1000000000"), "0.000001"),
        (Decimal("1234567890.1234561234567890123456789"), "1234567890.123457"),
        (100, "100"),
        ("-0", "-0"),
    ],
)
def test_a_cost_is_sent_as_the_daemon_keeps_it(home: Path, fake: Fake, cost: Any, sent: str) -> None:
    """Otherwise it would refuse the event for the text of its cost, and set aside the tokens as well."""
    with make(home) as meter:
        assert meter.record(tokens_in=9, cost_usd=cost) is not None
        assert meter.flush()
    (event,) = fake.events
    assert event["cost_usd"] == sent
    found = decode_events(json.dumps(event).encode())
    assert isinstance(found, Events)
    assert [one.reported_microusd for one in found.events] == [parse_usd(Decimal(str(cost)), round_up=True)]


@given(st.text("0123456789.eE+-_ \tna٣x", max_size=20))
def test_the_client_takes_for_a_cost_what_the_daemon_takes(text: str) -> None:
    try:
        wanted = parse_usd(text, round_up=True)
    except MoneyError:
        with pytest.raises(ValueError, match="US dollars"):
            dollars(text)
    else:
        assert parse_usd(dollars(text), round_up=True) == wanted


@pytest.mark.parametrize("address", ["ftp://host", "relative/path", "http://", "https://user@host", "http://h/?q=1"])
def test_an_address_that_is_none_is_an_error_at_once(address: str) -> None:
    with pytest.raises(ValueError, match="no address"):
        Meter(address, spool=False)


@pytest.mark.parametrize(
    "bad",
    [
        {"batch_events": 0},
        {"batch_events": 5001},
        {"batch_age_s": -1},
        {"batch_age_s": float("nan")},
        {"spool_bytes": 0},
    ],
)
def test_bounds_that_are_none_are_an_error_at_once(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be"):
        Meter(spool=False, **bad)


def test_the_default_spool_is_one_for_each_daemon(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(home))
    for address in ("/run/nobody/ingest.sock", "http://127.0.0.1:9"):
        Meter(address).close()
    assert len(list((home / "asapd" / "spool").iterdir())) == 2
    monkeypatch.setenv("XDG_STATE_HOME", "relative")
    with Meter("/run/nobody/ingest.sock") as meter:
        assert meter._spool is None


def test_the_default_spool_is_one_for_each_key_and_what_waits_under_another_is_named_and_left(
    home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Else a program would send with its own key what another recorded: it would be refused, or booked elsewhere."""
    monkeypatch.setenv("XDG_STATE_HOME", str(home))
    address = home / "ingest.sock"
    roots: dict[str, Path] = {}
    for key in ("", "first-key", "\udc80"):
        with Meter(address, key=key, agent=AGENT, consumer=CONSUMER) as meter:
            assert meter._root is not None
            roots[key] = meter._root
    assert len(set(roots.values())) == 3
    for key, root in roots.items():
        left = Spool(root / "1", 10**6, None)
        left.append(Kind.USAGE, {"id": f"of {key!r}"})
        left.close()
    of_one_that_runs = roots["first-key"].with_name(roots[""].name + "-0123456789abcdef")
    running = Spool(of_one_that_runs / "1", 10**6, None)
    running.append(Kind.USAGE, {"id": "of one that runs"})
    with Fake(address) as fake:
        with Meter(address, key="first-key\n", agent=AGENT, consumer=CONSUMER) as meter:
            assert meter.flush()
            until(lambda: meter.stats().pending == 0)
        assert [event["id"] for event in fake.events] == ["of 'first-key'"]
        (said,) = [record.getMessage() for record in caplog.records if "another key" in record.message]
        assert (str(roots[""]) + "," in said, str(roots["\udc80"]) in said) == (True, True)
        assert not any(text in said for text in (str(roots["first-key"]), "first-key", str(of_one_that_runs)))
        with Meter(address, key="", spool=roots[""]) as meter:
            until(lambda: meter.stats().pending == 0)
        with Meter(address, key="\udc80", spool=roots["\udc80"]) as meter:
            until(lambda: meter.stats().pending == 0)
        assert len(fake.events) == 3
    running.close()


def test_what_cannot_be_looked_into_beside_the_default_spool_is_no_trouble(
    home: Path, fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(root: Path) -> bool:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setenv("XDG_STATE_HOME", str(home))
    monkeypatch.setattr("asapd.client.spool.is_left", refuse)
    Meter(fake.path).close()
    with Meter(fake.path, key="other", agent=AGENT, consumer=CONSUMER) as meter:
        meter.record()
        assert meter.flush()


def test_without_a_spool_events_wait_in_memory_and_are_lost_with_the_process(home: Path) -> None:
    meter = make(home, spool=False)
    with Fake(home / "ingest.sock") as fake:
        meter.record()
        assert meter.flush()
        assert len(fake.events) == 1
    (home / "ingest.sock").unlink()
    meter.record()
    assert meter.flush(0.0) is False
    meter.close(0.1)
    assert meter.stats().lost == 1
    assert meter.flush() is False


def test_a_spool_that_cannot_be_made_leaves_memory(home: Path, fake: Fake) -> None:
    (home / "spool").write_text("a file")
    with make(home) as meter:
        meter.record()
        assert meter.flush()
    assert len(fake.events) == 1


def test_a_spool_that_can_be_made_later_is_taken_then(home: Path, fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(senders, "ADOPT_EVERY_S", 0.02)
    (home / "spool").write_text("a file")
    fake.handle = lambda events: None
    with make(home) as meter:
        meter.record(task_id="in memory")
        (home / "spool").unlink()
        until(lambda: meter._spool is not None)
        meter.record(task_id="on disk")
        assert (meter.flush(0.0), meter.stats().pending) == (False, 2)
        fake.handle = lambda events: refused("invalid") if events[0]["task_id"] == "on disk" else taken(events)
        assert meter.flush()
        assert meter.stats().lost == 0
    assert "on disk" in (home / "spool" / "refused.ndjson").read_text()
    assert (home / "spool" / "1" / "source").exists()


def test_of_a_spool_that_cannot_be_opened_the_log_says_what_is_not_sent(
    home: Path, fake: Fake, caplog: pytest.LogCaptureFixture
) -> None:
    for number in ("1", "2"):
        left = Spool(home / "spool" / number, 10**6, None)
        left.append(Kind.USAGE, {"id": f"in {number}"})
        left.close()
    (home / "spool" / "1" / "source").unlink()
    (home / "spool" / "1" / "source.new").mkdir()
    with make(home) as meter:
        until(lambda: any(f"{home}/spool/1 is not sent" in record.message for record in caplog.records))
        assert meter.flush()
    assert [event["id"] for event in fake.events] == ["in 2"]


def test_while_the_disk_refuses_events_wait_in_memory_and_leave_no_gap(
    home: Path, fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(fd: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    def tear(fd: int, data: bytes) -> int:
        return write(fd, data[:5])

    write = os.write
    with make(home) as meter:
        meter.record(task_id="before")
        for broken in (refuse, tear):
            with monkeypatch.context() as patch:
                patch.setattr("asapd.client.spool.os.write", broken)
                meter.record(task_id="during")
        meter.record(task_id="after")
        assert meter.flush()
        assert meter.stats().lost == 0
    seen = {(event["task_id"], event["seq"]) for event in fake.events}
    assert seen == {("before", 1), ("during", 1), ("during", 2), ("after", 2)}


def test_a_full_spool_refuses_new_events_counts_them_and_leaves_a_gap(home: Path) -> None:
    with make(home, spool_bytes=1000) as meter:
        given = [meter.record(task_id=str(number)) for number in range(10)]
        kept = [event_id for event_id in given if event_id is not None]
        assert 0 < len(kept) < 10
        assert given[: len(kept)] == kept
        stats = meter.stats()
        assert (stats.recorded, stats.lost, stats.pending) == (len(kept), 10 - len(kept), len(kept))
        with Fake(home / "ingest.sock") as fake:
            assert meter.flush()
            assert meter.record(task_id="later") is not None
            assert meter.flush()
            assert fake.events[-1]["seq"] == 11


def test_many_threads_lose_and_double_nothing(home: Path, fake: Fake) -> None:
    with make(home, batch_age_s=0.01) as meter:
        threads = [threading.Thread(target=lambda: [meter.record(tokens_in=1) for _ in range(300)]) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert meter.flush()
    assert sorted(event["seq"] for event in fake.events) == list(range(1, 1201))
    assert len({event["id"] for event in fake.events}) == 1200


@pytest.mark.parametrize("lock", ["_lock", "_spool._lock", "_memory._lock", "_sender._changed", "counters._lock"])
def test_what_a_finalizer_records_inside_a_lock_of_the_meter_comes_after_it(home: Path, fake: Fake, lock: str) -> None:
    """A collection of garbage and a signal come anywhere: where they are, the thread holds what recording takes."""
    meter = make(home)

    @meter.task(task_id="left halfway")
    async def numbers() -> AsyncIterator[int]:
        yield 1

    def collect() -> None:
        left: Any = numbers()
        with contextlib.suppress(StopIteration):
            left.asend(None).send(None)
        meter.record(task_id="before")
        with operator.attrgetter(lock)(meter):
            del left
            meter.settle("res_1")
            meter.record(tokens_in=-1)
            flushed.append(meter.flush(0.0))
        meter.record(task_id="after")
        flushed.append(meter.flush())

    flushed: list[bool] = []
    fake.http = lambda *request: (200, {})
    thread = threading.Thread(target=collect, daemon=True)
    thread.start()
    thread.join(PATIENCE_S)
    assert not thread.is_alive()
    assert [event["task_id"] for event in fake.events] == ["before", "left halfway", "after"]
    assert fake.log.index("/reservations/res_1/settle") > 0
    assert flushed == [False, True]
    assert (meter.stats().recorded, meter.stats().misused, meter.stats().lost) == (3, 1, 0)
    meter.close()


def test_a_handler_that_closes_the_meter_inside_its_lock_leaves_that_to_the_exit(
    home: Path, fake: Fake, caplog: pytest.LogCaptureFixture
) -> None:
    with make(home) as meter:
        assert meter._spool is not None
        with meter._spool._lock:
            meter.close()
        assert "which is closed at the exit instead" in caplog.text
        assert meter.record() is not None
    assert len(fake.events) == 1


@pytest.mark.parametrize("strange", ["\u00e9", "r" * 129, "../status", "", None, 5])
def test_what_can_be_no_reservation_is_misused_and_stops_nothing(home: Path, fake: Fake, strange: Any) -> None:
    fake.http = lambda path, headers, body: (200, {})
    with make(home) as meter:
        meter.settle(strange)
        meter.record()
        meter.settle("res_1")
        assert meter.flush()
        assert (meter.stats().misused, meter.stats().sent) == (1, 1)
    assert [path for path, _, _ in fake.requests] == ["/reservations/res_1/settle"]


def test_a_closed_meter_loses_what_comes_and_says_so(home: Path, fake: Fake) -> None:
    meter = make(home)
    meter.close()
    meter.close()
    assert meter.record() is None
    meter.settle("res_1")
    assert meter.flush() is True
    assert meter.stats().lost == 2


def test_a_closed_meter_says_whether_the_daemon_has_everything(home: Path) -> None:
    meter = make(home)
    meter.record()
    meter.close(0.0)
    assert meter.flush() is False
    assert meter.stats().pending == 1
    with Fake(home / "ingest.sock"):
        meter = make(home)
        meter.close(60)
        assert meter.flush() is True


def test_what_is_lost_when_closing_is_counted_though_the_thread_has_not_ended(home: Path, fake: Fake) -> None:
    """And what got through after all, before the thread ended, was not lost."""
    hold, aborted = threading.Event(), threading.Event()
    fake.handle = lambda events: taken(events) if hold.wait(20) else None
    meter = make(home, spool=False)
    meter.record()
    until(lambda: fake.batches)
    # As if aborting took long: the answer comes before.
    meter._link.abort = aborted.set  # type: ignore[method-assign] -- the race, made sure of
    meter.close(0.0)
    assert aborted.is_set()
    assert meter.stats().lost == 1
    hold.set()
    until(lambda: meter.stats().lost == 0)
    assert (meter.stats().sent, meter.stats().pending) == (1, 0)
    assert meter.flush() is True


def test_what_an_interrupt_left_of_closing_is_done_at_the_exit(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while close() waits, or a handler that ends the program."""
    meter = make(home, spool=False)
    meter.record()
    sender = meter._sender
    assert sender is not None

    def interrupted(timeout_s: float) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(sender._thread, "join", interrupted)
        with pytest.raises(KeyboardInterrupt):
            meter.close(60)
    monkeypatch.setattr(meters, "EXIT_S", 0.0)
    meters._at_exit()
    assert meter.stats().lost == 1
    meter.close()
    assert meter.stats().lost == 1


def test_a_finalizer_of_the_thread_that_sends_leaves_the_end_of_closing_to_the_exit(home: Path, fake: Fake) -> None:
    meter = make(home, spool=False)
    sender, report = meter._sender, meter._link.report
    assert sender is not None
    closed, go = threading.Event(), threading.Event()

    def report_and_close(events: Any) -> Any:
        meter.close(60)
        closed.set()
        assert go.wait(PATIENCE_S)
        return report(events)

    meter._link.report = report_and_close  # type: ignore[method-assign] -- as garbage is collected anywhere
    meter.record()
    assert closed.wait(PATIENCE_S)
    assert sender.is_alive
    go.set()
    meter.close(60)
    assert not sender.is_alive
    assert (meter.stats().sent, meter.stats().lost) == (1, 0)


def test_one_thread_closes_at_a_time(home: Path) -> None:
    meter = make(home, spool=False)
    meter.record()
    sender = meter._sender
    assert sender is not None
    other = threading.Thread(target=lambda: meter.close(60))
    other.start()
    until(lambda: sender._closing_at_s is not None)
    meter.close(0)  # which does not cut short what is sent there
    assert meter.stats().lost == 0
    with Fake(home / "ingest.sock"):
        other.join()
    assert meter.stats().sent == 1


def test_a_time_that_is_no_number_is_none(home: Path) -> None:
    meter = make(home)
    meter.record()
    assert meter.flush(float("nan")) is False
    meter.close(float("nan"))
    assert meter._sender is not None
    until(lambda: not meter._sender.is_alive)
    assert meter.stats().pending == 1


def test_a_host_without_threads_keeps_the_events(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(meters, "Sender", refuse)
        meter = make(home)
        assert meter.record(task_id="t") is not None
        assert meter.flush() is False
        meter.close()
        meter = make(home, spool=False)
        assert meter.record(task_id="t") is not None
        meter.close()
        assert meter.stats().lost == 1
    left = Spool(home / "spool" / "1", 10**6, None)
    assert left.count == 1
    left.close()


def test_what_is_recorded_while_the_thread_is_started_does_not_wait_for_it(
    home: Path, fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new thread itself may run a finalizer that records, before it has begun and while its start is waited for."""

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    def record_and_start(thread: threading.Thread) -> None:
        if thread.name == "asapd-meter":
            other = threading.Thread(target=lambda: meter.record(task_id="meanwhile"), daemon=True)
            start(other)
            other.join(PATIENCE_S)
            waits.append(other.is_alive())
        start(thread)

    waits: list[bool] = []
    start = threading.Thread.start
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        meter = make(home)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", record_and_start)
        meter.record(task_id="first")
    assert waits == [False]
    assert meter.flush()
    assert {event["task_id"] for event in fake.events} == {"first", "meanwhile"}
    meter.close()


def test_an_interrupt_while_the_thread_is_started_leaves_it_to_be_started(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    for interrupt in everywhere(meters):
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", refuse)
            meter = make(home, spool=False)
        interrupt(meter._open)
        sender = meter._open()
        assert sender is not None
        assert sender.is_alive
        meter.close(0)


def test_a_thread_whose_start_was_interrupted_is_the_one_that_sends(
    home: Path, fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start_and_interrupt(thread: threading.Thread) -> None:
        start(thread)
        if thread.name == "asapd-meter":
            started.append(thread)
            if len(started) == 1:
                raise KeyboardInterrupt

    started: list[threading.Thread] = []
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        meter = make(home)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start_and_interrupt)
        with pytest.raises(KeyboardInterrupt):
            meter.record(task_id="interrupted")
        meter.record(task_id="next")
    assert len(started) == 1
    assert meter.flush()
    assert [event["task_id"] for event in fake.events] == ["next"]
    meter.close()


def test_a_forked_child_reports_by_itself(home: Path, fake: Fake) -> None:
    """Child and parent have a source each, and neither sends what the other recorded."""
    script = """
import os, sys
from asapd.client import Meter
meter = Meter(sys.argv[1], agent="urn:asap:agent:w", consumer="urn:asap:agent:c", spool=sys.argv[2])
meter.record(task_id="before")
assert meter.flush()
child = os.fork()
meter.record(task_id="parent" if child else "child")
assert meter.flush()
assert meter.stats().recorded == (2 if child else 1)
if child:
    assert os.waitpid(child, 0)[1] == 0
    meter.record(task_id="after")
"""
    arguments = [sys.executable, "-W", "error", "-c", script, home / "ingest.sock", home / "spool"]
    outcome = subprocess.run(arguments, capture_output=True, text=True, timeout=20, check=False)
    assert (outcome.returncode, outcome.stderr) == (0, "")
    until(lambda: len(fake.events) == 4)
    sources: dict[str, list[tuple[str, int]]] = {}
    for event in fake.events:
        sources.setdefault(event["source"], []).append((event["task_id"], event["seq"]))
    assert sorted(sources.values()) == [[("before", 1), ("parent", 2), ("after", 3)], [("child", 1)]]


def test_what_is_recorded_while_a_child_comes_to_be_is_the_childs(home: Path, fake: Fake) -> None:
    """A finalizer may run there, before the meter was told of the fork: what it has is the parent's yet."""
    script = """
import os, sys
hooks = []
os.register_at_fork(after_in_child=lambda: [hook() for hook in hooks])
from asapd.client import Meter
meter = Meter(sys.argv[1], agent="urn:asap:agent:w", consumer="urn:asap:agent:c", spool=sys.argv[2])
meter.record(task_id="before")
assert meter.flush()
with meter._spool._lock:
    meter.record(task_id="late")
    hooks.append(lambda: meter.record(task_id="child"))
    child = os.fork()
if not child:
    assert meter.flush()
    assert meter.stats().recorded == 1
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
meter.record(task_id="parent")
"""
    arguments = [sys.executable, "-W", "error", "-c", script, home / "ingest.sock", home / "spool"]
    outcome = subprocess.run(arguments, capture_output=True, text=True, timeout=20, check=False)
    assert (outcome.returncode, outcome.stderr) == (0, "")
    sources: dict[str, list[tuple[str, int]]] = {}
    for event in fake.events:
        sources.setdefault(event["source"], []).append((event["task_id"], event["seq"]))
    assert sorted(sources.values()) == [[("before", 1), ("late", 2), ("parent", 3)], [("child", 1)]]


def test_a_child_that_a_server_written_in_c_forked_reports_by_itself(home: Path, fake: Fake) -> None:
    """It calls none of Python's hooks, as uWSGI without `py-call-osafterfork`."""
    script = """
import ctypes, os, sys
from asapd.client import Meter
meter = Meter(sys.argv[1], agent="urn:asap:agent:w", consumer="urn:asap:agent:c", spool=sys.argv[2])
meter.record(task_id="before")
assert meter.flush()
child = ctypes.PyDLL(None).fork()
assert meter.record(task_id="parent" if child else "child")
assert meter.flush()
if not child:
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
"""
    arguments = [sys.executable, "-W", "error", "-c", script, home / "ingest.sock", home / "spool"]
    outcome = subprocess.run(arguments, capture_output=True, text=True, timeout=20, check=False)
    assert (outcome.returncode, outcome.stderr) == (0, "")
    until(lambda: len(fake.events) == 3)
    sources = {event["task_id"]: event["source"] for event in fake.events}
    assert sources["parent"] == sources["before"] != sources["child"]


# Before each of the scripts: a fork of which Python's hooks hear nothing. The parent has no thread of the meter: one
# that wants the lock of the interpreter just then leaves the child's threads waiting for it, whatever the meter does.
FORK_IN_C = """
import ctypes, logging, os, sys, threading
from asapd.client import Allowed, Denied, Meter
from asapd.client.sender import Sender
logging.getLogger("asapd.client").addHandler(logging.NullHandler())
start, Sender.start = Sender.start, None
meter = Meter(sys.argv[1], agent="urn:asap:agent:w", consumer="urn:asap:agent:c", spool=sys.argv[2])
def fork():
    child = ctypes.PyDLL(None).fork()
    if not child:
        Sender.start = start
    return child
def end(child):
    if not child:
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
"""


def run(home: Path, script: str) -> None:
    arguments = [sys.executable, "-W", "error", "-c", FORK_IN_C + script, home / "ingest.sock", home / "spool"]
    outcome = subprocess.run(arguments, capture_output=True, text=True, timeout=20, check=False)
    assert (outcome.returncode, outcome.stderr) == (0, "")


def test_a_child_that_c_forked_asks_on_connections_of_its_own(home: Path, fake: Fake) -> None:
    """On one that it shares with its parent each would get the other's answers."""

    def judge(path: str, headers: dict[str, str], body: Any) -> tuple[int, dict[str, Any]]:
        if body["delegation"] == "bad":
            return 403, {"decision": "deny", "code": "revoked"}
        return 200, ALLOWED

    fake.http = judge
    script = """
from asapd.client import meter as meters
assert isinstance(meter.authorize("good", task_id="t"), Allowed)
shared, = [connection.sock.fileno() for _, connection in meter._requests._idle]
inode = os.fstat(shared).st_ino
child = fork()
if not child:
    meters._pid = os.getpid()  # as if another meter's call had come between: the requests look for themselves
    assert isinstance(meter.authorize("bad", task_id="t"), Denied)
    (_, connection), = meter._requests._idle
    assert os.fstat(connection.sock.fileno()).st_ino != inode
    end(child)
assert os.waitpid(child, 0)[1] == 0
assert isinstance(meter.authorize("good", task_id="t"), Allowed)
(_, connection), = meter._requests._idle
assert os.fstat(connection.sock.fileno()).st_ino == inode
"""
    run(home, script)


@pytest.mark.parametrize(
    "call",
    [
        "meter.authorize('good', task_id='t')",
        "meter.stats()",
        "meter.task()",
        "meter.settle('')",
        "meter.flush()",
        "Meter(sys.argv[1], spool=sys.argv[2])",
    ],
)
def test_whatever_a_child_that_c_forked_calls_first_finds_a_meter_of_its_own(home: Path, fake: Fake, call: str) -> None:
    fake.http = lambda path, headers, body: (200, ALLOWED)
    script = f"""
meter.record(task_id="before")
requests = meter._requests
meter.counters._lock.acquire()  # as by another thread, which is not in the child
child = fork()
if not child:
    threading.Thread(target=lambda: {call}).start()
    while meter._requests is requests:
        pass
    assert meter.stats().recorded == 0
    end(child)
meter.counters._lock.release()
end(child)
"""
    run(home, script)


def test_threads_of_a_child_that_c_forked_make_one_meter_of_it(home: Path, fake: Fake) -> None:
    """Else the second throws away what the first has taken in."""
    script = """
from asapd.client import spool
forget, times = spool.forget_in_child, []
def slow():
    times.append(1)
    if len(times) == 1:
        meter.record(task_id="between")  # as a finalizer does
        assert not meter.flush()
        other.start()
        while not waits():
            pass
    forget()
def waits():
    frames = sys._current_frames().get(other.ident)
    return frames is not None and frames.f_code.co_name == "_follow_fork"
other = threading.Thread(target=lambda: meter.record(task_id="second"))
meter._root = None
spool.forget_in_child = slow
child = fork()
if not child:
    meter.record(task_id="first")
    other.join()
    assert times == [1]
    assert meter.flush()
    assert meter.stats().recorded == 3
end(child)
"""
    run(home, script)
    assert sorted(event["task_id"] for event in fake.events) == ["between", "first", "second"]


@pytest.mark.parametrize("way", ["fork", "forkserver"])
def test_a_process_of_multiprocessing_sends_at_its_end_what_it_has_in_memory(home: Path, fake: Fake, way: str) -> None:
    program = home / "program.py"
    program.write_text("""
import multiprocessing, sys
from asapd.client import Meter
def work(address):
    meter = Meter(address, agent="urn:asap:agent:w", consumer="urn:asap:agent:c", spool=False, batch_age_s=60)
    meter.record(task_id="one")
    inherited.record(task_id="two") if inherited else None
if __name__ == "__main__":
    way, address = sys.argv[1:]
    inherited = None
    if way == "fork":
        inherited = Meter(address, agent="urn:asap:agent:w", consumer="urn:asap:agent:c", spool=False, batch_age_s=60)
    child = multiprocessing.get_context(way).Process(target=work, args=(address,))
    child.start()
    child.join()
    assert child.exitcode == 0
else:
    inherited = None
""")
    subprocess.run([sys.executable, program, way, home / "ingest.sock"], timeout=20, check=True)
    assert {event["task_id"] for event in fake.events} == ({"one", "two"} if way == "fork" else {"one"})


@pytest.mark.parametrize("way", ["fork", "forkserver"])
def test_a_process_of_multiprocessing_sends_what_a_meter_of_its_program_has_in_memory(
    home: Path, fake: Fake, way: str
) -> None:
    """It is made, or begins to send after a fork, before multiprocessing says that this is such a process."""
    program = home / "program.py"
    program.write_text("""
import multiprocessing, os, sys
from asapd.client import Meter
meter = Meter(sys.argv[2], agent="urn:asap:agent:w", consumer="urn:asap:agent:c", spool=False, batch_age_s=60)
os.register_at_fork(after_in_child=lambda: meter.flush(0))
def work():
    meter.record(task_id="one")
if __name__ == "__main__":
    child = multiprocessing.get_context(sys.argv[1]).Process(target=work)
    child.start()
    child.join()
    assert child.exitcode == 0
""")
    subprocess.run([sys.executable, program, way, home / "ingest.sock"], timeout=20, check=True)
    assert [event["task_id"] for event in fake.events] == ["one"]


def test_a_time_that_no_clock_has_is_a_long_one(home: Path, fake: Fake, caplog: pytest.LogCaptureFixture) -> None:
    meter = make(home, batch_age_s=float("inf"))
    sender = meter._sender
    assert sender is not None
    meter.record()
    assert not meter.flush(0)
    until(lambda: meter.stats().sent == 1)  # what flush() hurries
    meter.record()
    assert meter.flush(float("inf"))
    assert meter._sender is sender
    meter.close(1e10)
    assert not sender.is_alive
    assert not caplog.records


def test_a_spool_that_another_thread_took_meanwhile_is_sent_as_well(home: Path, fake: Fake) -> None:
    with Meter(home / "ingest.sock", agent=AGENT, consumer=CONSUMER, spool=home / "spool") as meter:
        assert meter.flush()
        sender = meter._sender
        assert sender is not None
        with sender._changed:  # as a sender that was made before the spool could be taken
            sender._work.queues.pop(0)
            sender._work.own -= 1
        meter.record(task_id="t")
        sender._adopted_at_s = float("-inf")
        sender.appended()
        until(lambda: len(fake.events) == 1)
        assert len(sender._work.queues) == 2


def test_a_forked_child_does_not_hold_what_its_parent_adopted(home: Path) -> None:
    """Else what waits there could be sent by nobody for as long as the child lives."""
    script = """
import os, pathlib, sys, time
from asapd.client import Meter
from asapd.client.spool import Spool
root = pathlib.Path(sys.argv[2])
meter = Meter(sys.argv[1], spool=root)
while meter.stats().pending < 2:
    time.sleep(0.005)
ready, go = os.pipe(), os.pipe()
child = os.fork()
if not child:
    os.close(go[1])
    os.write(ready[1], b"x")
    os.read(go[0], 1)
    os._exit(0)
os.read(ready[0], 1)
meter.close(0)
left = None
while left is None:
    assert os.waitpid(child, os.WNOHANG) == (0, 0)
    if meter._sender.is_alive:
        time.sleep(0.005)
    else:
        left = Spool(root / "7", 10**6, None)
os.write(go[1], b"x")
os.waitpid(child, 0)
"""
    for number in ("1", "7"):
        left = Spool(home / "spool" / number, 10**6, None)
        left.append(Kind.USAGE, {"id": number})
        left.close()
    arguments = [sys.executable, "-W", "error", "-c", script, home / "ingest.sock", home / "spool"]
    outcome = subprocess.run(arguments, capture_output=True, text=True, timeout=60, check=False)
    assert outcome.returncode == 0, outcome.stderr


def test_a_killed_program_loses_nothing_that_it_recorded(home: Path) -> None:
    script = """
import os, signal, sys
from asapd.client import Meter
meter = Meter(sys.argv[1], agent="urn:asap:agent:w", consumer="urn:asap:agent:c", spool=sys.argv[2])
print(*[meter.record(task_id=str(number)) for number in range(100)], flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    arguments = [sys.executable, "-c", script, home / "ingest.sock", home / "spool"]
    given = subprocess.run(arguments, stdout=subprocess.PIPE, text=True, timeout=60, check=False).stdout.split()
    with Fake(home / "ingest.sock") as fake, make(home) as meter:
        assert meter.flush()
        assert [event["id"] for event in fake.events] == given


# --- delegations

ALLOWED = {
    "decision": "allow",
    "delegation": "del_1",
    "reservation": {"id": "res_1", "expires_at": "2026-11-20T09:00:01Z"},
    "remaining": {"cost_usd": 1, "tasks": 2},
}
DENIED = {"decision": "deny", "code": "revoked", "reason": "it was revoked", "detail": "it was revoked"}


def test_an_authorisation_is_a_clear_yes_a_clear_no_or_none(home: Path, fake: Fake) -> None:
    answers: list[tuple[int, dict[str, Any]] | None] = [
        (200, ALLOWED),
        (403, DENIED),
        (403, {"code": "forbidden", "detail": "not you"}),
        (200, {"decision": "allow"}),
        (500, {}),
        None,
    ]
    fake.http = lambda path, headers, body: answers.pop(0) if answers else None
    with make(home) as meter:
        allowed = meter.authorize("job.42", task_id="t", estimate={"cost_usd": 0.1, "tokens": 5}, ttl_s=60)
        assert allowed == Allowed("del_1", "res_1", "2026-11-20T09:00:01Z", ALLOWED["remaining"])
        assert meter.authorize("a.b.c", task_id="t", project="p", action="task.read") == Denied(
            "revoked", "it was revoked", DENIED
        )
        for _ in range(4):
            assert isinstance(meter.authorize("{}", task_id="t"), Unavailable)
    first, second = fake.requests[0][2], fake.requests[1][2]
    assert first == {
        "delegation": "job.42",
        "action": "task.execute",
        "task_id": "t",
        "estimate": {"cost_usd": "0.1", "tokens": 5},
        "delegate": AGENT,
        "consumer": CONSUMER,
        "ttl_seconds": 60,
    }
    assert (second["token"], second["action"], second["project"]) == ("a.b.c", "task.read", "p")
    keys = [headers["idempotency-key"] for _, headers, _ in fake.requests]
    assert keys[0] != keys[1]


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (400, "malformed"),
        (404, "delegation_not_found"),
        (409, "conflict"),
        (413, "too_large"),
        (422, "missing_estimate"),
    ],
)
def test_a_question_that_is_refused_for_good_is_denied(home: Path, fake: Fake, status: int, code: str) -> None:
    problem = {"code": code, "detail": "give one"}
    fake.http = lambda path, headers, body: (status, problem)
    with make(home) as meter:
        denied = meter.authorize("{}", task_id="t")
        assert denied == Denied(code, "give one", problem)
        assert isinstance(denied, Denied)
        assert not denied.is_decided


@pytest.mark.parametrize("status", [401, 408, 429, 503])
def test_a_question_that_may_be_answered_another_time_is_not_denied(home: Path, fake: Fake, status: int) -> None:
    fake.http = lambda path, headers, body: (status, {"code": "some", "detail": "not now"})
    with make(home) as meter:
        assert isinstance(meter.authorize("{}", task_id="t"), Unavailable)
    fake.http = lambda path, headers, body: (404, {})  # whoever that is, it is not asapd
    with make(home) as meter:
        assert isinstance(meter.authorize("{}", task_id="t"), Unavailable)


@pytest.mark.parametrize("cost", ["much", -1])
def test_an_estimate_that_is_none_is_denied_without_asking(home: Path, fake: Fake, cost: Any) -> None:
    with make(home) as meter:
        denied = meter.authorize("{}", task_id="t", estimate={"cost_usd": cost})
        assert isinstance(denied, Denied)
        assert (denied.code, str(cost) in denied.reason) == ("invalid", True)
        assert meter.stats().misused == 1
    assert fake.requests == []


def test_a_connection_that_was_closed_meanwhile_is_made_anew(home: Path) -> None:
    with make(home) as meter:
        for _ in range(2):
            with Fake(home / "ingest.sock", http=lambda path, headers, body: (200, ALLOWED)) as fake:
                assert isinstance(meter.authorize("del_1", task_id="t"), Allowed)
                assert isinstance(meter.authorize("del_1", task_id="t"), Allowed)
                assert len(fake.requests) == 2
            (home / "ingest.sock").unlink()
