"""`asapctl usage export` and `asapctl retention` against a daemon that runs."""

from __future__ import annotations

import csv
import http.client
import json
import socket
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self
from uuid import uuid4

import pytest

from asapd.cli import usage_download
from asapd.cli.door import Door
from asapd.cli.outcome import Exit, Failure
from tests.cli.programs import Daemon, Program


def report(daemon: Daemon, agent: str, count: int, error: str | None = None) -> None:
    event: dict[str, Any] = {
        "agent": agent,
        "consumer": "urn:asap:agent:desk",
        "task_id": "=cmd()",
        "metrics": {"tokens_in": 1, "tokens_out": 0, "duration_ms": 1, "api_calls": 1},
        "timestamp": datetime.now(UTC).isoformat(),
        **({} if error is None else {"outcome": "failed", "error": error}),
    }
    Door(daemon.socket).post("/usage", {"events": [{**event, "id": uuid4().hex} for _ in range(count)]})


def test_an_export_is_written_as_a_whole_in_each_format(daemon: Daemon, ctl: Program, tmp_path: Path) -> None:
    agent = f"urn:asap:agent:{uuid4().hex[:12]}"
    report(daemon, agent, 3)
    lines = ctl("usage", "export", "--agent", agent)
    assert (lines.code, len(lines.out.splitlines())) == (Exit.DONE, 3)
    assert ctl("usage", "export", "--agent", agent, "--json").json["count"] == 3
    out = tmp_path / "usage.csv"
    ran = ctl("usage", "export", "--agent", agent, "--format", "csv", "--out", str(out))
    assert (ran.code, ran.out, "all up to row" in ran.err) == (Exit.DONE, "", True)
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["task_id"] for row in rows] == ["'=cmd()"] * 3
    assert [row["seq"] for row in rows] == [str(json.loads(line)["seq"]) for line in lines.out.splitlines()]
    assert ctl("usage", "report", "--agent", agent, "--period", "day", "--timezone", "Mars/Base").code == Exit.USAGE


