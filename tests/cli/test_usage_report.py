"""`asapctl usage report`: what days are, and what retention leaves of sums."""

from __future__ import annotations

import csv
import io
import shutil
import sys
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from asapd.cli.door import Door
from asapd.cli.options import moment_in
from asapd.cli.outcome import Exit
from asapd.cli.usage import _warn_of_gone
from tests.cli.programs import Daemon, Program, daemon_in

NOW = datetime.now(UTC)
OLD = (NOW - timedelta(days=40)).replace(minute=10, second=0, microsecond=0)
LATE = '[metering]\nlate_max = "60d"\n[retention]\nusage = "60d"\n'


def report(daemon: Daemon, *times: datetime, agent: str = "urn:asap:agent:a") -> None:
    events: list[dict[str, Any]] = [
        {"id": uuid4().hex, "agent": agent, "consumer": "c", "task_id": "t", "timestamp": time.isoformat()}
        for time in times
    ]
    Door(daemon.socket).post("/usage", {"events": events})


def shown(time: datetime) -> str:
    return time.isoformat().replace("+00:00", ".000000Z")


@pytest.fixture(scope="module")
def retired() -> Iterator[Daemon]:
    """A daemon whose retention took two of three events."""
    directory = Path(tempfile.mkdtemp(prefix="asapd-cli-"))
    for daemon in daemon_in(directory, LATE):
        report(daemon, OLD, OLD + timedelta(hours=2), NOW)
        daemon.config.write_text(daemon.config.read_text().replace("60d", "20d"))
        Door(daemon.socket).post("/reload")
        taken = Door(daemon.socket).post("/retention")
        assert taken["usage"]["count"] == 2
        yield daemon
    shutil.rmtree(directory)


@pytest.fixture
def daemon(retired: Daemon, monkeypatch: pytest.MonkeyPatch) -> Daemon:
    monkeypatch.setenv("ASAPD_SOCKET", str(retired.socket))
    return retired


def test_sums_of_whole_hours_are_whole_and_say_nothing(daemon: Daemon, ctl: Program) -> None:
    for arguments in (
        ("--period", "month"),
        ("--period", "day", "--timezone", "Europe/Berlin"),
        ("--by", "agent"),
    ):
        ran = ctl("usage", "report", *arguments, "--json")
        assert sum(row["total_events"] for row in ran.json["data"]) == 3
        assert (ran.json["incomplete"], ran.err) == ([], "")
        assert ran.json["raw_since"] is not None
    hour = OLD.replace(minute=0)
    ran = ctl("usage", "report", "--since", hour.isoformat(), "--until", (hour + timedelta(hours=3)).isoformat())
    assert ran.err.splitlines() == ["2 events have no known cost, which is not in these sums"]


@pytest.mark.parametrize("form", ["table", "csv", "json"])
def test_sums_that_lack_what_retention_took_say_so(daemon: Daemon, ctl: Program, form: str) -> None:
    asked = ("usage", "report", "--period", "hour", "--timezone", "Asia/Kolkata")
    told = ctl(*asked, "--json").json
    assert sum(row["total_events"] for row in told["data"]) == 1
    assert (told["timezone"], told["incomplete"]) == ("Asia/Kolkata", [{"start": None, "end": told["raw_since"]}])
    ran = ctl(*asked, "--format", form)
    warning = ran.err.splitlines()[0]
    assert warning.startswith(f"events from the beginning to {told['raw_since']} are missing in these sums")
    assert "retention" in warning
    assert "Ask for times on the hour" in warning
    if form == "csv":
        assert [row["total_events"] for row in csv.DictReader(io.StringIO(ran.out))] == ["1"]
    since = ctl(*asked, "--since", told["raw_since"], "--json")
    assert (since.json["incomplete"], since.err) == ([], "")


def test_many_stretches_that_are_gone_are_one_warning(capsys: pytest.CaptureFixture[str]) -> None:
    """As of the days of India, each of which begins inside an hour of UTC."""
    hours = [(f"2026-12-0{day}T18:00:00Z", f"2026-12-0{day}T19:00:00Z") for day in range(1, 6)]
    for count, said in (
        (3, [f"events from {start} to {end} are missing" for start, end in hours[:3]]),
        (5, ["events of 5 stretches from 2026-12-01T18:00:00Z to 2026-12-05T19:00:00Z are missing"]),
    ):
        parts = [{"start": start, "end": end} for start, end in hours[:count]]
        _warn_of_gone({"incomplete": parts, "raw_since": "2026-12-09T00:00:00Z"})
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == len(said)
        assert all(line.startswith(start) for line, start in zip(lines, said, strict=True))


