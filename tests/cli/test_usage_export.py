"""`asapctl usage export` and `asapctl retention` against a daemon that runs."""

from __future__ import annotations

import csv
import http.client
import json
import socket
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from asapd.cli.door import Door
from asapd.cli.outcome import Exit, Failure
from tests.cli.programs import Daemon, Program


def report(daemon: Daemon, agent: str, count: int) -> None:
    event: dict[str, Any] = {
        "agent": agent,
        "consumer": "urn:asap:agent:desk",
        "task_id": "=cmd()",
        "metrics": {"tokens_in": 1, "tokens_out": 0, "duration_ms": 1, "api_calls": 1},
        "timestamp": datetime.now(UTC).isoformat(),
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


def test_retention_says_what_would_go_and_goes(daemon: Daemon, ctl: Program) -> None:
    would = ctl("retention", "--dry-run", "--json")
    assert (would.code, would.json["dry_run"], would.json["usage"]["count"]) == (Exit.DONE, True, 0)
    ran = ctl("retention")
    assert ran.code == Exit.DONE
    assert ran.out.splitlines()[0].split() == ["RECORDS", "FROM", "BEFORE", "WENT"]


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