class Cutting:
    """A socket before the daemon's that ends each connection behind so many bytes of its answer, and then none.

    With `last` it answers that then.
    """

    def __init__(self, daemon: Daemon, path: Path, cuts: list[int], last: bytes | None = None) -> None:
        self._last = last
        self._daemon = daemon
        self._cuts = cuts
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self.asked: list[str] = []
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()

    def _run(self) -> None:
        for most in [*self._cuts, None]:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return  # nobody comes any more
            left = 2**40 if most is None else most
            with client, socket.socket(socket.AF_UNIX) as upstream:
                asked = client.recv(65536)
                self.asked.append(asked.split(b" ")[1].decode())
                if most is None and self._last is not None:
                    client.sendall(self._last)
                    return
                upstream.connect(str(self._daemon.socket))
                upstream.sendall(asked.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n", 1))
                while left > 0 and (part := upstream.recv(65536)):
                    client.sendall(part[:left])
                    left -= len(part)


@pytest.mark.parametrize("form", ["ndjson", "csv"])
def test_an_export_goes_on_where_it_was_cut_off(
    form: str, daemon: Daemon, ctl: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Byte for byte as in one go, wherever the cut is: in the headers, a header line, a cell of two lines, a row."""
    monkeypatch.setattr(usage_download, "_PAUSE_S", 0.0)
    agent = f"urn:asap:agent:{uuid4().hex[:12]}"
    report(daemon, agent, 700, 'a "b"\r\n77,c')
    _, parts = Door(daemon.socket).download("/usage/export", agent=agent, format=form)
    plain = b"".join(parts)
    out = tmp_path / "usage.out"
    with Cutting(daemon, tmp_path / "cut.sock", [1_000, 1_800, 9_973, 40_001, 100]) as cutting:
        asked = ["--agent", agent, "--format", form, "--out", str(out), "--socket", str(tmp_path / "cut.sock")]
        ran = ctl("usage", "export", *asked)
    assert ran.code == Exit.DONE, ran.err
    assert out.read_bytes() == plain
    assert len(cutting.asked) == 6
    assert "after=" in cutting.asked[-1]
    assert ran.err.count("going on from there") == 4


def test_json_is_asked_for_again_by_who_wants_it(daemon: Daemon, ctl: Program, tmp_path: Path) -> None:
    report(daemon, "urn:asap:agent:cut", 50)
    out = tmp_path / "usage.json"
    with Cutting(daemon, tmp_path / "cut.sock", [2_000]) as cutting:
        asked = ["--format", "json", "--out", str(out), "--socket", str(tmp_path / "cut.sock")]
        ran = ctl("usage", "export", *asked)
    assert (ran.code, "cut off: nothing was written, ask again" in ran.err) == (Exit.UNREACHABLE, True)
    assert list(tmp_path.glob("*usage*")) == []
    assert len(cutting.asked) == 1


@pytest.mark.parametrize(
    ("head", "body", "code", "said"),
    [
        ("400 Bad Request", b'{"code":"bad_parameter","detail":"that row is gone"}', Exit.USAGE, "that row is gone"),
        ("200 OK\r\nAsapd-Snapshot: 1", b"", Exit.UNREACHABLE, "no longer has rows that it had"),
    ],
)
def test_an_export_that_would_have_a_hole_is_not_gone_on_with(
    head: str, body: bytes, code: Exit, said: str, daemon: Daemon, ctl: Program, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(usage_download, "_PAUSE_S", 0.0)
    report(daemon, "urn:asap:agent:cut", 50)
    out = tmp_path / "usage.ndjson"
    last = f"HTTP/1.1 {head}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
    with Cutting(daemon, tmp_path / "cut.sock", [6_000], last):
        ran = ctl("usage", "export", "--out", str(out), "--socket", str(tmp_path / "cut.sock"))
    assert (ran.code, said in ran.err) == (code, True)
    assert list(tmp_path.glob("*usage*")) == []


def test_an_export_that_cannot_go_on_is_given_up(
    daemon: Daemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report(daemon, "urn:asap:agent:cut", 50)
    monkeypatch.setattr(usage_download, "PATIENCE_S", -1.0)
    with Cutting(daemon, tmp_path / "cut.sock", [6_000]) as cutting:
        _, parts = usage_download.download(Door(tmp_path / "cut.sock"), "csv", {})
        assert next(parts).startswith(b"seq,")
        with pytest.raises(Failure, match="cut off"):
            list(parts)
    assert len(cutting.asked) == 1


def test_retention_says_what_would_go_and_goes(daemon: Daemon, ctl: Program) -> None:
    would = ctl("retention", "--dry-run", "--json")
    assert (would.code, would.json["dry_run"], would.json["usage"]["count"]) == (Exit.DONE, True, 0)
    ran = ctl("retention")
    assert ran.code == Exit.DONE
    assert ran.out.splitlines()[0].split() == ["RECORDS", "FROM", "BEFORE", "WENT"]


def answer(status: bytes, told: dict[str, Any]) -> bytes:
    body = json.dumps(told).encode()
    head = b"HTTP/1.1 %s\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % (status, len(body))
    return head + body


def went(day: int, count: int, first: int | None, more: bool) -> bytes:
    """What one request took: so much of each kind, usage and entries from a row on."""
    gone = {"before": f"2026-01-0{day}T00:00:00.000000Z", "count": count}
    times = (
        {"oldest": None, "newest": None} if first is None else {"oldest": f"2025-{first}", "newest": f"2025-{first}"}
    )
    usage = {**gone, **times, "kept": 10 - day, "first_row": first, "last_row": first}
    audit = {**gone, **times, "first_seq": first, "last_seq": first}
    told = {"dry_run": False, "usage": usage, "probes": gone, "alerts": gone, "audit": audit, "more": more}
    return answer(b"200 OK", told)


def test_retention_adds_up_what_its_requests_took(ctl: Program, answers: Callable[..., None]) -> None:
    replies = [went(1, 3, 20, True), went(2, 0, None, True), went(3, 4, 11, False)]
    answers(*replies)
    ran = ctl("retention")
    assert [line.split() for line in ran.out.splitlines()[1:]] == [
        ["usage", "2026-01-03T00:00:00.000000Z", "7"],
        ["probes", "2026-01-01T00:00:00.000000Z", "3"],
        ["alerts", "2026-01-03T00:00:00.000000Z", "7"],
        ["audit", "2026-01-03T00:00:00.000000Z", "7"],
    ]
    assert ran.err.startswith("7 events stay")
    answers(*replies)
    told = ctl("retention", "--json").json
    assert (told["more"], told["usage"]["first_row"], told["usage"]["last_row"]) == (False, 11, 20)
    assert (told["audit"]["first_seq"], told["audit"]["oldest"], told["audit"]["newest"]) == (11, "2025-11", "2025-20")


def test_retention_says_what_went_before_a_request_was_refused(ctl: Program, answers: Callable[..., None]) -> None:
    no = answer(b"503 Service Unavailable", {"code": "storage_failed", "detail": "the disk failed", "status": 503})
    answers(went(1, 3, 20, True), no)
    ran = ctl("retention")
    assert ran.code != Exit.DONE
    assert ran.out.splitlines()[1].split() == ["usage", "2026-01-01T00:00:00.000000Z", "3"]
    assert "the disk failed" in ran.err
    answers(went(1, 3, 20, True), no)
    assert ctl("retention", "--json").json["more"] is True
    answers(no)
    assert ctl("retention").out == ""


def test_a_download_that_is_cut_off_fails(tmp_path: Path) -> None:
    path = tmp_path / "half.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def answer() -> None:
            client, _ = listener.accept()
            with client:
                client.recv(4096)
                client.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        _, parts = Door(path).download("/usage/export")
        with pytest.raises(Failure, match="cut off"):
            list(parts)
        thread.join()
    with pytest.raises(Failure):
        Door(path).download("/usage/export")
    assert issubclass(http.client.IncompleteRead, http.client.HTTPException)