def test_a_part_of_an_hour_that_is_gone_is_named(daemon: Daemon, ctl: Program) -> None:
    start, end = OLD - timedelta(minutes=5), OLD + timedelta(minutes=5)
    ran = ctl("usage", "report", "--since", start.isoformat(), "--until", end.isoformat(), "--json")
    assert ran.json["data"] == []
    assert ran.json["incomplete"] == [{"start": shown(start), "end": shown(end)}]
    assert f"events from {shown(start)} to {shown(end)} are missing" in ran.err
    ran = ctl("usage", "report", "--since", start.isoformat(), "--json")
    assert sum(row["total_events"] for row in ran.json["data"]) == 2
    hour = shown(OLD.replace(minute=0) + timedelta(hours=1))
    assert ran.json["incomplete"] == [{"start": shown(start), "end": hour}]


def test_an_export_says_what_retention_took_of_it(daemon: Daemon, ctl: Program) -> None:
    raw_since = ctl("usage", "report", "--json").json["raw_since"]
    for arguments, is_short in (((), True), (("--since", "30d"), True), (("--since", "1d"), False)):
        ran = ctl("usage", "export", *arguments)
        assert len(ran.out.splitlines()) == 1
        assert (f"events from before {raw_since} are not in it" in ran.err) is is_short
        assert is_short or not ran.err


def test_a_day_that_an_export_begins_with_is_one_of_the_zone(daemon: Daemon, ctl: Program) -> None:
    day = f"{NOW + timedelta(hours=14):%Y-%m-%d}"
    for zone, count in (("Pacific/Kiritimati", 1), ("Etc/GMT+12", 0)):  # 26 hours between the first and the last
        assert len(ctl("usage", "export", "--since", day, "--timezone", zone).out.splitlines()) == count
    ran = ctl("usage", "export", "--since", day, "--timezone", "Nowhere")
    assert (ran.code, "--timezone" in ran.err) == (Exit.USAGE, True)


def test_an_export_for_excel_begins_with_its_mark(daemon: Daemon, ctl: Program, tmp_path: Path) -> None:
    file = tmp_path / "usage.csv"
    assert ctl("usage", "export", "--format", "csv", "--bom", "--out", str(file)).code == Exit.DONE
    assert file.read_bytes().startswith(b"\xef\xbb\xbfseq,")
    assert ctl("usage", "export", "--bom").code == Exit.USAGE


@pytest.mark.parametrize(("form", "said"), [("ndjson", "100%"), ("csv", "100%"), ("parquet", "\r0.0 MB\n")])
def test_an_export_to_a_terminal_shows_how_far_it_is(
    form: str, said: str, daemon: Daemon, ctl: Program, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    ran = ctl("usage", "export", "--format", form, "--out", str(tmp_path / "usage"))
    assert (ran.code, said in ran.err) == (Exit.DONE, True), ran.err


@pytest.mark.parametrize(
    ("zone", "day", "begins"),
    [
        ("UTC", "2026-10-25", "2026-10-25T00:00:00.000000Z"),
        ("Europe/Berlin", "2026-10-25", "2026-10-24T22:00:00.000000Z"),
        ("Europe/Berlin", "2026-10-26", "2026-10-25T23:00:00.000000Z"),
        # Clocks are put from midnight to one there, and back from one to midnight.
        ("America/Havana", "2026-03-08", "2026-03-08T05:00:00.000000Z"),
        ("America/Havana", "2026-11-01", "2026-11-01T04:00:00.000000Z"),
        ("Europe/Berlin", "2026-10-25T09:00", "2026-10-25T09:00:00.000000Z"),
    ],
)
def test_a_day_begins_when_its_clocks_say_and_a_time_without_an_offset_is_utc(zone: str, day: str, begins: str) -> None:
    assert moment_in(zone, day) == begins


def test_a_day_is_one_of_the_time_zone(daemon: Daemon, ctl: Program) -> None:
    """It begins and ends by the clocks that tell periods, wherever `--timezone` stands."""
    agent = f"urn:asap:agent:{uuid4().hex[:12]}"
    day = (NOW - timedelta(days=3)).replace(hour=0, minute=0, second=0, microsecond=0)
    report(daemon, *(day + timedelta(hours=hours) for hours in (-6, -4, 18, 20)), agent=agent)
    asked = ("usage", "report", "--agent", agent, "--period", "day", "--json")
    days = ("--since", f"{day:%Y-%m-%d}", "--until", f"{day + timedelta(days=1):%Y-%m-%d}")
    # Five hours before UTC all year.
    for arguments in ((*days, "--timezone", "Asia/Karachi"), ("--timezone", "Asia/Karachi", *days)):
        rows = ctl(*asked, *arguments).json["data"]
        assert [(row["period"], row["total_events"]) for row in rows] == [(f"{day:%Y-%m-%d}", 2)]
    assert [row["total_events"] for row in ctl(*asked, *days).json["data"]] == [2]
    none = ctl(*asked, *days, "--timezone", "Mars/Base")
    assert (none.code, "--timezone" in none.err) == (Exit.USAGE, True)
    assert ctl(*asked, "--since", "2026-02-30").code == Exit.USAGE
    assert "'--since'" in ctl(*asked, "--since", "0001-01-01", "--timezone", "Asia/Karachi").err
